"""Who may send to whom in a round: each topology is a pure function of (n, seed, t).

A topology is made once, ``edges = ring(n, seed)``, and asked each round, ``edges(t)`` with t from
0; it keeps nothing between two calls, so any round can be had without those before it. How much
goes over a link is another question (`shares`), and so is what gets lost (`faults.py`).

An arc goes from a sender j (``src``) to a receiver i (``dst``). What a client keeps for itself is
no arc. P(t)[i, j] is the share of j's mass that goes to i: receivers are rows, senders columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import networkx as nx
import numpy as np
from annotated_types import Ge, Gt, Le
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from strategies.base_graph import base_rounds
from strategies.randomness import address

Ints = NDArray[np.int64]
Floats = NDArray[Any]
Probability = Annotated[float, Gt(0), Le(1)]
#: Clients above which a network of all pairs is refused: its arcs alone would fill the memory.
DENSE = 5000
#: Attempts to draw a fixed network that is strongly connected.
ATTEMPTS = 100


@dataclass(frozen=True)
class Arcs:
    """The arcs of one round.

    Attributes
    ----------
    src, dst : ndarray
        Sender and receiver of each, int64 of shape (m,); no arc twice, none to oneself.
    share : ndarray or None
        What each carries of its sender's mass, float64 (m,), where the topology itself says;
        the sender keeps the rest.
    """

    src: Ints
    dst: Ints
    share: Floats | None = None

    def __len__(self) -> int:
        """Return m."""
        return len(self.src)

    def where(self, mask: NDArray[np.bool_]) -> Arcs:
        """Return those that a mask (m,) keeps."""
        share = None if self.share is None else self.share[mask]
        return Arcs(self.src[mask], self.dst[mask], share)


Edges = Callable[[int], Arcs]


def shares(n: int, arcs: Arcs, rule: Literal["push", "metropolis"]) -> csr_array:
    """Return P (n, n), float64 CSR: columns sum to one, the diagonal is positive.

    Parameters
    ----------
    n : int
        Clients.
    arcs : Arcs
        The arcs of the round; shares of their own come before the rule.
    rule : {"push", "metropolis"}
        ``push``: P[i, j] = 1 / (1 + outdegree of j), which needs nothing but the sender's own
        degree. ``metropolis``: 1 / (1 + max degree of the two), doubly stochastic, for networks
        in which every arc has its reverse.

    Raises
    ------
    ValueError
        If Metropolis weights are asked for and an arc has no reverse.
    """
    degree = np.bincount(arcs.src, minlength=n)
    if arcs.share is not None:
        share = arcs.share
    elif rule == "push":
        share = 1.0 / (1.0 + degree[arcs.src])
    else:
        there, back = arcs.src * n + arcs.dst, arcs.dst * n + arcs.src
        if not np.array_equal(np.sort(there), np.sort(back)):
            raise ValueError(
                "metropolis weights need a network in which every arc has its reverse; "
                "take strategy.weights=push"
            )
        share = 1.0 / (1.0 + np.maximum(degree[arcs.src], degree[arcs.dst]))
    if arcs.share is None and rule == "push":
        kept = 1.0 / (1.0 + degree)
    else:
        kept = 1.0 - np.bincount(arcs.src, share, minlength=n)
    everyone = np.arange(n)
    rows, columns = np.r_[everyone, arcs.dst], np.r_[everyone, arcs.src]
    P = csr_array((np.r_[kept, share], (rows, columns)), shape=(n, n))
    P.sort_indices()
    return P


def connected(n: int, arcs: Arcs) -> bool:
    """Return whether every client reaches every other along the arcs."""
    return strongly_connected(adjacency(n, arcs))


def adjacency(n: int, arcs: Arcs) -> csr_array:
    """Return the arcs as a matrix of ones, receivers in rows."""
    ones = np.ones(len(arcs), dtype=np.int8)
    return csr_array((ones, (arcs.dst, arcs.src)), shape=(n, n))


def strongly_connected(graph: csr_array) -> bool:
    """Return whether a directed graph has one strong component."""
    count, _ = connected_components(graph, connection="strong")
    return bool(count == 1)


# Fixed networks and those that change by a rule.


def self_loop(n: int, seed: int) -> Edges:
    """Nobody sends anything: local training only."""
    return _always(_arcs([], []))


def complete(n: int, seed: int) -> Edges:
    """Everybody sends to everybody: one round gives the exact mean, as a server would."""
    return _always(_all_pairs(n))


def ring(n: int, seed: int, directed: bool = False) -> Edges:
    """Client j sends to j + 1 and, unless directed, to j - 1."""
    return _always(_shifts(n, [1] if directed else [1, -1]))


def exponential(n: int, seed: int) -> Edges:
    """Client j sends to j + 1, j + 2, j + 4, ... (Ying et al. 2021, arXiv 2110.13363)."""
    return _always(_shifts(n, (2**r for r in range(_doublings(n)))))


def one_peer_exponential(n: int, seed: int) -> Edges:
    """Client j sends to j + 2^(t mod tau) alone, tau = ceil(log2 n) (Assran et al. 2019).

    If n is a power of two, tau rounds of pure averaging give the exact mean.
    """
    period = max(_doublings(n), 1)
    rounds = [_shifts(n, [2**r]) for r in range(period)]
    return lambda t: rounds[t % period]


def base(n: int, seed: int, peers: Annotated[int, Ge(1)] = 1) -> Edges:
    """Base-(k+1) graphs, k = ``peers`` (Takezawa et al. 2023, arXiv 2305.11420).

    At every n a period of pure averaging gives the exact mean, with at most k peers in a round.
    """
    rounds = [
        Arcs(np.array(a, np.int64), np.array(b, np.int64), np.array(w, np.float64))
        for a, b, w in base_rounds(n, peers)
    ]
    return lambda t: rounds[t % len(rounds)]


# Networks that are drawn.


def erdos_renyi(
    n: int,
    seed: int,
    p: Probability | None = None,
    fresh: bool = False,
    directed: bool = True,
) -> Edges:
    """Each arc is there with probability p, by default 2 ln(n) / n.

    ``fresh`` draws a new network each round; otherwise one is drawn, strongly connected, and if it
    is not ``directed`` every arc comes with its reverse.
    """
    if fresh and not directed:
        raise ValueError("directed=false: one network is drawn; use fresh=false")
    p = min(1.0, 2 * math.log(max(n, 2)) / n) if p is None else p
    if fresh:
        return lambda t: _gnp(n, p, random(seed, "topology", t))

    def once(attempt: int) -> Arcs:
        word = address(seed, "topology", 0, attempt)
        graph = nx.fast_gnp_random_graph(n, p, seed=word % 2**32, directed=directed)
        graph = graph.to_directed()
        pairs = np.array(list(graph.edges), dtype=np.int64).reshape(-1, 2)
        return _arcs(pairs[:, 0], pairs[:, 1])

    return _always(_draw(n, once, f"p={p:.3g}"))


def k_out(n: int, seed: int, k: Annotated[int, Ge(1)] = 2) -> Edges:
    """Each round every client sends to k others, drawn anew (Kempe et al. 2003)."""
    if k >= n > 1:
        raise ValueError(f"k={k}: a client can send to at most {n - 1} others")

    def edges(t: int) -> Arcs:
        generator = random(seed, "topology", t)
        steps = np.zeros((n, 0), dtype=np.int64)
        for top in range(n - k, n) if n > 1 else ():  # Floyd's sample, all rows at once
            drawn = generator.integers(1, top + 1, n)
            taken = (steps == drawn[:, None]).any(axis=1)
            steps = np.c_[steps, np.where(taken, top, drawn)]
        src = np.repeat(np.arange(n), steps.shape[1])
        return _arcs(src, (src + steps.reshape(-1)) % n)

    return edges


def geometric(
    n: int,
    seed: int,
    radius: Annotated[float, Gt(0)] | None = None,
    spread: Annotated[float, Ge(0), Le(1)] = 0.4,
) -> Edges:
    """Points in the unit square; j reaches those within its own radius.

    Radii are drawn from ``radius`` times [1 - spread, 1 + spread], so that links are one-way where
    a strong sender meets a weak one. The default radius grows until the network is connected.
    """

    def once(attempt: int, reach: float) -> Arcs:
        generator = random(seed, "topology", 0, attempt)
        points, scale = generator.random((n, 2)), generator.uniform(-1, 1, n)
        found = cKDTree(points).query_ball_point(points, reach * (1 + spread * scale))
        src = np.repeat(np.arange(n), [len(f) for f in found])
        dst = np.concatenate([np.array(f, dtype=np.int64) for f in found])
        return _arcs(src[src != dst], dst[src != dst])

    if radius is not None:
        return _always(_draw(n, lambda a: once(a, radius), f"radius={radius:g}"))
    first = math.sqrt(2 * math.log(max(n, 2)) / (math.pi * n))
    return _always(_draw(n, lambda a: once(a, first * 1.05**a), "these settings"))


def stochastic(
    n: int,
    seed: int,
    low: Probability = 0.4,
    high: Probability = 0.8,
    directed: bool = True,
) -> Edges:
    """Keep each arc of the complete network with a probability of its own.

    The probabilities are drawn once from U[low, high]; undirected, the two arcs of a pair share
    one probability and one fate (Terashita and Hara, arXiv 2210.02129).
    """
    if low > high:
        raise ValueError(f"low={low:g} is more than high={high:g}")
    pairs = _all_pairs(n)
    first = pairs if directed else pairs.where(pairs.src < pairs.dst)
    chance = random(seed, "arcs").uniform(low, high, len(first))

    def edges(t: int) -> Arcs:
        kept = first.where(random(seed, "topology", t).random(len(first)) < chance)
        if directed:
            return kept
        return Arcs(np.r_[kept.src, kept.dst], np.r_[kept.dst, kept.src])

    return edges


def random(seed: int, purpose: str, t: int = 0, who: int = 0) -> np.random.Generator:
    """Return a numpy generator that stands at an address."""
    return np.random.default_rng(address(seed, purpose, t, who))


def _arcs(src: Any, dst: Any) -> Arcs:
    return Arcs(np.asarray(src, dtype=np.int64), np.asarray(dst, dtype=np.int64))


def _always(arcs: Arcs) -> Edges:
    return lambda t: arcs


def _doublings(n: int) -> int:
    """Return ceil(log2 n), by whole numbers: a floating logarithm errs at some powers."""
    return (n - 1).bit_length()


def _shifts(n: int, offsets: Iterable[int]) -> Arcs:
    steps = np.array(sorted({o % n for o in offsets} - {0}), dtype=np.int64)
    src = np.repeat(np.arange(n), len(steps))
    return _arcs(src, (src + np.tile(steps, n)) % n)


def _all_pairs(n: int) -> Arcs:
    if n > DENSE:
        raise ValueError(
            f"a network of all pairs has {n * (n - 1):,} arcs at n={n}; at most "
            f"{DENSE} clients, or take exponential, k_out or erdos_renyi"
        )
    return _shifts(n, range(1, n))


def _gnp(n: int, p: float, generator: np.random.Generator) -> Arcs:
    """Draw a directed G(n, p): how many arcs, then which."""
    pairs = n * (n - 1)
    count = generator.binomial(pairs, p)
    flat = generator.choice(pairs, count, replace=False, shuffle=False)
    src = flat // max(n - 1, 1)
    return _arcs(src, (src + 1 + flat % max(n - 1, 1)) % n)


def _draw(n: int, once: Callable[[int], Arcs], what: str) -> Arcs:
    """Draw until the network is strongly connected."""
    for attempt in range(ATTEMPTS):
        arcs = once(attempt)
        if connected(n, arcs):
            return arcs
    raise ValueError(
        f"{ATTEMPTS} networks of {n} clients with {what} were drawn and none is "
        "strongly connected; make it denser"
    )
