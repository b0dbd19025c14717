"""Estimates of the diagonal of the Hessian of a batch's mean loss, from random draws.

    Hutchinson     u with E uu' = I:   h = u * (Hessian u)            E h = diag Hessian
    Gauss-Newton-Bartlett (Liu et al. 2023, arXiv 2305.14342, Algorithm 2)
                   y_i ~ softmax(logits_i) for each of the B labels of the batch,
                   g = gradient of the mean cross-entropy with these labels
                                       h = B g * g          E h = diag of the Gauss-Newton matrix

For a Rademacher u the variance is Var h_i = sum of H_ij^2 over j != i, for a normal u it is
2 H_ii^2 more; only Hutchinson's h may be negative.

The factor B belongs to labels that are drawn independently and weigh alike. With weights w_i of
sum 1 (padding has none, a sequence shares its sample's weight among its labels) we take
g = sum_i sqrt(w_i) gradient_i and h = g * g: the same with w_i = 1/B, and unbiased in general,
since different labels' gradients are independent with mean zero. So B is always the number of
labels really drawn.

Draws come from their address, so that an estimate does not depend on the engine. The batch and its
dropout noise are those of the local step itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from strategies.losses import IGNORED
from strategies.objective import Batch, Objective
from strategies.randomness import normals, signs, uniforms


@dataclass(frozen=True)
class Place:
    """Where a local step stands, which addresses its draws.

    Attributes
    ----------
    seed, round_, client : int
        The run's seed, the round and the client.
    step : int
        The local step, from 0.
    first : int
        Position of its batch in the client's sequence of samples.
    """

    seed: int
    round_: int
    client: int
    step: int
    first: int


class Estimator(Protocol):
    """A source of estimates of the Hessian's diagonal."""

    @property
    def cost(self) -> int:
        """How many gradient evaluations an estimate costs."""

    def unfit(self, objective: Objective) -> str:
        """Say why it cannot serve a model; empty if it can."""

    def draw(self, place: Place, targets: torch.Size, size: int) -> Tensor:
        """Return the random numbers of one estimate.

        ``targets`` is the shape of the batch's targets, ``size`` is d.
        """

    def estimate(
        self,
        objective: Objective,
        theta: Tensor,
        buffers: Tensor,
        batch: Batch,
        drawn: Tensor,
    ) -> Tensor:
        """Return an estimate of the diagonal at theta, shape (d,); a pure function."""


def sample(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draw labels from softmax(logits), (..., C), by uniform numbers (...)."""
    ends = logits.softmax(-1).cumsum(-1)
    # Rounding may leave the last end below 1, and a number above it.
    return (uniform[..., None] >= ends).sum(-1).clamp(max=logits.shape[-1] - 1)


def shares(batch: Batch, dtype: torch.dtype) -> Tensor:
    """Return the weight of each label in the batch's mean loss, shaped as the targets, sum 1."""
    rows = len(batch.y)
    weights = batch.weights
    if weights is None:
        weights = torch.full((rows,), 1 / rows, dtype=dtype, device=batch.y.device)
    if batch.y.ndim == 1:
        return weights
    kept = (batch.y != IGNORED).to(dtype)
    counts = kept.flatten(1).sum(1).clamp(min=1)
    return kept * (weights / counts).view(-1, *[1] * (batch.y.ndim - 1))


@dataclass(frozen=True)
class GaussNewtonBartlett:
    """The Gauss-Newton diagonal of a cross-entropy from labels that the model itself draws."""

    cost = 1

    def unfit(self, objective: Objective) -> str:
        """Say why a model's labels cannot be drawn."""
        if not objective.classification:
            return (
                "the Gauss-Newton-Bartlett estimator draws labels from logits, and "
                "these data are no classes; use optimizer.estimator=hutchinson"
            )
        return ""

    def draw(self, place: Place, targets: torch.Size, size: int) -> Tensor:
        """Return a uniform number for each label."""
        labels = math.prod(targets[1:])
        who, start = [place.client], place.first * labels
        purpose = "curvature labels"
        drawn = uniforms(
            place.seed, purpose, place.round_, who, start, targets[0] * labels
        )
        return drawn.view(targets)

    def estimate(
        self,
        objective: Objective,
        theta: Tensor,
        buffers: Tensor,
        batch: Batch,
        drawn: Tensor,
    ) -> Tensor:
        """Return B g * g."""
        scale = shares(batch, theta.dtype).sqrt()

        def sampled(point: Tensor) -> Tensor:
            logits, _ = objective.outputs(point, buffers, batch)
            labels = sample(logits.detach(), drawn)
            losses = F.cross_entropy(logits.movedim(-1, 1), labels, reduction="none")
            return (scale * losses).sum()

        gradient: Tensor = torch.func.grad(sampled)(theta)
        return gradient.square()


@dataclass(frozen=True)
class Hutchinson:
    """The Hessian's diagonal from one product with a random vector.

    Attributes
    ----------
    law : {"rademacher", "gaussian"}
        Of the vector's entries.
    """

    law: Literal["rademacher", "gaussian"] = "rademacher"

    cost = 2  # a gradient, and the gradient of its product with u

    def unfit(self, objective: Objective) -> str:
        """Serve every model that can be differentiated twice."""
        return ""

    def draw(self, place: Place, targets: torch.Size, size: int) -> Tensor:
        """Return u."""
        law = signs if self.law == "rademacher" else normals
        start, who = place.step * size, [place.client]
        return law(place.seed, "curvature probe", place.round_, who, start, size)[0]

    def estimate(
        self,
        objective: Objective,
        theta: Tensor,
        buffers: Tensor,
        batch: Batch,
        drawn: Tensor,
    ) -> Tensor:
        """Return u * (Hessian u)."""
        u = drawn.to(theta.dtype)
        return u * objective.product(theta, buffers, batch, u)[0]
