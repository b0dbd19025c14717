"""FedAvg: clients train, the server averages (McMahan et al. 2017, arXiv 1602.05629).

    client k:  theta_k = several SGD steps on L_k, started at theta
    server:    theta <- theta + server_lr * sum_k w_k (theta_k - theta) / sum_k w_k

with w_k = n_k (``weighting: samples``) or 1 (``uniform``).

On quadratics L_k = 1/2 theta'A_k theta - b_k'theta with E full gradient steps of size eta, FedAvg
does not stop at the global minimizer but at [sum P_k]^-1 sum P_k A_k^-1 b_k with
P_k = I - (I - eta A_k)^E: the bias that the other algorithms here remove.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Gt
from torch import Tensor

from strategies.algorithm import Client, Cohort, Vectors


@dataclass(frozen=True)
class FedAvg:
    """Federated averaging.

    Attributes
    ----------
    weighting : {"samples", "uniform"}
        Whether a client counts by its samples or as one.
    server_lr : float
        Step of the server along the mean difference; 1 is plain averaging.
    """

    weighting: Literal["samples", "uniform"] = "samples"
    server_lr: Annotated[float, Gt(0)] = 1.0

    mirror = None
    needs: ClassVar[tuple[str, ...]] = ()

    @property
    def up(self) -> tuple[str, ...]:
        """The difference alone."""
        return ("delta",)

    def fresh(self, theta: Tensor) -> Vectors:
        """Return nothing: there is no memory."""
        return {}

    def begin(
        self, down: Mapping[str, Tensor], memory: Vectors, client: Client
    ) -> Vectors:
        """Return nothing: there is no state."""
        return {}

    def direction(
        self, gradient: Tensor, theta: Tensor, anchor: Tensor, state: Vectors
    ) -> Tensor:
        """Step along the gradient itself."""
        return gradient

    def finish(
        self, theta: Tensor, anchor: Tensor, state: Vectors, effort: Tensor
    ) -> tuple[Vectors, Vectors]:
        """Return the difference theta_k - theta."""
        return {"delta": theta - anchor}, {}

    def weight(self, client: Client) -> float:
        """Return n_k or 1."""
        return float(client.samples) if self.weighting == "samples" else 1.0

    def start(self, theta: Tensor) -> Vectors:
        """Return the model alone."""
        return {"theta": theta}

    def down(self, server: Vectors) -> Vectors:
        """Return the model alone."""
        return {"theta": server["theta"]}

    def update(self, server: Vectors, mean: Vectors, cohort: Cohort) -> Vectors:
        """Move along the mean difference."""
        return {"theta": server["theta"] + self.server_lr * mean["delta"]}

    def models(self, server: Vectors) -> Vectors:
        """Return the server's model."""
        return {"server": server["theta"]}
