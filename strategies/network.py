"""P(t): a topology, a weight rule and faults put together, and what can be said about them.

``Network.at(t)`` is a pure function of (seed, t). `Window` and `contraction` describe the
matrices; nothing here touches what the clients carry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from scipy.sparse import csr_array, diags_array

from strategies.faults import Faults, Mask
from strategies.topology import (
    Arcs,
    Edges,
    Floats,
    adjacency,
    shares,
    strongly_connected,
)

#: Clients up to which a product of matrices is formed and its norm computed exactly.
EXACT = 256


@dataclass(frozen=True)
class Links:
    """The network of one round.

    Attributes
    ----------
    P : csr_array
        Column-stochastic shares (n, n), float64: receiver in rows, sender in columns.
    lost : csr_array
        The entries of P that do not arrive, (n, n).
    awake : ndarray
        Who takes part, bool (n,). The others' columns and rows are those of the identity.
    """

    P: csr_array
    lost: csr_array
    awake: Mask


@dataclass(frozen=True)
class Network:
    """A directed network that changes every round.

    Attributes
    ----------
    n : int
        Clients.
    seed : int
        Of its draws.
    edges : callable
        The topology: ``edges(t)`` gives the arcs of round t, from 0.
    rule : {"push", "metropolis"}
        How much goes over each arc (see `topology.shares`).
    faults : Faults
        What goes wrong.
    """

    n: int
    seed: int
    edges: Edges
    rule: Literal["push", "metropolis"] = "push"
    faults: Faults = field(default_factory=Faults)
    _last: list[tuple[Arcs, csr_array]] = field(
        default_factory=list, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        self.faults.check(self.n)

    def at(self, t: int) -> Links:
        """Return the network of round t.

        Raises
        ------
        ValueError
            If Metropolis weights meet a network with one-way links.
        """
        arcs = self.edges(t)
        awake = self.faults.awake(self.seed, t, self.n)
        if awake.all():
            P = self._shares(arcs)
        else:
            arcs = arcs.where(awake[arcs.src] & awake[arcs.dst])
            P = shares(self.n, arcs, self.rule)
        gone = arcs.where(self.faults.lost(self.seed, t, arcs.src, arcs.dst))
        lost = P.multiply(adjacency(self.n, gone)).tocsr() if len(gone) else _none(P)
        return Links(P, lost, awake)

    def heir(self, client: int, t: int, present: Mask) -> int:
        """Return who takes over from a client that leaves as round t begins.

        A client that it sends to in that round or, if none of those is there, the next one.
        """
        arcs = self.edges(t)
        near = arcs.dst[arcs.src == client]
        near = near[present[near]] if present[near].any() else np.flatnonzero(present)
        return int(near[((near - client) % self.n).argmin()])

    def _shares(self, arcs: Arcs) -> csr_array:
        """Return the shares of arcs; a fixed network's are computed once."""
        if not self._last or self._last[0][0] is not arcs:
            self._last[:] = [(arcs, shares(self.n, arcs, self.rule))]
        return self._last[0][1]


def _none(like: csr_array) -> csr_array:
    return csr_array(like.shape, dtype=like.dtype)


def check_shares(P: csr_array, where: str) -> None:
    """Check that no share is negative, and that columns sum to one with something kept.

    Raises
    ------
    ValueError
        Naming the client whose shares are wrong.
    """
    if P.nnz and P.data.min() < 0:
        sender = int(P.tocoo().col[P.data.argmin()])
        raise ValueError(
            f"{where}: client {sender} has a negative share {P.data.min():g}"
        )
    off = np.abs(P.sum(axis=0) - 1)
    if off.max() > 1e-9:
        sender = int(off.argmax())
        total = 1 + float((P.sum(axis=0) - 1)[sender])
        raise ValueError(
            f"{where}: the shares of client {sender} sum to {total:g}, not 1"
        )
    if P.diagonal().min() <= 0:
        sender = int(P.diagonal().argmin())
        raise ValueError(f"{where}: client {sender} keeps nothing for itself")


class Window:
    """Watches how long the union of a network's links takes to connect all to all.

    Attributes
    ----------
    longest : int or None
        The longest stretch so far that it took; None before it has happened once.
    """

    def __init__(self, n: int) -> None:
        self.union = csr_array((n, n), dtype=bool)
        self.length = 0
        self.longest: int | None = None

    def see(self, links: Links, present: Mask) -> None:
        """Take in one round."""
        self.length += 1
        arrived = (links.P - links.lost) > 0
        self.union = self.union + arrived
        here = self.union if present.all() else self.union[present][:, present]
        if strongly_connected(here):
            self.longest = max(self.longest or 0, self.length)
            self.union, self.length = csr_array(self.union.shape, dtype=bool), 0


def contraction(rounds: Sequence[csr_array]) -> float:
    """Return how much disagreement a round leaves: sigma^(1/tau) over the last tau rounds.

    Parameters
    ----------
    rounds : sequence of csr_array
        The tau matrices that were applied, oldest first. With Phi their product and
        R = diag(Phi 1)^-1 Phi, which maps models to models, sigma is the largest singular value
        of J R J, J = I - 11'/n: the disagreement after tau rounds is at most sigma times that
        before. 0 is exact averaging, 1 and above is no contraction.
    """
    n = rounds[0].shape[0]
    if n <= 1:
        return 0.0
    scale: Floats = np.ones(n)
    for P in rounds:
        scale = P @ scale
    scale = np.maximum(scale, np.finfo(float).tiny)
    if n <= EXACT:
        R: Floats = np.eye(n)
        for P in rounds:
            R = P @ R
        R = R / scale[:, None]
        R -= R.mean(axis=0)
        R -= R.mean(axis=1)[:, None]
        sigma = float(np.linalg.norm(R, 2))
    else:
        sigma = _norm(rounds, scale)
    return float(sigma ** (1 / len(rounds))) if sigma > 1e-14 else 0.0


def _norm(rounds: Sequence[csr_array], scale: Floats, steps: int = 30) -> float:
    """Return the largest singular value of J R J by power iteration, without forming it."""
    v = np.random.default_rng(0).standard_normal(len(scale))
    found = 0.0
    for _ in range(steps):
        v -= v.mean()
        v /= max(float(np.linalg.norm(v)), np.finfo(float).tiny)
        for P in rounds:
            v = P @ v
        v /= scale
        v -= v.mean()
        found = float(np.linalg.norm(v))
        v /= scale
        for P in reversed(rounds):
            v = P.T @ v
    return found


def delivered(links: Links, policy: str) -> csr_array:
    """Return the matrix that is applied to the clients' mass in a round, (n, n).

    ``keep`` adds a lost share to what the sender keeps, ``renorm`` divides what arrives by its
    sum, ``vanish`` and ``running`` leave it out of the clients' mass.
    """
    if not links.lost.nnz:
        return links.P
    arrived = csr_array(links.P - links.lost)
    arrived.eliminate_zeros()
    if policy == "keep":
        return csr_array(arrived + diags_array(links.lost.sum(axis=0)))
    if policy == "renorm":
        return csr_array(arrived @ diags_array(1.0 / arrived.sum(axis=0)))
    return arrived
