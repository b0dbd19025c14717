"""A model and its loss as functions of flat vectors: what a local solver may ask.

The module keeps no state here: parameters and buffers (BatchNorm's running statistics) go in and
come out as vectors. Buffers are averaged between clients and never touched by an algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from strategies.vector import Layout


@dataclass(frozen=True)
class Batch:
    """A batch of samples.

    Attributes
    ----------
    x : Tensor
        Inputs, shape (B, ...).
    y : Tensor
        Targets, shape (B,): int64 classes, or floats in a regression.
    noise : mapping of str to Tensor
        Uniform numbers for the model's dropout layers, by buffer name, shape (B, ...).
    weights : Tensor or None
        Weight of each sample in the mean loss, shape (B,), with sum 1; None weighs alike.
    """

    x: Tensor
    y: Tensor
    noise: Mapping[str, Tensor]
    weights: Tensor | None = None


def cross_entropy(outputs: Tensor, y: Tensor) -> Tensor:
    """Return the loss of each sample, shape (B,), of logits of shape (B, C)."""
    return F.cross_entropy(outputs, y, reduction="none")


def squared(outputs: Tensor, y: Tensor) -> Tensor:
    """Return half the squared error of each sample, shape (B,)."""
    return 0.5 * (outputs - y).square()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": cross_entropy,
    "squared": squared,
}


class Objective:
    """L(theta): the mean loss of a batch as a function of flat vectors.

    Parameters
    ----------
    module : nn.Module
        The model, weights included: they are theta^0.
    loss : str
        ``"cross_entropy"`` or ``"squared"``.
    noise_shapes : mapping of str to tuple of int
        Shape for one sample of every dropout buffer.
    """

    def __init__(
        self, module: nn.Module, loss: str, noise_shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self.module = module
        self.losses = LOSSES[loss]
        self.classification = loss == "cross_entropy"
        self.noise_shapes = noise_shapes
        persistent = module.state_dict()
        self.layout = Layout.of(module.named_parameters())
        self.buffer_layout = Layout.of(
            (n, b)
            for n, b in module.named_buffers()
            if n in persistent and b.is_floating_point()
        )
        self.dtype = next(module.parameters()).dtype

    def initial(self) -> tuple[Tensor, Tensor]:
        """Return theta^0 of shape (d,) and the buffers of shape (b,)."""
        theta = self.layout.flatten(dict(self.module.named_parameters()), self.dtype)
        buffers = self.buffer_layout.flatten(
            dict(self.module.named_buffers()), self.dtype
        )
        return theta, buffers

    def loss(
        self, theta: Tensor, buffers: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """Return the batch's mean loss in training mode, and the buffers after it."""
        self.module.train()
        # BatchNorm writes its statistics in place: into a copy, so that this stays a function.
        after = buffers.clone() if buffers.numel() else buffers
        tensors = {
            **self.layout.unflatten(theta),
            **self.buffer_layout.unflatten(after),
            **batch.noise,
        }
        outputs = functional_call(self.module, tensors, (batch.x,))
        losses = self.losses(outputs, batch.y)
        loss = losses.mean() if batch.weights is None else batch.weights @ losses
        return loss, after.detach()

    def gradient(
        self, theta: Tensor, buffers: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradient (d,), the loss and the buffers after the batch."""
        theta = theta.detach().requires_grad_()
        loss, buffers = self.loss(theta, buffers, batch)
        (gradient,) = torch.autograd.grad(loss, theta)
        return gradient, loss.detach(), buffers

    @torch.no_grad()
    def scores(
        self,
        theta: Tensor,
        buffers: Tensor,
        x: Tensor,
        y: Tensor,
        index: Tensor | None = None,
        batch: int = 4096,
    ) -> tuple[Tensor, Tensor]:
        """Judge samples one by one in evaluation mode, in large batches.

        Parameters
        ----------
        theta, buffers : Tensor
            The model.
        x, y : Tensor
            Samples (N, ...) and targets (N,).
        index : Tensor, optional
            The rows to judge, in this order; all of them by default.
        batch : int
            Samples in a batch, which bounds the memory.

        Returns
        -------
        losses : Tensor
            float64, one for each row.
        hits : Tensor
            Whether the largest logit is the target's; empty in a regression.
        """
        self.module.eval()
        tensors = {
            **self.layout.unflatten(theta),
            **self.buffer_layout.unflatten(buffers),
        }
        losses, hits = [], []
        for start in range(0, len(y) if index is None else len(index), batch):
            if index is None:
                part, target = x[start : start + batch], y[start : start + batch]
            else:
                rows = index[start : start + batch]
                part, target = x.index_select(0, rows), y.index_select(0, rows)
            outputs = functional_call(self.module, tensors, (part,))
            losses.append(self.losses(outputs, target).to(torch.float64))
            if self.classification:
                hits.append(outputs.argmax(-1) == target)
        return torch.cat(losses), torch.cat(hits) if hits else torch.zeros(0)

    def evaluate(
        self, theta: Tensor, buffers: Tensor, x: Tensor, y: Tensor
    ) -> dict[str, float]:
        """Return the mean loss, and the accuracy of a classification."""
        losses, hits = self.scores(theta, buffers, x, y)
        metrics = {"loss": float(losses.mean())}
        if self.classification:
            metrics["accuracy"] = float(hits.to(torch.float64).mean())
        return metrics
