"""FedDyn: dynamic regularization (Acar et al. 2021, ICLR, arXiv 2111.04263, Algorithm 1).

    client k:  theta_k = argmin L_k(theta) - <g_k, theta> + (alpha/2) ||theta - anchor||^2,
               approached from theta = anchor by steps along
               grad L_k(theta) - g_k + alpha (theta - anchor)
               g_k <- g_k - alpha (theta_k - anchor)                     (once, after training)
    server:    h     <- h - (alpha/m) sum_{k in P} (theta_k - anchor)    (m = all clients)
               theta <- mean_{k in P} theta_k - h/alpha                  (uniform mean)

Both start at zero, so h = (1/m) sum_k g_k after every round, whoever took part and however well
the local problems were solved. At the fixed point every theta_k equals theta, h = 0 and
g_k = grad L_k(theta): the minimizer of the mean objective, which FedAvg misses.

``weighting: samples`` minimizes sum_k n_k L_k instead, as the authors' code does: alpha becomes
alpha / w_k for client k, with w_k = n_k / mean(n). The memory kept here is G_k = w_k g_k; it
follows G_k <- G_k - alpha (theta_k - anchor) in both cases, and h is its mean.

Three models have a name, and the record names the one that it reports:

    server   theta above. It carries -h/alpha, so it can be much noisier than the others.
    active   the mean of the cohort's theta_k.
    all      the mean over all m clients of the last theta_k (theta^0 for those never seen): the
             authors' curves. It costs one more vector up and in memory, so it is asked for by
             ``mean_of_all``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Gt
from torch import Tensor

from strategies.algorithm import Client, Cohort, Vectors


@dataclass(frozen=True)
class FedDyn:
    """Dynamic regularization.

    Attributes
    ----------
    alpha : float
        Weight of the quadratic term; larger keeps clients closer to the server.
    weighting : {"uniform", "samples"}
        Whether the limit minimizes the mean of L_k or the sample-weighted mean.
    mean_of_all : bool
        Also evaluate the mean of all clients' last models, at the cost of one vector up.
    report : {"server", "active", "all"}
        Which of the three models the accuracy of the record and of the summary is about.
    """

    alpha: Annotated[float, Gt(0)] = 0.1
    weighting: Literal["uniform", "samples"] = "uniform"
    mean_of_all: bool = False
    report: Literal["server", "active", "all"] = "server"

    mirror = ("gradient", "h")
    needs = ()

    def __post_init__(self) -> None:
        """Refuse to report a model that is not kept."""
        if self.report == "all" and not self.mean_of_all:
            raise ValueError("report=all needs mean_of_all=true")

    @property
    def up(self) -> tuple[str, ...]:
        """The difference, and the change of the last model if its mean is wanted."""
        return ("delta", "drift") if self.mean_of_all else ("delta",)

    def fresh(self, theta: Tensor) -> Vectors:
        """Return G_k = 0, and 0 for the last model; the server puts theta^0 there."""
        memory = {"gradient": torch.zeros_like(theta)}
        if self.mean_of_all:
            memory["last"] = torch.zeros_like(theta)
        return memory

    def begin(
        self, down: Mapping[str, Tensor], memory: Vectors, client: Client
    ) -> Vectors:
        """Hold the memory, and w_k where it matters."""
        if self.weighting == "uniform":
            return dict(memory)
        return {**memory, "share": down["theta"].new_tensor(client.share)}

    def direction(
        self, gradient: Tensor, theta: Tensor, anchor: Tensor, state: Vectors
    ) -> Tensor:
        """Return grad - g_k + (alpha/w_k)(theta - anchor), with g_k = G_k/w_k."""
        pull = self.alpha * (theta - anchor) - state["gradient"]
        return gradient + (pull / state["share"] if "share" in state else pull)

    def finish(
        self, theta: Tensor, anchor: Tensor, state: Vectors, effort: Tensor
    ) -> tuple[Vectors, Vectors]:
        """Return the difference; remember G_k - alpha (theta_k - anchor)."""
        delta = theta - anchor
        up = {"delta": delta}
        memory = {"gradient": state["gradient"] - self.alpha * delta}
        if self.mean_of_all:
            up["drift"] = theta - state["last"]
            memory["last"] = theta
        return up, memory

    def weight(self, client: Client) -> float:
        """Return 1: every client counts the same, in both weightings."""
        return 1.0

    def start(self, theta: Tensor) -> Vectors:
        """Return theta^0, h = 0, and the means at theta^0."""
        server = {"theta": theta, "h": torch.zeros_like(theta), "active": theta}
        if self.mean_of_all:
            server |= {"all": theta, "initial": theta}
        return server

    def down(self, server: Vectors) -> Vectors:
        """Return the model alone: d floats down, as FedAvg."""
        return {"theta": server["theta"]}

    def update(self, server: Vectors, mean: Vectors, cohort: Cohort) -> Vectors:
        """Take steps 4 and 5 of Algorithm 1."""
        h = server["h"] - self.alpha * (cohort.size / cohort.total) * mean["delta"]
        active = server["theta"] + mean["delta"]
        after = {"theta": active - h / self.alpha, "h": h, "active": active}
        if self.mean_of_all:
            # A newcomer reports theta_k - 0, but its last model in the mean was theta^0.
            drift = cohort.size * mean["drift"] - cohort.newcomers * server["initial"]
            after["all"] = server["all"] + drift / cohort.total
            after["initial"] = server["initial"]
        return after

    def recount(self, server: Vectors, sums: Vectors, seen: int, total: int) -> Vectors:
        """Return h, and the mean of the last models, from what the clients remember."""
        after = {**server, "h": sums["gradient"] / total}
        if self.mean_of_all:
            unseen = (total - seen) * server["initial"]
            after["all"] = (sums["last"] + unseen) / total
        return after

    def models(self, server: Vectors) -> Vectors:
        """Return the reported model first, then the others."""
        models = {"server": server["theta"], "active": server["active"]}
        if self.mean_of_all:
            models["all"] = server["all"]
        return {self.report: models.pop(self.report), **models}
