"""Comparing runs and summarizing sweeps, on made-up run directories."""

import csv
import json
import math
import shutil

import pytest
import yaml
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from app import report, sweep, tables
from app.errors import UserError

FINISHED = {"status": "finished"}


def settings(strategy="feddyn", seed=0, lr=0.1, **options):
    return {
        "strategy": {"name": strategy, "target": f"x.{strategy}", "options": options},
        "local": {"lr": lr},
        "seed": seed,
        "targets": [0.5],
        "output_dir": f"runs/{seed}",
        "resume": "",
    }


def write(path, config, accuracies, summary=FINISHED, torn=False):
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [
        json.dumps(
            {
                "round": number,
                "accuracy": value,
                "loss": None if value is None else 1 - value,
                "bytes": {"down": {"model": 2_000_000}, "up": {"model": 1_000_000}},
                "seconds": {"round": 0.5},
                "gradients": 100,
            }
        )
        for number, value in enumerate(accuracies)
    ]
    (path / "metrics.jsonl").write_text("\n".join(lines) + ('\n{"ro' if torn else "\n"))
    if summary:
        (path / "summary.json").write_text(json.dumps(summary))
    return path


@pytest.fixture
def runs(tmp_path):
    for seed in range(2):
        values = [0.1, 0.4 + 0.2 * seed, 0.8]
        config = settings(alpha=0.1, seed=seed)
        write(tmp_path / f"dyn-{seed}", config, values)
    write(tmp_path / "dyn-b", settings(alpha=0.01), [0.1, 0.2], summary=None, torn=True)
    write(tmp_path / "avg", settings("fedavg", server_lr=1.0), [0.1, 0.3, None])
    return tmp_path


def test_groups_differ_only_in_their_seed(runs):
    groups = report.group(report.load([runs]))
    assert {label: len(of) for label, of in groups.items()} == {
        "strategy=feddyn alpha=0.1": 2,
        "strategy=feddyn alpha=0.01": 1,
        "strategy=fedavg": 1,
    }


def test_seeds_of_an_algorithm_that_draws_are_one_group(tmp_path):
    for seed in range(3):
        same = {"data": {"seed": 0}}
        hyper = settings("fedopt_hyper", seed=seed) | {"coin": {"seed": seed}} | same
        write(tmp_path / f"hyper-{seed}", hyper, [0.1, 0.2])
        plain = settings("fedavg", seed=seed) | same
        write(tmp_path / f"avg-{seed}", plain, [0.1, 0.2])
    groups = report.group(report.load([tmp_path]))
    assert {label: len(of) for label, of in groups.items()} == {
        "strategy=fedavg": 3,
        "strategy=fedopt_hyper": 3,
    }


def test_a_run_without_settings_is_beside_others(tmp_path):
    write(tmp_path / "bare", {}, [0.1])
    (tmp_path / "bare" / "config.yaml").unlink()
    write(tmp_path / "full", settings() | {"data": {"seed": 0}}, [0.1, 0.2])
    assert len(report.group(report.load([tmp_path]))) == 2


def test_a_run_is_read_once_and_in_natural_order(runs):
    write(runs / "dyn-10", settings(alpha=0.1, seed=10), [0.1])
    loaded = report.load([runs, runs / "avg"])
    assert [r.path.name for r in loaded] == ["avg", "dyn-0", "dyn-1", "dyn-10", "dyn-b"]


def test_labels_of_one_group_and_of_equal_short_names(tmp_path):
    write(tmp_path / "a", settings(), [0.1])
    assert list(report.group(report.load([tmp_path]))) == ["feddyn"]
    write(tmp_path / "b", settings() | {"server": {"lr": 1}}, [0.1])
    write(tmp_path / "c", settings(lr=0.5) | {"server": {"lr": 1}}, [0.1])
    labels = list(report.group(report.load([tmp_path])))
    assert labels[-1] == "local.lr=0.5 server.lr=1"


def test_rounds_to_a_target(runs):
    first, second = report.load([runs / "dyn-0", runs / "dyn-1"])
    assert tables.rounds_to(first, 0.5) == 2
    assert tables.rounds_to(second, 0.5) == 1
    assert tables.rounds_to(first, 0.9) is None
    assert tables.rounds_to(first, 0.25, "loss") == 2


def test_the_table(runs):
    groups = report.group(report.load([runs]))
    rows = {row["group"]: row for row in tables.table(groups, [0.5, 0.9])}
    row = rows["strategy=feddyn alpha=0.1"]
    assert row["rounds_to"][0.5].mean == 1.5
    assert row["rounds_to"][0.5].sd == pytest.approx(math.sqrt(0.5))
    assert row["rounds_to"][0.9].text(".1f") == "- (0/2)"
    assert row["final"].text(".2f") == "0.80 ± 0.00"
    assert (row["mb_down"].mean, row["mb_up"].mean) == (6.0, 3.0)
    assert (row["seconds"].mean, row["gradients"].mean) == (1.5, 300)
    # A run that ends in NaN has a best value and no final one.
    row = rows["strategy=fedavg"]
    assert (row["final"].text(".2f"), row["best"].text(".2f")) == ("- (0/1)", "0.30")
    assert rows["strategy=feddyn alpha=0.01"]["state"] == "1 unfinished"


def test_a_spread_tells_how_many_have_a_value():
    spread = tables.Spread.of([1.0, None, math.nan, 3.0])
    assert spread.text(".1f") == "2.0 ± 1.4 (2/4)"
    assert tables.Spread.of([1.0]).text(".1f") == "1.0"


def test_the_command_line(runs, tmp_path, capsys):
    out = tmp_path / "made" / "here"
    argv = [str(runs), "--x", "bytes", "--targets", "0.5,0.9", "--out", str(out)]
    assert report.main(argv) == 0
    assert "unfinished" in capsys.readouterr().out
    text = (out / "report.md").read_text()
    assert "rounds to ≥ 0.5" in text
    assert "| strategy=feddyn alpha=0.1 | 2 | 1.5 ± 0.7 |" in text
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")


def test_regression_runs_are_compared_by_loss(tmp_path, capsys):
    path = write(tmp_path / "a", settings(), [0.2, 0.6])
    lines = (path / "metrics.jsonl").read_text().replace("accuracy", "other")
    (path / "metrics.jsonl").write_text(lines)
    assert report.main([str(tmp_path)]) == 0
    assert "final loss" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--metric", "acuracy"], "did you mean 'accuracy'"),
        (["--targets", "0.8,x"], "--targets"),
        (["--out", "{}/avg/config.yaml"], "cannot write"),
        (["{}/none"], "no such directory"),
        (["{}/empty"], "holds no run"),
    ],
)
def test_mistakes_are_told_in_one_line(runs, more, words, capsys):
    (runs / "empty").mkdir()
    assert report.main([str(runs), *(m.format(runs) for m in more)]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1


def test_a_broken_config_is_told(runs):
    (runs / "avg" / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"config\.yaml"):
        report.load([runs])


def multirun(folder, job=0):
    hydra = {"mode": "MULTIRUN", "sweep": {"dir": str(folder)}, "job": {"num": job}}
    config = OmegaConf.create({"hydra": hydra})
    config.hydra.mode = sweep.RunMode.MULTIRUN
    return config


def test_a_sweep_over_one_number(tmp_path, capsys):
    for alpha in (0.01, 0.1, 1.0):
        for seed in range(2):
            config = settings(alpha=alpha, seed=seed)
            write(tmp_path / f"{alpha}-{seed}", config, [0.1, 0.5 + alpha / 10])
    callback = sweep.SweepSummary()
    callback.on_multirun_start(multirun(tmp_path))
    failed = JobReturn(overrides=["strategy.alpha=x"], status=JobStatus.FAILED)
    failed.return_value = UserError("strategy.alpha='x':\nno number")
    callback.on_job_end(multirun(tmp_path, 7), failed)
    callback.on_multirun_end(multirun(tmp_path))
    callback.on_multirun_end(multirun(tmp_path))

    told = capsys.readouterr().out
    assert told.count("1 failed") == 1
    assert "job 7 (strategy.alpha=x): UserError: strategy.alpha='x': no number" in told
    text = (tmp_path / "summary.md").read_text()
    assert "objective.png" in text and "## Failed jobs" in text
    with open(tmp_path / "summary.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["group"] for row in rows] == ["alpha=0.01", "alpha=0.1", "alpha=1"]
    assert float(rows[2]["final_mean"]) == pytest.approx(0.6)
    assert rows[0]["rounds_to_0.5_n"] == "2"
    for name in ("summary.png", "objective.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_sweep_over_several_keys_has_no_objective(runs):
    sweep.summarize(runs)
    assert (runs / "summary.png").exists()
    assert not (runs / "objective.png").exists()


@pytest.mark.parametrize("harm", ["nothing", "no folder", "broken"])
def test_the_callback_never_raises(runs, harm, capsys):
    if harm == "broken":
        (runs / "avg" / "metrics.jsonl").write_text("x\ny\n")
    else:
        shutil.rmtree(runs)
        if harm == "nothing":
            runs.mkdir()
    sweep.SweepSummary().on_multirun_end(multirun(runs))
    assert "no summary" in capsys.readouterr().out


def test_a_sweep_in_which_every_job_failed(tmp_path, capsys):
    failed = JobReturn(overrides=["a=1"], status=JobStatus.FAILED)
    failed.return_value = ValueError("bad")
    callback = sweep.SweepSummary()
    callback.on_job_end(multirun(tmp_path), failed)
    callback.on_multirun_end(multirun(tmp_path))
    assert "no run was made" in capsys.readouterr().out
    assert "ValueError: bad" in (tmp_path / "summary.md").read_text()
