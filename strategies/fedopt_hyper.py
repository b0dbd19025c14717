"""FedOpt whose own settings follow hyper-gradients (Rush et al. 2024, arXiv 2301.07806, Alg. 2).

    theta+ = ServerOpt(theta, m, v, Delta; phi)      phi = (log server_lr, logit momentum, log pace)
    dF/dphi = <g, d theta+ / d phi>                  g = mean gradient of the clients at theta+
    phi <- phi - hyper_lr dF/dphi

g is the mean over the next round's cohort of the first local gradient, which their training takes
at theta+ anyway: no further round, d more floats up. The server's part, d theta+/d phi, is taken in
forward mode when theta+ is made. The horizon is one round: that earlier models depend on phi too is
left out, as in the paper.

The clients' learning rate (``client_lr``) is the local optimizer's times pace. A client carries the
tangent s = d theta_k / d log pace through its steps, one Hessian product each (see `tuned_sgd`),
and its mean comes up with Delta, d floats more.

With ``normalized`` the product is a cosine, <g, s> / (|g| |s|), so that hyper_lr is the largest
change of phi in a round and means the same on every task; its zeros are those of the derivative.

Delta and g of a round come from the same clients and batches, and a step is judged by the gradient
that decides on the next one. ``independent`` tosses a coin for every client and round: one side
sends only Delta, the other only g, so the two come from different clients.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor

from strategies.algorithm import Client, Cohort, Vectors
from strategies.fedopt import FedOpt, Moments
from strategies.randomness import address
from strategies.vector import dot


@dataclass(frozen=True)
class FedOptHyper(FedOpt):
    """FedOpt that tunes itself.

    Attributes
    ----------
    weighting, server_lr, optimizer, momentum, second, tau
        As in `FedOpt`; server_lr and momentum are where they start. A momentum of 0 stays 0.
    hyper_lr : float
        Step along the hyper-gradient.
    normalized : bool
        Whether hyper-gradients are cosines.
    client_lr : bool
        Whether the clients' learning rate is tuned too; the local optimizer is then tuned_sgd.
    independent : bool
        Whether differences and gradients come from different clients.
    seed : int
        Of the coins that decide which.
    """

    hyper_lr: Annotated[float, Gt(0)] = 0.3
    normalized: bool = True
    client_lr: bool = False
    independent: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.client_lr and self.independent:
            raise ValueError(
                "client_lr needs the steps of every client, independent drops half of them; "
                "choose one"
            )

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """The clients' pace and the tangent by it, if it is tuned."""
        return ("pace", "slope") if self.client_lr else ()

    @property
    def up(self) -> tuple[str, ...]:
        """The difference, the first gradient, how many sent each, and the tangent."""
        parts = ("share",) if self.independent else ()
        return ("delta", "gradient", *parts, *(("slope",) if self.client_lr else ()))

    @property
    def tuned(self) -> tuple[str, ...]:
        """The names of the settings that are tuned, each a number among the server's vectors."""
        momentum = ("server_momentum",) if self.momentum else ()
        return ("server_lr", *momentum, *(("pace",) if self.client_lr else ()))

    # Client half.

    def begin(
        self, down: Mapping[str, Tensor], memory: Vectors, client: Client
    ) -> Vectors:
        """Toss the coin for who sends what."""
        if not self.independent:
            return {}
        coin = address(self.seed, "fedopt half", int(down["round"]), client.id) & 1
        return {"steps": down["theta"].new_tensor(float(coin))}

    def witness(self, state: Vectors, gradient: Tensor, loss: Tensor) -> Vectors:
        """Note the gradient of the model that the server sent."""
        return state | {"gradient": gradient}

    def finish(
        self, theta: Tensor, anchor: Tensor, state: Vectors, effort: Tensor
    ) -> tuple[Vectors, Vectors]:
        """Return the difference and the first gradient."""
        up = {"delta": theta - anchor, "gradient": state["gradient"]}
        if self.independent:
            steps = state["steps"]
            up = {
                "delta": steps * up["delta"],
                "gradient": (1 - steps) * up["gradient"],
            }
            up["share"] = torch.stack([steps, 1 - steps])
        return up, {}

    # Server half.

    def start(self, theta: Tensor) -> Vectors:
        """Return FedOpt's vectors, the settings, and no derivative yet."""
        server = super().start(theta) | {
            "server_lr": theta.new_full((1,), self.server_lr)
        }
        if self.momentum:
            server["server_momentum"] = theta.new_full((1,), self.momentum)
        if self.client_lr:
            server["pace"] = theta.new_ones(1)
        if self.independent:
            server["round"] = theta.new_ones(1)
        return server | {f"d_{n}": torch.zeros_like(theta) for n in self.tuned}

    def down(self, server: Vectors) -> Vectors:
        """Return the model, and the pace and the round if they are used."""
        sent = ("theta", "pace", "round")
        return {n: server[n] for n in sent if n in server}

    def update(self, server: Vectors, mean: Vectors, cohort: Cohort) -> Vectors:
        """Judge the last step by the gradient, tune, and take the next step."""
        after = dict(server)
        if self.independent:
            parts = mean["share"].clamp(min=1e-12)
            # With nobody on one side, these are zero: there is no judgement, or no step (below).
            mean = mean | {
                n: mean[n] / parts[i] for i, n in enumerate(("delta", "gradient"))
            }
            after["round"] = server["round"] + 1
        for name in self.tuned:
            after[name] = self._follow(name, server, mean["gradient"])
        if self.independent and not mean["share"][0]:
            # No step to judge: the last one has been judged now.
            return after | {
                f"d_{n}": torch.zeros_like(server["theta"]) for n in self.tuned
            }
        theta, moments = self._model(after, mean["delta"])
        after |= {"theta": theta} | self.kept(moments)
        return after | self._derivatives(
            server | {n: after[n] for n in self.tuned}, mean
        )

    def _follow(self, name: str, server: Vectors, gradient: Tensor) -> Tensor:
        """Return a setting after a step along its hyper-gradient."""
        slope = server[f"d_{name}"]
        along = dot(gradient, slope)
        if self.normalized:
            norms = torch.linalg.vector_norm(gradient) * torch.linalg.vector_norm(slope)
            along = torch.where(norms > 0, along / norms.clamp(min=1e-38), norms)
        if name == "server_momentum":
            return torch.sigmoid(torch.logit(server[name]) - self.hyper_lr * along)
        return server[name] * torch.exp(-self.hyper_lr * along)

    def _model(self, server: Vectors, delta: Tensor) -> tuple[Tensor, Moments]:
        """Return model and moments after the server's step with its present settings."""
        moments = server.get("momentum"), server.get("second")
        momentum = server.get("server_momentum", delta.new_zeros(1))
        return self.step(server["theta"], moments, delta, server["server_lr"], momentum)

    def _derivatives(self, server: Vectors, mean: Vectors) -> Vectors:
        """Return the model's derivative by each setting, in forward mode."""
        lr, delta = server["server_lr"], mean["delta"]
        # d lr = lr d log lr, d momentum = momentum (1 - momentum) d logit.
        moved = {"server_lr": {"server_lr": lr}}
        if self.momentum:
            beta = server["server_momentum"]
            moved["server_momentum"] = {"server_momentum": beta * (1 - beta)}
        if self.client_lr:
            moved["pace"] = {"delta": mean["slope"]}

        def model(point: Vectors) -> Tensor:
            return self._model(server | point, point.get("delta", delta))[0]

        found = {}
        for name, tangent in moved.items():
            point = {n: delta if n == "delta" else server[n] for n in tangent}
            found[f"d_{name}"] = push(model, point, tangent)
        return found


def push(f: Callable[[Vectors], Tensor], point: Vectors, tangent: Vectors) -> Tensor:
    """Return the derivative of f at a point along a tangent."""
    with warnings.catch_warnings():  # torch imports what it deprecates itself
        warnings.simplefilter("ignore", FutureWarning)
        along: Tensor = torch.func.jvp(f, (point,), (tangent,))[1]
    return along
