"""Local optimizers: how a client steps along the direction that its algorithm gives.

    v     <- momentum v + (direction + weight_decay theta)
    theta <- theta - lr v

An optimizer is a pure function on vectors; its state lives for one local training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from strategies.algorithm import Vectors


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with momentum and coupled weight decay.

    Weight decay is part of the local objective, (weight_decay/2)||theta||^2: the algorithms'
    memories and fixed points refer to the objective with it.

    Attributes
    ----------
    lr : float
        Learning rate of the first round.
    lr_decay : float
        Factor of the learning rate from one round to the next.
    momentum : float
        Weight of the previous velocity; it starts at zero in every round.
    weight_decay : float
        Weight of the quadratic penalty.
    """

    lr: Annotated[float, Gt(0)] = 0.1
    lr_decay: Annotated[float, Gt(0)] = 1.0
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.0
    weight_decay: Annotated[float, Ge(0)] = 0.0

    def init(self, theta: Tensor) -> Vectors:
        """Return the state before the first local step."""
        state = {"effort": theta.new_zeros(())}
        if self.momentum:
            state |= {"velocity": torch.zeros_like(theta), "push": theta.new_zeros(())}
        return state

    def step(
        self, theta: Tensor, direction: Tensor, state: Vectors, round_: int
    ) -> tuple[Tensor, Vectors]:
        """Return theta and state after one step of the given round (counted from 1)."""
        lr = self.lr * self.lr_decay ** (round_ - 1)
        if self.weight_decay:
            direction = direction + self.weight_decay * theta
        if not self.momentum:
            theta = torch.sub(theta, direction, alpha=lr)
            return theta, {"effort": state["effort"] + lr}
        velocity = self.momentum * state["velocity"] + direction
        # The same recursion on a direction of constant 1 gives the directions' total weight.
        push = self.momentum * state["push"] + 1
        effort = state["effort"] + lr * push
        theta = torch.sub(theta, velocity, alpha=lr)
        return theta, {"velocity": velocity, "push": push, "effort": effort}
