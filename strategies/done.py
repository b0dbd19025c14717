"""DONE: an approximate Newton step by Richardson iterations (Dinh et al. 2022, arXiv 2012.05625).

One iteration takes two rounds:

    odd round    client k:  grad L_k(theta)
                 server:    g <- weighted mean of grad L_k(theta)
    even round   client k:  d_k = 0;  d_k <- d_k - lr (H_k d_k + g), once for every local step,
                            with H_k the Hessian of L_k at theta
                 server:    theta <- theta + server_lr * weighted mean of d_k;  g <- 0

d_k approaches -H_k^-1 g where lr is below 2 over the largest eigenvalue of H_k, so that theta
approaches the minimizer wherever the mean of H_k^-1 is near the inverse of the mean of H_k.

How it lives here: gradient and direction come from the same local solver, `Richardson`, whose
``answer`` goes up. Its steps are along the gradient of the local quadratic model,
H_k (theta_k - theta) + g, with theta_k = theta + d_k, so DONE is gradient descent on another local
objective. The rounds of an iteration are told apart by their number; an odd round whose replies
are all lost leaves g = 0 and the even round after it changes nothing. After an even round that was
lost, g is still there: the clients then answer grad L_k + g, and the server takes g off again.

A message carries 2d floats down and d up in both rounds, since nodes keep no model in between: 6d
an iteration, where the paper's accounting has 4d. A Hessian product counts as two gradients. The
authors take all of a client's samples (``local.batch: 0``); with batches every step has another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor

from strategies.algorithm import Client, Cohort, Vectors
from strategies.fedavg import FedAvg
from strategies.optimizer import Optimizer


def asks_gradient(round_: int) -> bool:
    """Return whether a round, from 1, is the first of its iteration."""
    return round_ % 2 == 1


@dataclass(frozen=True)
class Richardson(Optimizer):
    """Richardson's iteration on the local Newton system, or the gradient alone.

    Attributes
    ----------
    lr : float
        Step of the iteration, below 2 over the Hessian's largest eigenvalue.
    """

    lr: Annotated[float, Gt(0)] = 0.008

    def init(self, theta: Tensor, memory: Mapping[str, Tensor]) -> Vectors:
        """Return d = 0."""
        return {"answer": torch.zeros_like(theta)}

    def length(self, round_: int, steps: int) -> int:
        """Return 1 where the gradient is asked for."""
        return 1 if asks_gradient(round_) else steps

    def models(self, round_: int) -> bool:
        """Return whether the direction is asked for."""
        return not asks_gradient(round_)

    def step(
        self, theta: Tensor, direction: Tensor, state: Vectors, round_: int
    ) -> tuple[Tensor, Vectors]:
        """Return theta and d after one iteration; theta and the gradient in an odd round."""
        if asks_gradient(round_):
            return theta, {"answer": direction}
        theta.sub_(direction, alpha=self.lr)
        return theta, {"answer": torch.sub(state["answer"], direction, alpha=self.lr)}


@dataclass(frozen=True)
class Done(FedAvg):
    """The server of clients that answer by `Richardson`; ``server_lr`` scales the direction."""

    needs = ("answer",)

    @property
    def up(self) -> tuple[str, ...]:
        """What the round asks for."""
        return ("answer",)

    def begin(
        self, down: Mapping[str, Tensor], memory: Vectors, client: Client
    ) -> Vectors:
        """Hold g."""
        return {"gradient": down["gradient"]}

    def direction(
        self, gradient: Tensor, theta: Tensor, anchor: Tensor, state: Vectors
    ) -> Tensor:
        """Return H_k d_k + g; in an odd round grad L_k + g."""
        return gradient + state["gradient"]

    def finish(
        self, theta: Tensor, anchor: Tensor, state: Vectors, effort: Tensor
    ) -> tuple[Vectors, Vectors]:
        """Return nothing of its own: the optimizer's answer goes up."""
        return {}, {}

    def start(self, theta: Tensor) -> Vectors:
        """Return the model and g = 0."""
        return {"theta": theta, "gradient": torch.zeros_like(theta)}

    def down(self, server: Vectors) -> Vectors:
        """Return the model and g."""
        return dict(server)

    def update(self, server: Vectors, mean: Vectors, cohort: Cohort) -> Vectors:
        """Keep the gradient, or move along the direction."""
        theta = server["theta"]
        if asks_gradient(cohort.round_):
            return {"theta": theta, "gradient": mean["answer"] - server["gradient"]}
        theta = theta + self.server_lr * mean["answer"]
        return {"theta": theta, "gradient": torch.zeros_like(theta)}
