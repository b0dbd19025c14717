"""Fed-Sophia: a clipped second-order step in every local step (Elbakary et al. 2024).

Of arXiv 2406.06655, built on Sophia (Liu et al. 2023, arXiv 2305.14342, Algorithm 3):

    client k, at every local step:
        m     <- beta1 m + (1 - beta1) grad L_k(theta_k)
        h     <- beta2 h + (1 - beta2) (estimate of diag Hessian)      (when it is due)
        theta_k <- theta_k - lr weight_decay theta_k
        theta_k <- theta_k - lr clip(m / max(gamma h, eps), 1)         (entry by entry)
    server:   theta <- weighted mean of theta_k

m and h are the client's own: they stay with it from round to round (``moments: persist``) and cost
no traffic, so a message is as long as FedAvg's. No entry moves by more than lr in a step, weight
decay aside. Where h is zero or negative the entry moves by lr in the direction of -sign(m).

This is the form (P). The form clip(m / max(h, eps), rho) with the rate lr' is the same with
gamma = rho and lr = rho lr'. The authors' code has lr clip(|m| / (rho bs h'), 1) sign(m), where h'
is without the factor B of the Gauss-Newton-Bartlett estimator and bs stays at 5120: with batches
of B it is gamma = 5120 rho / B, which is 0.1 for their rho = 0.01 and B = 512.

``tau_unit: steps`` estimates the Hessian at every tau-th local step of a client, ``rounds`` at all
local steps of every tau-th round, as the authors' code does. There is no bias correction, in the
authors' code neither.

The local solver, `Sophia`, is an optimizer like any other and works below other algorithms too;
`FedSophia` is FedAvg's mean, which may also average the moments.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from strategies.algorithm import Cohort, Vectors
from strategies.curvature import Estimator, GaussNewtonBartlett, Hutchinson
from strategies.fedavg import FedAvg
from strategies.optimizer import Moments, Optimizer


@dataclass(frozen=True)
class Sophia(Optimizer):
    """Clipped steps scaled by an estimate of the Hessian's diagonal.

    The defaults are the authors' for MNIST.

    Attributes
    ----------
    lr : float
        Learning rate of the first round: the largest change of an entry in a step.
    lr_decay : float
        Factor of the learning rate from one round to the next.
    beta1, beta2 : float
        Weights of the previous m and h.
    gamma : float
        Weight of h: the larger, the fewer entries are clipped. A win rate (share of unclipped
        entries) of 0.1 to 0.5 is what the authors of Sophia advise.
    eps : float
        Least denominator.
    weight_decay : float
        Share of theta, times the learning rate, that a step takes away.
    estimator : {"gnb", "hutchinson"}
        Gauss-Newton-Bartlett, which needs logits, or Hutchinson's.
    law : {"rademacher", "gaussian"}
        Of Hutchinson's random vectors.
    tau : int
        How rarely the Hessian is estimated.
    tau_unit : {"steps", "rounds"}
        Whether tau counts a client's local steps or the rounds.
    moments : {"persist", "reset"}
        Whether m, h and the count of steps start where the client's last participation left
        them, or at zero.
    """

    lr: Annotated[float, Gt(0)] = 1e-3
    lr_decay: Annotated[float, Gt(0)] = 1.0
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.965
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.95
    gamma: Annotated[float, Gt(0)] = 0.1
    eps: Annotated[float, Gt(0)] = 1e-12
    weight_decay: Annotated[float, Ge(0)] = 0.02
    estimator: Literal["gnb", "hutchinson"] = "gnb"
    law: Literal["rademacher", "gaussian"] = "rademacher"
    tau: Annotated[int, Ge(1)] = 10
    tau_unit: Literal["steps", "rounds"] = "steps"
    moments: Moments = "persist"

    metrics = ("win_rate", "h_norm", "refreshes")

    @property
    def kept(self) -> tuple[str, ...]:
        """The moments and the number of steps so far, if they persist."""
        return ("m", "h", "age") if self.moments == "persist" else ()

    @property
    def curvature(self) -> Estimator:
        """The estimator of the Hessian's diagonal."""
        if self.estimator == "gnb":
            return GaussNewtonBartlett()
        return Hutchinson(self.law)

    def init(self, theta: Tensor, memory: Mapping[str, Tensor]) -> Vectors:
        """Return the state before the first local step."""
        zero, none = torch.zeros_like(theta), theta.new_zeros(())
        state = {"m": zero, "h": zero, "age": theta.new_zeros(1)}
        counts = {"won": none, "taken": none, "refreshes": none}
        given = {name: memory[name] for name in state if name in memory}
        return state | given | counts

    def refreshes(
        self, memory: Mapping[str, Tensor], round_: int, steps: int
    ) -> Collection[int]:
        """Return the local steps at which tau is full."""
        if self.tau_unit == "rounds":
            return range(steps if (round_ - 1) % self.tau == 0 else 0)
        age = int(memory["age"]) if "age" in memory else 0
        return range(-age % self.tau, steps, self.tau)

    def refresh(self, state: Vectors, estimate: Tensor) -> Vectors:
        """Return the state with the estimate in h."""
        h = torch.lerp(estimate, state["h"], self.beta2)
        return {**state, "h": h, "refreshes": state["refreshes"] + 1}

    def step(
        self, theta: Tensor, direction: Tensor, state: Vectors, round_: int
    ) -> tuple[Tensor, Vectors]:
        """Return theta and state after one step of the given round (counted from 1)."""
        lr = self.lr * self.lr_decay ** (round_ - 1)
        m = torch.lerp(direction, state["m"], self.beta1)
        ratio = m / (self.gamma * state["h"]).clamp(min=self.eps)
        won = (ratio.abs() < 1).to(theta.dtype).mean()
        theta.mul_(1 - lr * self.weight_decay).sub_(ratio.clamp(-1, 1), alpha=lr)
        counts = {"won": state["won"] + won, "taken": state["taken"] + 1}
        return theta, {**state, "m": m, "age": state["age"] + 1, **counts}

    def told(self, state: Vectors) -> Vectors:
        """Return the mean win rate, the norm of h and the number of estimates."""
        return {
            "win_rate": state["won"] / state["taken"],
            "h_norm": torch.linalg.vector_norm(state["h"]),
            "refreshes": state["refreshes"],
        }


@dataclass(frozen=True)
class FedSophia(FedAvg):
    """The server of clients that step by `Sophia`.

    Attributes
    ----------
    average_moments : bool
        Whether m and h are averaged with the models and every client of the next cohort starts
        from their means, at the cost of two vectors more in each direction.
    """

    average_moments: bool = False

    needs = ("m", "h")

    @property
    def up(self) -> tuple[str, ...]:
        """The difference, and the moments if they are averaged."""
        return ("delta", "m", "h") if self.average_moments else ("delta",)

    def start(self, theta: Tensor) -> Vectors:
        """Return the model, and moments of zero if they are averaged."""
        zero = torch.zeros_like(theta)
        return {"theta": theta} | (
            {"m": zero, "h": zero} if self.average_moments else {}
        )

    def down(self, server: Vectors) -> Vectors:
        """Return all of it."""
        return dict(server)

    def update(self, server: Vectors, mean: Vectors, cohort: Cohort) -> Vectors:
        """Move along the mean difference; replace the moments by their means."""
        moments = {n: mean[n] for n in ("m", "h") if self.average_moments}
        return {**super().update(server, mean, cohort), **moments}
