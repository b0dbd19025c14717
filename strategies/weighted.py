"""Training of one model by all clients, with a weight for each of their samples.

What influence is about (`influence.py`): the same training again and again, with one sample left
out. All clients take part in every step and a server averages exactly, so the model is one vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from strategies.conjugate import solve
from strategies.families import Own
from strategies.hyperproblem import Lambdas, Problem
from strategies.personalization import Personal
from strategies.randomness import permutations
from strategies.sgd import SGD

#: Largest entry of the gradient at what counts as a minimizer, and that of Newton's last step
#: relative to the model: where classes can be separated the gradient vanishes and steps stay long.
FLAT = {torch.float64: 1e-11, torch.float32: 1e-5}
SHORT = 1e-3
#: Newton's steps; from zero, a logistic regression with a minimizer takes about ten.
NEWTON = 50

#: Validation samples that are judged at once, which bounds the memory.
JUDGED = 4096


@dataclass(frozen=True)
class Task:
    """The clients' training and validation, with a weight for each training sample.

    Attributes
    ----------
    personal : Personal
        The model and its weight decay, with the family SampleWeights.
    clients : tuple of Own
        What they have. Samples are numbered through, client after client: N in all.
    batch : int
        Samples of a client in a step of training or of the estimate; 0 takes all. Batches are the
        same in every training: a sample that is left out leaves its place empty.
    seed : int
        Of the batches.
    """

    personal: Personal
    clients: tuple[Own, ...]
    batch: int = 0
    seed: int = 0

    @cached_property
    def sizes(self) -> list[int]:
        """Training samples of each client."""
        return [len(own.y) for own in self.clients]

    @cached_property
    def _together(self) -> tuple[Tensor, Tensor, Tensor]:
        """All training samples and the share of each in the mean of the f_i."""
        x, y = (torch.cat([getattr(own, s) for own in self.clients]) for s in "xy")
        n = len(self.clients)
        shares = torch.cat([x.new_full((k,), 1 / (n * k)) for k in self.sizes])
        return x, y, shares

    def ones(self) -> Tensor:
        """Return the weights with which every sample counts, (N,)."""
        return torch.ones_like(self._together[2])

    def without(self, sample: int) -> Tensor:
        """Return the weights that leave one sample out, (N,)."""
        weights = self.ones()
        weights[sample] = 0
        return weights

    def draw(self, purpose: str, k: int) -> list[Tensor]:
        """Return the k-th batches of a purpose: row numbers of each client's samples."""
        name = f"influence {purpose}"
        return [
            permutations(self.seed, name, k, [i], len(own.y))[0][: self.batch].to(
                own.y.device
            )
            for i, own in enumerate(self.clients)
        ]

    def cost(self, theta: Tensor, weights: Tensor, k: int | None = None) -> Tensor:
        """Return the mean of the f_i without weight decay, of all samples or of batch k."""
        x, y, shares = self._together
        if self.batch and k is not None:
            starts = [0, *accumulate(self.sizes)]
            drawn = list(zip(starts, self.draw("training", k), strict=False))
            rows = torch.cat([start + rows for start, rows in drawn])
            n, (x, y, weights) = len(drawn), (v[rows] for v in (x, y, weights))
            shares = torch.cat(
                [x.new_full((len(r),), 1 / (n * len(r))) for _, r in drawn]
            )
        losses = F.cross_entropy(self.personal.net(theta, x), y, reduction="none")
        return (shares * weights * losses).sum()

    @torch.no_grad()
    def judged(self, theta: Tensor) -> tuple[float, float]:
        """Return the mean over clients of validation loss, float64, and of accuracy."""
        losses, hits = [], []
        for own in self.clients:
            parts = [
                self.personal.net(theta, x) for x in torch.split(own.outer_x, JUDGED)
            ]
            logits = torch.cat(parts).to(torch.float64)
            losses.append(F.cross_entropy(logits, own.outer_y))
            hits.append((logits.argmax(1) == own.outer_y).to(torch.float64).mean())
        return float(torch.stack(losses).mean()), float(torch.stack(hits).mean())

    def problem(self, theta: Tensor, damping: float = 0.0) -> Problem:
        """Return what `hypergrad` estimates from, at a trained model (d,)."""
        x = theta.detach().expand(len(self.clients), -1).clone()
        zeros = tuple(self.personal.zeros(own) for own in self.clients)
        draw = self.draw if self.batch else None
        problem = self.personal.problem(self.clients, x, zeros, draw)
        if not damping:
            return problem

        def damped(
            z: Tensor, lambdas: Lambdas, drawn: Sequence[Tensor] | None
        ) -> Tensor:
            return problem.inner(z, lambdas, drawn) + damping / 2 * (
                z - x
            ).square().sum(1)

        return replace(problem, inner=damped)

    def slope(self, theta: Tensor, weights: Tensor) -> Tensor:
        """Return the gradient of the mean of the f_i, weight decay included, (d,)."""
        theta = theta.detach().requires_grad_()
        (found,) = torch.autograd.grad(self.cost(theta, weights), theta)
        return found + self.personal.decay * theta.detach()


def minimize(task: Task, start: Tensor, weights: Tensor) -> Tensor:
    """Return the minimizer of a convex task, (d,), by Newton's method.

    Each step is solved by conjugate gradients from Hessian products, so no d x d matrix is made,
    and directions that the cost does not know (the same number added to all logits) are left alone.

    Raises
    ------
    ValueError
        If there is none, as for classes that a plane separates where there is no weight decay.
    """
    theta = start.detach().clone()
    moved = 0.0  # a start without a slope is a minimizer

    def cost(theta: Tensor) -> Tensor:
        decay = task.personal.decay / 2 * theta.square().sum()
        return task.cost(theta, weights) + decay

    for k in range(NEWTON):
        leaf = theta.requires_grad_()
        before = cost(leaf)
        (gradient,) = torch.autograd.grad(before, leaf, create_graph=True)
        theta, before = theta.detach(), before.detach()
        near = moved <= SHORT * (1 + float(theta.abs().max()))
        if near and float(gradient.detach().abs().max()) <= FLAT[theta.dtype]:
            return theta
        slope, eps = gradient.detach(), torch.finfo(theta.dtype).eps

        def product(p: Tensor, whole: Tensor = gradient, at: Tensor = leaf) -> Tensor:
            return torch.autograd.grad(whole, at, p, retain_graph=True)[0]

        try:
            step = solve(product, slope, 2 * len(slope), eps**0.5).y
        except ValueError:
            break  # no curvature is left
        moved = float(step.abs().max())
        for _ in range(0 if near and k else 30):
            with torch.no_grad():
                if cost(theta - step) <= before:
                    break
            step = step / 2
        theta = theta - step
    raise ValueError(
        "the clients' training has no minimizer, as for classes that a plane separates; set "
        "optimizer.weight_decay"
    )


def descend(
    task: Task, start: Tensor, weights: Tensor, optimizer: SGD, steps: int
) -> Tensor:
    """Return a model (d,) after gradient steps on the mean of the f_i, as a server takes them.

    Parameters
    ----------
    task : Task
        The clients.
    start : Tensor
        The model before.
    weights : Tensor
        Of the samples, (N,).
    optimizer : SGD
        Its ``lr_decay`` goes from step to step here.
    steps : int
        How many.
    """
    theta = start.detach().clone()
    state = optimizer.init(theta, {})
    for k in range(1, steps + 1):
        leaf = theta.detach().requires_grad_()
        (direction,) = torch.autograd.grad(task.cost(leaf, weights, k), leaf)
        theta, state = optimizer.step(theta, direction, state, k)
    return theta
