"""The client's half of an estimate of hyper-gradients: its products, and what it keeps of them.

    start      u_i = (1/n) dF_i/dx                  v_i = (1/n) dF_i/dl_i
    push m     u_i = z_i - alpha w_i H_i z_i        v_i <- v_i - alpha w_i J_i' z_i
    curvature  w_i H_i q_i, for the power iteration and conjugate gradients

Damping is part of H_i. w_i is the client's weight in the inner cost, with a mean of one.
`bilevel.py` has the other half.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from strategies.algorithm import Vectors
from strategies.families import Own
from strategies.hyperproblem import Draw, Products
from strategies.personalization import Personal
from strategies.personalize import Personalize
from strategies.randomness import permutations


@dataclass(frozen=True)
class Member:
    """A client in an estimate.

    Attributes
    ----------
    id, total : int
        Its number, and n.
    share : float
        w_i.
    how : Personalize
        The settings.
    task : Personal
        Costs, everybody's weight decay included.
    own : Own
        Its samples.
    theta : Tensor
        Its model, (d,).
    memory : Vectors
        What `Personalize.fresh` begins.
    seed, at : int
        The address of its batches.
    """

    id: int
    total: int
    share: float
    how: Personalize
    task: Personal
    own: Own
    theta: Tensor
    memory: Vectors
    seed: int = 0
    at: int = 0

    def start(self) -> tuple[Tensor, Vectors]:
        """Return u and the memory before the first step."""
        u, (v,) = self._work(draw=lambda purpose, k: None).outer()
        return u[0] / self.total, self.memory | {"v": v / self.total}

    def push(self, z: Tensor, m: int) -> tuple[Tensor, Vectors]:
        """Return u and the memory after the m-th step."""
        draw = self._draw()
        work, scale = self._work(draw), self.how.alpha * self.share
        if self.how.independent and draw is not None:
            (cross,) = work.cross(z[None], "cross", m)
            curved = work.hessian(z[None], "x", m)
        else:
            curved, (cross,) = work.both(z[None], "cross", m)
        return z - scale * (curved[0] + self.how.damping * z), self.memory | {
            "v": self.memory["v"] - scale * cross
        }

    def last(self, z: Tensor, m: int) -> Vectors:
        """Return the memory after the m-th step, which is the last, and Adam's.

        l stays where its families admit it.
        """
        (cross,) = self._work(self._draw()).cross(z[None], "cross", m)
        scale = self.how.alpha * self.share
        after = self.memory | {"v": self.memory["v"] - scale * cross}
        rates = self.how.rates(self.task, after["l"], self.own)
        after = self.how.step(after, rates)
        return after | {"l": self.task.admitted(after["l"], self.own)}

    def curvature(self, q: Tensor, k: int) -> Tensor:
        """Return the product of its Hessian, in its weight, with a vector."""
        curved = self._work(self._draw()).hessian(q[None], "eigenvalue", k)
        return self.share * (curved[0] + self.how.damping * q)

    def _work(self, draw: Draw | None) -> Products:
        x, lam = self.theta[None], (self.memory["l"],)
        return Products(self.task.problem([self.own], x, lam, draw))

    def _draw(self) -> Draw | None:
        """Return the function that draws its batches; None if it takes all samples."""
        size, count = self.how.batch, len(self.own.y)
        if not self.how.batched(count):
            return None

        def draw(purpose: str, k: int) -> list[Tensor]:
            name = f"hypergrad {purpose}"
            order = permutations(self.seed, name, self.at, [self.id], count)[0]
            return [order[:size].to(self.own.y.device)]

        return draw
