"""SCAFFOLD: control variates against client drift (Karimireddy et al. 2020, arXiv 1910.06378).

    client k:  steps along grad L_k(theta) - c_k + c
               c_k+ = c_k - c + (anchor - theta_k) / (K eta)          (option II of the paper)
    server:    theta <- theta + server_lr * mean_{k in P} (theta_k - anchor)
               c     <- c + (|P|/m) * mean_{k in P} (c_k+ - c_k)

c_k starts at zero, so c = mean over all m clients of c_k after every round. K eta is the total
weight with which directions entered theta_k, so the formula holds with momentum too: c_k+ is then
the weighted mean of the gradients seen on the way (and, where moments persist, of what is left of
earlier rounds' directions). Means are uniform, as in the paper. The message
carries 2d floats in each direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor

from strategies.algorithm import Client, Cohort, Vectors


@dataclass(frozen=True)
class Scaffold:
    """Stochastic controlled averaging.

    Attributes
    ----------
    server_lr : float
        Step of the server along the mean difference.
    """

    server_lr: Annotated[float, Gt(0)] = 1.0

    mirror = ("control", "control")
    up = ("delta", "control")
    needs = ("effort",)

    def fresh(self, theta: Tensor) -> Vectors:
        """Return c_k = 0."""
        return {"control": torch.zeros_like(theta)}

    def begin(
        self, down: Mapping[str, Tensor], memory: Vectors, client: Client
    ) -> Vectors:
        """Hold c_k and the correction c - c_k."""
        control = memory["control"]
        return {"control": control, "correction": down["control"] - control}

    def direction(
        self, gradient: Tensor, theta: Tensor, anchor: Tensor, state: Vectors
    ) -> Tensor:
        """Return grad - c_k + c."""
        return gradient + state["correction"]

    def finish(
        self, theta: Tensor, anchor: Tensor, state: Vectors, effort: Tensor
    ) -> tuple[Vectors, Vectors]:
        """Return both differences; remember c_k+."""
        delta = theta - anchor
        # c_k+ - c_k = -c - delta/(K eta), and correction + c_k = c.
        change = -(state["correction"] + state["control"]) - delta / effort
        return {"delta": delta, "control": change}, {
            "control": state["control"] + change
        }

    def weight(self, client: Client) -> float:
        """Return 1: every client counts the same."""
        return 1.0

    def start(self, theta: Tensor) -> Vectors:
        """Return the model and c = 0."""
        return {"theta": theta, "control": torch.zeros_like(theta)}

    def down(self, server: Vectors) -> Vectors:
        """Return the model and c."""
        return dict(server)

    def update(self, server: Vectors, mean: Vectors, cohort: Cohort) -> Vectors:
        """Move the model by the mean over the cohort, c by the mean over all m clients."""
        share = cohort.size / cohort.total
        return {
            "theta": server["theta"] + self.server_lr * mean["delta"],
            "control": server["control"] + share * mean["control"],
        }

    def recount(self, server: Vectors, sums: Vectors, seen: int, total: int) -> Vectors:
        """Return c from what the clients remember."""
        return {**server, "control": sums["control"] / total}

    def models(self, server: Vectors) -> Vectors:
        """Return the server's model."""
        return {"server": server["theta"]}
