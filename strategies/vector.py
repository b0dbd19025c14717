"""Models as vectors: the algorithms see theta in R^d, the modules see named tensors.

Every formula of the papers is written on flat vectors, a message carries one array for each
quantity, and a cohort is a matrix. `Layout` is the only place that knows where a named tensor
lies inside its vector.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the tensors that a flat vector holds, in order.

    Attributes
    ----------
    names : tuple of str
        Names as in ``module.named_parameters()``.
    shapes : tuple of torch.Size
        Shape of each tensor.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @classmethod
    def of(cls, named: Iterable[tuple[str, Tensor]]) -> Layout:
        """Describe the given named tensors."""
        pairs = list(named)
        return cls(tuple(n for n, _ in pairs), tuple(t.shape for _, t in pairs))

    @property
    def sizes(self) -> list[int]:
        """Number of entries of each tensor."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def size(self) -> int:
        """Length d of the vector."""
        return sum(self.sizes)

    def flatten(self, named: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Copy the named tensors into one new vector of shape (d,)."""
        if not self.names:
            return torch.zeros(0, dtype=dtype)
        return torch.cat([named[n].detach().reshape(-1).to(dtype) for n in self.names])

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """View a vector of shape (d,) as named tensors, differentiably and without a copy."""
        if not self.names:
            return {}
        # One split has one backward node (a concatenation), whatever the number of tensors.
        parts = torch.split(vector, self.sizes)
        return {
            n: p.view(s) for n, s, p in zip(self.names, self.shapes, parts, strict=True)
        }

    def named(self, theta: Tensor) -> dict[str, Tensor]:
        """View one vector, or those of several learners (K d,), each in a place of its own."""
        models = torch.split(theta, self.size)
        if len(models) == 1:
            return self.unflatten(theta)
        return {
            f"learner_{k}.{name}": tensor
            for k, model in enumerate(models)
            for name, tensor in self.unflatten(model).items()
        }


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the product of two vectors, the same bits wherever they lie in memory."""
    return (a * b).sum()


def largest(dtype: torch.dtype) -> float:
    """Return the largest norm that a vector of a reply may have: its square is still a number.

    So no sum, mean or second moment of what was accepted overflows: who sends more than that
    is refused alone, instead of spoiling the round for all.
    """
    return float(torch.finfo(dtype).max ** 0.5)
