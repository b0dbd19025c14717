"""Base-(k+1) graphs: sequences of sparse matrices whose product is the exact mean.

Takezawa et al. 2023 (arXiv 2305.11420), algorithms 1 to 3, in integers. Every matrix is symmetric
and doubly stochastic with at most k neighbours for each client:

    smooth      n = n_1 ... n_L, all n_l <= k+1: round l averages the groups that differ in digit l
    simple      n = a_1 (k+1)^p_1 + ... + a_L (k+1)^p_L: each part averages itself; then every
                client outside part 1 meets one client in each of its a_1 blocks, and so on down;
                at last each block averages itself
    base        n = p q with p smooth and q free of such factors: ``simple`` on p sets of q
                clients, then ``smooth`` across them
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

Round = list[tuple[int, int, float]]


def base_rounds(
    n: int, k: int
) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]]:
    """Return the rounds of one period as (senders, receivers, shares).

    Parameters
    ----------
    n : int
        Clients.
    k : int
        Largest number of peers in a round.
    """
    everyone = range(n)
    smooth = _largest_smooth(n, k)
    plain = _simple(everyone, k)
    rounds = plain
    if 1 < smooth < n:
        size = n // smooth
        rows = [everyone[i * size : (i + 1) * size] for i in range(smooth)]
        rounds = _together([_simple(row, k) for row in rows])
        columns = [everyone[i::size] for i in range(size)]
        rounds += _together([_smooth(column, k) for column in columns])
        rounds = min(rounds, plain, key=len)
    both = [r + [(j, i, w) for i, j, w in r] for r in rounds] or [[]]
    return [
        (tuple(a for a, _, _ in r), tuple(b for _, b, _ in r), tuple(w for *_, w in r))
        for r in both
    ]


@functools.cache
def _factors(n: int, k: int) -> tuple[int, ...] | None:
    """Return the fewest factors of n that are at most k + 1, None if there are none."""
    if n == 1:
        return ()
    found = None
    for first in range(min(k + 1, n), 1, -1):
        rest = _factors(n // first, k) if n % first == 0 else None
        if rest is not None and (found is None or len(rest) + 1 < len(found)):
            found = (first, *rest)
    return found


def _largest_smooth(n: int, k: int) -> int:
    """Return the largest divisor of n without a prime factor above k + 1."""
    return max(p for p in range(1, n + 1) if n % p == 0 and _factors(p, k) is not None)


def _smooth(nodes: Sequence[int], k: int) -> list[Round]:
    """Average all nodes exactly; their number has no prime factor above k + 1."""
    rounds, stride = [], 1
    for size in _factors(len(nodes), k) or ():
        pairs: Round = []
        for i, node in enumerate(nodes):
            digit = i // stride % size
            pairs += [
                (node, nodes[i + step * stride], 1.0 / size)
                for step in range(1, size - digit)
            ]
        rounds.append(pairs)
        stride *= size
    return rounds


def _simple(nodes: Sequence[int], k: int) -> list[Round]:
    """Average all nodes exactly, whatever their number."""
    if _factors(len(nodes), k) is not None:
        return _smooth(nodes, k)
    parts = _parts(nodes, k)
    rounds = _together([_smooth([v for b in part for v in b], k) for part in parts])
    endings = []
    for stage, blocks in enumerate(parts[:-1]):
        outside = [v for part in parts[stage + 1 :] for b in part for v in b]
        mine = sum(map(len, blocks))
        weight = mine / (len(blocks) * (mine + len(outside)))
        rounds.append(
            [(v, b[i], weight) for i, v in enumerate(outside) for b in blocks]
        )
        # Nobody of this part is needed in later stages: its blocks finish meanwhile.
        finish = _together([_smooth(block, k) for block in blocks])
        endings.append((len(rounds), finish))
    for start, finish in endings:
        for place, pairs in enumerate(finish, start):
            if place == len(rounds):
                rounds.append([])
            rounds[place] = rounds[place] + pairs
    return rounds


def _parts(nodes: Sequence[int], k: int) -> list[list[Sequence[int]]]:
    """Cut nodes into parts of a_l blocks of (k+1)^p_l, by the digits of their number."""
    size = 1
    while size * (k + 1) <= len(nodes):
        size *= k + 1
    parts, start = [], 0
    while size:
        count = (len(nodes) - start) // size
        ends = [start + i * size for i in range(count + 1)]
        if count:
            parts.append([nodes[a:b] for a, b in itertools.pairwise(ends)])
        start, size = ends[-1], size // (k + 1)
    return parts


def _together(sequences: list[list[Round]]) -> list[Round]:
    """Run sequences over disjoint nodes side by side."""
    length = max(map(len, sequences), default=0)
    return [[e for s in sequences if t < len(s) for e in s[t]] for t in range(length)]
