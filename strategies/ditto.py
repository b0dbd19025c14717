"""Ditto: each client has a model of its own on a leash to everybody's (Li et al. 2021, ICML).

Algorithm 1 of arXiv 2012.04221:

    client k:  theta_k  from theta by steps along  grad L_k(theta_k)
               v_k      from v_k   by steps along  grad L_k(v_k) + lam (v_k - theta)
    server:    theta <- theta + server_lr * sum_k w_k (theta_k - theta) / sum_k w_k

v_k stays with the client. Its fixed point is the minimizer of L_k + lam/2 |v - theta|^2: with
``lam: 0`` local training alone, and ever closer to FedAvg's model as lam grows (the step lr must
stay below 2 / (lam + curvature)). The two are trained together, one vector [theta_k; v_k] along one
batch after the other, with as many steps each; each is clipped by itself. A client that has not
trained yet takes v_k from the first theta that it receives. The training loss that the record tells
is the sum of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from strategies.algorithm import Client, Net, Vectors
from strategies.fedavg import FedAvg
from strategies.individual import Seen


@dataclass(frozen=True)
class Ditto(FedAvg):
    """Personal models on a leash to the shared one.

    Attributes
    ----------
    lam : float
        Weight of the quadratic term, the paper's lambda.
    """

    lam: Annotated[float, Ge(0)] = 0.1

    def fresh(self, theta: Tensor) -> Vectors:
        """Return v_k = theta."""
        return {"personal": theta}

    def origin(self, down: Mapping[str, Tensor], memory: Vectors) -> Tensor:
        """Return [theta; v_k], (2 d,)."""
        return torch.cat([down["theta"], memory["personal"]])

    def begin(
        self, down: Mapping[str, Tensor], memory: Vectors, client: Client
    ) -> Vectors:
        """Return nothing: the anchor holds both."""
        return {}

    def cost(self, batch: Seen, theta: Tensor, state: Vectors) -> Tensor:
        """Return the sum of both models' losses."""
        shared, own = theta.chunk(2)
        losses = batch.losses(batch.outputs(shared))
        return losses + batch.losses(batch.outputs(own))

    def direction(
        self, gradient: Tensor, theta: Tensor, anchor: Tensor, state: Vectors
    ) -> Tensor:
        """Return both gradients, v's with lam (v - theta)."""
        (shared, _), (_, own) = anchor.chunk(2), theta.chunk(2)
        return gradient + torch.cat(
            [torch.zeros_like(shared), self.lam * (own - shared)]
        )

    def finish(
        self, theta: Tensor, anchor: Tensor, state: Vectors, effort: Tensor
    ) -> tuple[Vectors, Vectors]:
        """Return theta_k - theta; remember v_k."""
        shared, own = theta.chunk(2)
        return {"delta": shared - anchor.chunk(2)[0]}, {"personal": own}

    def predict(
        self, net: Net, down: Mapping[str, Tensor], memory: Vectors, x: Tensor
    ) -> Tensor:
        """Return the outputs of v_k."""
        return net(memory["personal"], x)
