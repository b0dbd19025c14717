"""A process that is killed at any moment, and the run that goes on from what it left.

The same over real SuperNodes, SuperLink and ServerApp: tests/test_deployment.py, and at length
tests/test_long.py.
"""

from __future__ import annotations

import multiprocessing
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from books import EVERY, audited
from conftest import QUICK, Result

from app.experiment import run_local
from app.store import DirectoryStore

pytestmark = pytest.mark.timeout(600)  # ten seconds for all, on a machine that is free


def killed(given: list[str], path: Path, after: int, delay: float) -> int:
    """Run in a process that is killed some time after a round; return the last checkpoint's."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["app.client_app", "app.experiment"])
    # More rounds than it can take: a busy machine must not let it finish.
    endless = [*QUICK, *given, "rounds=100000"]
    process = context.Process(target=run_local, args=(endless, (), str))
    process.start()
    try:
        end = time.monotonic() + 300
        while not (path / "checkpoints" / f"{after:08d}.safetensors").exists():
            assert process.is_alive() and time.monotonic() < end
            time.sleep(0.002)
        time.sleep(delay)
        assert process.is_alive()
    finally:
        process.kill()
        process.join()
    return max(int(p.stem) for p in (path / "checkpoints").glob("*.safetensors"))


@pytest.mark.parametrize("name", EVERY)
def test_killed_and_resumed_it_ends_with_the_bits_of_one_that_never_was(
    run: Callable[..., Result], tmp_path: Path, name: str
) -> None:
    draw = random.Random()  # another moment each time
    after, delay = draw.choice((2, 4, 6)), draw.random() * 0.1
    given = ["clients_per_round=4", "checkpoint_every=2", "checkpoint_keep=3"]
    given += ["engine=loop", "partition=dirichlet", "name=killed", *EVERY[name]]
    path = tmp_path / "runs" / "killed"
    last = killed([*given, f"output_dir={tmp_path}/runs"], path, after, delay)
    rounds = f"rounds={last + 4}"
    ours = run(*given, rounds, f"resume={path}")
    undisturbed = run(*given, rounds, "name=undisturbed")
    assert torch.equal(ours.theta, undisturbed.theta), (after, delay)
    for a, b in zip(ours.records, undisturbed.records, strict=True):
        assert {k: a[k] for k in a if k != "seconds"} == {
            k: b[k] for k in b if k != "seconds"
        }
    audited(ours, name, 6, lambda _: [DirectoryStore(ours.path / "clients")])
