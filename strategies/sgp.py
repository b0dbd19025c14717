"""Stochastic gradient push: local training and Push-Sum in turn.

    step_first   x <- P (x + dz)     w <- P w     z <- x / w         (Assran et al. 2019)
    mix_first    x <- P x     w <- P w     z <- x / w     x <- x + dz
                                                           (Nedic and Olshevsky 2015)

dz_i = z_i' - z_i is what client i's local training from z_i changes: -eta g_i(z_i) with one SGD
step. It is added to x_i as it is. Setting x_i = w_i z_i' instead would weigh client i's gradient by
w_i, and sending z_i with a weight of one would forget the network's bias; both settle elsewhere on
a network with uneven degrees. The price: z_i moves by dz_i / w_i, so local steps must be small
where some w_i is.

With a constant learning rate the clients keep a spread of its order; a complete network of
clients that all train is FedAvg
and one without arcs is local training. ``train_rounds`` ends training, not mixing, after so many
rounds: with 1, the clients average the models that each trained alone (ratio consensus).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from strategies.gossip import Gossip


@dataclass(frozen=True)
class SGP(Gossip):
    """Stochastic gradient push.

    Attributes
    ----------
    order : {"step_first", "mix_first"}
        Which comes first in a round.
    train_rounds : int
        Rounds in which clients train; 0 all.
    """

    order: Literal["step_first", "mix_first"] = "step_first"
    train_rounds: Annotated[int, Ge(0)] = 0

    @property
    def mixes_first(self) -> bool:
        """Whether the network comes before the gradient."""
        return self.order == "mix_first"

    def trains(self, round_: int) -> bool:
        """Return whether clients still train."""
        return not self.train_rounds or round_ <= self.train_rounds
