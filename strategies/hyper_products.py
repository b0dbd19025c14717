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


class Fewer(Exception):
    """Some clients no longer answer."""


def check(level: Bilevel, clients: list[int]) -> bool:
    """Look for the mean Hessian's largest eigenvalue, and warn of an alpha too large for it.

    Return whether all have answered: without some of them it would come out too small.
    """
    theta = level.federation.server["theta"]
    seed, d = level.federation.roster.seed, len(theta)
    q = normals(seed, "eigenvalue", 0, [0], 0, d)[0].to(theta)
    q, found = q / q.norm(), theta.new_zeros(1)
    if level.each:
        q = q.expand(level.count, d).contiguous()
    for k in range(level.how.power_steps):
        products, answered = level.exchange("curvature", k, clients, q)
        if len(answered) < level.count or not clients:
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


def solved(level: Bilevel, g: Tensor, clients: list[int], keeps: bool) -> list[int]:
    """Let clients take their step along the solution of H y = g, and return who has.

    Parameters
    ----------
    level : Bilevel
        Who asks: a server's.
    g : Tensor
        The mean of what clients sent at the start, (d,).
    clients : list of int
        Who has.
    keeps : bool
        Whether they keep what they have as the best so far.
    """
    how, number = level.how, itertools.count()

    def product(p: Tensor) -> Tensor:
        nonlocal clients
        parts, there = level.exchange("curvature", next(number), clients, p)
        if len(there) < len(clients):
            clients = there
            raise Fewer
        return level.mean(parts, None)

    found = None
    while clients and not found:
        try:
            found = solve(product, g, how.depth)
        except Fewer:
            continue  # with another H the iteration begins anew
        except ValueError as error:
            why = f"personal.method={how.method}: no step, {error}"
            level.told.warnings.append(why)
            log(WARNING, "%s", why)
            return []
    if not found:
        return []
    level.told.residual = found.residual
    z = found.y / how.alpha  # a client takes alpha J_i' z
    return level.exchange("step", how.depth, clients, z, keeps)[1]
