"""The whole way: `flwr run`, a SuperLink, Ray's simulation, and the local runtime's model.

Each test uses a SuperLink of its own module: its own FLWR_HOME and free ports, so that it meets
nobody else's, and its processes are known by that FLWR_HOME and ended by their ids.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import QUICK, Result, found

from app.errors import UserError
from app.experiment import run_flower
from app.records import read_summary

pytestmark = [
    pytest.mark.flower,
    pytest.mark.skipif(sys.platform != "linux", reason="finds processes by /proc"),
]
ROOT = Path(__file__).resolve().parent.parent
Run = Callable[..., Result]


def free_ports(count: int) -> list[str]:
    """Ports that are free now, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [str(s.getsockname()[1]) for s in sockets]
    finally:
        for s in sockets:
            s.close()


def belonging(home: Path) -> list[int]:
    """Ids of the living processes that were started with this FLWR_HOME."""
    mark = f"FLWR_HOME={home}".encode()
    ids = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                ids.append(int(entry.name))
        except OSError:
            continue  # ended meanwhile, or another user's
    return ids


def end(home: Path) -> list[int]:
    """End these processes and return who is left: politely first, the SuperLink before Ray."""
    for how, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
        limit = time.monotonic() + patience
        for pid in sorted(belonging(home)):
            try:
                os.kill(pid, how)
            except ProcessLookupError:
                continue
        while belonging(home) and time.monotonic() < limit:
            time.sleep(0.1)
    return belonging(home)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The FLWR_HOME of this module's SuperLink, which the first `flwr run` starts."""
    path = tmp_path_factory.mktemp("flower")
    http, control = free_ports(2)
    environment = {
        "FLWR_HOME": str(path),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": http,
        "FLWR_LOCAL_CONTROL_API_PORT": control,
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            yield path
        finally:
            left = end(path)
    assert not left, f"processes {left} would not end"


def test_a_mistake_is_told_before_flower_starts(home: Path) -> None:
    lines: list[str] = []
    with pytest.raises(UserError, match="did you mean 'feddyn'"):
        run_flower(["strategy=fedyn"], lines.append)
    with pytest.raises(UserError, match=r"data|npz"):
        run_flower(["data=npz", f"data.path={home}/none.npz"], lines.append)
    assert lines == []
    assert belonging(home) == []


@pytest.mark.timeout(180)
@pytest.mark.parametrize("nodes", [2, 6])
def test_flower_gives_the_local_runtimes_model(
    home: Path, run: Run, tmp_path: Path, nodes: int
) -> None:
    given = [*QUICK, "rounds=2", f"nodes={nodes}", "holdout_clients=1", "seed=3"]
    awkward = 'name=it\'s a "run" = 1, a\\b'
    lines: list[str] = []
    run_flower([*given, f"output_dir={tmp_path}/flower", "name=there"], lines.append)
    path = tmp_path / "flower" / "there"
    summary = read_summary(path)
    assert summary is not None, "\n".join(lines)
    flower = found(path, summary)
    local = run(*given)
    assert awkward
    assert flower.model.keys() == local.model.keys()
    for name, tensor in local.model.items():
        assert torch.equal(tensor, flower.model[name]), name
    for ours, theirs in zip(local.records, flower.records, strict=True):
        free = ("seconds", "callbacks")
        assert {k: v for k, v in ours.items() if k not in free} == {
            k: v for k, v in theirs.items() if k not in free
        }
    told = "\n".join(lines)
    assert told.count(f"run directory: {path}") == 2
    assert "round 2/2" in told
