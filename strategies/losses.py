"""Losses of samples, from a model's outputs and their targets."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

#: The target of a place that is padding, as torch marks it.
IGNORED = -100


def cross_entropy(outputs: Tensor, y: Tensor) -> Tensor:
    """Return the loss of each sample, shape (B,), of logits of shape (B, C).

    A sample may have several targets, (B, T) with logits (B, T, C): its loss is their mean,
    without those that are `IGNORED`.
    """
    if y.ndim == 1:
        return F.cross_entropy(outputs, y, reduction="none")
    losses = F.cross_entropy(
        outputs.movedim(-1, 1), y, reduction="none", ignore_index=IGNORED
    )
    counts = (y != IGNORED).flatten(1).sum(1).clamp(min=1)
    return losses.flatten(1).sum(1) / counts


def squared(outputs: Tensor, y: Tensor) -> Tensor:
    """Return half the squared error of each sample, shape (B,)."""
    return 0.5 * (outputs - y).square()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": cross_entropy,
    "squared": squared,
}
