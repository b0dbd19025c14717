"""The weighted mean of what clients send: on a node over its clients, on the server over nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from strategies.algorithm import Vectors


@dataclass
class Mean:
    """A weighted mean of vectors by name, accumulated in float64 in the order of arrival."""

    sums: Vectors = field(default_factory=dict)
    weight: float = 0.0

    def add(self, vectors: Mapping[str, Tensor], weight: float) -> None:
        """Add one vector (d,) for each name, with a weight."""
        rows = {name: vector[None] for name, vector in vectors.items()}
        self.add_rows(rows, [weight])

    def add_rows(self, rows: Mapping[str, Tensor], weights: Sequence[float]) -> None:
        """Add rows (n, d) for each name, with a weight each."""
        for name, matrix in rows.items():
            scale = torch.tensor(weights, dtype=torch.float64, device=matrix.device)
            # Not one product of w and the matrix: its order of summation may change with n.
            term = (scale[:, None] * matrix).sum(0)
            self.sums[name] = self.sums[name] + term if name in self.sums else term
        self.weight += sum(weights)

    def value(self, dtype: torch.dtype) -> Vectors:
        """Return the mean in the given dtype; empty if nothing was added."""
        return {n: (s / self.weight).to(dtype) for n, s in self.sums.items()}
