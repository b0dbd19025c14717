"""The objective of a model whose clients have hyper-parameters of their own.

Engines, algorithms and optimizers see an objective as always. What is new is that a batch brings
its client's l (``Batch.hyper``), and that a client is judged by its own predictions. Without an l,
as on the server's test set, it is l = 0: the plain model, or the mean of the learners.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from strategies.families import Family, Own
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
    zero : Tensor
        l = 0, (p,).

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
        self.task = Personal(net, layout.size, classes, families, self.models)
        label = torch.zeros(1, dtype=torch.int64)
        self.zero = self.task.zeros(Own(like, label, like, label))

    def own(self, batch: Batch) -> tuple[Own, Tensor]:
        """Return a batch as all that its client has, and l: the batch's, or zero."""
        own = Own(batch.x, batch.y, batch.x, batch.y)
        return own, self.zero if batch.hyper is None else batch.hyper

    def outputs(
        self, theta: Tensor, buffers: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """Return what the batch's client predicts."""
        own, hyper = self.own(batch)
        return self.task.predict(theta, hyper, own, batch.x), buffers

    def loss(
        self, theta: Tensor, buffers: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """Return f_i of the batch."""
        own, hyper = self.own(batch)
        return self.task.inner(theta, hyper, own, shares=batch.weights), buffers

    def gradient(
        self, theta: Tensor, buffers: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradient (d,), the loss and the buffers."""
        theta = theta.detach().requires_grad_()
        loss, _ = self.loss(theta, buffers, batch)
        (gradient,) = torch.autograd.grad(loss, theta)
        return gradient, loss.detach(), buffers

    def predictions(self, theta: Tensor, hyper: Tensor, x: Tensor) -> Tensor:
        """Return what a client with these hyper-parameters predicts, (B, C)."""
        label = torch.zeros(1, dtype=torch.int64)
        return self.task.predict(theta, hyper, Own(x, label, x, label), x)
