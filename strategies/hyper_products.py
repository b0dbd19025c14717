"""What is learned of the mean Hessian by asking clients for its products with vectors.

    check    its largest eigenvalue, which says whether alpha is small enough
    solved   y of H y = g, by conjugate gradients, and the step that clients take along it

`bilevel.py` asks; clients keep nothing of a product.
"""

from __future__ import annotations

import itertools
from logging import WARNING
from typing import TYPE_CHECKING

import torch
from flwr.common.logger import log
from torch import Tensor

from strategies.conjugate import solve
from strategies.hypergrad import doubt
from strategies.randomness import normals

if TYPE_CHECKING:
    from strategies.bilevel import Bilevel


#: A residual of conjugate gradients that is told, beside the slope of the outer cost.
LARGE = 0.1


class Fewer(Exception):
    """Some clients no longer answer."""


def check(level: Bilevel, clients: list[int]) -> bool:
    """Look for the mean Hessian's largest eigenvalue, and warn of an alpha too large for it.

    Return whether all have answered: without some of them it would come out too small.
    """
    if len(clients) < level.count or not clients:
        log(WARNING, "personal.alpha: not checked now, as some are not there")
        return False
    theta = level.federation.server["theta"]
    seed, d = level.federation.roster.seed, len(theta)
    q = normals(seed, "eigenvalue", 0, [0], 0, d)[0].to(theta)
    q, found = q / q.norm(), theta.new_zeros(1)
    if level.each:
        q = q.expand(level.count, d).contiguous()
    for k in range(level.how.power_steps):
        products, answered = level.exchange("curvature", k, clients, q)
        if len(answered) < len(clients):
            log(WARNING, "personal.alpha: not checked now, as some do not answer")
            return False
        z = level.mean(products, None)
        found = (q * z).sum(-1)
        q = z / z.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny)
    level.told.largest = float(found.max())
    if why := doubt(level.how.alpha, found):
        level.told.warnings.append(f"personal.alpha: {why}")
        log(WARNING, "personal.alpha: %s", why)
    return True


def solved(level: Bilevel, g: Tensor, clients: list[int]) -> list[int]:
    """Let clients take their step along the solution of H y = g, and return who has.

    Parameters
    ----------
    level : Bilevel
        Who asks: a server's.
    g : Tensor
        The mean of what clients sent at the start, (d,).
    clients : list of int
        Who has.
    """
    how, number = level.how, itertools.count()

    def product(p: Tensor) -> Tensor:
        nonlocal clients
        parts, there = level.exchange("curvature", next(number), clients, p)
        if len(there) < len(clients):
            clients = there
            raise Fewer
        return level.mean(parts, None)

    found, why = None, ""
    while clients and not found:
        try:
            found = solve(product, g, how.depth)
        except Fewer:
            continue  # with another H the iteration begins anew
        except ValueError as error:
            why = f"no step, {error}; raise personal.damping"
            break
    if found and found.residual > LARGE:
        why = (
            f"after {found.iterations} iterations {found.residual:.2g} of the slope is left; "
            "raise personal.depth or personal.damping"
        )
    if why:
        level.told.warnings.append(f"personal.method={how.method}: {why}")
        log(WARNING, "personal.method=%s: %s", how.method, why)
    if not found:
        return []
    level.told.residual = found.residual
    z = found.y / how.alpha  # a client takes alpha J_i' z
    return level.exchange("step", how.exchanges - 2, clients, z)[1]
