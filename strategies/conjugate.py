"""Conjugate gradients: H y = g where H is known by its products alone (Hestenes and Stiefel, 1952).

At most d iterations in exact arithmetic, about sqrt(condition) where a Neumann series takes
condition many. Each needs the same H: all samples, and averages that are exact, as a server's are.
A network's inexact ones would break the conjugacy, so there is no such version of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Solved(NamedTuple):
    """Where the iteration ended.

    Attributes
    ----------
    y : Tensor
        The solution, (d,).
    iterations : int
        Products that it took.
    residual : float
        |H y - g| / |g|, as the iteration carries it.
    done : bool
        Whether that is as small as was asked for.
    """

    y: Tensor
    iterations: int
    residual: float
    done: bool


def solve(
    product: Callable[[Tensor], Tensor],
    g: Tensor,
    steps: int,
    tolerance: float = 1e-10,
) -> Solved:
    """Return y of H y = g.

    Parameters
    ----------
    product : callable
        H p, (d,), of p (d,).
    g : Tensor
        The right side, (d,).
    steps : int
        At most so many iterations.
    tolerance : float
        Ends where the residual is so small beside g, as far as the numbers can tell. Directions
        without curvature, such as softmax does not know, are left alone.

    Raises
    ------
    ValueError
        If H is not positive definite, or g not finite.
    """
    y, p, residual, square = torch.zeros_like(g), g, g, g @ g
    if not square.isfinite():
        raise ValueError("the slope of the outer cost is not finite")
    eps, top, taken = torch.finfo(g.dtype).eps, 0.0, 0
    start, goal = square, square * max(tolerance, 10 * eps) ** 2
    for _ in range(steps):
        if square <= goal:
            break
        curved = product(p)
        taken += 1
        bend = p @ curved
        curvature = float(bend / (p @ p))
        top = max(top, curvature)
        flat = top * eps**0.75
        if not curvature > flat:  # or NaN
            if -flat < curvature:  # what is left of the residual may be rounding
                break
            raise ValueError(
                f"the mean Hessian is not positive definite (p'Hp = {float(bend):.3g}): the "
                "models are not at a minimum"
            )
        y = y + square / bend * p
        residual = residual - square / bend * curved
        before, square = square, residual @ residual
        p = residual + square / before * p
    left = float((square / start).sqrt()) if start > 0 else 0.0
    return Solved(y, taken, left, bool(square <= goal))
