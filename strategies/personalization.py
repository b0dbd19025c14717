"""Personalization as hyper-parameters of a shared model (Terashita and Hara, arXiv 2210.02129).

All clients train one x; client i differs by hyper-parameters l_i of its own, in its loss, in its
predictions or in both, chosen so that everybody's outer cost after training is small. A `Family`
(`families.py`) says what one kind of them does; l = 0 is the unpersonalized model (of a
mixture, which has none, the mean of its learners):

    ClassWeights      loss of a sample of class y times C softmax(l)_y                   (DA)
    LogitWeights      logits times C softmax(l), in training and in prediction           (PL)
    Mixture           sum_k softmax(l)_k softmax(logits of learner k), K learners in x  (MTL)
    SampleWeights     loss of training sample j times 1 + l_j;  l_j = -1 leaves it out
    Interpolation     the model x + l (x_i - x), x_i the client's local one
    WeightDecay       + l/2 |x|^2 in the training cost
    FeatureScales     inputs times e^l, one for each feature or channel

`Personal` combines any of them. Their vectors stand one after the other in l_i, so hyper-gradients
know nothing of families: one algorithm serves every combination.

    f_i(x, l_i) = mean over training samples of the weighted losses + penalties + decay/2 |x|^2
    F_i(x, l_i) = mean over other samples of the plain losses of its predictions
                  + sum over families of gamma/2 |l|^2

The outer cost weighs no samples. A client predicts with its own l_i; the clients' mean l would be
no model of anybody.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from strategies.families import Family, Mixture, Own
from strategies.hyperproblem import Draw, Lambdas, Problem


@dataclass(frozen=True)
class Personal:
    """A shared classifier with some families of hyper-parameters.

    Attributes
    ----------
    net : callable
        ``net(theta, x)``: logits (B, C) of one learner, theta (d,).
    parameters, classes : int
        d and C.
    families : tuple of Family
        In the order of their vectors in l; none is the plain model.
    learners : int
        Of which the shared vector is made, one after the other: (learners * d,).
    decay : float
        Weight decay of everybody.
    """

    net: Callable[[Tensor, Tensor], Tensor]
    parameters: int
    classes: int
    families: tuple[Family, ...] = ()
    learners: int = 1
    decay: float = 0.0

    def __post_init__(self) -> None:
        kinds = [type(f) for f in self.families]
        for kind in kinds:
            if kinds.count(kind) > 1:
                raise ValueError(f"{kind.__name__} is there twice")
        if self.classes < 2:
            raise ValueError("personalization is about classes, and the model has none")
        if self.learners > 1 and Mixture not in kinds:
            raise ValueError(
                f"a model of {self.learners} learners needs the family Mixture"
            )

    def zeros(self, own: Own) -> Tensor:
        """Return l = 0 for a client, float like its samples.

        Raises
        ------
        ValueError
            If a family does not go with the model or with what the client has.
        """
        for family in self.families:
            if why := family.unfit(self.classes, self.learners, own):
                raise ValueError(f"{family.name} {why}")
        return own.x.new_zeros(sum(f.size(self.classes, own) for f in self.families))

    def split(self, lam: Tensor, own: Own) -> list[tuple[Family, Tensor]]:
        """Return each family with its part of a client's vector."""
        ends = [0]
        for family in self.families:
            ends.append(ends[-1] + family.size(self.classes, own))
        if ends[-1] != len(lam):
            raise ValueError(f"{len(lam)} hyper-parameters where {ends[-1]} are needed")
        parts = [lam[a:b] for a, b in pairwise(ends)]
        return list(zip(self.families, parts, strict=True))

    def admitted(self, lam: Tensor, own: Own) -> Tensor:
        """Return the nearest l that all families admit."""
        parts = self.split(lam, own)
        return torch.cat([f.admitted(part, self.decay) for f, part in parts])

    def predict(self, theta: Tensor, lam: Tensor, own: Own, x: Tensor) -> Tensor:
        """Return a client's logits (B, C); of a mixture, log-probabilities.

        Raises
        ------
        ValueError
            If theta or lam has the wrong length.
        """
        if len(theta) != self.learners * self.parameters:
            raise ValueError(
                f"a model of {len(theta)} numbers where {self.learners} learners of "
                f"{self.parameters} are needed"
            )
        parts = self.split(lam, own)
        for family, part in parts:
            x, theta = family.inputs(x, part), family.model(theta, own.local, part)
        found = []
        for learner in torch.split(theta, self.parameters):
            logits = self.net(learner, x)
            for family, part in parts:
                logits = family.logits(logits, part)
            found.append(logits)
        for family, part in parts:
            if isinstance(family, Mixture):
                logs = torch.stack([f.log_softmax(-1) for f in found])
                return (logs + part.log_softmax(0)[:, None, None]).logsumexp(0)
        return found[0]

    def inner(
        self,
        theta: Tensor,
        lam: Tensor,
        own: Own,
        rows: Tensor | None = None,
        shares: Tensor | None = None,
    ) -> Tensor:
        """Return f_i, of some training samples (row numbers) or of all.

        ``shares`` (B,), with sum 1, are the samples' weights in the mean, None for equal ones.
        """
        x, y = (own.x, own.y) if rows is None else (own.x[rows], own.y[rows])
        rows = torch.arange(len(y), device=y.device) if rows is None else rows
        losses = F.cross_entropy(self.predict(theta, lam, own, x), y, reduction="none")
        parts = self.split(lam, own)
        for family, part in parts:
            weights = family.weights(y, rows, part)
            losses = losses if weights is None else weights * losses
        cost = losses.mean() if shares is None else (shares * losses).sum()
        for family, part in parts:
            penalty = family.penalty(theta, part)
            cost = cost if penalty is None else cost + penalty
        return cost + self.decay / 2 * theta.square().sum() if self.decay else cost

    def outer(self, theta: Tensor, lam: Tensor, own: Own) -> Tensor:
        """Return F_i."""
        logits = self.predict(theta, lam, own, own.outer_x)
        cost = F.cross_entropy(logits, own.outer_y)
        for family, part in self.split(lam, own):
            if family.gamma:
                cost = cost + family.gamma / 2 * part.square().sum()
        return cost

    def problem(
        self,
        clients: Sequence[Own],
        x: Tensor,
        lambdas: Lambdas,
        draw: Draw | None = None,
    ) -> Problem:
        """Return what `hypergrad` estimates from.

        Parameters
        ----------
        clients : sequence of Own
            Who there is.
        x : Tensor
            Their models (n, learners * d).
        lambdas : tuple of Tensor
            Their hyper-parameters.
        draw : callable, optional
            Batches: the row numbers of each client's, n vectors of int64.
        """

        def inner(
            x: Tensor, lambdas: Lambdas, drawn: Sequence[Tensor] | None
        ) -> Tensor:
            rows = [None] * len(clients) if drawn is None else drawn
            given = zip(x, lambdas, clients, rows, strict=True)
            return torch.stack([self.inner(t, v, own, r) for t, v, own, r in given])

        def outer(x: Tensor, lambdas: Lambdas) -> Tensor:
            given = zip(x, lambdas, clients, strict=True)
            return torch.stack([self.outer(t, v, own) for t, v, own in given])

        return Problem(inner, outer, x, lambdas, draw)
