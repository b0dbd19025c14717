"""Push-DIGing: gradient tracking over directed networks (Nedic, Olshevsky and Shi 2017).

    u <- P (u - eta y)      w <- P w      z = u / w      y <- P y + g(z+) - g(z)      y(0) = g(z(0))

y_i follows the mean gradient instead of client i's own, so that all agree on the minimizer with a
constant step, where Push-Sum alone keeps a spread of the order of eta. At all times
sum_i y_i = sum_i g_i.

Here eta g_i is the difference that local training makes, -(z_i' - z_i): the formula as it stands
with one full-batch SGD step (eta is then the local learning rate, constant over the rounds), and
the same rule for several steps or another optimizer. A client that has not trained in a round
keeps its last g_i and does not step. A client that leaves takes its g_i out of y_i and hands on the
rest; of one that crashes y_i - g_i is lost, and the others settle that much off their minimizer.
Twice Push-Sum's bytes travel over a link: u and y, with one weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from strategies.gossip import Gossip
from strategies.pushsum import Matrix, State, column_sums
from strategies.topology import Ints

if TYPE_CHECKING:
    from strategies.gossip import Carried, Kept


@dataclass(frozen=True)
class PushDIGing(Gossip):
    """Push-Sum with gradient tracking."""

    carries: ClassVar[tuple[str, ...]] = ("model", "tracker")

    def start(self, model: State) -> tuple[Carried, Kept]:
        """Carry y = 0 beside the model; keep g = 0."""
        tracker = State.of(np.zeros_like(model.x))
        return (
            {"model": model, "tracker": tracker},
            {"gradient": np.zeros_like(model.x)},
        )

    def take(self, carried: Carried, kept: Kept, rows: Ints, change: Matrix) -> None:
        """Replace g, correct y by the change and step along it, for those who trained."""
        tracker, before = carried["tracker"].x, kept["gradient"]
        tracker[rows] -= change + before[rows]
        before[rows] = -change
        carried["model"].x[rows] -= tracker[rows]

    def retire(self, carried: Carried, kept: Kept, k: int) -> None:
        """Take a client's g out of y, so that y follows those who stay."""
        carried["tracker"].x[k] -= kept["gradient"][k]
        kept["gradient"][k] = 0

    def audit(self, carried: Carried, kept: Kept) -> dict[str, float]:
        """Compare the sum of y, lost parts included, with the sum of g."""
        tracker = carried["tracker"]
        there, here = tracker.total()[0] + tracker.lost_x, column_sums(kept["gradient"])
        scale = float(np.linalg.norm(kept["gradient"])) * len(tracker.w) ** 0.5
        return {"tracking": float(np.linalg.norm(there - here)) / max(scale, 1e-30)}
