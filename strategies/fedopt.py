"""FedOpt: the mean difference as a gradient for the server's own optimizer.

Reddi et al. 2021 (arXiv 2003.00295), Algorithm 2, with Delta the weighted mean of theta_k - theta:

    sgd     m <- momentum m + Delta                theta <- theta + server_lr m
    adam    m <- momentum m + (1 - momentum) Delta
            v <- second v + (1 - second) Delta^2
            theta <- theta + server_lr m / (sqrt(v) + tau)
    yogi    as adam, but v <- v - (1 - second) Delta^2 sign(v - Delta^2)

``sgd`` is the server momentum of Hsu et al. 2019 (arXiv 1909.06335), and FedAvg without momentum.
As in the paper v starts at tau^2, and nothing is corrected for the start. Clients are FedAvg's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from strategies.algorithm import Cohort, Vectors
from strategies.fedavg import FedAvg

#: What the server's optimizer remembers: (m, v); an unused one is None.
Moments = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class FedOpt(FedAvg):
    """A server optimizer over federated averaging.

    Attributes
    ----------
    weighting : {"samples", "uniform"}
        Whether a client counts by its samples or as one.
    server_lr : float
        Learning rate of the server.
    optimizer : {"sgd", "adam", "yogi"}
        The server's optimizer.
    momentum : float
        Weight of the earlier differences (beta_1).
    second : float
        Weight of their earlier squares (beta_2).
    tau : float
        What keeps the adaptive step bounded.
    """

    optimizer: Literal["sgd", "adam", "yogi"] = "sgd"
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    second: Annotated[float, Ge(0), Lt(1)] = 0.99
    tau: Annotated[float, Gt(0)] = 1e-3

    def start(self, theta: Tensor) -> Vectors:
        """Return the model, m = 0 and v = tau^2 where they are used."""
        server = {"theta": theta}
        if self.momentum:
            server["momentum"] = torch.zeros_like(theta)
        if self.optimizer != "sgd":
            server["second"] = torch.full_like(theta, self.tau**2)
        return server

    def update(self, server: Vectors, mean: Vectors, cohort: Cohort) -> Vectors:
        """Take one step of the server's optimizer."""
        moments = server.get("momentum"), server.get("second")
        theta, after = self.step(
            server["theta"], moments, mean["delta"], self.server_lr, self.momentum
        )
        return {"theta": theta} | self.kept(after)

    def kept(self, moments: Moments) -> Vectors:
        """Return the moments by name."""
        named = dict(zip(("momentum", "second"), moments, strict=True))
        return {n: v for n, v in named.items() if v is not None}

    def step(
        self,
        theta: Tensor,
        moments: Moments,
        delta: Tensor,
        lr: float | Tensor,
        momentum: float | Tensor,
    ) -> tuple[Tensor, Moments]:
        """Return model and moments after a step, differentiable by every tensor."""
        m, v = moments
        if self.optimizer == "sgd":
            push = delta if m is None else momentum * m + delta
            return theta + lr * push, (m if m is None else push, None)
        assert v is not None, "adaptive optimizers keep the squares"
        push = delta if m is None else momentum * m + (1 - momentum) * delta
        square = delta.square()
        if self.optimizer == "adam":
            v = self.second * v + (1 - self.second) * square
        else:
            v = v - (1 - self.second) * square * torch.sign(v - square)
        # Where v is zero so is its derivative here, whatever that of a root at zero.
        root = torch.where(v == 0, v, torch.where(v == 0, 1, v).sqrt())
        theta = theta + lr * push / (root + self.tau)
        return theta, (m if m is None else push, v)
