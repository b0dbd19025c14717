"""Figures of runs: learning curves, the label distribution, the result of a sweep.

Everything is drawn with matplotlib's object interface on the Agg canvas, so a figure
needs no display, leaves no global state behind and may be drawn in any process. Colors
are those of Okabe and Ito, told apart by color-blind readers; line style and marker
repeat the difference for readers of a grey print.

A run is given as its list of round records and a metric by its keys joined by ``/``,
both as in `app.records`.
"""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from app.records import (
    Floats,
    Records,
    cumulative,
    lookup,
    series,
    traffic,
    write_atomic,
)

COLORS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#F0E442",
)
# Yellow fills an area well; as a line on white it is lost, so grey takes its place.
INKS = (*COLORS[:-1], "#808080")
LINES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX*"

# The label of each x axis and the factor from the recorded unit to the drawn one.
AXES = {
    "rounds": ("communication round", 1.0),
    "bytes": ("traffic, down and up (MB)", 1e-6),
    "seconds": ("wall time (s)", 1.0),
    "gradients": ("gradient evaluations, all clients", 1.0),
}
BARS_UP_TO = 100  # clients; a bar is about one pixel wide beyond
LEGEND_UP_TO = 2 * len(COLORS)  # classes; colors, then the same colors hatched


class Curve(NamedTuple):
    """The seeds of one group on a common grid: one mean line and its band."""

    x: Floats
    mean: Floats
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
        ``range`` (minimum to maximum) or ``std`` (one standard deviation either side).

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
    title: str = "",
) -> None:
    """Draw one line for each group: the mean over its seeds, with a band.

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
        ``range`` (minimum to maximum) or ``std`` (one standard deviation either side).
    title : str
        Above the figure.
    """
    name, scale = AXES[axis]
    figure, axes = _figure(7.2, 4.4)
    several = False
    for index, (label, runs) in enumerate(groups.items()):
        curve = align(runs, metric, axis, band)
        style = _style(index)
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
        _line(axes, curve.x * scale, curve.mean, label, index)
        axes.fill_between(
            curve.x * scale,
            curve.low,
            curve.high,
            color=style["color"],
            alpha=0.18,
            lw=0,
        )
    axes.set(xlabel=name, ylabel=_unit(metric), title=title)
    if axis == "rounds":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _log_if_wide(axes, metric)
    words = {"range": "minimum to maximum", "std": "one standard deviation"}[band]
    caption = f"line: mean over seeds; band: {words}" if several else None
    _legend(figure, axes, caption)
    _save(figure, path)


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
        panels.append((_unit(metric), _present(records, tags)))
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
            _line(axes, x, y, label, index)
        axes.set(xlabel=AXES["rounds"][0], ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _log_if_wide(axes, unit)
        axes.legend(fontsize=8)
    figure.suptitle(title)
    _save(figure, path)


def label_map(counts: NDArray[Any], names: Sequence[str], path: Path) -> None:
    """Draw how the labels are spread over the clients.

    Up to 100 clients as stacked bars of samples; above as a heat map of each client's
    shares, under a line of its number of samples.

    Parameters
    ----------
    counts : ndarray of shape (clients, classes)
        Samples of each class at each client.
    names : sequence of str
        The classes.
    path : Path
        The PNG to write, replaced as a whole.
    """
    counts = np.asarray(counts, dtype=float)
    if len(counts) <= BARS_UP_TO:
        figure = _label_bars(counts, names)
    else:
        figure = _label_heat(counts, names)
    _save(figure, path)


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
    figure, axes = _figure(6.0, 4.0)
    finite = {
        x: [y for y in ys if math.isfinite(y)] for x, ys in sorted(values.items())
    }
    finite = {x: ys for x, ys in finite.items() if ys}
    style = _style(0)
    if any(len(ys) > 1 for ys in finite.values()):
        dots = [(x, y) for x, ys in finite.items() for y in ys]
        x, y = zip(*dots, strict=True)
        axes.plot(
            x, y, "o", color=COLORS[1], mfc="none", ms=5, label="one run", zorder=3
        )
    means = [float(np.mean(ys)) for ys in finite.values()]
    axes.plot(
        list(finite), means, "-s", color=style["color"], ms=6, label="mean over seeds"
    )
    if finite and min(finite) > 0 and max(finite) / min(finite) >= 30:
        axes.set_xscale("log")
    axes.set(xlabel=key, ylabel=unit)
    axes.legend(fontsize=8)
    _save(figure, path)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure of one pair of axes, in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    return figure, axes


def _style(index: int) -> dict[str, Any]:
    """Return a color, line style and marker that no other of 32 indices has."""
    turn = index // len(INKS)
    return {
        "color": INKS[index % len(INKS)],
        "ls": LINES[(index + turn) % len(LINES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def _line(axes: Axes, x: Floats, y: Floats, label: str, index: int) -> None:
    """Draw one line with about eight markers, shifted from line to line."""
    every = max(1, len(x) // 8)
    style = _style(index)
    axes.plot(
        x, y, label=label, lw=1.6, ms=4.5, markevery=(index % every, every), **style
    )


def _legend(figure: Figure, axes: Axes, title: str | None) -> None:
    """Put the legend in the axes, or beside them when it would cover the lines."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    if len(labels) <= 4 and max(map(len, labels)) <= 32:
        axes.legend(fontsize=8, title=title, title_fontsize=7)
        return
    columns = 1 if max(map(len, labels)) > 44 else 2
    lines = math.ceil(len(labels) / columns) + 1
    figure.set_figheight(figure.get_figheight() + 0.19 * lines)
    figure.legend(
        loc="outside lower center",
        fontsize=8,
        ncols=columns,
        title=title,
        title_fontsize=7,
    )


def _present(
    records: Records, tags: Mapping[str, str]
) -> dict[str, tuple[Floats, Floats]]:
    """Return the series that hold a finite value."""
    found = {label: series(records, tag) for label, tag in tags.items()}
    return {label: xy for label, xy in found.items() if np.isfinite(xy[1]).any()}


def _unit(metric: str) -> str:
    """Return a metric's name for an axis, with its unit where it has one."""
    words = " ".join(metric.replace("_", " ").split("/"))
    if "accuracy" in metric:
        return f"{words} (fraction of samples)"
    return f"{words} (mean over samples)" if "loss" in metric else words


def _log_if_wide(axes: Axes, metric: str) -> None:
    """Draw a loss that spans a factor of 50 or more on a logarithmic axis."""
    drawn = [np.asarray(line.get_ydata(), dtype=float) for line in axes.get_lines()]
    values = np.concatenate(drawn) if drawn else np.empty(0)
    values = values[np.isfinite(values)]
    loss = "loss" in metric and values.size > 0 and values.min() > 0
    if loss and values.max() / values.min() >= 50:
        axes.set_yscale("log")


def _label_bars(counts: Floats, names: Sequence[str]) -> Figure:
    """Draw one stacked bar for each client."""
    figure, axes = _figure(8.0, 4.2)
    axes.grid(False, axis="x")
    clients, classes = counts.shape
    few = classes <= LEGEND_UP_TO
    bottom = np.zeros(clients)
    for index in range(classes):
        # More classes than colors: a shade in the order of the classes, read off a bar.
        shade = colormaps["cividis"]((index + 0.5) / classes)
        axes.bar(
            np.arange(clients),
            counts[:, index],
            bottom=bottom,
            width=0.9,
            color=COLORS[index % len(COLORS)] if few else shade,
            hatch="////" if few and index >= len(COLORS) else None,
            edgecolor="white",
            linewidth=0.0,
            label=str(names[index]),
        )
        bottom += counts[:, index]
    axes.set(xlabel="client", ylabel="samples", xlim=(-0.7, clients - 0.3))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if few:
        figure.legend(
            loc="outside right upper", fontsize=8, title="class", reverse=True
        )
    else:
        _class_bar(figure, axes, classes)
    return figure


def _label_heat(counts: Floats, names: Sequence[str]) -> Figure:
    """Draw the shares of each client as a column, and its size above."""
    clients, classes = counts.shape
    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    top, main = figure.subplots(2, 1, sharex=True, height_ratios=(1, 3))
    sizes = counts.sum(axis=1)
    top.fill_between(np.arange(clients), sizes, step="mid", color=COLORS[0], lw=0)
    top.set(ylabel="samples", ylim=(0, None))
    top.grid(alpha=0.3)
    shares = counts / np.maximum(sizes, 1)[:, None]
    image = main.imshow(shares.T, aspect="auto", cmap="cividis", vmin=0, vmax=1)
    figure.colorbar(image, ax=main, label="share of the client's samples")
    main.set(xlabel="client", ylabel="class")
    main.xaxis.set_major_locator(MaxNLocator(integer=True))
    if classes <= 30:
        main.set_yticks(range(classes), [str(name) for name in names], fontsize=8)
    return figure


def _class_bar(figure: Figure, axes: Axes, classes: int) -> None:
    """Add a color bar that numbers the classes, where a legend would be too long."""
    shades = ScalarMappable(Normalize(0, classes), colormaps["cividis"])
    figure.colorbar(shades, ax=axes, label="class, in the order of labels.csv")


def _save(figure: Figure, path: Path) -> None:
    """Write the figure as PNG, whole or not at all."""
    FigureCanvasAgg(figure)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_atomic(path, image.getvalue())
