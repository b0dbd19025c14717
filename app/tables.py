"""Groups of runs as a table: a row of numbers for each group, then text, then Markdown.

A number stands for all runs of its group, as mean and standard deviation, and says how
many of the runs have it.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from app.records import cumulative, falls, series, traffic


@dataclass(frozen=True)
class Run:
    """One run as read from its directory; ``summary`` is None if it did not finish."""

    path: Path
    config: dict[str, Any]
    rounds: list[dict[str, Any]]
    summary: dict[str, Any] | None


@dataclass(frozen=True)
class Spread:
    """The finite ones of several numbers, one for each run."""

    values: list[float] = field(default_factory=list)
    runs: int = 0

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Spread":
        """Collect numbers; None, NaN and infinities count as a run without one."""
        given = list(values)
        finite = [v for v in given if v is not None and math.isfinite(v)]
        return cls(finite, len(given))

    @property
    def mean(self) -> float:
        """The mean, NaN of nothing."""
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def sd(self) -> float:
        """The sample standard deviation, NaN of fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan

    def text(self, form: str) -> str:
        """Return ``mean ± sd``, and ``(2/3)`` if only 2 of 3 runs have a value."""
        if not self.values:
            return "-" if not self.runs else f"- (0/{self.runs})"
        parts = format(self.mean, form)
        if len(self.values) > 1:
            parts += f" ± {format(self.sd, form)}"
        count = len(self.values)
        return parts if count == self.runs else f"{parts} ({count}/{self.runs})"

    def quantiles(self, form: str) -> str:
        """Return ``median (least to largest)``."""
        if not self.values:
            return "-"
        least, largest = min(self.values), max(self.values)
        middle = statistics.median(self.values)
        return f"{middle:{form}} ({least:{form}} to {largest:{form}})"


def rounds_to(run: Run, target: float, metric: str = "accuracy") -> int | None:
    """Return the first round whose metric reaches a target, None if none does.

    A metric that falls (any loss) reaches a target from above.
    """
    for at, value in zip(*series(run.rounds, metric), strict=True):
        if (value <= target) if falls(metric) else (value >= target):
            return int(at)
    return None


def table(
    groups: Mapping[str, Sequence[Run]],
    targets: Sequence[float],
    metric: str = "accuracy",
) -> list[dict[str, Any]]:
    """Return one row for each group.

    Returns
    -------
    list of dict
        ``group`` (label), ``runs`` (how many), ``state`` (what is not finished, in
        words), ``rounds_to`` (from target to `Spread`), and as `Spread` over the runs:
        ``final`` and ``best`` of the metric, and sums over the rounds: ``mb_down`` and
        ``mb_up`` (1e6 bytes), ``seconds``, ``gradients`` (of all clients).
    """
    pick = min if falls(metric) else max
    rows = []
    for label, runs in groups.items():
        values = [series(run.rounds, metric)[1].tolist() for run in runs]
        finite = [[v for v in one if math.isfinite(v)] for one in values]
        rows.append(
            {
                "group": label,
                "runs": len(runs),
                "state": _state(runs),
                "rounds_to": {
                    t: Spread.of(rounds_to(run, t, metric) for run in runs)
                    for t in targets
                },
                "final": Spread.of(one[-1] if one else None for one in values),
                "best": Spread.of(pick(one, default=None) for one in finite),
                "mb_down": _total(runs, lambda r: traffic(r, "down") / 1e6),
                "mb_up": _total(runs, lambda r: traffic(r, "up") / 1e6),
                "seconds": Spread.of(_last(run, "seconds") for run in runs),
                "gradients": Spread.of(_last(run, "gradients") for run in runs),
            }
        )
    return rows


def cells(rows: Sequence[Mapping[str, Any]], metric: str) -> list[list[str]]:
    """Return the table as text, its header first."""
    targets = list(rows[0]["rounds_to"]) if rows else []
    sign = "≤" if falls(metric) else "≥"
    head = ["group", "runs", *(f"rounds to {sign} {t:g}" for t in targets)]
    head += [f"final {metric}", f"best {metric}", "MB down", "MB up", "seconds"]
    lines = [[*head, "gradients"]]
    for row in rows:
        state = f"{row['runs']} ({row['state']})" if row["state"] else str(row["runs"])
        lines.append(
            [
                row["group"],
                state,
                *(spread.text(".1f") for spread in row["rounds_to"].values()),
                *(row[key].text(".4f") for key in ("final", "best")),
                *(row[key].text(".2f") for key in ("mb_down", "mb_up")),
                row["seconds"].text(".1f"),
                row["gradients"].text(",.0f"),
            ]
        )
    return lines


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Return a table of text as Markdown."""
    rule = ["---", *["---:"] * (len(lines[0]) - 1)]
    body = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in [body[0], rule, *body[1:]])


def show(lines: Sequence[Sequence[str]]) -> None:
    """Print a table of text, its header first, in parts where it is too wide."""
    console = Console(markup=False, highlight=False)
    label, *columns = zip(*lines, strict=True)
    parts = [[label]]
    for column in columns:
        width = sum(max(map(len, c)) + 2 for c in [*parts[-1], column]) - 2
        if width > console.width and len(parts[-1]) > 1:
            parts.append([label])
        parts[-1].append(column)
    for place, part in enumerate(parts):
        view = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for number, (name, *_) in enumerate(part):
            view.add_column(
                name,
                justify="right" if number else "left",
                no_wrap=number > 0,
                overflow="fold",
            )
        for row in list(zip(*part, strict=True))[1:]:
            view.add_row(*row)
        if place:
            console.print()
        console.print(view)


def _state(runs: Sequence[Run]) -> str:
    """Return how many runs did not simply finish, in words."""
    words = []
    states = [r.summary.get("status", "finished") if r.summary else None for r in runs]
    for state, word in ((None, "unfinished"), ("stopped", "stopped")):
        if state in states:
            words.append(f"{states.count(state)} {word}")
    return ", ".join(words)


def _total(runs: Sequence[Run], of: Callable[[Mapping[str, Any]], float]) -> Spread:
    """Return the sums over the rounds of each run."""
    return Spread.of(sum(map(of, run.rounds)) if run.rounds else None for run in runs)


def _last(run: Run, axis: str) -> float | None:
    """Return where a run ends on an axis."""
    return float(cumulative(run.rounds, axis)[-1]) if run.rounds else None
