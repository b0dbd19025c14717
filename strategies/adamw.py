"""AdamW on the clients (Loshchilov and Hutter 2019, arXiv 1711.05101): a first-order baseline.

    m     <- beta1 m + (1 - beta1) direction
    v     <- beta2 v + (1 - beta2) direction^2
    theta <- theta - lr weight_decay theta - lr m' / (sqrt(v') + eps)

with m' = m / (1 - beta1^t) and v' = v / (1 - beta2^t), where t counts the steps since m and v
were zero.
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
class AdamW(Optimizer):
    """Adam with decoupled weight decay.

    Attributes
    ----------
    lr : float
        Learning rate of the first round.
    lr_decay : float
        Factor of the learning rate from one round to the next.
    beta1, beta2 : float
        Weights of the previous moments.
    eps : float
        Added to the denominator.
    weight_decay : float
        Share of theta, times the learning rate, that a step takes away.
    moments : {"persist", "reset"}
        Whether m, v and t start where the client's last participation left them, or at zero.
    """

    lr: Annotated[float, Gt(0)] = 1e-3
    lr_decay: Annotated[float, Gt(0)] = 1.0
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.999
    eps: Annotated[float, Gt(0)] = 1e-8
    weight_decay: Annotated[float, Ge(0)] = 0.01
    moments: Moments = "persist"

    @property
    def kept(self) -> tuple[str, ...]:
        """The moments and their age, if they persist."""
        return ("m", "v", "age") if self.moments == "persist" else ()

    def init(self, theta: Tensor, memory: Mapping[str, Tensor]) -> Vectors:
        """Return the state before the first local step."""
        zero = torch.zeros_like(theta)
        state = {"m": zero, "v": zero, "age": theta.new_zeros(1)}
        return state | {name: memory[name] for name in self.kept if name in memory}

    def step(
        self, theta: Tensor, direction: Tensor, state: Vectors, round_: int
    ) -> tuple[Tensor, Vectors]:
        """Return theta and state after one step of the given round (counted from 1)."""
        lr = self.lr * self.lr_decay ** (round_ - 1)
        age = state["age"] + 1
        m = torch.lerp(direction, state["m"], self.beta1)
        v = torch.lerp(direction.square(), state["v"], self.beta2)
        scale = (v / (1 - self.beta2**age)).sqrt() + self.eps
        along = m / (1 - self.beta1**age) / scale
        theta.mul_(1 - lr * self.weight_decay).sub_(along, alpha=lr)
        return theta, {"m": m, "v": v, "age": age}
