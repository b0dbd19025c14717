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

What the clients can evaluate, and exact ways to the same derivatives, are in `hyperproblem.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from strategies.hyperproblem import Found, Lambdas, Problem, Products
from strategies.randomness import normals

if TYPE_CHECKING:
    from strategies.network import Network


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


#: ``watch(m, found)`` sees the estimate after m steps, from 0.
Watch = Callable[[int, Found], None]


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
        # A node has the settings above and no network: it starts for every message, without scipy.
        from strategies.pushsum import average

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
        found = largest_eigenvalue(products, links, settings.power_steps, network.seed)
        if why := doubt(alpha, found):
            warnings.warn(why, RuntimeWarning, stacklevel=2)
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
    products: Products, links: Links, steps: int, seed: int
) -> Tensor:
    """Return what each client finds the dominant eigenvalue of the mean Hessian to be, (n,).

    By power iteration from a vector that all draw alike, with the messages of `hypergradients`. It
    is approached from below in size, and negative if the mean Hessian is mostly so. Without arcs
    each finds that of its own Hessian.
    """
    n, d = products.x.shape
    start = normals(seed, "eigenvalue", 0, [0], 0, d).to(products.x)
    q, found = (start / start.norm()).expand(n, d), products.x.new_zeros(n)
    for k in range(steps):
        z = links.mean(products.hessian(q.contiguous(), "eigenvalue", k))
        found = (q * z).sum(1)
        q = z / z.norm(dim=1, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny)
    return found


def doubt(alpha: float, found: Tensor) -> str:
    """Say why the series may diverge with an alpha, by the eigenvalues found; empty if not."""
    largest, least = float(found.max()), float(found.min())
    if least < 0:
        return (
            f"the mean Hessian has an eigenvalue near {least:.3g}: the models are not at a "
            "minimum, and the series diverges with every alpha"
        )
    if largest > 0 and alpha >= 2 / largest:
        return (
            f"alpha={alpha:g} is too large: the series converges below "
            f"2/lambda_max = {2 / largest:.3g}"
        )
    return ""
