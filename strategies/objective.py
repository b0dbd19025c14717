"""A model and its loss as functions of flat vectors: what a local solver may ask.

The module keeps no state here: parameters and buffers (BatchNorm's running statistics) go in and
come out as vectors. Buffers are averaged between clients and never touched by an algorithm.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from strategies.algorithm import Net, Vectors
from strategies.individual import Seen
from strategies.losses import LOSSES
from strategies.vector import Layout


@dataclass(frozen=True)
class Batch:
    """A batch of samples.

    Attributes
    ----------
    x : Tensor
        Inputs, shape (B, ...).
    y : Tensor
        Targets, shape (B,): int64 classes, or floats in a regression. Sequences of classes
        are (B, T), `IGNORED` where there is no target.
    noise : mapping of str to Tensor
        Uniform numbers for the model's dropout layers, by buffer name, shape (B, ...).
    weights : Tensor or None
        Weight of each sample in the mean loss, shape (B,), with sum 1; None weighs alike.
    hyper : Vectors
        What the client that it is from has of its own (see `Job.hyper`), and ``places`` (B,): which
        of the client's samples these are. Empty where clients have nothing.
    """

    x: Tensor
    y: Tensor
    noise: Mapping[str, Tensor]
    weights: Tensor | None = None
    hyper: Vectors = field(default_factory=dict)


def _slot(module: nn.Module, name: str, kind: str) -> tuple[dict[str, Any], str]:
    """Return the dictionary that holds a named parameter or buffer, and its key there."""
    path, _, attribute = name.rpartition(".")
    held: dict[str, Any] = getattr(module.get_submodule(path), kind)
    return held, attribute


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
    learners : sequence of nn.Module
        Further models of the same kind: theta^0 is then all their weights, one after the other
        (K d,), and an algorithm that is `Plural` asks for one at a time.
    """

    #: Models that are evaluated in one evaluation of it, each of which has its gradient.
    models = 1

    def __init__(
        self,
        module: nn.Module,
        loss: str,
        noise_shapes: Mapping[str, tuple[int, ...]],
        learners: Sequence[nn.Module] = (),
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
        # BatchNorm's count of batches: written in each pass, into a copy, and not kept.
        self._counts = {
            n: b
            for n, b in module.named_buffers()
            if n in persistent and not b.is_floating_point()
        }
        self.dtype = next(module.parameters()).dtype
        weights = [
            self.layout.flatten(dict(m.named_parameters()), self.dtype)
            for m in (module, *learners)
        ]
        self._initial = (
            torch.cat(weights) if learners else weights[0],
            self.buffer_layout.flatten(dict(module.named_buffers()), self.dtype),
        )
        # Where each parameter is held; one that is tied is held in several places.
        everywhere = list(module.named_parameters(remove_duplicate=False))
        self._slots = [
            [
                _slot(module, other, "_parameters")
                for other, p in everywhere
                if p is parameter
            ]
            for _, parameter in module.named_parameters()
        ]
        self._noise_slots = {n: _slot(module, n, "_buffers") for n in noise_shapes}
        self._placed: Tensor | None = None
        self._parts: list[Tensor] = []

    def initial(self) -> tuple[Tensor, Tensor]:
        """Return theta^0 of shape (d,), of K learners (K d,), and the buffers of shape (b,)."""
        return self._initial

    def outputs(
        self, theta: Tensor, buffers: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """Return the batch's outputs in training mode, and the buffers after it."""
        if not self.module.training:
            self.module.train()
        # BatchNorm writes its statistics in place: into a copy, so that this stays a function.
        after = buffers.clone() if buffers.numel() else buffers
        tensors = {
            **self.layout.unflatten(theta),
            **self.buffer_layout.unflatten(after),
            **{name: count.clone() for name, count in self._counts.items()},
            **batch.noise,
        }
        return functional_call(self.module, tensors, (batch.x,)), after.detach()

    def loss(
        self, theta: Tensor, buffers: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """Return the batch's mean loss in training mode, and the buffers after it."""
        outputs, after = self.outputs(theta, buffers, batch)
        losses = self.losses(outputs, batch.y)
        loss = (
            losses.mean() if batch.weights is None else (batch.weights * losses).sum()
        )
        return loss, after

    def cost(
        self,
        cost: Callable[[Seen, Tensor], Tensor],
        theta: Tensor,
        buffers: Tensor,
        batch: Batch,
    ) -> Tensor:
        """Return the mean of what an algorithm's cost, (B,), makes of a batch, in training mode."""
        seen = Seen(
            lambda model: self.outputs(model, buffers, batch)[0],
            lambda outputs: self.losses(outputs, batch.y),
            batch.y,
        )
        costs = cost(seen, theta)
        return costs.mean() if batch.weights is None else (batch.weights * costs).sum()

    def product(
        self, theta: Tensor, buffers: Tensor, batch: Batch, vector: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the Hessian of the batch's mean loss times a vector, (d,), and the loss."""

        def loss(point: Tensor) -> tuple[Tensor, Tensor]:
            value, _ = self.loss(point, buffers, batch)
            return value, value.detach()

        def slope(point: Tensor) -> tuple[Tensor, Tensor]:
            gradient, value = torch.func.grad(loss, has_aux=True)(point)
            return gradient @ vector, value

        product, value = torch.func.grad(slope, has_aux=True)(theta)
        return product, value

    def gradient(
        self, theta: Tensor, buffers: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradient (d,), the loss and the buffers after the batch.

        Nothing else may write into the module between the steps of one training.
        """
        if buffers.numel():
            theta = theta.detach().requires_grad_()
            loss, buffers = self.loss(theta, buffers, batch)
            (gradient,) = torch.autograd.grad(loss, theta)
            return gradient, loss.detach(), buffers
        # The hot path: tensors in the module's own places cost less than a call that puts them
        # there and back.
        parts = self._place(theta)
        for name, noise in batch.noise.items():
            held, attribute = self._noise_slots[name]
            held[attribute] = noise
        if not self.module.training:
            self.module.train()
        losses = self.losses(self.module(batch.x), batch.y)
        loss = (
            losses.mean() if batch.weights is None else (batch.weights * losses).sum()
        )
        gradients = torch.autograd.grad(loss, parts)
        return torch.cat([g.reshape(-1) for g in gradients]), loss.detach(), buffers

    def _place(self, theta: Tensor) -> list[Tensor]:
        """Put views of theta into the module; they stay while theta is stepped in place."""
        if theta is not self._placed:
            pieces = torch.split(theta.detach(), self.layout.sizes)
            self._parts = [
                piece.view(shape).requires_grad_()
                for shape, piece in zip(self.layout.shapes, pieces, strict=True)
            ]
            for places, part in zip(self._slots, self._parts, strict=True):
                for held, name in places:
                    held[name] = part
            self._placed = theta
        return self._parts

    def net(self, buffers: Tensor) -> Net:
        """Return the model in evaluation mode as a function of parameters and inputs."""
        self.module.eval()

        def net(theta: Tensor, x: Tensor) -> Tensor:
            tensors = {
                **self.layout.unflatten(theta),
                **self.buffer_layout.unflatten(buffers),
            }
            outputs: Tensor = functional_call(self.module, tensors, (x,))
            return outputs

        return net

    def scores(
        self,
        theta: Tensor,
        buffers: Tensor,
        x: Tensor,
        y: Tensor,
        index: Tensor | None = None,
        batch: int = 4096,
    ) -> tuple[Tensor, Tensor]:
        """Judge samples one by one with the model itself (see `judge`)."""
        outputs = functools.partial(self.net(buffers), theta)
        return self.judge(outputs, x, y, index, batch)

    @torch.no_grad()
    def judge(
        self,
        predict: Callable[[Tensor], Tensor],
        x: Tensor,
        y: Tensor,
        index: Tensor | None = None,
        batch: int = 4096,
    ) -> tuple[Tensor, Tensor]:
        """Judge samples one by one, in large batches.

        Parameters
        ----------
        predict : callable
            From inputs (B, ...) to outputs, logits in a classification.
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
        losses, hits = [], []
        for start in range(0, len(y) if index is None else len(index), batch):
            if index is None:
                part, target = x[start : start + batch], y[start : start + batch]
            else:
                rows = index[start : start + batch]
                part, target = x.index_select(0, rows), y.index_select(0, rows)
            outputs = predict(part)
            losses.append(self.losses(outputs, target).to(torch.float64))
            if self.classification:
                hits.append(outputs.argmax(-1) == target)
        return torch.cat(losses), torch.cat(hits) if hits else torch.zeros(0)

    def predictor(self, theta: Tensor, buffers: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the model in evaluation mode as a function of inputs.

        Of K learners (K d,), the mean of their probabilities; in a regression, of their outputs.
        """
        models, net = torch.split(theta, self.layout.size), self.net(buffers)

        def mixed(x: Tensor) -> Tensor:
            outputs = torch.stack([net(model, x) for model in models])
            if not self.classification:
                return outputs.mean(0)
            return outputs.log_softmax(-1).logsumexp(0) - math.log(len(models))

        return mixed if len(models) > 1 else functools.partial(net, theta)

    def evaluate(
        self, theta: Tensor, buffers: Tensor, x: Tensor, y: Tensor
    ) -> dict[str, float]:
        """Return the mean loss, and the accuracy of a classification (see `predictor`)."""
        losses, hits = self.judge(self.predictor(theta, buffers), x, y)
        metrics = {"loss": float(losses.mean())}
        if self.classification:
            metrics["accuracy"] = float(hits.to(torch.float64).mean())
        return metrics
