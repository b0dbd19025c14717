"""Settings: two files that agree, a round trip through Flower, and mistakes in one line."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import QUICK, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from app import compose, config, experiment
from app.compose import PARTS, names
from app.config import Config, load
from app.errors import UserError
from app.experiment import run_flower
from app.run_config import FIRST_CLASS, from_run_config, to_run_config

ROOT = Path(__file__).resolve().parent.parent
Door = Callable[..., str]


def run_config() -> dict[str, Any]:
    """Return the [tool.flwr.app.config] of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    table: dict[str, Any] = project["tool"]["flwr"]["app"]["config"]
    return table


# Two files that agree.


def test_flowers_keys_and_defaults_are_hydras() -> None:
    flower = run_config()
    assert flower.pop("overrides") == ""
    assert tuple(flower) == FIRST_CLASS
    hydra = yaml.safe_load((ROOT / "conf" / "config.yaml").read_text())
    choices = {
        k: v
        for entry in hydra["defaults"]
        if entry != "_self_"
        for k, v in entry.items()
    }
    for key, value in flower.items():
        assert value == (choices | hydra)[key], key
    assert from_run_config(run_config()) == []


def test_every_choice_of_every_group_composes() -> None:
    needs = {
        "data=npz": ["data.path=x.npz"],
        "data=described": ["data.shape=[4]", "data.classes=3"],
        "data=imagefolder": ["data.root=x"],
        "data=text": ["data.path=x.txt"],
    }
    network = "strategy=pushsum"
    needs |= {f"topology={n}": [network] for n in names("topology") if n != "none"}
    needs |= {f"faults={name}": [network] for name in names("faults")}
    needs["estimate=hypergrad"] = list(LOGISTIC)
    needs["estimate=influence"] = [*LOGISTIC, "client_validation=0.25"]
    needs["optimizer=richardson"] = ["strategy=done"]
    needs["optimizer=tuned_sgd"] = ["strategy=fedopt_hyper", "strategy.client_lr=true"]
    needs["privacy=central"] = ["strategy=fedavg", "strategy.weighting=uniform"]
    needs["privacy=local"] = ["evaluate_clients=none"]
    needs["personal=hgp"] = ["client_validation=0.2"]
    needs["topology=file"] = [network, "topology.path=x.txt"]
    for group in PARTS:
        assert names(group), group
        for name in names(group):
            choice = f"{group}={name}"
            config = load([choice, *needs.get(choice, [])])
            assert getattr(config, group).name == name


@pytest.mark.parametrize(
    "given",
    [
        ("seed=3", "strategy=feddyn", "strategy.alpha=0.3", "targets=[0.1,0.2]"),
        ("experiment=digits", "rounds=3", "model.hidden=[8,9]"),
        (
            *("strategy=pushsum", "topology=k_out", "strategy@strategy.solver=ditto"),
            *("strategy.solver.lam=0.3", "faults.crash={3: 10}"),
        ),
        ("personal=hgp", "client_validation=0.2", "personal.lr={class_weights:1.0}"),
        ("deployment=shared_data", "name='odd \"x\" 1'", "output_dir='/a b'"),
    ],
    ids=" ".join,
)
def test_choices_that_are_composed_once_serve_any_values(
    given: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, seen = compose._whole, list[tuple[str, ...]]()

    def watched(overrides: tuple[str, ...]) -> Any:
        seen.append(overrides)
        return whole(overrides)

    compose._chosen.cache_clear()
    monkeypatch.setattr(compose, "_whole", watched)
    ours = config._typed(given)
    assert given not in seen, "else both ways are one"
    monkeypatch.setattr(compose, "_special", lambda _: True)  # all by Hydra itself
    assert config._typed(given) == ours
    assert seen[-1] == given


# Through Flower and back.

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)


@given(st.lists(WORDS, max_size=5))
def test_any_overrides_survive_the_run_config(overrides: list[str]) -> None:
    assert from_run_config(to_run_config(overrides)) == overrides
    assert from_run_config({**run_config(), **to_run_config(overrides)}) == overrides


#: Any letters; ``$`` would begin an interpolation, as everywhere in a configuration.
PATHS = st.text(
    st.characters(min_codepoint=32, max_codepoint=0x2FF, exclude_characters="$"),
    min_size=1,
)


@settings(max_examples=25)
@given(PATHS)
def test_any_output_dir_of_the_run_config_arrives(text: str) -> None:
    config = load(from_run_config({**run_config(), "output_dir": text}))
    assert config.output_dir == text


@settings(max_examples=10)
@given(
    st.fixed_dictionaries(
        {
            "strategy": st.sampled_from(["fedavg", "feddyn", "scaffold", "fedprox"]),
            "rounds": st.integers(0, 10**6),
            "seed": st.integers(0, 2**40),
            "clients": st.integers(5, 99),
            "device": st.sampled_from(["auto", "cpu"]),
        }
    )
)
def test_first_class_values_arrive(values: dict[str, Any]) -> None:
    config = load(from_run_config({**run_config(), **values}))
    assert config.strategy.name == values.pop("strategy")
    for key, value in values.items():
        assert getattr(config, key) == value


def test_overrides_win_over_first_class_keys() -> None:
    told = {**run_config(), "rounds": 7, "overrides": "rounds=9 strategy.alpha=0.5"}
    config = load(from_run_config(told))
    assert config.rounds == 9
    assert config.strategy.options["alpha"] == 0.5


def test_torn_quotes_in_overrides_are_a_users_mistake() -> None:
    with pytest.raises(UserError, match="overrides: "):
        from_run_config({"overrides": "name='half"})


def test_a_configuration_is_frozen() -> None:
    config: Config = load([])
    with pytest.raises(ValueError, match="frozen"):
        config.rounds = 3  # type: ignore[misc]


# Mistakes, through the public door.

KEPT = ("clients=6", "clients_per_round=3", "client_validation=0.2")
ESTIMATE = ("experiment=hypergrad_error", "rounds=1", "data.test_samples=5")
LOGISTIC = ("strategy=pushsum", "model=linear", "dtype=float64", "client_test=0.5")


@pytest.fixture
def door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Door:
    """`python -m app.experiment` in this process: the one line that it ends with."""

    def door(*overrides: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["experiment", *overrides])
        with pytest.raises(SystemExit) as ended:
            experiment.main()
        assert ended.value.code == 2
        told = capsys.readouterr()
        assert told.out == ""
        (line,) = told.err.splitlines()
        assert line.startswith("error: ")
        assert list(tmp_path.glob("runs/*")) == [], "a refused run left a directory"
        return line

    return door


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        # A name that is not there, with the nearest one.
        (
            ["strategy=fedyn"],
            ["no strategy is called 'fedyn'", "'feddyn'?", "scaffold"],
        ),
        (["data=minst"], ["no data is called 'minst'", "'mnist'?"]),
        (["model=mpl"], ["no model is called 'mpl'", "'mlp'?"]),
        (["partition=dirichle"], ["no partition is called", "'dirichlet'?"]),
        (["optimizer=sdg"], ["no optimizer is called 'sdg'", "sgd"]),
        (["strategy=fedyn,fedavg"], ["several values are a sweep", "in brackets"]),
        (["experiment=nothing"], ["experiment", "nothing"]),
        (["+experiment=mnist"], ["write experiment=mnist"]),
        # A key that is not there.
        (["round=3"], ["no setting is called 'round'", "'rounds'?"]),
        (
            ["strategy.alhpa=1"],
            ["no setting is called 'strategy.alhpa'", "'strategy.alpha'?"],
        ),
        (["local.epoch=1"], ["no setting is called 'local.epoch'", "'local.epochs'?"]),
        (["+local.foo=1"], ["no setting is called 'local.foo'", "epochs"]),
        (["+strategy.foo=1"], ["strategy.foo", "no such setting", "alpha"]),
        (["+stop.foo=1"], ["stop.foo"]),
        (["+foo=1"], ["foo"]),
        # One that is elsewhere, or in another choice.
        (["epochs=1"], ["no setting is called 'epochs'", "did you mean local.epochs?"]),
        (["lr=0.01"], ["did you mean optimizer.lr?"]),
        (["alpha=1"], ["partition.alpha or strategy.alpha?"]),
        (
            ["privacy.epsilon=0.5"],
            ["privacy as chosen has none; choose one of central, local, none"],
        ),
        (
            ["strategy=fedavg", "strategy.alpha=1"],
            ["no setting is called 'strategy.alpha'"],
        ),
        # An estimate without what it needs.
        (["estimate=hypergrad"], ["estimate=hypergrad", "strategy=pushsum"]),
        (
            ["estimate=hypergrad", "strategy=pushsum"],
            ["model=linear dtype=float64"],
        ),
        ([*ESTIMATE, "client_test=0"], ["outer cost", "client_test=0.5"]),
        ([*ESTIMATE, "faults.crash={0: 2}"], ["faults.crash", "all clients"]),
        ([*ESTIMATE, "program=two_rounds"], ["program=two_rounds", "one of the two"]),
        ([*ESTIMATE, "rounds=0"], ["estimate.depth=0"]),
        ([*ESTIMATE, "estimate.pushes=0"], ["estimate.pushes=0"]),
        ([*ESTIMATE, "estimate.alpha=0"], ["estimate.alpha=0"]),
        (["estimate=hypergrad", *LOGISTIC], ["data=digits", "two classes"]),
        ([*ESTIMATE, "partition=size", "data.clients=5"], ["as many samples"]),
        ([*ESTIMATE, "data.samples=4"], ["no minimizer", "data.samples"]),
        # What has no rounds, and settings that are about rounds.
        (["program=two_rounds", "privacy=local"], ["privacy=local", "as it is"]),
        (["program=two_rounds", "resume=auto"], ["resume=auto", "no rounds"]),
        (
            [*ESTIMATE, "optimizer.weight_decay=0.1"],
            ["optimizer.weight_decay=0.1: estimate=hypergrad does not read it"],
        ),
        (
            [*ESTIMATE, "strategy@strategy.solver=ditto"],
            ["strategy.solver: estimate=hypergrad does not read it"],
        ),
        ([*ESTIMATE, "client_validation=0.1"], ["client_validation=0.1: estimate="]),
        (
            ["experiment=influence_digits", "local.clip=1"],
            ["local.clip=1.0: estimate=influence does not read it"],
        ),
        ([*ESTIMATE, "stop.patience=3"], ["stop: estimate=hypergrad", "leave it out"]),
        # A value that cannot be.
        (["strategy.alpha=0"], ["strategy.alpha=0", "greater than 0"]),
        (["strategy.alpha=-1"], ["strategy.alpha=-1", "greater than 0"]),
        (["strategy.alpha=lots"], ["strategy.alpha='lots'", "number"]),
        (["strategy.alpha=nan"], ["strategy.alpha"]),
        (["strategy.alpha=inf"], ["strategy.alpha"]),
        (["strategy=fedprox", "strategy.mu=-1"], ["strategy.mu=-1"]),
        (["strategy.weighting=equal"], ["strategy.weighting='equal'", "uniform"]),
        (["strategy.report=all"], ["mean_of_all"]),
        (["partition.alpha=0"], ["partition.alpha=0"]),
        (["optimizer.lr=0"], ["optimizer.lr=0"]),
        (["optimizer.lr=nan"], ["optimizer.lr"]),
        (["optimizer.momentum=1"], ["optimizer.momentum=1"]),
        (["model.hidden=[0]"], ["model.hidden"]),
        (["model.hidden=wide"], ["model.hidden"]),
        (["rounds=many"], ["rounds='many'", "integer"]),
        (["rounds=-1"], ["rounds=-1"]),
        (["rounds=1.5"], ["rounds=1.5"]),
        (["clients=0"], ["clients=0"]),
        (["local.batch=-1"], ["local.batch=-1"]),
        (["local.epochs=0"], ["local.epochs=0"]),
        (["local.clip=nan"], ["local.clip"]),
        (["local=1"], ["local=1: local is a group"]),
        (["stop=now"], ["stop='now'", "stop.KEY=VALUE"]),
        (["targets=[2]"], ["targets"]),
        (["client_test=1"], ["client_test=1"]),
        (["device=tpu"], ["device='tpu': auto, cpu, cuda or cuda:N"]),
        (["dtype=float16"], ["dtype='float16'"]),
        (["runtime=cloud"], ["runtime='cloud'"]),
        (["seed=-1"], ["seed=-1"]),
        (["deadline=0"], ["deadline=0"]),
        (["data=npz"], ["data.path has no value"]),
        (["strategy=null"], ["strategy"]),
        # Values that do not go together.
        (
            ["stop.accuracy=0.9", "evaluate_every=0"],
            ["stop.accuracy", "before the end"],
        ),
        (
            ["evaluate_clients=none", "client_validation=0.2"],
            ["client_validation=0.2", "nobody looks"],
        ),
        (
            [*KEPT, "strategy=pushsum", "topology=complete"],
            ["client_validation=0.2", "nobody looks", "use strategy.judge=own"],
        ),
        (
            ["strategy=fedavg", "optimizer=tuned_sgd"],
            ["optimizer=tuned_sgd", "use optimizer=sgd"],
        ),
        (
            ["strategy=fedsophia", "personal=hgp", "client_validation=0.2"],
            ["optimizer=sophia estimates the curvature", "use strategy=fedavg"],
        ),
        (
            ["strategy=scaffold", "privacy=local", "evaluate_clients=none"],
            ["privacy=local with strategy=scaffold", "only the difference"],
        ),
        (
            ["strategy=pushsum", "topology=complete", "strategy.solver=fedprox"],
            ["strategy.solver='fedprox'", "strategy@strategy.solver=fedprox"],
        ),
        (["partition=dirichlet", "client_test=0.2"], ["too few", "partition.minimum"]),
        (["clients=4", "clients_per_round=5"], ["clients_per_round=5", "clients=4"]),
        (["min_clients=99"], ["min_clients=99 is more than there are clients"]),
        (["runtime=flower", "nodes=2001"], ["nodes=2001", "at most 2000"]),
        (["clients=2000"], ["2000"]),
        (["partition=iid", "clients=2000"], ["2000"]),
        # Not an override at all.
        (["rounds"], ["'rounds' is not key=value"]),
        (["strategy@strategy.solver=fedprox", "rounds=3"], ["configuration: "]),
        (["rounds=[1"], ["rounds=[1"]),
        (["name=../up"], ["name"]),
        (["name=a/b"], ["name"]),
        # What is not there.
        (["data=npz", "data.path=none.npz"], ["none.npz"]),
        (["data=mnist", "data.root=nowhere"], ["nowhere"]),
        (["data=imagefolder", "data.root=nowhere"], ["nowhere"]),
        (["data=text", "data.path=nowhere.txt"], ["nowhere.txt"]),
        (["resume=nowhere"], ["resume=nowhere"]),
        (["resume=auto"], ["resume=auto", "no unfinished run"]),
        # Other people's code.
        (["strategy._target_=os.system"], ["os.system", "below app or strategies"]),
        (["data._target_=builtins.eval"], ["builtins.eval", "below app or strategies"]),
        (["strategy._target_=appendix.f"], ["appendix.f", "below app or strategies"]),
        (["strategy._target_=strategies.nothing.F"], ["strategies.nothing.F"]),
        (["strategy._target_=strategies.sgd.SGD"], ["strategy"]),
        (["strategy._target_=app.data.os.system"], ["app.data.os.system"]),
    ],
    ids=lambda value: (
        " ".join(value) if isinstance(value, list) and "=" in value[0] else ""
    ),
)
def test_a_mistake_is_told_in_one_line(
    door: Door, overrides: list[str], parts: list[str]
) -> None:
    line = door(*overrides)
    for part in parts:
        assert part in line, line


def test_a_missing_root_says_what_to_put_where(door: Door) -> None:
    line = door("data=mnist", "data.root=nowhere")
    assert "data.download=true" in line
    assert "train-images-idx3-ubyte and its three" in line


@pytest.mark.parametrize("text", [b"", b"not an archive", b"PK\x03\x04torn"])
def test_a_corrupt_file(door: Door, tmp_path: Path, text: bytes) -> None:
    (tmp_path / "torn.npz").write_bytes(text)
    line = door("data=npz", "data.path=torn.npz")
    assert "torn.npz" in line and "not a readable .npz" in line


def test_a_label_column_that_does_not_exist(door: Door, tmp_path: Path) -> None:
    np.savez(
        tmp_path / "d.npz", x=np.zeros((9, 2), np.float32), target=np.arange(9) % 2
    )
    line = door("data=npz", "data.path=d.npz")
    assert "'y'" in line and "target" in line
    line = door("data=npz", "data.path=d.npz", "data.label=targt")
    assert "did you mean 'target'?" in line


def test_a_natural_partition_of_data_without_clients(door: Door) -> None:
    assert "no natural clients" in door("partition=natural")


def test_more_clients_than_a_client_test_can_serve(door: Door) -> None:
    line = door(*QUICK, "clients=1000", "clients_per_round=1", "client_test=0.2")
    assert "client_test=0.2" in line and "too few to keep" in line


def test_no_gpu(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "use device=cpu" in door("device=cuda")


def test_a_gpu_beyond_the_last(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert "there are 2 GPUs" in door("device=cuda:2")


def test_data_of_one_class(door: Door, tmp_path: Path) -> None:
    one = tmp_path / "one.npz"
    np.savez(one, x=np.zeros((40, 3), dtype=np.float32), y=np.zeros(40, dtype=int))
    line = door(
        *("data=npz", f"data.path={one}", "partition=iid"),
        *("clients=4", "clients_per_round=4"),
    )
    assert "all samples are of one class" in line


def test_flower_is_given_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its processes work in other folders than the one where a person names a file."""
    monkeypatch.chdir(tmp_path)
    given = ["data=npz", "data.path=my data.npz", "resume=runs/x", "output_dir=out"]
    network = ["strategy=pushsum", "topology=file", "topology.path=net.txt"]
    found = tomllib.loads(experiment.argument([*given, *network]))
    config = load(from_run_config(found))
    assert config.data.options["path"] == f"{tmp_path}/my data.npz"
    assert config.topology.options["path"] == f"{tmp_path}/net.txt"
    assert config.resume == f"{tmp_path}/runs/x"
    assert config.output_dir == f"{tmp_path}/out"
    found = tomllib.loads(experiment.argument(["resume=auto"]))
    assert load(from_run_config(found)).resume == "auto"


def test_an_output_dir_that_is_a_file(door: Door, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    assert "taken" in door("output_dir=taken")


# By a real process too.


def test_a_real_process_ends_with_one_line_and_status_2(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "app.experiment",
        "strategy=fedyn",
        f"output_dir={tmp_path}/runs",
    ]
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ") and "did you mean 'feddyn'?" in line
    assert ended.stdout == ""
    assert not (tmp_path / "runs").exists()


def test_what_is_right_runs_through_the_same_door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*QUICK, "rounds=1", f"output_dir={tmp_path}/runs"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["experiment", *given])
    experiment.main()
    (path,) = (tmp_path / "runs").iterdir()
    out = capsys.readouterr().out
    assert out.startswith(f"run directory: {path}\n")
    assert out.rstrip().endswith(f"run directory: {path}")
    assert [p.name for p in tmp_path.iterdir()] == ["runs"], "it writes nowhere else"


def test_the_objective_of_a_search(run: Callable[..., Result]) -> None:
    summary = run("rounds=1").summary
    assert experiment.objective_of(summary) == summary["accuracy"]
    assert experiment.objective_of({"accuracy": None, "loss": 2.0}) == -2.0
    assert math.isnan(experiment.objective_of({"accuracy": None, "loss": None}))


def test_a_mistake_in_a_sweep_has_no_traceback(tmp_path: Path) -> None:
    """What only shows when a job loads its data is told as shortly as any other mistake."""
    words = [
        "-m",
        "data=mnist",
        "data.root=nowhere",
        "seed=0,1",
        f"output_dir={tmp_path}",
    ]
    command = [sys.executable, "-m", "app.experiment", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert "error: MNIST cannot be read from data.root=nowhere" in done.stderr
    assert "2 failed" in done.stdout and "Exception" not in done.stdout


def test_a_sweep_by_joblib_runs_its_jobs_side_by_side(tmp_path: Path) -> None:
    swept = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "seed=0,1"]
    words = ["-m", *QUICK, "rounds=1", *swept, f"output_dir={tmp_path}"]
    command = [sys.executable, "-m", "app.experiment", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = tmp_path.iterdir()
    runs = sorted(p for p in folder.iterdir() if (p / "summary.json").exists())
    found = [json.loads((p / "summary.json").read_text()) for p in runs]
    assert sorted(summary["seed"] for summary in found) == [0, 1]
    assert {summary["status"] for summary in found} == {"finished"}
    assert (folder / "summary.md").exists()


FAKE = """#!{python}
import sys
if "run" in sys.argv[:2]:
    print("Successfully started run 7")
else:
    print('{{"success": true, "runs": [{{"run-id": "7", "status": "{status}"}}]}}')
"""


@pytest.mark.parametrize("status", ["completed", "failed", "stopped"])
def test_a_run_that_did_not_complete_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    """The log of a ServerApp that was killed ends without a word."""
    text = FAKE.format(python=sys.executable, status=f"finished:{status}")
    (tmp_path / "flwr").write_text(text)
    (tmp_path / "flwr").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    told: list[str] = []
    if status == "completed":
        run_flower([*QUICK], told.append)
    else:
        with pytest.raises(UserError, match="run 7 did not complete"):
            run_flower([*QUICK], told.append)
    assert told == ["Successfully started run 7"]
