"""A figure of many variants: a row for each, with a dot for what each metric came to.

Twenty lines over rounds tell nobody apart; where only the end is compared, this is what to look at.
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from app import canvas
from app.tables import Spread
from app.verdict import Table


def dots(table: Table, metric: str, shown: Sequence[str], path: Path) -> None:
    """Draw the last values of some metrics: mean over seeds, and one standard deviation.

    Parameters
    ----------
    table : dict
        The numbers of every run by variant and seed, as `app.measure` gives them.
    metric : str
        The metric of the study, whose numbers are under ``final``; others are under ``also``.
    shown : sequence of str
        Metrics of one unit, each with a color and marker of its own.
    path : Path
        The PNG to write, replaced as a whole.
    """
    figure = Figure(figsize=(7.2, 1.0 + 0.2 * len(table)), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    several = False
    for index, name in enumerate(shown):
        spreads = [
            Spread.of(
                r["final"] if name == metric else r["also"][name] for r in of.values()
            )
            for of in table.values()
        ]
        several |= any(len(s.values) > 1 for s in spreads)
        axes.errorbar(
            [s.mean for s in spreads],
            range(len(spreads)),
            xerr=[s.sd for s in spreads],
            label=canvas.words(name),
            ms=5,
            capsize=2,
            **(canvas.style(index) | {"ls": ""}),
        )
    axes.set_yticks(range(len(table)), list(table), fontsize=8)
    axes.set_ylim(len(table) - 0.5, -0.5)
    common = canvas.quantity(shown[0]) if len(shown) > 1 else ""
    axes.set_xlabel(common or canvas.unit(shown[0]))
    note = "mean over seeds; bar: one standard deviation" if several else None
    canvas.legend(figure, axes, note)
    canvas.save(figure, path)
