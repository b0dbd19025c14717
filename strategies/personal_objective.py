"""The objective of a model whose clients have hyper-parameters of their own.

Engines, algorithms and optimizers see an objective as always. What is new is that a batch brings
what its client has of its own (``Batch.hyper``), and that a client is judged by its own
predictions. Without an l, as on the server's test set, it is l = 0: the plain model, or the mean
of the learners.

The weights of samples stand last in l, whatever the order of the families: their number differs by
client, so engines may pad l at its end, and a batch takes its own samples' from there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from strategies.algorithm import Vectors
from strategies.families import Family, Own, SampleWeights
from strategies.objective import Batch, Objective
from strategies.personalization import Personal
from strategies.vector import Layout


class Learners(nn.Module):
    """K models of one kind; the mean of their predictions, as log-probabilities."""

    def __init__(self, learners: Sequence[nn.Module]) -> None:
        super().__init__()
        self.learners = nn.ModuleList(learners)

    def forward(self, x: Tensor) -> Tensor:
        """Return log-probabilities (B, C)."""
        logs = torch.stack([one(x).log_softmax(-1) for one in self.learners])
        zero = logs.new_zeros(len(self.learners))
        return (logs + zero.log_softmax(0)[:, None, None]).logsumexp(0)


class PersonalObjective(Objective):
    """f_i(x, l_i) of batches that bring l_i.

    Parameters
    ----------
    learners : sequence of nn.Module
        The model or, for a mixture, K of them that start apart; without dropout or buffers.
    families : tuple of Family
        What clients have of their own.
    classes : int
        C.
    like : Tensor
        A sample, (1, ...).

    Attributes
    ----------
    models : int
        K: a gradient goes through all of them.
    task : Personal
        Costs and predictions, without the weight decay of a local optimizer.
    common : int
        Entries of l before the weights of samples: as many for each client.

    Raises
    ------
    ValueError
        If a family does not go with the model.
    """

    def __init__(
        self,
        learners: Sequence[nn.Module],
        families: tuple[Family, ...],
        classes: int,
        like: Tensor,
    ) -> None:
        one = learners[0]
        super().__init__(
            one if len(learners) == 1 else Learners(learners), "cross_entropy", {}
        )
        layout = Layout.of(one.named_parameters())

        def net(theta: Tensor, x: Tensor) -> Tensor:
            logits: Tensor = functional_call(one, layout.unflatten(theta), (x,))
            return logits

        self.models = len(learners)
        ordered = tuple(sorted(families, key=lambda f: isinstance(f, SampleWeights)))
        self._weighs = any(isinstance(family, SampleWeights) for family in families)
        self.task = Personal(net, layout.size, classes, ordered, self.models)
        none = torch.zeros(0, dtype=torch.int64)
        self._zero = self.task.zeros(Own(like, none, like, none, self.initial()[0]))
        self.common = len(self._zero)

    def zeros(self, samples: int) -> Tensor:
        """Return l = 0 of a client with so many training samples, (p,)."""
        return self._zero.new_zeros(self.common + samples * self._weighs)

    def own(self, theta: Tensor, batch: Batch) -> tuple[Own, Tensor]:
        """Return a batch as all that its client has, and its l: the batch's, or zero."""
        hyper = batch.hyper
        # Where l = 0 any model serves as the client's own: theta is one.
        local = hyper.get("local", theta)
        own = Own(batch.x, batch.y, batch.x, batch.y, local)
        if "l" not in hyper:
            return own, self.zeros(len(batch.y))
        if not self._weighs:
            return own, hyper["l"]
        common, weights = hyper["l"][: self.common], hyper["l"][self.common :]
        return own, torch.cat([common, weights.gather(0, hyper["places"])])

    def outputs(
        self, theta: Tensor, buffers: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """Return what the batch's client predicts."""
        own, hyper = self.own(theta, batch)
        return self.task.predict(theta, hyper, own, batch.x), buffers

    def loss(
        self, theta: Tensor, buffers: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """Return f_i of the batch."""
        own, hyper = self.own(theta, batch)
        return self.task.inner(theta, hyper, own, shares=batch.weights), buffers

    def gradient(
        self, theta: Tensor, buffers: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradient (d,), the loss and the buffers."""
        theta = theta.detach().requires_grad_()
        loss, _ = self.loss(theta, buffers, batch)
        (gradient,) = torch.autograd.grad(loss, theta)
        return gradient, loss.detach(), buffers

    def predictions(self, theta: Tensor, hyper: Vectors, x: Tensor) -> Tensor:
        """Return what a client with this of its own (see `Job.hyper`) predicts, (B, C)."""
        none = torch.zeros(0, dtype=torch.int64)
        own = Own(x, none, x, none, hyper.get("local"))
        # The weights of training samples are no part of a prediction.
        return self.task.predict(theta, hyper["l"][: self.common], own, x)
