"""What all figures share: the paper, the colors and the lines, the legend and the file.

Everything is drawn with matplotlib's object interface on the Agg canvas, so a figure
needs no display, leaves no global state behind and may be drawn in any process. Colors
are those of Okabe and Ito, told apart by color-blind readers; line style and marker
repeat the difference for readers of a grey print.
"""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from app.records import Floats, falls, write_atomic

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


def blank(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure of one pair of axes, in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    return figure, axes


def literal(text: str) -> str:
    """Return text that a user chose as it is drawn: without formulas, and never left out."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def style(index: int) -> dict[str, Any]:
    """Return a color, line style and marker that no other of 32 indices has."""
    turn = index // len(INKS)
    return {
        "color": INKS[index % len(INKS)],
        "ls": LINES[(index + turn) % len(LINES)],
        "marker": MARKERS[(index + 3 * turn) % len(MARKERS)],
    }


def line(axes: Axes, x: Floats, y: Floats, label: str, index: int) -> None:
    """Draw one line with about eight markers, shifted from line to line."""
    every = max(1, len(x) // 8)
    axes.plot(
        x,
        y,
        label=literal(label),
        lw=1.6,
        ms=4.5,
        markevery=(index % every, every),
        **style(index),
    )


def legend(figure: Figure, axes: Axes, title: str | None) -> None:
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
        handlelength=3.5,  # long enough to tell a line's dashes beside its marker
        ncols=columns,
        title=title,
        title_fontsize=7,
    )


def words(metric: str) -> str:
    """Return a metric's name as words."""
    return " ".join(metric.replace("_", " ").split("/"))


def quantity(metric: str) -> str:
    """Return what a metric is measured in, empty where it has no unit."""
    if "accuracy" in metric:
        return "fraction of samples"
    if "/cost/" in metric:
        return "rounds of training"
    return "mean over samples" if "loss" in metric else ""


def unit(metric: str) -> str:
    """Return a metric's name for an axis, with its unit where it has one."""
    measured = quantity(metric)
    return f"{words(metric)} ({measured})" if measured else words(metric)


def log_if_wide(axes: Axes, metric: str) -> None:
    """Draw a loss or error that spans a factor of 50 or more on a logarithmic axis."""
    drawn = [np.asarray(line.get_ydata(), dtype=float) for line in axes.get_lines()]
    values = np.concatenate(drawn) if drawn else np.empty(0)
    values = values[np.isfinite(values)]
    loss = falls(metric) and values.size > 0 and values.min() > 0
    if loss and values.max() / values.min() >= 50:
        axes.set_yscale("log")


def save(figure: Figure, path: Path) -> None:
    """Write the figure as PNG, whole or not at all."""
    FigureCanvasAgg(figure)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_atomic(path, image.getvalue())
