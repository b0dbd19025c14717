"""FedProx: FedAvg with a leash (Li et al. 2020, arXiv 1812.06127).

    client k:  minimizes L_k(theta) + (mu/2) ||theta - anchor||^2, so it steps along
               grad L_k(theta) + mu (theta - anchor)
    server:    as FedAvg

With local problems solved exactly its fixed point on quadratics solves
sum_k w_k (A_k + mu I)^-1 (A_k theta - b_k) = 0: nearer to the minimizer than FedAvg's, not at it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge
from torch import Tensor

from strategies.algorithm import Vectors
from strategies.fedavg import FedAvg


@dataclass(frozen=True)
class FedProx(FedAvg):
    """FedAvg with the proximal term of weight mu in every local objective.

    Attributes
    ----------
    mu : float
        Weight of the proximal term; 0 is FedAvg.
    """

    mu: Annotated[float, Ge(0)] = 0.01

    def direction(
        self, gradient: Tensor, theta: Tensor, anchor: Tensor, state: Vectors
    ) -> Tensor:
        """Return grad + mu (theta - anchor)."""
        return gradient + self.mu * (theta - anchor)
