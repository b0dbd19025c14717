"""The figure of who holds what: how the labels are spread over the clients."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from app import canvas
from app.records import Floats

BARS_UP_TO = 100  # clients; a bar is about one pixel wide beyond
LEGEND_UP_TO = 2 * len(canvas.COLORS)  # classes; colors, then the same colors hatched


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
        figure = _bars(counts, names)
    else:
        figure = _heat(counts, names)
    canvas.save(figure, path)


def _bars(counts: Floats, names: Sequence[str]) -> Figure:
    """Draw one stacked bar for each client."""
    figure, axes = canvas.blank(8.0, 4.2)
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
            color=canvas.COLORS[index % len(canvas.COLORS)] if few else shade,
            hatch="////" if few and index >= len(canvas.COLORS) else None,
            edgecolor="white",
            linewidth=0.0,
            label=canvas.literal(str(names[index])),
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


def _heat(counts: Floats, names: Sequence[str]) -> Figure:
    """Draw the shares of each client as a column, and its size above."""
    clients, classes = counts.shape
    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    top, main = figure.subplots(2, 1, sharex=True, height_ratios=(1, 3))
    sizes = counts.sum(axis=1)
    top.fill_between(
        np.arange(clients), sizes, step="mid", color=canvas.COLORS[0], lw=0
    )
    top.set(ylabel="samples", ylim=(0, None))
    top.grid(alpha=0.3)
    shares = counts / np.maximum(sizes, 1)[:, None]
    image = main.imshow(shares.T, aspect="auto", cmap="cividis", vmin=0, vmax=1)
    figure.colorbar(image, ax=main, label="share of the client's samples")
    main.set(xlabel="client", ylabel="class")
    main.xaxis.set_major_locator(MaxNLocator(integer=True))
    if classes <= 30:
        main.set_yticks(
            range(classes), [canvas.literal(str(n)) for n in names], fontsize=8
        )
    return figure


def _class_bar(figure: Figure, axes: Axes, classes: int) -> None:
    """Add a color bar that numbers the classes, where a legend would be too long."""
    shades = ScalarMappable(Normalize(0, classes), colormaps["cividis"])
    figure.colorbar(shades, ax=axes, label="class, in the order of labels.csv")
