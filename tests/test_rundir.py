"""A run's directory: what is written, what a torn line costs, what a resume cuts."""

import csv
import json
import math
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from app import plots
from app.errors import UserError
from app.records import cumulative, read_rounds, read_summary, series
from app.rundir import RunDir

SUMMARY = {
    "status": "finished",
    "name": "a",
    "strategy": "feddyn",
    "data": "digits",
    "seed": 0,
    "rounds": 2,
    "accuracy": 0.8,
    "best_accuracy": 0.85,
    "best_round": 1,
    "rounds_to": {"0.8": 1, "0.9": None},
    "loss": math.nan,
    "bytes_down": 4_000_000,
    "bytes_up": 2_000_000,
    "gradients": 1234,
    "seconds": 2.0,
    "failures": 1,
    "reported_model": "server",
}


def record(number, **more):
    return {
        "round": number,
        "accuracy": 0.1 * number,
        "models": {"server": {"accuracy": 0.1 * number, "loss": 1.0}},
        "clients": {"cohort": [1, 2], "failed": {7: "NaN in delta"}, "train_loss": 0.5},
        "bytes": {"down": {"model": 10, "state": 1}, "up": {"model": 5}},
        "seconds": {"round": 0.5},
        "gradients": 100,
        **more,
    }


@pytest.fixture
def make(tmp_path):
    opened = []

    def create(name="a", config=None):
        opened.append(RunDir.create(tmp_path, name, config or {"seed": 1}, "", "cpu"))
        return opened[-1]

    yield create
    for run in opened:
        run.close()


def test_names_are_never_shared(make):
    assert [make().path.name for _ in range(3)] == ["a", "a-2", "a-3"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b"])
def test_a_name_is_a_folder_name(tmp_path, name):
    with pytest.raises(UserError, match="plain folder name"):
        RunDir.create(tmp_path, name, {}, "", "cpu")


def test_a_base_that_is_a_file_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot keep runs here"):
        RunDir.create(tmp_path / "file", "a", {}, "", "cpu")


def test_config_and_environment(make, tmp_path):
    run = make(
        config={"seed": 1, "list": (1, 2), "path": tmp_path, "lr": np.float32(2)}
    )
    config = yaml.safe_load((run.path / "config.yaml").read_text())
    assert config == {"seed": 1, "list": [1, 2], "path": str(tmp_path), "lr": 2.0}
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["versions"]["torch"]
    assert environment["machine"]["cores"] >= 1


def test_rounds_reach_the_log_and_tensorboard(make):
    run = make()
    run.round(record(0, loss=math.nan, strategy={"h_norm": np.float32(3)}))
    run.round(record(1, loss=math.inf, checks={"ok": True}))
    run.close()
    first, second = read_rounds(run.path)
    assert first["loss"] is None and second["loss"] is None
    assert first["strategy"] == {"h_norm": 3.0}
    assert first["clients"]["failed"] == {"7": "NaN in delta"}
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"accuracy", "models/server/loss", "bytes/up/model", "checks/ok"} <= tags
    assert not {"round", "loss", "clients/cohort"} & tags
    assert [e.step for e in events.Scalars("accuracy")] == [0, 1]


@pytest.mark.parametrize(
    "torn", [b'{"round": 2, "accu', b'{"round": 2, "s": "\xc3', b"2"]
)
def test_a_torn_last_line_is_left_out(make, torn):
    run = make()
    for number in range(2):
        run.round(record(number))
    with open(run.path / "metrics.jsonl", "ab") as file:
        file.write(torn)
    assert [r["round"] for r in read_rounds(run.path)] == [0, 1]


def test_a_broken_line_in_the_middle_is_told(make):
    run = make()
    (run.path / "metrics.jsonl").write_text('{"round": 0}\n{"rou\n{"round": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        read_rounds(run.path)


def test_reopening_cuts_what_is_run_again(make):
    run = make()
    for number in range(5):
        run.round(record(number))
        run.clients([{"round": number, "client": 3}, {"round": number, "client": 12}])
    run.finish(SUMMARY, {"w": torch.ones(2)})
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"round": 5,')
    with open(run.path / "clients.csv", "a") as file:
        file.write("1,3,0")

    time.sleep(1.1)  # TensorBoard orders its files by the second they were begun in
    again = RunDir.reopen(run.path, 2)
    assert read_summary(run.path) is None
    again.round(record(3, accuracy=0.9))
    again.clients([{"round": 3, "client": 4}])
    again.close()
    assert [r["round"] for r in read_rounds(run.path)] == [0, 1, 2, 3]
    with open(run.path / "clients.csv") as file:
        rows = [(row["round"], row["client"]) for row in csv.DictReader(file)]
    kept = [(str(r), c) for r in range(3) for c in ("3", "12")]
    assert rows == [*kept, ("3", "4")]
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    scalars = [(e.step, round(e.value, 3)) for e in events.Scalars("accuracy")]
    assert scalars == [(0, 0.0), (1, 0.1), (2, 0.2), (3, 0.9)]


def test_reopening_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match="no run directory"):
        RunDir.reopen(tmp_path / "none", 1)


#: Another process, which tries to go on with a run for each line that it is sent.
OTHER = """
import sys
from pathlib import Path
from app.errors import UserError
from app.rundir import RunDir
for _ in sys.stdin:
    try:
        RunDir.reopen(Path(sys.argv[1]), 0).close()
        print("reopened")
    except UserError as error:
        print(error)
"""


def test_one_process_is_at_a_run(make):
    run = make()
    run.round(record(0))
    command = [sys.executable, "-u", "-c", OTHER, str(run.path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdin is not None and other.stdout is not None

        def tries() -> str:
            other.stdin.write("\n")
            other.stdin.flush()
            return other.stdout.readline()

        assert "another process is at this run" in tries()
        assert len(read_rounds(run.path)) == 1
        run.close()
        assert "reopened" in tries()
        # A run that goes on with other settings is held as one that has just begun.
        again = RunDir.reopen(run.path, 0, config={"rounds": 9})
        assert "another process is at this run" in tries()
        again.close()
        assert "reopened" in tries()
        other.stdin.close()
    assert other.returncode == 0


def test_client_rows(make):
    run = make()
    run.clients([{"round": 1, "client": 2, "role": "train", "loss": np.float64(0.5)}])
    run.clients([{"round": 1, "client": 3, "error": 'NaN,\n in "delta"', "loss": None}])
    with open(run.path / "clients.csv") as file:
        first, second = csv.DictReader(file)
    assert (first["loss"], first["accuracy"], first["role"]) == ("0.5", "", "train")
    assert (second["loss"], second["error"]) == ("", 'NaN, in "delta"')
    with pytest.raises(ValueError, match="nonsense"):
        run.clients([{"round": 1, "nonsense": 1}])


@pytest.mark.parametrize(("clients", "classes"), [(3, 10), (4, 30), (150, 10)])
def test_labels(make, clients, classes):
    run = make()
    counts = np.arange(clients * classes).reshape(clients, classes)
    run.labels(counts, [f"class {c}" for c in range(classes)])
    # A formula that is none is not drawn as one, and a name is not left out.
    run.labels(counts, [f"_a$_${c}" for c in range(classes)])
    run.labels(counts, [f"class {c}" for c in range(classes)])
    with open(run.path / "labels.csv") as file:
        header, *rows = csv.reader(file)
    assert header[:2] == ["client", "class 0"]
    assert [int(v) for v in rows[2][1:]] == counts[2].tolist()
    assert (run.path / "labels.png").read_bytes().startswith(b"\x89PNG")


def test_finish(make):
    run = make()
    run.round(record(0))
    run.round(record(1))
    weight = torch.arange(4.0).reshape(2, 2)
    text = run.finish(SUMMARY, {"w": weight, "tied": weight.T})
    model = load_file(run.path / "model.safetensors")
    assert torch.equal(model["tied"], weight.T)
    summary = read_summary(run.path)
    assert summary == {**SUMMARY, "loss": None}
    assert (run.path / "curves.png").read_bytes().startswith(b"\x89PNG")
    for words in (
        "0.8000 of the server model",
        "accuracy 0.9",
        "4.00 MB down",
        "1,234",
    ):
        assert words in text
    assert len(text.splitlines()) < 20
    hidden = [p.name for p in run.path.iterdir() if p.name.startswith(".")]
    assert hidden == [".lock"]


def test_finish_of_a_run_without_rounds_or_accuracy(make):
    text = make().finish({"status": "stopped", "rounds": 0, "loss": 2.0}, {})
    assert "accuracy" not in text
    assert "stopped after 0 rounds" in text


def test_axes_accumulate():
    records = [record(0), record(1), record(2)]
    for told in records:
        told["strategy"] = {"link_bytes": 7}
    assert cumulative(records, "links").tolist() == [7, 14, 21]
    assert cumulative(records, "bytes").tolist() == [16, 32, 48]
    assert cumulative(records, "seconds").tolist() == [0.5, 1.0, 1.5]
    assert cumulative(records, "gradients").tolist() == [100, 200, 300]
    with pytest.raises(ValueError, match="none of"):
        cumulative(records, "hours")


def test_series_holds_the_evaluated_rounds():
    records = [{"round": 0, "loss": 1.0}, {"round": 1}, {"round": 2, "loss": None}]
    x, y = series(records, "loss")
    assert x.tolist() == [0, 2]
    np.testing.assert_equal(y, [1.0, math.nan])
    assert series(records, "clients/loss_mean")[0].size == 0


def test_seeds_are_averaged_where_all_of_them_are():
    def run(values, cost):
        up = {"up": {"model": cost}}
        return [{"round": i, "loss": v, "bytes": up} for i, v in enumerate(values)]

    runs = [run([4.0, 2.0, 1.0], 1), run([2.0, 0.0], 2)]
    curve = plots.align(runs, "loss", "rounds")
    assert curve.x.tolist() == [0, 1]
    assert curve.middle.tolist() == [3.0, 1.0]
    assert curve.low.tolist() == [2.0, 0.0]
    of_three = plots.align([*runs, run([6.0, 9.0], 1)], "loss", "rounds", "quartiles")
    assert of_three.middle.tolist() == [4.0, 2.0]
    assert of_three.high.tolist() == [5.0, 5.5]
    # By bytes they lie at 1, 2, 3 and at 2, 4: common is 2 to 3, linear in between.
    curve = plots.align(runs, "loss", "bytes", band="std")
    assert (curve.x[0], curve.x[-1]) == (2, 3)
    np.testing.assert_allclose(curve.middle[[0, -1]], [2.0, 1.0])
    np.testing.assert_allclose(curve.high - curve.middle, curve.middle - curve.low)
