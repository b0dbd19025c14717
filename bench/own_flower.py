"""A SuperLink of one's own: its FLWR_HOME, free ports, and an end for what it started.

`flwr run` starts a local SuperLink that stays. Whoever measures or tests must meet nobody else's,
and leave none behind: its processes are known by their FLWR_HOME and ended by their ids.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.processes import end_all, free_ports, marked


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


def belonging(home: Path) -> dict[int, str]:
    """Return the living processes that were started with this FLWR_HOME: id -> command line."""
    return marked(f"FLWR_HOME={home}")


def end(home: Path) -> list[int]:
    """End these processes and return who is left: politely first."""
    for how, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
        left = end_all(lambda: belonging(home), how, patience)
        if not left:
            break
    return left
