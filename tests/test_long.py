"""The long forms on real processes: `./run.sh test --long -n 0 tests/test_long.py -s`.

Each prints the line that docs/reliability.md shows. FEDGRAD_LONG_SEED draws other moments.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import test_faults
import torch
from books import STATEFUL, audited
from conftest import Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jobs import JOB, Job, Lively, two_nodes

from app.deployment import Deployment
from app.records import series

pytestmark = [pytest.mark.long, pytest.mark.flower, pytest.mark.timeout(14400)]
SEED = int(os.environ.get("FEDGRAD_LONG_SEED", "0"))
REPETITIONS = int(os.environ.get("FEDGRAD_LONG_REPETITIONS", "20"))


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Give one deployment to all of them."""
    made = two_nodes(tmp_path_factory.mktemp("long") / "deployment", Lively)
    try:
        yield made
    finally:
        made.stop()
    assert made.processes() == {}


@dataclass
class Tally:
    """What became of the jobs of one strategy."""

    jobs: int = 0
    kills: int = 0
    anew: int = 0
    gap: float = 0.0


def disturbed(job: Job, rounds: int, draw: random.Random) -> int:
    """Kill a node in training, the ServerApp and the SuperLink, each at a random moment."""
    kills = 0
    plan = [(draw.randrange(rounds), kind) for kind in ("node", "app", "link")]
    draw.shuffle(plan)
    for round_, kind in sorted(plan, key=lambda moment: moment[0]):
        job.until_round(round_, 900)
        delay, name = draw.random() * 3, draw.choice(("node-1", "node-2"))
        if kind == "node":
            job.until_training(name, 900)
        time.sleep(delay)
        if job.ended():
            break
        kills += 1
        if kind == "node":
            job.kill_node(name)
            continue
        if kind == "app":
            kills -= not job.kill_app(900)
        else:
            job.kill_link()
        if not job.ended():
            job.submit()
    return kills


def test_kill_9_at_random(
    deployment: Deployment,
    run: Callable[..., Result],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Kill every part at a random moment of a job; the model is the undisturbed one."""
    draw, began, rounds = random.Random(SEED), time.monotonic(), 3
    truth: dict[str, Result] = {}
    tallies = {name: Tally() for name in STATEFUL}
    broken: list[str] = []

    def say(line: str) -> None:
        with capsys.disabled():
            print(line, flush=True)

    for repetition in range(REPETITIONS):
        name = list(STATEFUL)[repetition % len(STATEFUL)]
        tally = tallies[name]
        given = [*JOB, *STATEFUL[name], f"rounds={rounds}"]
        if name not in truth:
            truth[name] = run(*given, "processes=0", quick=())
        place = f"job-{SEED}-{repetition}"
        job = Job(deployment, place, [*given, "deadline=75", "attempts=50"])
        job.submit()
        tally.jobs += 1
        tally.kills += disturbed(job, rounds, draw)
        result = job.finish(1200)
        tally.anew += sum(r.get("attempts", 1) - 1 for r in result.records)
        try:
            tally.gap = max(tally.gap, audited(result, name, 6, job.stores))
            assert all(
                r["clients"]["cohort"] == list(range(6)) for r in result.records[1:]
            ), "somebody was left out"
            assert torch.equal(result.theta, truth[name].theta), "other bits"
        except AssertionError as error:
            broken.append(f"{place} {name}: {str(error).splitlines()[0]}")
            say(broken[-1])
        spent = time.monotonic() - began
        say(
            f"{repetition + 1}/{REPETITIONS} {name}, {tally.kills} kills, {spent:.0f} s"
        )
    say("| strategy | jobs | kills | rounds taken again | largest gap | other bits |")
    say("|---|---:|---:|---:|---:|---:|")
    for name, tally in tallies.items():
        other = sum(f" {name}:" in line for line in broken)
        say(
            f"| {name} | {tally.jobs} | {tally.kills} | {tally.anew} | "
            f"{tally.gap:.0e} | {other} |"
        )
    assert broken == []


@settings(max_examples=10_000, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(sorted(test_faults.ALGORITHMS)),
    st.lists(
        st.tuples(st.sampled_from([11, 12, 13]), test_faults.MUTATIONS),
        min_size=1,
        max_size=5,
    ),
)
def test_ten_thousand_mutated_rounds(name: str, mutations: Any) -> None:
    """No reply crashes the server, and nothing bad is accepted."""
    test_faults.test_no_reply_can_harm_the_server.hypothesis.inner_test(name, mutations)


def resident(processes: dict[int, str]) -> dict[str, int]:
    """Return the resident memory in kB of SuperLink, ServerApp and SuperNodes."""
    found: dict[str, int] = {}
    for pid, command in processes.items():
        for kind in ("flower-superlink", "flwr-serverapp", "flower-supernode"):
            if f"/{kind} " in command:
                try:
                    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                except OSError:
                    continue
                size = next((x for x in lines if x.startswith("VmRSS")), "VmRSS: 0")
                found[kind] = found.get(kind, 0) + int(size.split()[1])
    return found


def test_soak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Run long with four nodes: memory does not grow."""
    rounds = int(os.environ.get("FEDGRAD_SOAK_ROUNDS", "500"))
    deployment = Deployment(tmp_path / "soak")
    try:
        deployment.start_link()
        for i in range(4):
            deployment.add_node(f"node-{i + 1}", {"clients": str(i)})
            deployment.start_node(f"node-{i + 1}")
        deployment.wait_online(4)
        given = [
            o for o in JOB if not o.startswith(("clients", "min_replies", "nodes"))
        ]
        given += ["clients=4", "clients_per_round=4", "min_replies=4", "nodes=4"]
        job = Job(deployment, "soak", [*given, "strategy=feddyn", f"rounds={rounds}"])
        job.submit()
        samples: list[tuple[int, dict[str, int]]] = []
        while not (job.path / "summary.json").exists():
            time.sleep(2)
            at = job.rounds()
            if at >= rounds // 10 and (not samples or at > samples[-1][0]):
                samples.append((at, resident(deployment.processes())))
        result = job.finish()
    finally:
        deployment.stop()
    assert result.summary["failures"] == 0
    loss = series(result.records, "loss")[1]
    assert loss[-1] < loss[0]
    for kind in ("flower-superlink", "flwr-serverapp", "flower-supernode"):
        points = [(at, sizes[kind]) for at, sizes in samples if kind in sizes]
        x = torch.tensor([float(at) for at, _ in points])
        y = torch.tensor([float(size) for _, size in points])
        slope = float(
            ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
        )
        with capsys.disabled():
            print(
                f"soak {rounds} rounds: {kind} {y.mean() / 1024:.0f} MB, {slope:+.2f} kB/round"
            )
        # Less than a tenth in the whole of the run.
        assert slope * rounds < 0.1 * float(y.mean()), kind
