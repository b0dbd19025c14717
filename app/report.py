"""Compare runs: ``python -m app.report DIR... [--metric NAME] [--targets 0.8,0.9]``.

Finds the run directories below the given ones, groups those that differ only in their
seed, prints a table and writes ``report.md`` and ``report.png``. Unfinished runs take
part with what they have recorded, and are shown as such.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from app import plots
from app.errors import UserError, nearest
from app.records import (
    AXES,
    ROUNDS,
    read_rounds,
    read_summary,
    scalars,
    write_atomic,
)
from app.tables import Run, cells, markdown, show, table

# Keys in which the runs of one group may differ.
APART = ("seed", "output_dir", "resume", "name")


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
    """Group the runs that differ only in seed, name and where they are written.

    Returns
    -------
    dict
        From a label, made of the settings in which the groups differ, to its runs.
    """
    settings = {id(run): own for run, own in zip(runs, told(runs), strict=True)}
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
        print(f"error: {error}", file=sys.stderr)
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


def told(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the settings of runs by dotted names, without seeds that are the run's everywhere."""
    found = [flat(run.config) for run in runs]
    seeds = {k for one in found for k in one if k.endswith(".seed")}
    same = {
        k
        for k in seeds
        if all(one.get(k, one.get("seed")) == one.get("seed") for one in found)
    }
    return [{k: v for k, v in one.items() if k not in same} for one in found]


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

    A setting of a section with a choice (``strategy.alpha``) follows from the
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
                short = key
            parts.append(f"{short}={_value(config[key])}")
    return " ".join(parts)


def _value(value: Any) -> str:
    """Return a setting in few characters."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 32 else f"{text[:29]}..."


def _plain_name(run: Run) -> str:
    """Return what to call the only group."""
    return str(_names(flat(run.config)).get("strategy") or run.path.resolve().name)


if __name__ == "__main__":
    sys.exit(main())
