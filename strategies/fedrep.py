"""FedRep: a shared body below heads that stay with their clients (Collins et al. 2021, ICML).

Algorithm 1 of arXiv 2102.07078; with ``joint``, FedPer (Arivazhagan et al. 2019, arXiv 1912.00818).

    client k:  h_k   by the first ``head_share`` of its steps, the body b fixed
               b_k   by the others, h_k fixed;   ``joint``: all steps move both
    server:    b <- b + server_lr * sum_k w_k (b_k - b) / sum_k w_k

With local.epochs=5, head_share=0.8 is four epochs for the head and one for the body, as in the
paper's alternation. A client of very few steps, T < 0.5 / (1 - head_share), so one or two at 0.8,
trains its head alone. The model of client k is (b, h_k); the head is the last ``head`` tensors of
the model, weight and bias of its last layer. The message has zeros in the head's place, so that
nothing of it is told and the algorithm runs over a network, too; the server's own head stays as it
was drawn, and is what a client starts from that never took part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Self

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from strategies.algorithm import Net, Vectors
from strategies.fedavg import FedAvg
from strategies.vector import Layout


@dataclass(frozen=True)
class FedRep(FedAvg):
    """A shared body, heads of the clients' own.

    Attributes
    ----------
    head : int
        How many of the model's last tensors are the head.
    head_share : float
        Share of a client's steps that move the head; the rest move the body.
    joint : bool
        Whether all steps move both (FedPer).
    width : int
        Numbers in the head; the model says it (`tailored`).
    """

    head: Annotated[int, Ge(1)] = 2
    head_share: Annotated[float, Gt(0), Lt(1)] = 0.8
    joint: bool = False
    width: Annotated[int, Ge(0)] = 0

    def tailored(self, layout: Layout) -> Self:
        """Return it for a model; ValueError if nothing would be shared."""
        if self.head >= len(layout.sizes):
            raise ValueError(
                f"head={self.head}: the model has {len(layout.sizes)} tensors, so no "
                "body would be shared; use a model of several layers, or strategy=local"
            )
        return replace(self, width=sum(layout.sizes[-self.head :]))

    def fresh(self, theta: Tensor) -> Vectors:
        """Return the head of the model received."""
        return {"head": self._split(theta)[1]}

    def origin(self, down: Mapping[str, Tensor], memory: Vectors) -> Tensor:
        """Return (b, h_k)."""
        return torch.cat([self._split(down["theta"])[0], memory["head"]])

    def moves(self, theta: Tensor, progress: Tensor) -> Tensor:
        """Return the head's entries first, then the body's."""
        place = torch.arange(len(theta), device=theta.device)
        head = place >= len(theta) - self.width
        return head == (progress < self.head_share) if not self.joint else head | ~head

    def finish(
        self, theta: Tensor, anchor: Tensor, state: Vectors, effort: Tensor
    ) -> tuple[Vectors, Vectors]:
        """Return the body's difference; remember h_k."""
        body, head = self._split(theta - anchor)
        delta = torch.cat([body, torch.zeros_like(head)])
        return {"delta": delta}, {"head": self._split(theta)[1]}

    def predict(
        self, net: Net, down: Mapping[str, Tensor], memory: Vectors, x: Tensor
    ) -> Tensor:
        """Return the outputs of (b, h_k)."""
        return net(self.origin(down, memory), x)

    def _split(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return body and head of a vector."""
        edge = len(theta) - self.width
        return theta[:edge], theta[edge:]
