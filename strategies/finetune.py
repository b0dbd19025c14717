"""FedAvg with local adaptation: everybody trains one model, and each a little more for itself.

    training:  FedAvg
    judging:   client k takes ``epochs`` epochs of its own SGD steps from the theta that it
               receives, and is judged with what comes out

The simplest personalization, hard to beat where clients have samples enough (Yu et al. 2020, arXiv
2002.04758; Cheng et al. 2021, arXiv 2108.07313). Nothing is remembered and nothing travels beside
FedAvg's model. With ``epochs: 0`` it is FedAvg.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge
from torch import Tensor

from strategies.algorithm import Net, Vectors
from strategies.fedavg import FedAvg


@dataclass(frozen=True)
class FineTune(FedAvg):
    """FedAvg whose clients are judged after some training of their own.

    Attributes
    ----------
    epochs : int
        How much of it.
    """

    epochs: Annotated[int, Ge(0)] = 1

    @property
    def practice(self) -> int:
        """The epochs before a client is judged."""
        return self.epochs

    def predict(
        self, net: Net, down: Mapping[str, Tensor], memory: Vectors, x: Tensor
    ) -> Tensor:
        """Return the outputs of the model, adapted by then."""
        return net(down["theta"], x)
