"""The benchmark: its workloads are what they say, and its figures are medians."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from app.config import load
from app.processes import marked
from bench import __main__ as bench
from bench import overhead
from bench.workloads import ALL, WORKLOADS, Workload


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=list(WORKLOADS))
def test_every_workload_composes(workload: Workload) -> None:
    config = load(workload.overrides)
    assert f"{config.clients_per_round:,} of {config.clients:,}" in workload.what
    assert config.strategy.name == "fedavg" and config.local.clip == 0
    assert config.optimizer.options["lr"] == workload.lr


def test_a_figure_is_a_median_of_medians() -> None:
    def run(*seconds: float) -> dict[str, Any]:
        same = {"samples": 60.0, "accuracy": 0.5, "peak_mb": 100.0}
        return {"seconds": list(seconds), **same}

    found = bench.summarize([run(9, 1, 2, 3), run(9, 4, 4, 4), run(9, 3, 3, 3)])
    assert (found["seconds"], found["least"], found["most"]) == (3, 2, 4)
    assert (found["repeats"], found["samples_per_second"]) == (3, 20)


def test_our_own_run_is_read_from_its_record(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("data=digits", "partition=iid", "clients=6", "clients_per_round=6")
    tiny = Workload("tiny", "6 of 6", (*settings, "processes=0"), 0.1)
    monkeypatch.setitem(ALL, "tiny", tiny)
    bench.one("local", "tiny", 4)
    found = json.loads(capsys.readouterr().out)
    # The last round evaluates, so it is left out.
    assert len(found["seconds"]) == 2 and min(found["seconds"]) > 0
    assert found["accuracy"] > 0.2 and found["engine"] == "vmap"
    assert found["where"].keys() == {"client", "wire", "server"}


def test_memory_is_that_of_all_processes_that_a_contender_started() -> None:
    mark = "FEDGRAD_BENCH=test"
    with subprocess.Popen(
        [sys.executable, "-c", "held = bytearray(60 << 20); input()"],
        env={**os.environ, **dict([mark.split("=")])},
        stdin=subprocess.PIPE,
    ) as process:
        limit = time.monotonic() + 20
        while bench.resident(marked(mark)) < 60 and time.monotonic() < limit:
            time.sleep(0.05)
        held = bench.resident(marked(mark))
        process.communicate(b"\n")
    assert 60 < held < 200
    assert marked(mark) == {}


def test_optimizers_are_timed_side_by_side(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(overhead, "SAMPLES", 20)
    monkeypatch.setattr(overhead, "TASK", (*overhead.TASK, "local.steps=2"))
    assert overhead.main(["--models", "mlp_sophia", "--repeats", "2"]) == 0
    text = capsys.readouterr().out
    assert "Fed-Sophia, GNB, tau=10" in text and "1.00" in text
    lines = overhead.rows("m", {"a": [1.0, 2.0, 4.0], "b": [2.0, 2.0, 6.0]})
    assert lines == [["m", "a", "200.00", "1.00"], ["m", "b", "200.00", "1.50"]]
    assert overhead.main(["--models", "lenet"]) == 2
    assert "mlp_sophia" in capsys.readouterr().err


def test_a_report_says_with_what_and_where(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def measured(who: str, *_: Any) -> dict[str, Any]:
        numbers = {"samples": 60.0, "accuracy": 0.5, "peak_mb": 100.0}
        return {"seconds": [9.0, 1.0, 2.0], **numbers}

    monkeypatch.setattr(bench, "measure", measured)
    words = ["--who", "local,bare-loop", "--workloads", "W1", "--repeats", "1"]
    out = tmp_path / "made" / "bench.json"
    monkeypatch.setattr("sys.argv", ["bench", *words, "--out", str(out)])
    assert bench.main() == 0
    told = json.loads(out.read_text())
    assert told["results"]["W1"]["local"]["seconds"] == 1.5
    assert told["machine"]["device"] == "cpu" and told["versions"]["torch"]


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
