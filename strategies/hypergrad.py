"""Hyper-gradient push (Terashita and Hara 2022, arXiv 2210.02129v3): derivatives over a network.

Client i has a training cost f_i(x, l_i), an outer cost F_i(x, l_i) and hyper-parameters l_i that
nobody else sees. At the minimizer x* of sum_j f_j, what everybody's outer cost owes to them is

    v_i = d/dl_i  (1/n) sum_j F_j(x*(l), l_j)
        = (1/n) dF_i/dl_i - (1/n) J_i' H^-1 g       H = mean_j H_j,  g = mean_j dF_j/dx

with H_i = d2 f_i/dx2 and J_i = d2 f_i/dx dl_i. HGP estimates it by exchanging vectors of R^d:

    u_i = (1/n) dF_i/dx       v_i = (1/n) dF_i/dl_i
    M times:   z_i = client i's estimate of mean_j u_j after S pushes, whose weight starts at one
               v_i <- v_i - alpha J_i' z_i          u_i <- z_i - alpha H_i z_i

Where averages are exact (a complete network, which is what a server is, or S to infinity) this is
the Neumann series, [I - (I - alpha H)^M] H^-1 in the place of H^-1: it converges for
0 < alpha < 2 / (largest eigenvalue of H), and only the mean of the H_i has to be positive definite.
With few pushes an error stays that more steps do not remove. Without arcs nothing is sent, and
v_i is the client's own hyper-gradient, with H_i and dF_i/dx in the place of H and g.

The weight belongs to the pushed vector alone: that of training is not touched. With batches the
estimate is unbiased, since J of one step multiplies H of earlier ones only, and each step draws
anew; whether its two products share a batch is a question of cost and of variance.

`Problem` is what the clients can evaluate. All are handled at once: costs are functions of stacked
vectors whose entry i depends on client i's row alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from strategies.network import Network
from strategies.pushsum import average
from strategies.randomness import normals

#: Hyper-parameters, or derivatives by them: a vector (p_i,) for each client.
Lambdas = tuple[Tensor, ...]
#: ``draw(purpose, k)`` gives the k-th batches of a purpose, in whatever form the cost takes them.
Draw = Callable[[str, int], Any]


@dataclass(frozen=True)
class HGP:
    """How a hyper-gradient is estimated.

    Attributes
    ----------
    depth : int
        M, the steps of the Neumann series.
    pushes : int
        S, the pushes between two of them.
    alpha : float
        Damping, below 2 over the largest eigenvalue of the mean Hessian.
    independent : bool
        Whether the two products of a step take batches of their own.
    power_steps : int
        Steps of the power iteration by which alpha is checked, each with S pushes; 0 does not.
    """

    depth: Annotated[int, Ge(1)] = 10
    pushes: Annotated[int, Ge(1)] = 1
    alpha: Annotated[float, Gt(0)] = 0.1
    independent: bool = True
    power_steps: Annotated[int, Ge(0)] = 20

    def __post_init__(self) -> None:
        for name, least in (("depth", 1), ("pushes", 1), ("power_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: at least {least}")
        if not 0 < self.alpha < float("inf"):
            raise ValueError(
                f"alpha={self.alpha:g}: a positive number, below 2 over the largest "
                "eigenvalue of the mean Hessian"
            )


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


#: ``watch(m, found)`` sees the estimate after m steps, from 0.
Watch = Callable[[int, Found], None]


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


class Links:
    """Averages over a network, round after round, and a count of what they send.

    Parameters
    ----------
    network : Network
        Of which rounds are used from ``first`` on.
    pushes : int
        S.
    first : int
        The first round.
    """

    def __init__(self, network: Network, pushes: int, first: int) -> None:
        self.network, self.pushes, self.round = network, pushes, first
        self.exchanges = self.messages = self.bytes = 0

    def mean(self, u: Tensor) -> Tensor:
        """Return every client's estimate of the mean of u (n, d), which is not changed."""
        rows = u.detach().cpu().numpy().copy()
        z, sent = average(self.network, rows, self.round, self.pushes)
        self.round += self.pushes
        self.exchanges += 1
        self.messages += sent
        self.bytes += sent * (rows.itemsize * rows.shape[1] + 8)
        return torch.from_numpy(z).to(u.device)

    def found(self, v: Lambdas) -> Found:
        """Return an estimate with what was sent for it until now."""
        return Found(v, self.exchanges, self.messages, self.bytes)


def hypergradients(
    problem: Problem,
    network: Network,
    settings: HGP,
    first: int = 0,
    watch: Watch | None = None,
) -> Found:
    """Estimate every client's hyper-gradient over a network.

    Parameters
    ----------
    problem : Problem
        The clients.
    network : Network
        As many of them; over a complete one averages are exact at S = 1.
    settings : HGP
        How.
    first : int
        The network's first round to use. The check of alpha comes first, then the series.
    watch : callable, optional
        Sees the estimate after each step.

    Raises
    ------
    ValueError
        If problem and network have different numbers of clients.

    Warns
    -----
    RuntimeWarning
        If alpha is too large for the series to converge, or the mean Hessian is not positive.
    """
    n = len(problem.x)
    if network.n != n:
        raise ValueError(f"a network of {network.n} clients and a problem of {n}")
    products, links = Products(problem), Links(network, settings.pushes, first)
    alpha = settings.alpha
    if settings.power_steps:
        found = _largest(products, links, settings.power_steps, network.seed)
        _judge(alpha, found)
    u, v = products.outer()
    u, v = u / n, tuple(part / n for part in v)
    if watch:
        watch(0, links.found(v))
    for m in range(1, settings.depth + 1):
        z = links.mean(u)
        if settings.independent and problem.draw is not None:
            cross, curved = products.cross(z, "cross", m), products.hessian(z, "x", m)
        else:
            curved, cross = products.both(z, "cross", m)
        v = tuple(part - alpha * c for part, c in zip(v, cross, strict=True))
        u = z - alpha * curved
        if watch:
            watch(m, links.found(v))
    return links.found(v)


def largest_eigenvalue(
    problem: Problem, network: Network, pushes: int = 1, steps: int = 20, first: int = 0
) -> Tensor:
    """Return what each client finds the dominant eigenvalue of the mean Hessian to be, (n,).

    By power iteration from a vector that all draw alike, with the messages of `hypergradients`. It
    is approached from below in size, and negative if the mean Hessian is mostly so. Without arcs
    each finds that of its own Hessian.
    """
    links = Links(network, pushes, first)
    return _largest(Products(problem), links, steps, network.seed)


def _largest(products: Products, links: Links, steps: int, seed: int) -> Tensor:
    n, d = products.x.shape
    start = normals(seed, "eigenvalue", 0, [0], 0, d).to(products.x)
    q, found = (start / start.norm()).expand(n, d), products.x.new_zeros(n)
    for k in range(steps):
        z = links.mean(products.hessian(q.contiguous(), "eigenvalue", k))
        found = (q * z).sum(1)
        q = z / z.norm(dim=1, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny)
    return found


def _judge(alpha: float, found: Tensor) -> None:
    """Warn of an alpha with which the series diverges."""
    largest, least = float(found.max()), float(found.min())
    if least < 0:
        warnings.warn(
            f"the mean Hessian has an eigenvalue near {least:.3g}: the models are not at a "
            "minimum, and the series diverges with every alpha",
            RuntimeWarning,
            stacklevel=3,
        )
    elif largest > 0 and alpha >= 2 / largest:
        warnings.warn(
            f"alpha={alpha:g} is too large: the series converges below "
            f"2/lambda_max = {2 / largest:.3g}",
            RuntimeWarning,
            stacklevel=3,
        )


def conjugate_gradients(
    problem: Problem, steps: int = 50, tolerance: float = 1e-10
) -> Found:
    """Return the hyper-gradients by conjugate gradients, where there is a server.

    The server solves H y = g with one exact average of H_i p an iteration, then sends y to all:
    v_i = (1/n) (dF_i/dl_i - J_i' y). At most d iterations in exact arithmetic, about
    sqrt(condition) where HGP takes condition many; a network's inexact averages would break the
    conjugacy, so there is no such version of it.

    Parameters
    ----------
    problem : Problem
        Without batches: the iteration needs the same H throughout.
    steps : int
        At most so many iterations.
    tolerance : float
        Ends where the residual is so small beside g.

    Raises
    ------
    ValueError
        If the problem draws batches, or H is not positive definite.
    """
    if problem.draw is not None:
        raise ValueError(
            "conjugate gradients need all samples in every product; take HGP for batches"
        )
    products, n = Products(problem), len(problem.x)
    by_x, by_lambda = products.outer()
    residual = by_x.mean(0)
    y, p, square = torch.zeros_like(residual), residual, residual @ residual
    goal, exchanges = square * tolerance**2, 1
    for _ in range(steps):
        if square <= goal:
            break
        curved = products.hessian(p.expand(n, -1).contiguous(), "", 0).mean(0)
        exchanges += 1
        bend = p @ curved
        if bend <= 0:
            raise ValueError(
                f"the mean Hessian is not positive definite (p'Hp = {float(bend):.3g}): the "
                "models are not at a minimum"
            )
        y = y + square / bend * p
        residual = residual - square / bend * curved
        before, square = square, residual @ residual
        p = residual + square / before * p
    cross = products.cross(y.expand(n, -1).contiguous(), "", 0)
    v = tuple((a - b) / n for a, b in zip(by_lambda, cross, strict=True))
    # Up and down for each client in an exchange, and y down at the end.
    messages = n * (2 * exchanges + 1)
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
