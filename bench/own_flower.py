"""A SuperLink of one's own: its FLWR_HOME, free ports, and an end for what it started.

`flwr run` starts a local SuperLink that stays. Whoever measures or tests must meet nobody else's,
and leave none behind: its processes are known by their FLWR_HOME and ended by their ids.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def own_flower(home: Path) -> Iterator[None]:
    """Let `flwr run` use a SuperLink of its own below ``home``, and end it afterwards.

    Raises
    ------
    RuntimeError
        If some of its processes would not end.
    """
    http, control = free_ports(2)
    given = {
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": http,
        "FLWR_LOCAL_CONTROL_API_PORT": control,
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        left = end(home)
    if left:
        raise RuntimeError(f"processes {left} would not end")


def free_ports(count: int) -> list[str]:
    """Return ports that are free now, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [str(s.getsockname()[1]) for s in sockets]
    finally:
        for s in sockets:
            s.close()


def belonging(home: Path) -> list[int]:
    """Return the ids of the living processes that were started with this FLWR_HOME."""
    return marked(f"FLWR_HOME={home}")


def marked(setting: str) -> list[int]:
    """Return the ids of the other processes that have this ``NAME=value`` around them."""
    mark, ids = setting.encode(), []
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
