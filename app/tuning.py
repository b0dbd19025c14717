"""Methods that are tuned before they are compared: each by its own grid, on validation alone.

A study's ``tuning`` names the variants among which each method is to choose, and the metric of the
records that chooses, which must not be one of the test set. The verdict is then about the chosen
ones, and the whole grid is shown below it.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import Field

from app.binding import Model
from app.tables import Spread
from app.verdict import Table, better

#: Under this name a run's numbers hold what chooses.
BY = "tuned_by"


class Tuning(Model):
    """The section ``tuning`` of a study.

    Attributes
    ----------
    by : str
        A metric of the records on validation samples.
    methods : dict
        From method to the variants that are its settings.
    """

    by: Annotated[str, Field(pattern="validation")]
    methods: dict[str, Annotated[list[str], Field(min_length=1)]]


def chosen(tuning: Tuning, table: Table) -> dict[str, str]:
    """Return each method's variant of the best mean over its seeds; of equals the first.

    A method of which a run is missing has none yet.
    """
    found = {}
    for method, names in tuning.methods.items():
        seeds = {seed for name in names for seed in table.get(name, {})}
        if not seeds or any(set(table.get(name, {})) != seeds for name in names):
            continue
        falls = better(tuning.by)
        ranks = {name: _rank(table[name].values(), falls) for name in names}
        found[method] = max(names, key=ranks.__getitem__)
    return found


def _rank(runs: Iterable[Mapping[str, Any]], falls: bool) -> float:
    """Return how good a setting is: the larger, the better; one that diverged is the worst."""
    values = [run[BY] for run in runs]
    if None in values:
        return -math.inf
    mean: float = sum(values) / len(values)
    return -mean if falls else mean


def compared(result: Mapping[str, Any]) -> Table:
    """Return what a study's verdict is about: its variants, or its methods as chosen."""
    table: Table = result["variants"]
    picks = (result.get("tuning") or {}).get("chosen")
    if picks is None:
        return table
    return {method: table[name] for method, name in picks.items()}


def grid(result: Mapping[str, Any]) -> list[list[str]]:
    """Return the settings that were tried, as text, header first; the chosen ones are marked."""
    tuning, table = result["tuning"], result["variants"]
    lines = [["method", "setting", tuning["by"], "chosen"]]
    for method, names in tuning["methods"].items():
        for name in names:
            spread = Spread.of(run[BY] for run in table.get(name, {}).values())
            mark = "yes" if tuning["chosen"].get(method) == name else ""
            lines.append([method, name, spread.text(".4f"), mark])
    return lines
