"""What an estimate of influence tells: agreement with retraining, doubts, the list of samples."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau
from sklearn.metrics import r2_score
from torch import Tensor

from app.records import Floats

#: Below this R2 the lists come with a warning.
TRUSTED = 0.5
#: The estimate has settled if half the steps give the same up to this.
SETTLED = 0.1
Agreement = Mapping[str, float | None]
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Look:
    """The estimate after some steps.

    Attributes
    ----------
    step : int
        m.
    predicted : Tensor
        Changes of the mean validation loss, (N,), on the CPU.
    messages, bytes, seconds : float
        Spent until then.
    """

    step: int
    predicted: Tensor
    messages: int
    bytes: int
    seconds: float


def agreement(predicted: Floats, actual: Floats) -> Agreement:
    """Return how well predictions agree with what happened.

    Returns
    -------
    dict
        ``r2``, the share of the actual changes' variance that the predictions explain as they are
        (negative where their mean explains more); ``kendall``, the rank correlation tau;
        ``correlation``, which forgives a wrong scale. None where they are not defined.
    """
    names = ("r2", "kendall", "correlation")
    whole = np.isfinite(predicted).all() and np.isfinite(actual).all()
    if len(actual) < 2 or not whole or np.ptp(actual) == 0:
        return dict.fromkeys(names)
    spread = np.ptp(predicted) > 0
    return {
        "r2": float(r2_score(actual, predicted)),
        "kendall": float(kendalltau(predicted, actual).statistic) if spread else None,
        "correlation": float(np.corrcoef(predicted, actual)[0, 1]) if spread else None,
    }


def unsettled(looks: Sequence[Look]) -> list[str]:
    """Return a warning if the second half of the steps still changed the estimate much."""
    last, at = looks[-1].predicted, looks[-1].step / 2
    half = min(looks, key=lambda look: abs(look.step - at)).predicted
    if len(looks) == 1:
        half = last.new_zeros(last.shape)  # as before the first step
    if not last.isfinite().all():
        return [
            "the series diverged; take a smaller estimate.alpha or some estimate.damping"
        ]
    moved = float((last - half).norm() / last.norm().clamp(min=1e-300))
    if moved <= SETTLED:
        return []
    return [
        f"the second half of the steps changed the estimate by {moved:.0%}: it has not "
        "settled; take more rounds, a larger estimate.alpha or some estimate.damping"
    ]


def disagreement(found: Agreement) -> list[str]:
    """Return a warning if predictions say little of what happened."""
    r2 = found["r2"]
    if r2 is not None and r2 >= TRUSTED:
        return []
    value = "undefined" if r2 is None else f"{r2:.2f}"
    return [
        f"predicted and actual changes disagree (R2 {value}): do not act on these lists"
    ]


def told(found: Agreement, checked: int) -> str:
    """Return the agreement as a line."""
    if not checked:
        return "predictions not checked (estimate.check=0)"
    shown = {k: "undefined" if v is None else f"{v:.3f}" for k, v in found.items()}
    return (
        f"predicted against actual, {checked} samples: R2 {shown['r2']}, "
        f"Kendall tau {shown['kendall']}, correlation {shown['correlation']}"
    )


def listed(
    rows: Sequence[NDArray[Any]],
    labels: Sequence[int],
    predicted: Floats,
    actual: Mapping[int, float],
) -> Rows:
    """Return a row for each training sample: a client's together, the most harmful first.

    Parameters
    ----------
    rows : sequence of ndarray
        For each client, where its training samples lie in the data.
    labels : sequence of int
        The classes of the data's training samples.
    predicted : ndarray
        Changes of the mean validation loss, client after client.
    actual : mapping
        Those that are known, by their place in ``predicted``.
    """
    table, start = [], 0
    for client, index in enumerate(rows):
        mine = predicted[start : start + len(index)]
        for place in np.argsort(mine, kind="stable").tolist():
            sample = int(index[place])
            row: dict[str, Any] = {
                "client": client,
                "sample": sample,
                "label": labels[sample],
            }
            row |= {
                "predicted": float(mine[place]),
                "actual": actual.get(start + place),
            }
            table.append(row)
        start += len(index)
    return table


def as_csv(table: Rows) -> str:
    """Return rows as CSV; what is not known or not finite stays empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table[0])
    for row in table:
        writer.writerow(
            None if isinstance(v, float) and not math.isfinite(v) else v
            for v in row.values()
        )
    return text.getvalue()
