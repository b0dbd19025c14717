"""The bilevel problem of n clients: what they can evaluate, and its exact derivatives.

With f_i, F_i, H_i, J_i, H and g as in `hypergrad.py`, the derivatives are

    v_i = (1/n) (dF_i/dl_i - J_i' y)      H y = g

`closed_form` forms H and solves; `conjugate_gradients` needs products alone, and a server.

All clients are handled at once: costs are functions of stacked vectors whose entry i depends on
client i's row alone, so that one differentiation gives everybody's product.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from strategies.conjugate import solve

#: Hyper-parameters, or derivatives by them: a vector (p_i,) for each client.
Lambdas = tuple[Tensor, ...]
#: ``draw(purpose, k)`` gives the k-th batches of a purpose, in whatever form the cost takes them.
Draw = Callable[[str, int], Any]


@dataclass(frozen=True)
class Problem:
    """What n clients can evaluate.

    Attributes
    ----------
    inner : callable
        ``inner(x, lambdas, batch)``: the training costs f_i, (n,), at x (n, d). ``batch`` is what
        ``draw`` gave, None for all samples.
    outer : callable
        ``outer(x, lambdas)``: the outer costs F_i, (n,), regularizers of l_i included.
    x : Tensor
        Where: the clients' models (n, d), near the common minimizer.
    lambdas : tuple of Tensor
        The clients' hyper-parameters.
    draw : callable or None
        Batches for the products; None takes all samples.
    """

    inner: Callable[[Tensor, Lambdas, Any], Tensor]
    outer: Callable[[Tensor, Lambdas], Tensor]
    x: Tensor
    lambdas: Lambdas
    draw: Draw | None = None

    def __post_init__(self) -> None:
        if self.x.ndim != 2 or len(self.x) != len(self.lambdas):
            raise ValueError(
                f"x of shape {tuple(self.x.shape)} and hyper-parameters of "
                f"{len(self.lambdas)} clients: a row and a vector for each client"
            )


@dataclass(frozen=True)
class Found:
    """An estimate and what it cost.

    Attributes
    ----------
    v : tuple of Tensor
        (p_i,) for each client, which keeps it.
    exchanges : int
        How often vectors were averaged.
    messages, bytes : int
        Sent over arcs, a vector and its weight in each.
    """

    v: Lambdas
    exchanges: int
    messages: int
    bytes: int


class Products:
    """H_i z_i and J_i' z_i of all clients, by differentiating the gradients once more.

    Without batches the gradients' graph is made once and serves every product.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.x = problem.x.detach().clone().requires_grad_()
        self.lambdas = tuple(
            v.detach().clone().requires_grad_() for v in problem.lambdas
        )
        self._gradient = self._at(None) if problem.draw is None else None

    def outer(self) -> tuple[Tensor, Lambdas]:
        """Return dF_i/dx (n, d) and dF_i/dl_i."""
        cost = self.problem.outer(self.x, self.lambdas).sum()
        x, *lambdas = torch.autograd.grad(
            cost, (self.x, *self.lambdas), materialize_grads=True
        )
        return x, tuple(lambdas)

    def hessian(self, z: Tensor, purpose: str, k: int) -> Tensor:
        """Return H_i z_i, (n, d)."""
        return self._pull(z, purpose, k, (self.x,))[0]

    def cross(self, z: Tensor, purpose: str, k: int) -> Lambdas:
        """Return J_i' z_i."""
        return self._pull(z, purpose, k, self.lambdas)

    def both(self, z: Tensor, purpose: str, k: int) -> tuple[Tensor, Lambdas]:
        """Return both, from the same batches."""
        x, *lambdas = self._pull(z, purpose, k, (self.x, *self.lambdas))
        return x, tuple(lambdas)

    def _at(self, batch: Any) -> Tensor:
        cost = self.problem.inner(self.x, self.lambdas, batch).sum()
        (gradient,) = torch.autograd.grad(cost, self.x, create_graph=True)
        return gradient

    def _pull(
        self, z: Tensor, purpose: str, k: int, by: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        draw, gradient = self.problem.draw, self._gradient
        if gradient is None:
            gradient = self._at(None if draw is None else draw(purpose, k))
        return torch.autograd.grad(
            gradient, by, z, retain_graph=draw is None, materialize_grads=True
        )


def conjugate_gradients(
    problem: Problem, steps: int = 50, tolerance: float = 1e-10
) -> Found:
    """Return the hyper-gradients by conjugate gradients, where there is a server.

    The server solves H y = g with one exact average of H_i p an iteration (`conjugate.solve`), then
    sends y to all: v_i = (1/n) (dF_i/dl_i - J_i' y).

    Parameters
    ----------
    problem : Problem
        Without batches: the iteration needs the same H throughout.
    steps, tolerance : int, float
        When it ends (see `conjugate.solve`).

    Raises
    ------
    ValueError
        If the problem draws batches, H is not positive definite, or something is not finite.

    Warns
    -----
    RuntimeWarning
        If it ends before the residual is so small.
    """
    if problem.draw is not None:
        raise ValueError(
            "conjugate gradients need all samples in every product; take HGP for batches"
        )
    products, n = Products(problem), len(problem.x)
    by_x, by_lambda = products.outer()

    def product(p: Tensor) -> Tensor:
        return products.hessian(p.expand(n, -1).contiguous(), "", 0).mean(0)

    y, iterations, left, done = solve(product, by_x.mean(0), steps, tolerance)
    if not done:
        warnings.warn(
            f"conjugate gradients ended after {iterations} iterations with a residual of "
            f"{left:.1e} beside g: more of them are needed, or some damping",
            RuntimeWarning,
            stacklevel=2,
        )
    cross = products.cross(y.expand(n, -1).contiguous(), "", 0)
    v = tuple((a - b) / n for a, b in zip(by_lambda, cross, strict=True))
    if not all(bool(part.isfinite().all()) for part in v):
        raise ValueError("the hyper-gradients are not finite")
    # Each client's part of g goes up, p down and H_i p up in an iteration, y down at the end.
    exchanges = iterations + 1
    messages = n * 2 * exchanges
    return Found(v, exchanges, messages, messages * y.numel() * y.element_size())


def closed_form(problem: Problem) -> Lambdas:
    """Return the exact hyper-gradients, from d products with unit vectors and one solve.

    Of all samples, even if the problem draws batches; for small models, at the minimizer. It is
    what estimates are held against.
    """
    products, (n, d) = Products(replace(problem, draw=None)), problem.x.shape
    unit = torch.eye(d).to(problem.x)
    columns = [
        products.hessian(unit[k].expand(n, d).contiguous(), "", 0).mean(0)
        for k in range(d)
    ]
    by_x, by_lambda = products.outer()
    y = torch.linalg.solve(torch.stack(columns, 1), by_x.mean(0))
    cross = products.cross(y.expand(n, d).contiguous(), "", 0)
    return tuple((a - b) / n for a, b in zip(by_lambda, cross, strict=True))
