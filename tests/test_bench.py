"""The benchmark: its workloads are what they say, and its figures are medians."""

import json
from pathlib import Path
from typing import Any

import pytest

from app.config import load
from bench import __main__ as bench
from bench.workloads import WORKLOADS, Workload


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=list(WORKLOADS))
def test_every_workload_composes(workload: Workload) -> None:
    config = load(workload.overrides)
    assert f"{config.clients_per_round:,} of {config.clients:,}" in workload.what
    assert config.strategy.name == "fedavg" and config.local.clip == 0
    assert config.optimizer.options["lr"] == workload.lr


def test_a_figure_is_a_median_of_medians() -> None:
    def run(*seconds: float) -> dict[str, Any]:
        return {"seconds": list(seconds), "accuracy": 0.5, "peak_mb": 100.0}

    found = bench.summarize([run(9, 1, 2, 3), run(9, 4, 4, 4), run(9, 3, 3, 3)])
    assert (found["seconds"], found["least"], found["most"]) == (3, 2, 4)
    assert found["repeats"] == 3


def test_our_own_run_is_read_from_its_record(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("data=digits", "partition=iid", "clients=6", "clients_per_round=6")
    tiny = Workload("tiny", "6 of 6", (*settings, "processes=0"), 0.1)
    monkeypatch.setitem(WORKLOADS, "tiny", tiny)
    bench.one("local", "tiny", 4)
    found = json.loads(capsys.readouterr().out)
    # The last round evaluates, so it is left out.
    assert len(found["seconds"]) == 3 and min(found["seconds"]) > 0
    assert found["accuracy"] > 0.2 and found["engine"] == "vmap"
    assert found["where"].keys() == {"client", "wire", "server"}
    assert found["peak_mb"] > 50


@pytest.mark.parametrize(
    "words", [["--who", "locl"], ["--workloads", "W9"], ["--rounds", "2"]]
)
def test_a_mistake_is_told_in_one_line(
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(
        "sys.argv", ["bench", *words, "--out", str(tmp_path / "o.json")]
    )
    assert bench.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "o.json").exists()
