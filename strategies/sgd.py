"""Stochastic gradient descent, with Polyak's momentum.

v     <- momentum v + (direction + weight_decay theta)
theta <- theta - lr v
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from strategies.algorithm import Vectors
from strategies.optimizer import Moments, Optimizer


@dataclass(frozen=True)
class SGD(Optimizer):
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
        Weight of the previous velocity.
    weight_decay : float
        Weight of the quadratic penalty.
    moments : {"reset", "persist"}
        Whether the velocity starts at zero in every round, or where the client's last
        participation left it.
    """

    lr: Annotated[float, Gt(0)] = 0.1
    lr_decay: Annotated[float, Gt(0)] = 1.0
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.0
    weight_decay: Annotated[float, Ge(0)] = 0.0
    moments: Moments = "reset"

    @property
    def penalty(self) -> float:
        """The weight decay."""
        return self.weight_decay

    @property
    def kept(self) -> tuple[str, ...]:
        """The velocity and its weight, if they persist."""
        persist = self.momentum and self.moments == "persist"
        return ("velocity", "push") if persist else ()

    def init(self, theta: Tensor, memory: Mapping[str, Tensor]) -> Vectors:
        """Return the state before the first local step."""
        state = {"effort": theta.new_zeros(())}
        if self.momentum:
            state |= {"velocity": torch.zeros_like(theta), "push": theta.new_zeros(1)}
        return state | {name: memory[name] for name in self.kept if name in memory}

    def step(
        self, theta: Tensor, direction: Tensor, state: Vectors, round_: int
    ) -> tuple[Tensor, Vectors]:
        """Return theta and state after one step of the given round (counted from 1)."""
        lr = self.lr * self.lr_decay ** (round_ - 1)
        if self.weight_decay:
            direction = direction + self.weight_decay * theta
        if not self.momentum:
            theta.sub_(direction, alpha=lr)
            return theta, {"effort": state["effort"] + lr}
        velocity = self.momentum * state["velocity"] + direction
        # The same recursion on a direction of constant 1 gives the directions' total weight.
        push = self.momentum * state["push"] + 1
        effort = state["effort"] + lr * push.squeeze(0)
        theta.sub_(velocity, alpha=lr)
        return theta, {"velocity": velocity, "push": push, "effort": effort}
