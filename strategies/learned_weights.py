"""FedAvg with client weights that are learned (Rush et al. 2024, arXiv 2301.07806, section 5).

    w_k = exp(phi . f_k + z_k)        f_k = (log share, log of the first loss, label entropy)
    theta+ = theta + server_lr Delta,     Delta = sum a_k w_k Delta_k / sum a_k w_k

with a_k = n_k or 1. phi is the server's, the logit z_k is client k's own and never leaves it; both
start at 0, which is FedAvg. Adding a constant to all exponents changes nothing. They follow the
derivative of the loss F at theta+, with g = grad F(theta+) and s_k = <g, Delta_k>:

    dF/dphi = server_lr sum_k a_k w_k (s_k - <g, Delta>) f_k / sum_k a_k w_k
    dF/dz_k = server_lr a_k w_k (s_k - <g, Delta>) / sum_j a_j w_j        (they sum to 0)

g is the mean first local gradient of the next round's cohort, so it is known a round later and goes
down with the model after that, d floats more each way and no further round. Client k computes s_k
from Delta_k, which it remembers, and puts its terms of dF/dphi into the sum that the server
receives; it takes its own step along dF/dz_k. Who did not take part two rounds ago has nothing to
add: with all clients in each round the derivative is exact, otherwise it is estimated from those
who were in both.

Derivatives are divided by |g| and the clients' mean |Delta_k|, which does not vanish as |Delta|
does where clients pull against each other; dF/dz_k is taken times the number of clients, so that
its step does not depend on how many they are. The feature of a loss L is sign(L) log(1 + |L|).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from strategies.algorithm import Client, Cohort, Vectors
from strategies.fedavg import FedAvg
from strategies.vector import dot

#: What the server learns about, one number each; f_k has the same order.
LEARNED = ("by_samples", "by_loss", "by_entropy")
#: What a client notes of a participation: its round, weight and features.
NOTES = 2 + len(LEARNED)


@dataclass(frozen=True)
class LearnedWeights(FedAvg):
    """Federated averaging with learned weights.

    Attributes
    ----------
    weighting : {"samples", "uniform"}
        What the learned weights multiply: the client's samples, or 1.
    server_lr : float
        Step of the server along the mean difference.
    hyper_lr : float
        Step of phi along its derivative.
    logit_lr : float
        Step of the clients' own logits along theirs; 0 keeps them at 0.
    """

    hyper_lr: Annotated[float, Ge(0)] = 0.1
    logit_lr: Annotated[float, Ge(0)] = 0.05

    @property
    def up(self) -> tuple[str, ...]:
        """The weighted difference, weight and length, first gradient, terms of the derivative."""
        return ("delta", "weight", "gradient", "terms")

    @property
    def learned(self) -> tuple[str, ...]:
        """The entries of phi."""
        return LEARNED

    # Client half.

    def fresh(self, theta: Tensor) -> Vectors:
        """Return a logit of 0 and no participation."""
        return {
            "last": torch.zeros_like(theta),
            "earlier": torch.zeros_like(theta),
            "notes": theta.new_zeros(2 * NOTES),
            "logit": theta.new_zeros(1),
        }

    def begin(
        self, down: Mapping[str, Tensor], memory: Vectors, client: Client
    ) -> Vectors:
        """Judge the client's part in the round before last, and step along its logit."""
        round_, (level, mass, scale) = int(down["round"]), down["level"]
        terms = memory["notes"].new_zeros(2 * len(LEARNED) + 1)
        logit = memory["logit"]
        for name, notes in zip(
            ("last", "earlier"), torch.split(memory["notes"], NOTES), strict=True
        ):
            if round_ > 2 and int(notes[0]) == round_ - 2:
                s, weight, f = dot(down["gradient"], memory[name]), notes[1], notes[2:]
                terms = weight * torch.cat([s * f, f, s.new_ones(1)])
                base = client.share if self.weighting == "samples" else 1.0
                slope = self.server_lr * base * weight / mass * (s - level)
                logit = logit - self.logit_lr * slope / scale
        # The loss is still to come.
        known = [math.log(client.share), math.nan, client.entropy]
        return {
            "terms": terms,
            "logit": logit,
            "features": memory["logit"].new_tensor(known),
            "phi": torch.cat([down[n] for n in LEARNED]),
            "round": down["round"],
            "last": memory["last"],
            "notes": memory["notes"],
        }

    def witness(self, state: Vectors, gradient: Tensor, loss: Tensor) -> Vectors:
        """Note the gradient and the loss of the model that the server sent."""
        samples, _, entropy = state["features"].unbind()
        felt = torch.sign(loss) * torch.log1p(loss.abs())
        features = torch.stack([samples, felt.to(samples.dtype), entropy])
        return state | {"gradient": gradient, "features": features}

    def finish(
        self, theta: Tensor, anchor: Tensor, state: Vectors, effort: Tensor
    ) -> tuple[Vectors, Vectors]:
        """Return the weighted difference and the rest; remember the plain one."""
        delta, f = theta - anchor, state["features"]
        weight = torch.exp(state["phi"] @ f + state["logit"])
        up = {
            "delta": weight * delta,
            "weight": torch.cat([weight, weight * torch.linalg.vector_norm(delta)]),
            "gradient": state["gradient"],
            "terms": state["terms"],
        }
        notes = torch.cat([state["round"], weight, f, state["notes"][:NOTES]])
        kept = {"last": delta, "earlier": state["last"], "notes": notes}
        return up, kept | {"logit": state["logit"]}

    # Server half.

    def start(self, theta: Tensor) -> Vectors:
        """Return the model, phi = 0, and nothing to judge yet."""
        zero = torch.zeros_like(theta)
        return {
            "theta": theta,
            "gradient": zero,
            "step": zero.clone(),
            "mass": theta.new_ones(1),
            "length": theta.new_zeros(1),
            "level": theta.new_tensor([0.0, 1.0, 1.0]),
            "round": theta.new_ones(1),
            **{name: theta.new_zeros(1) for name in LEARNED},
        }

    def down(self, server: Vectors) -> Vectors:
        """Return the model, phi, and by what the round before last is judged."""
        sent = ("theta", "gradient", "level", "round", *LEARNED)
        return {n: server[n] for n in sent}

    def update(self, server: Vectors, mean: Vectors, cohort: Cohort) -> Vectors:
        """Take FedAvg's step in the learned weights, and step along the derivative by phi."""
        weight, length = mean["weight"].split(1)  # type: ignore[no-untyped-call]
        delta, gradient = mean["delta"] / weight, mean["gradient"]
        level, _, scale = server["level"]
        products, sums, mass = torch.split(
            mean["terms"], [len(LEARNED), len(LEARNED), 1]
        )
        slopes = torch.zeros_like(sums)
        if mass > 0:  # somebody was in the round before last
            slopes = self.server_lr * (products - level * sums) / mass / scale
        scale = torch.linalg.vector_norm(gradient) * server["length"][0]
        judged = [
            dot(gradient, server["step"]),
            server["mass"][0],
            scale.clamp(min=1e-30),
        ]
        learned = {
            name: server[name] - self.hyper_lr * slope
            for name, slope in zip(LEARNED, torch.split(slopes, 1), strict=True)
        }
        return {
            "theta": server["theta"] + self.server_lr * delta,
            "gradient": gradient,
            "step": delta,
            "mass": weight,
            "length": length / weight,
            "level": torch.stack(judged),
            "round": server["round"] + 1,
            **learned,
        }
