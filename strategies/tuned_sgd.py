"""SGD that also carries the derivative of its result by the logarithm of its learning rate.

    theta <- theta - lr pace g(theta)
    s     <- s - lr pace (g(theta) + H(theta) s)            s = d theta / d log pace

H is the Hessian of the batch's loss (with clipping, the derivative of the clipped gradient). Each
step costs a Hessian product, about two gradients more. The pace comes from the server.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from strategies.algorithm import Vectors
from strategies.optimizer import Optimizer


@dataclass(frozen=True)
class TunedSGD(Optimizer):
    """Stochastic gradient descent with a tangent.

    Attributes
    ----------
    lr : float
        Learning rate of the first round at pace 1.
    lr_decay : float
        Factor of the learning rate from one round to the next.
    weight_decay : float
        Weight of the quadratic penalty (weight_decay/2)||theta||^2.
    """

    lr: Annotated[float, Gt(0)] = 0.1
    lr_decay: Annotated[float, Gt(0)] = 1.0
    weight_decay: Annotated[float, Ge(0)] = 0.0

    @property
    def penalty(self) -> float:
        """The weight decay."""
        return self.weight_decay

    @property
    def along(self) -> str:
        """The tangent."""
        return "slope"

    def init(self, theta: Tensor, memory: Mapping[str, Tensor]) -> Vectors:
        """Return the pace that was sent, and no tangent yet."""
        pace = memory.get("pace", theta.new_ones(1))
        zero = torch.zeros_like(theta)
        return {"effort": theta.new_zeros(()), "pace": pace, "slope": zero}

    def step(
        self, theta: Tensor, direction: Tensor, state: Vectors, round_: int
    ) -> tuple[Tensor, Vectors]:
        """Return theta and state after one step of the given round (counted from 1)."""
        lr = self.lr * self.lr_decay ** (round_ - 1) * state["pace"]
        slope = state["slope"]
        direction = direction + self.weight_decay * theta
        product = state["product"] + self.weight_decay * slope
        after = {
            "effort": state["effort"] + lr.squeeze(0),
            "pace": state["pace"],
            "slope": slope - lr * (direction + product),
        }
        return theta - lr * direction, after
