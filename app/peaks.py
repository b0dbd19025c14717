"""The largest resident memory of each kind of process of a deployment, sampled while it runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

#: Flower's commands, by what they are called in docs/deployment.md.
KINDS = {
    "flower-superlink": "SuperLink",
    "flwr-serverapp": "ServerApp",
    "flower-supernode": "SuperNode",
    "flower-superexec": "SuperExec",
    "flwr-clientapp": "ClientApp",
}
PAUSE = 0.1


class Peaks:
    """A context in which the processes are watched.

    Parameters
    ----------
    processes : callable
        Returns the living processes: id -> command line.

    Attributes
    ----------
    found : dict of str to int
        The largest peak (``VmHWM``) in kB among the processes of each kind.
    """

    def __init__(self, processes: Callable[[], dict[int, str]]) -> None:
        self.processes = processes
        self.found: dict[str, int] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peaks:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        # The kernel keeps the peak, so a process needs to be seen only late in its life.
        while not self._ended.wait(PAUSE):
            self.look()

    def look(self) -> None:
        """Take in the peaks of the processes that live now."""
        for pid, command in self.processes().items():
            kind = next((n for key, n in KINDS.items() if f"/{key} " in command), "")
            if kind:
                self.found[kind] = max(self.found.get(kind, 0), peak(pid))

    def __str__(self) -> str:
        rows = [f"{kind:<12}{kb / 1024:6.0f} MB" for kind, kb in self.found.items()]
        return "\n".join(["peak of resident memory", *rows])


def peak(process: int) -> int:
    """Return the largest resident memory that a process has had, in kB; 0 if it is gone (Linux)."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(x.split()[1]) for x in lines if x.startswith("VmHWM")), 0)
