"""The long forms on real processes: `./run.sh test --long -n 0 tests/test_long.py -s`.

Each prints the line that docs/reliability.md shows. FEDGRAD_LONG_SEED draws other moments.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import test_faults
import torch
from conftest import Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jobs import JOB, Job, two_nodes

from app.deployment import Deployment
from app.records import series

pytestmark = [pytest.mark.long, pytest.mark.flower, pytest.mark.timeout(14400)]
SEED = int(os.environ.get("FEDGRAD_LONG_SEED", "0"))
REPETITIONS = int(os.environ.get("FEDGRAD_LONG_REPETITIONS", "20"))
STRATEGIES = ("strategy=feddyn", "strategy=scaffold", "strategy=fedavg")


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Give one deployment to all of them."""
    made = two_nodes(tmp_path_factory.mktemp("long") / "deployment")
    try:
        yield made
    finally:
        made.stop()
    assert made.processes() == {}


def kept(result: Result) -> None:
    """Assert the invariants of a run, in every round."""
    rounds = [r["round"] for r in result.records]
    assert rounds == list(range(rounds[-1] + 1)), "a round is missing, or there twice"
    for record in result.records[1:]:
        assert record["clients"]["cohort"] == list(range(6))
        assert record["checks"].get("memory_gap", 0.0) < 1e-5


def test_kill_9_at_random(
    deployment: Deployment,
    run: Callable[..., Result],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Kill a part at a random moment, again and again; the model is the undisturbed one."""
    draw = random.Random(SEED)
    rounds, counts, began = 3, dict[str, int](), time.monotonic()
    truth = {
        s: run(*JOB, s, f"rounds={rounds}", "processes=0", quick=()) for s in STRATEGIES
    }
    for repetition in range(REPETITIONS):
        strategy = STRATEGIES[repetition % len(STRATEGIES)]
        kinds = ("node", "app", "link")
        # Three moments in a run: kills of every kind, in every order.
        plan = sorted(
            (draw.randrange(rounds), draw.random() * 4, draw.choice(kinds))
            for _ in range(3)
        )
        job = Job(
            deployment,
            f"job-{repetition}",
            [*JOB, strategy, f"rounds={rounds}", "deadline=75", "attempts=50"],
        )
        job.submit()
        for round_, delay, kind in plan:
            job.until_round(round_, 900)
            time.sleep(delay)
            counts[kind] = counts.get(kind, 0) + 1
            if kind == "node":
                job.kill_node(draw.choice(("node-1", "node-2")))
                continue
            job.kill_app() if kind == "app" else job.kill_link()
            if not (job.path / "summary.json").exists():
                job.submit()
        result = job.finish(900)
        kept(result)
        assert torch.equal(result.theta, truth[strategy].theta), (repetition, plan)
        with capsys.disabled():
            print(
                f"repetition {repetition + 1}/{REPETITIONS} {strategy}: {plan} "
                f"same bits, {time.monotonic() - began:.0f} s",
                flush=True,
            )
    with capsys.disabled():
        print(f"kills {counts}, {REPETITIONS} runs, 0 differ, 0 invariants broken")


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
