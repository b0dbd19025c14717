"""The long forms on real processes: `./run.sh test --long -n 0 tests/test_long.py -s`.

Each prints the line that docs/reliability.md shows. FEDGRAD_LONG_SEED draws other moments.
"""

from __future__ import annotations

import logging
import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import test_durability
import test_faults
import torch
from books import EVERY, STATEFUL, audited
from conftest import Result
from hypothesis import HealthCheck, settings
from jobs import JOB, Job, Lively, same_hosts, two_nodes

from app.deploy import own_data
from app.deployment import Deployment
from app.host import setting
from app.records import series
from app.store import DirectoryStore

pytestmark = [pytest.mark.long, pytest.mark.flower, pytest.mark.timeout(14400)]
SEED = int(os.environ.get("FEDGRAD_LONG_SEED", "0"))
EXAMPLES = int(os.environ.get("FEDGRAD_LONG_EXAMPLES", "10000"))
REPETITIONS = int(os.environ.get("FEDGRAD_LONG_REPETITIONS", "20"))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Leave out Flower's line about every lost or refused reply: here are many."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)


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
    tallies = {name: Tally() for name in EVERY}
    broken: list[str] = []

    def say(line: str) -> None:
        with capsys.disabled():
            print(line, flush=True)

    for repetition in range(REPETITIONS):
        name = list(EVERY)[repetition % len(EVERY)]
        tally = tallies[name]
        given = [*JOB, *EVERY[name], f"rounds={rounds}"]
        if name not in truth:
            truth[name] = run(*given, grid=same_hosts, quick=())
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


def test_ten_thousand_mutated_replies(capsys: pytest.CaptureFixture[str]) -> None:
    """No reply crashes the server, and nothing bad is accepted."""
    counts: Counter[str] = Counter()
    began = time.monotonic()

    @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
    @test_faults.REPLIES
    def all_of_them(name: str, mutations: Any) -> None:
        counts.update(test_faults.harmless(name, mutations))

    all_of_them()
    with capsys.disabled():
        print(
            f"| mutated replies | {counts['mutated']:,} replies in {counts['rounds']:,} "
            f"rounds, {time.monotonic() - began:.0f} s | no crash, nothing bad accepted; "
            f"{counts['left out']:,} clients left out, {counts['accepted']:,} accepted |"
        )


@pytest.mark.parametrize("name", STATEFUL)
def test_thirty_percent_of_replies_lost(
    run: Callable[..., Result], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Fifty rounds in which replies are dropped at random: it converges, the books agree."""
    draw = random.Random(SEED)
    lost = {t: {k for k in range(6) if draw.random() < 0.3} for t in range(50)}
    given = [*STATEFUL[name], "nodes=6", "clients_per_round=6", "rounds=50"]
    given += ["evaluate_clients=none", "evaluate_every=10", "local.batch=20"]
    given += ["checkpoint_every=10"]
    result = run(*given, grid=lambda o: test_durability.Deaf(o, lost))
    whole = run(*given)
    gap = audited(result, name, 6, lambda _: [DirectoryStore(result.path / "clients")])
    count = sum(map(len, lost.values()))
    assert result.summary["failures"] == count
    with capsys.disabled():
        print(
            f"| {name} | {count} of 300 replies lost | accuracy "
            f"{result.summary['accuracy']:.3f}, {whole.summary['accuracy']:.3f} without "
            f"losses; largest gap {gap:.0e} |"
        )
    assert result.summary["accuracy"] > whole.summary["accuracy"] - 0.05


#: The processes that live as long as a deployment or a run, and how many there are.
COUNTED = {"flower-superlink": 1, "flwr-serverapp": 1, "flower-supernode": 4}


def resident(processes: dict[int, str]) -> dict[str, int]:
    """Return the resident memory in kB of the processes of each kind."""
    found: dict[str, int] = {}
    for pid, command in processes.items():
        for kind in COUNTED:
            if f"/{kind} " in command:
                try:
                    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                except OSError:
                    continue
                size = next((x for x in lines if x.startswith("VmRSS")), "VmRSS: 0")
                found[kind] = found.get(kind, 0) + int(size.split()[1])
    return found


def slope(points: list[tuple[int, int]]) -> tuple[float, float]:
    """Return mean and slope by least squares of (round, kB)."""
    x, y = torch.tensor(points, dtype=torch.float64).T
    x = x - x.mean()
    return float(y.mean()), float((x * y).sum() / x.square().sum())


def test_soak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Run long with four nodes, each with a client and its data: memory does not grow."""
    rounds = int(os.environ.get("FEDGRAD_SOAK_ROUNDS", "500"))
    deployment, began = Deployment(tmp_path / "soak"), time.monotonic()
    samples: list[tuple[int, dict[str, int]]] = []
    drop = ("clients", "min_replies", "nodes", "deployment", "evaluate_clients")
    given = [o for o in JOB if not o.startswith(drop)]
    given += ["clients=4", "clients_per_round=4", "nodes=4", "client_test=0.2"]
    parts = setting(tuple(given))
    # As at the edge: the server knows the data's shape alone.
    given += ["deployment=own_data", "data.shape=[1,8,8]", "data.classes=10"]
    given += ["min_replies=4", "strategy=feddyn", f"rounds={rounds}"]
    try:
        deployment.start_link()
        for i in range(4):
            file = own_data(tmp_path / f"data-{i}.npz", parts.samples(i))
            node = {"clients": str(i), "data-path": str(file)}
            deployment.add_node(f"node-{i + 1}", node)
            deployment.start_node(f"node-{i + 1}")
        deployment.wait_online(4)
        job = Job(deployment, "soak", given)
        job.submit()
        for round_ in range(1, rounds + 1):
            # A round without end is seen within ten minutes, not at the end of the test.
            job.until_round(round_, 600)
            if round_ >= rounds // 10:
                samples.append((round_, resident(deployment.processes())))
            if round_ % 50 == 0:
                with capsys.disabled():
                    spent = time.monotonic() - began
                    print(f"round {round_}, {spent:.0f} s, {samples[-1:]}", flush=True)
        result = job.finish()
    finally:
        deployment.stop()
    loss = series(result.records, "clients/loss_mean")[1]
    told = []
    grown = {}
    for kind, count in COUNTED.items():
        mean, rise = slope([(t, sizes[kind]) for t, sizes in samples if kind in sizes])
        told.append(
            f"{kind} {mean / 1024 / count:.0f} MB, {rise / count:+.2f} kB a round"
        )
        grown[kind] = rise * rounds / mean
    with capsys.disabled():
        print(
            f"| soak, 4 nodes, FedDyn | {rounds} rounds, "
            f"{(time.monotonic() - began) / 60:.0f} min | {'; '.join(told)}; "
            f"{result.summary['failures']} replies lost |"
        )
    gap = audited(result, "FedDyn", 4, job.stores)
    with capsys.disabled():
        print(f"largest gap {gap:.0e}")
    assert result.summary["failures"] == 0
    assert loss[-1] < loss[0]
    # Less than a tenth in the whole of the run.
    assert all(part < 0.1 for part in grown.values()), grown


def test_disks_that_are_full_or_read_only(
    run: Callable[..., Result], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A node's disk fills up, another's is read-only: both say so, the run goes on.

    The disks are mounts in a namespace of the node's own, which needs no privileges: a tmpfs with
    room for two memories, and a directory that is bound read-only.
    """
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    made = Lively(tmp_path / "deployment")
    full, frozen = (made.folder / f"node-{i}" / "state" for i in (1, 2))
    made.prepared["node-1"] = f"mount -t tmpfs -o size=8k none '{full}'"
    made.prepared["node-2"] = (
        f"mount --bind '{frozen}' '{frozen}' && mount -o remount,ro,bind '{frozen}'"
    )
    try:
        made.start_link()
        for i, clients in enumerate(("0,3", "1,4", "2,5"), start=1):
            made.add_node(f"node-{i}", {"clients": clients})
            made.start_node(f"node-{i}")
        made.wait_online(3)
        common = [o for o in JOB if not o.startswith(("min_replies", "nodes"))]
        common += ["min_replies=1", "strategy=feddyn", "rounds=3"]
        job = Job(made, "disks", [*common, "nodes=3", "deadline=150"])
        job.submit()
        result = job.finish(900)
        logs = [made.log(f"node-{i}").read_text() for i in (1, 2, 3)]
    finally:
        made.stop()
    failed = [r["clients"]["failed"] for r in result.records[1:]]
    assert [sorted(f) for f in failed] == [["1", "4"], *[["0", "1", "3", "4"]] * 2]
    assert "state-dir: OSError: [Errno 28] No space left on device" in failed[1]["0"]
    assert "state-dir: OSError: [Errno 30] Read-only file system" in failed[0]["1"]
    assert "client 0 is left out: state-dir" in logs[0]
    assert "client 1 is left out: state-dir" in logs[1]
    assert "left out" not in logs[2]
    assert all(r["checks"]["memory_gap"] < 1e-5 for r in result.records[1:])
    lost = {0: {1, 4}, 1: {0, 1, 3, 4}, 2: {0, 1, 3, 4}}
    ours = run(
        *[*common, "nodes=6"],
        grid=lambda o: test_durability.Deaf(o, lost),
        quick=(),
    )
    torch.testing.assert_close(result.theta, ours.theta, rtol=1e-4, atol=1e-6)
    read_only = failed[0]["1"].split(": '")[0]  # without the path
    with capsys.disabled():
        print(
            "| a state-dir of 8 kB and one that is read-only, on two of three nodes | 3 rounds | "
            f"{failed[1]['0']}; {read_only}; "
            "the model of lost replies |"
        )
