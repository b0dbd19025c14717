"""How far a study is: a bar for the run under way and one for all, or plain lines."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

LINES = 10  # of a run, where there is no terminal


class Board:
    """Shows the runs of a study one after the other; a context manager.

    Parameters
    ----------
    console : Console
        Bars on a terminal; elsewhere a line about each tenth of a run.
    runs : int
        How many runs there are.
    """

    def __init__(self, console: Console, runs: int) -> None:
        self._console = console
        self._runs, self._at, self._rounds, self._began = runs, 0, 0, 0.0
        self._last = ""
        self._run: TaskID | None = None
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self._bars = Progress(
            *columns, console=console, disable=not console.is_terminal
        )
        self._all = self._bars.add_task("all runs", total=runs)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def _print(self, text: str) -> None:
        self._bars.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _count(self) -> str:
        return f"[{self._at}/{self._runs}]"

    def skip(self, name: str) -> None:
        """Tell of a run that has finished before."""
        self._at += 1
        self._bars.advance(self._all)
        self._print(f"{self._count()} {name}: finished before")

    def start(self, name: str, rounds: int) -> None:
        """Begin a run."""
        self._at, self._rounds, self._began = self._at + 1, rounds, time.monotonic()
        self._last = ""
        self._run = self._bars.add_task(name, total=rounds)
        if not self._console.is_terminal:
            self._print(f"{self._count()} {name}: {rounds} rounds")

    def advance(self, record: Mapping[str, Any]) -> tuple[bool, dict[str, float]]:
        """Show a round's record; a callback of a run."""
        if self._run is not None:
            self._bars.update(self._run, completed=record["round"])
        shown = [m for m in ("accuracy", "loss") if record.get(m) is not None][:1]
        self._last = "".join(f", {m} {record[m]:.4g}" for m in shown)
        every = max(1, self._rounds // LINES)
        if not self._console.is_terminal and record["round"] % every == 0:
            seconds = time.monotonic() - self._began
            text = f"round {record['round']}/{self._rounds}{self._last}"
            self._print(f"    {text}, {seconds:.0f} s")
        return False, {}

    def end(self, name: str, failure: str | None) -> None:
        """End a run, with the reason if it failed."""
        if self._run is not None:
            self._bars.remove_task(self._run)
        self._run = None
        self._bars.advance(self._all)
        seconds = time.monotonic() - self._began
        told = f"FAILED: {failure}" if failure else f"{seconds:.0f} s{self._last}"
        self._print(f"{self._count()} {name}: {told}")
