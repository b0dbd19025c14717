"""Figures of influence: predicted against actual changes, and the samples that matter most."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from app import canvas
from app.influence_report import Agreement, Rows

#: Clients in the sheet, samples of each at either end, and clients with a sheet of their own.
CLIENTS, ENDS, SHEETS = 8, 6, 24


def scatter(table: Rows, found: Agreement, path: Path) -> None:
    """Draw the checked samples: what was predicted, and what retraining gave.

    Parameters
    ----------
    table : sequence of dict
        A row for each sample; those without an actual change are not drawn.
    found : dict
        R2 and Kendall's tau, for the title.
    path : Path
        The PNG to write, replaced as a whole.
    """
    figure, axes = canvas.blank(5.6, 5.0)
    known = [r for r in table if r["actual"] is not None]
    groups = {
        f"client {k}": [r for r in known if r["client"] == k] for k in _clients(known)
    }
    if len(groups) > CLIENTS:
        groups = {"all clients": known}
    for place, (label, mine) in enumerate(groups.items()):
        points = np.array([[r["predicted"], r["actual"]] for r in mine])
        style = canvas.style(place) | {"ls": ""}
        axes.plot(*points.T, ms=5, alpha=0.85, label=label, **style)
    values = np.array([[r["predicted"], r["actual"]] for r in known], dtype=float)
    values = values[np.isfinite(values).all(1)]
    if len(values):
        ends = [float(values.min()), float(values.max())]
        axes.plot(
            ends, ends, color="#808080", lw=1, ls="--", label="predicted = actual"
        )
    axes.ticklabel_format(style="sci", scilimits=(-2, 3), useMathText=True)
    numbers = ", ".join(
        f"{word} {'undefined' if found[k] is None else f'{found[k]:.3f}'}"
        for word, k in (("R2", "r2"), ("Kendall tau", "kendall"))
    )
    axes.set(
        xlabel="predicted change of the mean validation loss",
        ylabel="actual change after retraining",
        title=f"{len(known)} samples left out, one at a time\n{numbers}",
    )
    axes.legend(fontsize=8)
    canvas.save(figure, path)


def sheet(table: Rows, pictures: Tensor, names: Sequence[str], path: Path) -> None:
    """Draw each client's most harmful and most helpful training images.

    Parameters
    ----------
    table : sequence of dict
        A row for each sample, a client's from the most harmful to the most helpful.
    pictures : Tensor
        The data set's training images, (N, channels, height, width); channels 1 or 3, or the first
        is drawn.
    names : sequence of str
        The classes.
    path : Path
        The PNG to write, replaced as a whole.
    """
    clients = _clients(table)[:CLIENTS]
    size = 2 * ENDS * 0.95, 1.45 * len(clients) + 0.6
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(clients), 2 * ENDS, squeeze=False)
    for line, client in zip(grid, clients, strict=True):
        mine = [r for r in table if r["client"] == client]
        ends = min(ENDS, len(mine) // 2)
        gap = [None] * 2 * (ENDS - ends)
        shown = [*mine[:ends], *gap, *reversed(mine[len(mine) - ends :])]
        for axes, row in zip(line, shown, strict=True):
            axes.set(xticks=[], yticks=[])
            if row is None:
                axes.axis("off")
                continue
            axes.imshow(_picture(pictures[row["sample"]]), cmap="gray_r")
            harmful = row["predicted"] < 0
            color = canvas.COLORS[1] if harmful else canvas.COLORS[0]
            for spine in axes.spines.values():
                spine.set(color=color, lw=2, ls="--" if harmful else "-")
            name = canvas.literal(names[row["label"]])
            title = f"{name}\n{row['predicted']:+.1e}"
            axes.set_title(title, fontsize=8, color=color)
        line[0].set_ylabel(f"client {client}", fontsize=9)
    figure.suptitle(
        "Most harmful (left, dashed: without it the loss falls) and most helpful (right) training "
        "samples\nclass, and predicted change of the mean validation loss when left out",
        fontsize=9,
    )
    canvas.save(figure, path)


def _clients(table: Rows) -> list[int]:
    return sorted({row["client"] for row in table})


def _picture(image: Tensor) -> np.ndarray:
    """Return an image as matplotlib draws it, scaled to [0, 1]."""
    shown = image.detach().cpu().to(torch.float64).numpy()
    shown = shown.transpose(1, 2, 0) if len(shown) == 3 else shown[0]
    least, most = shown.min(), shown.max()
    scaled: np.ndarray = (shown - least) / max(most - least, 1e-12)
    return scaled
