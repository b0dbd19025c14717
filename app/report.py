"""Compare runs: ``python -m app.report DIR... [--metric NAME] [--targets 0.8,0.9]``.

Finds the run directories below the given ones, groups those that differ only in their
seed, prints a table and writes ``report.md`` and ``report.png``. Unfinished runs take
part with what they have recorded, and are shown as such.
"""

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from app import plots
from app.errors import UserError, nearest
from app.records import (
    AXES,
    ROUNDS,
    cumulative,
    falls,
    read_rounds,
    read_summary,
    scalars,
    series,
    traffic,
    write_atomic,
)

# Keys in which the runs of one group may differ.
APART = ("seed", "output_dir", "resume")


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


def load(dirs: Sequence[Path | str]) -> list[Run]:
    """Read every run directory at or below the given ones.

    Raises
    ------
    UserError
        If a directory does not exist, holds no run, or a run's file cannot be read.
    """
    found: dict[Path, Path] = {}
    for folder in map(Path, dirs):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such directory.")
        below = sorted((file.parent for file in folder.rglob(ROUNDS)), key=_natural)
        if not below:
            raise UserError(f"{folder}: holds no run (no folder with {ROUNDS}).")
        for path in below:
            found.setdefault(path.resolve(), path)
    return [
        Run(path, _config(path), read_rounds(path), read_summary(path))
        for path in found.values()
    ]


def group(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group the runs that differ only in seed, output_dir and resume.

    Returns
    -------
    dict
        From a label, made of the settings in which the groups differ, to its runs.
    """
    settings = {id(run): flat(run.config) for run in runs}
    together: dict[str, list[Run]] = {}
    for run in runs:
        kept = {k: v for k, v in settings[id(run)].items() if k not in APART}
        together.setdefault(json.dumps(kept, sort_keys=True, default=str), []).append(
            run
        )
    members = list(together.values())
    firsts = [settings[id(group[0])] for group in members]
    # The choices first: strategy=feddyn says more than epochs=5.
    shown = sorted(differing(firsts), key=lambda key: not key.endswith(".name"))
    labeled: dict[str, list[Run]] = {}
    for config, group_runs in zip(firsts, members, strict=True):
        label = _label(config, firsts, shown) or _plain_name(group_runs[0])
        unique, number = label, 1
        while unique in labeled:
            number += 1
            unique = f"{label} #{number}"
        labeled[unique] = group_runs
    return labeled


def differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys, among flat configurations, that do not agree in all of them."""
    keys = dict.fromkeys(key for config in configs for key in config)
    missing = object()
    return [
        key
        for key in keys
        if key not in APART
        and any(c.get(key, missing) != configs[0].get(key, missing) for c in configs)
    ]


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


def show(lines: Sequence[Sequence[str]], console: Console | None = None) -> None:
    """Print a table of text, its header first, in parts where it is too wide."""
    console = console or Console(markup=False, highlight=False)
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


def choose_metric(runs: Sequence[Run], asked: str | None = None) -> str:
    """Return the metric asked for, or accuracy where recorded and the loss otherwise.

    Raises
    ------
    UserError
        If no run has recorded the one asked for.
    """
    known = {tag for run in runs for record in run.rounds for tag, _ in scalars(record)}
    if asked is None:
        return "accuracy" if "accuracy" in known else "loss"
    if asked not in known:
        raise UserError(f"--metric {asked}: not recorded; {nearest(asked, known)}")
    return asked


def known_targets(runs: Sequence[Run]) -> list[float]:
    """Return the accuracies that the runs themselves were asked to watch."""
    return sorted({float(t) for run in runs for t in run.config.get("targets") or []})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status (2 after a user's mistake)."""
    parser = argparse.ArgumentParser(prog="python -m app.report", description=__doc__)
    parser.add_argument(
        "dirs", nargs="+", metavar="DIR", help="runs, or folders of runs"
    )
    parser.add_argument("--metric", help="accuracy, loss, clients/accuracy_mean, ...")
    parser.add_argument(
        "--x", choices=AXES, default="rounds", help="x axis of the figure"
    )
    parser.add_argument("--targets", help="for example 0.8,0.9 (those of the runs)")
    parser.add_argument("--out", type=Path, help="where to write (the first DIR)")
    given = parser.parse_args(argv)
    try:
        runs = load(given.dirs)
        metric = choose_metric(runs, given.metric)
        targets = _targets(given.targets)
        if targets is None:
            targets = known_targets(runs) if metric == "accuracy" else []
        groups = group(runs)
        lines = cells(table(groups, targets, metric), metric)
        show(lines)
        out = given.out or Path(given.dirs[0])
        try:
            out.mkdir(parents=True, exist_ok=True)
            drawn = {label: [run.rounds for run in of] for label, of in groups.items()}
            plots.curves(drawn, metric, given.x, out / "report.png")
            text = f"# Report\n\n{markdown(lines)}\n![{metric}](report.png)\n"
            write_atomic(out / "report.md", text)
        except OSError as error:
            raise UserError(f"{out}: cannot write there ({error.strerror}).") from error
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{out / 'report.md'}, {out / 'report.png'}")
    return 0


def _targets(text: str | None) -> list[float] | None:
    """Parse ``0.8,0.9``."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise UserError(
            f"--targets {text}: numbers with commas, as 0.8,0.9."
        ) from error


def _config(path: Path) -> dict[str, Any]:
    """Read a run's configuration; a run without one has no settings to tell it by."""
    file = path / "config.yaml"
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file}: cannot be read as YAML.") from error
    return config if isinstance(config, dict) else {}


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """Sort ``run-10`` behind ``run-9``."""
    parts = re.split(r"(\d+)", str(path))
    return [(p.isdecimal(), int(p) if p.isdecimal() else 0, p) for p in parts]


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a configuration with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was chosen in each section: ``{"strategy": "feddyn", ...}``."""
    return {k[:-5]: v for k, v in config.items() if k.endswith(".name")}


def _label(
    config: Mapping[str, Any],
    configs: Sequence[Mapping[str, Any]],
    shown: Sequence[str],
) -> str:
    """Return the settings that tell a group from the others.

    A setting of a section with a choice (``strategy.options.alpha``) follows from the
    choice unless groups of the same choice differ in it: then only is it named.
    """
    parts = []
    for key in shown:
        section = key.split(".", 1)[0]
        named = f"{section}.name"
        if key != named and named in config:
            same = [c for c in configs if c.get(named) == config[named]]
            if key not in differing(same):
                continue
        if key in config:
            short = section if key == named else key.rsplit(".", 1)[-1]
            clash = [k for k in shown if k.rsplit(".", 1)[-1] == short and k != key]
            if clash and key != named:
                short = key.replace(".options.", ".")
            parts.append(f"{short}={_value(config[key])}")
    return " ".join(parts)


def _value(value: Any) -> str:
    """Return a setting in few characters."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 32 else f"{text[:29]}..."


def _plain_name(run: Run) -> str:
    """Return what to call the only group."""
    return str(_names(flat(run.config)).get("strategy") or run.path.resolve().name)


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


if __name__ == "__main__":
    sys.exit(main())
