"""IFCA: K models, and each client trains the one that suits it best (Ghosh et al. 2020, NeurIPS).

Algorithm 1 of arXiv 2006.04088, with model averaging:

    client k:  j = argmin_j L_k(theta_j) over all of its training samples
               theta_j' from theta_j by several SGD steps on L_k
    server:    theta_j <- theta_j + server_lr * (mean of theta_j' - theta_j over those that chose j)

A cluster that nobody chose stays. Nothing is remembered: a client chooses anew in every round, and
again when it is judged. The server's vector is the K models, one after the other; a client needs
all of them, and sends K d numbers of which all but its own cluster's are zero, and its vote, so
that a node's mean tells who chose which.

K models that start alike stay alike, so they start from different draws. If one of them suits all
clients best at the start, the others never train (the authors restart then): see the record's
``strategy/votes_j``, the shares of the last cohort's weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from strategies.algorithm import Client, Cohort, Net, Vectors
from strategies.fedavg import FedAvg


@dataclass(frozen=True)
class Clustered(FedAvg):
    """Iterative federated clustering.

    Attributes
    ----------
    learners : int
        K, the clusters.
    """

    learners: Annotated[int, Ge(2)] = 3

    @property
    def up(self) -> tuple[str, ...]:
        """All clusters' differences, and who chose which."""
        return ("delta", "votes")

    def candidates(self, down: Mapping[str, Tensor]) -> Tensor:
        """Return the K models."""
        return down["theta"].view(self.learners, -1)

    def survey(self, memory: Vectors, losses: Tensor) -> Vectors:
        """Choose the model of least mean loss."""
        choice = torch.zeros_like(losses[:, 0])
        choice[losses.mean(1).argmin()] = 1
        return {**memory, "choice": choice}

    def origin(self, down: Mapping[str, Tensor], memory: Vectors) -> Tensor:
        """Return the model chosen, (d,)."""
        return self.candidates(down)[memory["choice"].argmax()]

    def begin(
        self, down: Mapping[str, Tensor], memory: Vectors, client: Client
    ) -> Vectors:
        """Hold the choice."""
        return {"choice": memory["choice"]}

    def finish(
        self, theta: Tensor, anchor: Tensor, state: Vectors, effort: Tensor
    ) -> tuple[Vectors, Vectors]:
        """Return the difference in its cluster's place, and the vote."""
        delta = state["choice"][:, None] * (theta - anchor)
        return {"delta": delta.reshape(-1), "votes": state["choice"]}, {}

    def start(self, theta: Tensor) -> Vectors:
        """Return the K models, and no votes."""
        return {"theta": theta, **self._told(theta.new_zeros(self.learners))}

    def update(self, server: Vectors, mean: Vectors, cohort: Cohort) -> Vectors:
        """Move each model by the mean over those that chose it."""
        votes = mean["votes"]
        scale = torch.where(votes > 0, 1 / votes, torch.zeros_like(votes))
        moved = mean["delta"].view(self.learners, -1) * scale[:, None]
        theta = server["theta"] + self.server_lr * moved.reshape(-1)
        return {"theta": theta, **self._told(votes)}

    def _told(self, votes: Tensor) -> Vectors:
        """Return each cluster's share as a vector of its own, which the record shows."""
        return {f"votes_{j}": vote[None] for j, vote in enumerate(votes)}

    def predict(
        self, net: Net, down: Mapping[str, Tensor], memory: Vectors, x: Tensor
    ) -> Tensor:
        """Return the outputs of the model that the client chooses now."""
        return net(self.origin(down, memory), x)
