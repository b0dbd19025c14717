"""Feature shift: clients of one group see their inputs in another way than those of the others.

A client's group is drawn from the run's seed, groups of equal size up to one. All of its samples
are changed alike, before they are cut into training, validation and test; the data's own test set
is nobody's and stays. Samples belong to one client each, so a shift changes rows of the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from app.data import Dataset, Split
from app.errors import UserError
from strategies.randomness import permutations, uniforms


@dataclass(frozen=True)
class Shift:
    """No shift, and what every shift is.

    Attributes
    ----------
    groups : int
        How many ways of seeing there are.
    """

    groups: Annotated[int, Ge(1)] = 1

    def moved(self, x: Tensor, group: int, seed: int) -> Tensor:
        """Return inputs (B, ...) as a group sees them."""
        return x

    def unfit(self, x: Tensor) -> str:
        """Say why such inputs cannot be shifted; empty if they can."""
        return ""


@dataclass(frozen=True)
class Normalization(Shift):
    """Subtract and divide by numbers of the group's own (Terashita and Hara, arXiv 2210.02129).

    x <- (x - u_1) / u_2 with u_1 ~ U(0, 1) and u_2 ~ U(least, 1), drawn for each group. The
    authors draw u_2 from U(0, 1), which may divide by next to nothing.

    Attributes
    ----------
    least : float
        The smallest divisor.
    """

    groups: Annotated[int, Ge(1)] = 3
    least: Annotated[float, Gt(0), Le(1)] = 0.1

    def moved(self, x: Tensor, group: int, seed: int) -> Tensor:
        """Return (x - u_1) / u_2."""
        drawn = uniforms(seed, "shift", 0, [group], 0, 2)[0].to(x.device, x.dtype)
        return (x - drawn[0]) / torch.lerp(
            drawn.new_tensor(self.least), drawn.new_ones(()), drawn[1]
        )

    def unfit(self, x: Tensor) -> str:
        """Refuse symbols."""
        return "" if x.is_floating_point() else "takes numbers, and the inputs are text"


@dataclass(frozen=True)
class Rotation(Shift):
    """Turn pictures by quarters: group g by g times 90 degrees (as Ghosh et al. 2020 do)."""

    groups: Annotated[int, Ge(1), Le(4)] = 4

    def moved(self, x: Tensor, group: int, seed: int) -> Tensor:
        """Return turned pictures (B, channels, side, side)."""
        return x.rot90(group, (-2, -1))

    def unfit(self, x: Tensor) -> str:
        """Refuse all but square pictures."""
        if x.ndim == 4 and x.shape[-1] == x.shape[-2]:
            return ""
        return f"takes square pictures, and an input has shape {tuple(x.shape[1:])}"


def groups_of(clients: int, groups: int, seed: int) -> list[int]:
    """Return each client's group."""
    places = permutations(seed, "shift groups", 0, [0], clients)[0]
    return [int(place) % groups for place in places]


def shifted(
    dataset: Dataset, parts: Sequence[np.ndarray], shift: Shift, seed: int
) -> Dataset:
    """Return the data as their clients see them.

    Raises
    ------
    UserError
        If such inputs cannot be shifted.
    """
    if type(shift) is Shift:
        return dataset
    train = dataset.train
    if why := shift.unfit(train.x):
        raise UserError(f"shift={type(shift).__name__.lower()} {why}")
    x, groups = train.x.clone(), groups_of(len(parts), shift.groups, seed)
    for group in range(shift.groups):
        mine = [part for part, g in zip(parts, groups, strict=True) if g == group]
        if mine:
            rows = torch.from_numpy(np.concatenate(mine)).to(x.device)
            x[rows] = shift.moved(train.x[rows], group, seed)
    return replace(dataset, train=Split(x, train.y))
