"""Figures of runs: learning curves, one run on a page, the result of a sweep.

A run is given as its list of round records and a metric by its keys joined by ``/``,
both as in `app.records`.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from app import canvas
from app.records import Floats, Records, cumulative, lookup, series, traffic

# The label of each x axis and the factor from the recorded unit to the drawn one.
AXES = {
    "rounds": ("communication round", 1.0),
    "bytes": ("traffic, down and up (MB)", 1e-6),
    "links": ("traffic over the network's links (MB)", 1e-6),
    "seconds": ("wall time (s)", 1.0),
    "gradients": ("gradient evaluations, all clients", 1.0),
}


# What the line and the band of a group are.
BANDS = {
    "range": "line: mean over seeds; band: minimum to maximum",
    "std": "line: mean over seeds; band: one standard deviation",
    "quartiles": "line: median over seeds; band: from quartile to quartile",
}


class Curve(NamedTuple):
    """The seeds of one group on a common grid: one line and its band."""

    x: Floats
    middle: Floats
    low: Floats
    high: Floats


def align(
    runs: Sequence[Records], metric: str, axis: str, band: str = "range"
) -> Curve:
    """Bring the seeds of one group onto a common grid.

    On ``rounds`` the grid is the rounds that every run evaluated. Elsewhere no two runs
    share an abscissa: each is interpolated linearly on 200 points of the stretch that
    all of them cover, so that the mean never changes because a run ended.

    Parameters
    ----------
    runs : sequence of list of dict
        The round records of each run; runs without a finite value are left out.
    metric, axis : str
        As for `series`.
    band : str
        ``range`` (the mean, minimum to maximum), ``std`` (the mean, one standard deviation either
        side) or ``quartiles`` (the median, the middle half of the seeds), for what spreads over
        powers of ten: there the largest seed alone decides a mean.

    Returns
    -------
    Curve
        Empty arrays where the runs have nothing in common.
    """
    found = []
    for records in runs:
        x, y = series(records, metric, axis)
        keep = np.isfinite(y)
        if keep.any():
            found.append((x[keep], y[keep]))
    empty = np.empty(0)
    if not found:
        return Curve(empty, empty, empty, empty)
    if axis == "rounds" or len(found) == 1:
        grid = found[0][0]
        if axis == "rounds":
            for x, _ in found[1:]:
                grid = np.intersect1d(grid, x)
    else:
        start, stop = max(x[0] for x, _ in found), min(x[-1] for x, _ in found)
        grid = np.linspace(start, stop, 200) if start <= stop else empty
    if not grid.size:
        return Curve(empty, empty, empty, empty)
    table = np.stack([np.interp(grid, x, y) for x, y in found])
    if band == "quartiles":
        low, middle, high = np.quantile(table, [0.25, 0.5, 0.75], axis=0)
        return Curve(grid, middle, low, high)
    mean = table.mean(axis=0)
    if band == "std" and len(table) > 1:
        spread = table.std(axis=0, ddof=1)
        return Curve(grid, mean, mean - spread, mean + spread)
    return Curve(grid, mean, table.min(axis=0), table.max(axis=0))


def curves(
    groups: Mapping[str, Sequence[Records]],
    metric: str,
    axis: str,
    path: Path,
    *,
    band: str = "range",
) -> None:
    """Draw one line for each group, the middle of its seeds, with a band.

    A seed that goes on after the shortest of its group has ended is drawn thin from
    there, alone, since a mean over fewer seeds would jump.

    Parameters
    ----------
    groups : dict
        From the label of a group to the round records of its runs, one for each seed.
    metric : str
        What is drawn, for example ``accuracy`` or ``clients/loss_mean``.
    axis : str
        ``rounds``, ``bytes``, ``seconds`` or ``gradients``.
    path : Path
        The PNG to write, replaced as a whole.
    band : str
        As for `align`.
    """
    name, scale = AXES[axis]
    figure, axes = canvas.blank(7.2, 4.4)
    several = False
    for index, (label, runs) in enumerate(groups.items()):
        curve = align(runs, metric, axis, band)
        style = canvas.style(index)
        if len(runs) > 1:
            several = True
            label = f"{label} ({len(runs)} runs)"
            end = curve.x[-1] if curve.x.size else -math.inf
            for records in runs:
                x, y = series(records, metric, axis)
                rest = x >= end
                if (x > end).any():
                    axes.plot(
                        x[rest] * scale,
                        y[rest],
                        lw=0.8,
                        alpha=0.7,
                        color=style["color"],
                    )
        canvas.line(axes, curve.x * scale, curve.middle, label, index)
        axes.fill_between(
            curve.x * scale,
            curve.low,
            curve.high,
            color=style["color"],
            alpha=0.18,
            lw=0,
        )
    axes.set(xlabel=name, ylabel=canvas.unit(metric))
    if axis == "rounds":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axis == "links":  # from one peer to all of them: factors, not differences
        axes.set_xscale("log")
    canvas.log_if_wide(axes, metric)
    canvas.legend(figure, axes, BANDS[band] if several else None)
    canvas.save(figure, path)


def overview(records: Records, path: Path, title: str = "") -> None:
    """Draw one run on one page: accuracy, loss, traffic and time, whichever it has.

    Parameters
    ----------
    records : list of dict
        The round records of the run.
    path : Path
        The PNG to write, replaced as a whole.
    title : str
        Above the figure, usually the name of the run.
    """
    models = sorted({name for r in records for name in lookup(r, "models") or {}})
    panels: list[tuple[str, dict[str, tuple[Floats, Floats]]]] = []
    for metric in ("accuracy", "loss"):
        tags = {f"{name} model": f"models/{name}/{metric}" for name in models}
        tags = tags or {"model": metric}
        tags["clients, mean"] = f"clients/{metric}_mean"
        tags["clients, worst decile"] = f"clients/{metric}_decile"
        tags["clients held out, mean"] = f"clients/holdout_{metric}_mean"
        tags["clients, in training"] = f"clients/train_{metric}"
        panels.append((canvas.unit(metric), _present(records, tags)))
    rounds = cumulative(records, "rounds")
    sent = {
        way: np.cumsum([traffic(record, way) * 1e-6 for record in records])
        for way in ("down", "up")
    }
    panels.append(
        ("traffic so far (MB)", {w: (rounds, s) for w, s in sent.items() if s.any()})
    )
    parts = {part: f"seconds/{part}" for part in ("round", "client", "wire", "server")}
    panels.append(("time of the round (s)", _present(records, parts)))
    panels = [panel for panel in panels if panel[1]]

    columns = min(2, max(1, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    figure = Figure(figsize=(4.8 * columns, 3.3 * rows), layout="constrained")
    if not panels:
        figure.text(0.5, 0.5, "nothing recorded", ha="center")
    for place, (unit, lines) in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, place)
        axes.grid(alpha=0.3)
        for index, (label, (x, y)) in enumerate(lines.items()):
            canvas.line(axes, x, y, label, index)
        axes.set(xlabel=AXES["rounds"][0], ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        canvas.log_if_wide(axes, unit)
        axes.legend(fontsize=8)
    figure.suptitle(canvas.literal(title))
    canvas.save(figure, path)


def swept(
    values: Mapping[float, Sequence[float]], key: str, unit: str, path: Path
) -> None:
    """Draw the objective of a sweep against the one value that was swept.

    Parameters
    ----------
    values : dict
        From the swept value to the objective of each run at it (one for each seed);
        objectives that are not finite are left out.
    key : str
        The name of the swept key, for the x axis. The axis is logarithmic when the
        values are positive and spread over a factor of 30 or more.
    unit : str
        What the objective is, for the y axis.
    path : Path
        The PNG to write, replaced as a whole.
    """
    figure, axes = canvas.blank(6.0, 4.0)
    finite = {
        x: [y for y in ys if math.isfinite(y)] for x, ys in sorted(values.items())
    }
    finite = {x: ys for x, ys in finite.items() if ys}
    style = canvas.style(0)
    if any(len(ys) > 1 for ys in finite.values()):
        dots = [(x, y) for x, ys in finite.items() for y in ys]
        x, y = zip(*dots, strict=True)
        axes.plot(
            x,
            y,
            "o",
            color=canvas.COLORS[1],
            mfc="none",
            ms=5,
            label="one run",
            zorder=3,
        )
    means = [float(np.mean(ys)) for ys in finite.values()]
    axes.plot(
        list(finite), means, "-s", color=style["color"], ms=6, label="mean over seeds"
    )
    if finite and min(finite) > 0 and max(finite) / min(finite) >= 30:
        axes.set_xscale("log")
    axes.set(xlabel=key, ylabel=unit)
    axes.legend(fontsize=8)
    canvas.save(figure, path)


def _present(
    records: Records, tags: Mapping[str, str]
) -> dict[str, tuple[Floats, Floats]]:
    """Return the series that hold a finite value."""
    found = {label: series(records, tag) for label, tag in tags.items()}
    return {label: xy for label, xy in found.items() if np.isfinite(xy[1]).any()}
