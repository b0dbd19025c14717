"""Ports that are free, and processes found by a mark in their environment and ended by their ids.

Who starts processes gives them a variable of their own, which their children inherit: so what is
ended is what was started, whoever its parent is by then, and nothing else.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

HOST = "127.0.0.1"


def free_ports(count: int) -> list[str]:
    """Return ports that are free now, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind((HOST, 0))
        return [str(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


def marked(mark: str) -> dict[int, str]:
    """Return the living processes with this ``NAME=VALUE`` in their environment (Linux)."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        if entry.name == str(os.getpid()):
            continue
        try:
            if mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                found[int(entry.name)] = b" ".join(words).decode(errors="replace")
        except OSError:
            continue  # ended meanwhile, or another user's
    return found


def end_all(
    find: Callable[[], dict[int, str]], how: signal.Signals, patience: float = 5.0
) -> list[int]:
    """Signal all that ``find`` finds, again while new ones appear; return who is left."""
    limit, told = time.monotonic() + patience, set[int]()
    while left := find():
        if time.monotonic() > limit:
            return sorted(left)
        for pid in left.keys() - told:
            try:
                os.kill(pid, how)
            except ProcessLookupError:
                continue
            told.add(pid)
        time.sleep(0.05)
    return []
