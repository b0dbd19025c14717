"""Push-Sum: averages over directed networks (Kempe, Dobra and Gehrke 2003).

    x(t+1) = P(t) x(t)      w(t+1) = P(t) w(t)      z_i = x_i / w_i      w(0) = 1

The columns of P(t) sum to one, so the sums of x and of w never change, and z_i goes to
sum x(0) / sum w(0) however many arcs come in and out of client i. Rows may sum to anything: that is
what w corrects. x alone, or z sent with a weight of one, would go to averages weighted by the
network.

`State` is one carried quantity, with a weight of its own. `mix` is the only function that mixes it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import block_array, csr_array

from strategies.faults import Policy
from strategies.network import Links, Network, delivered
from strategies.topology import Floats, Ints

Matrix = NDArray[Any]
#: Bytes of x that are mixed at once by each thread; the product is the only copy made.
BLOCK = 2**23
#: Fewest columns in a block: narrower ones waste the cache lines that they touch.
WIDTH = 64
#: Numbers below which threads cost more than they save.
SMALL = 2**20
#: A matrix with more than one entry in so many is multiplied as a dense one.
SPARSE = 8
#: Float32 holds every multiple of 1 / GRID between 0 and 1.
GRID = 2.0**24
#: Bytes that may wait on links (running sums) before the run is refused.
IN_FLIGHT = 2**32


def _cores() -> int:
    return min(len(os.sched_getaffinity(0)), 8)


class Unbalanced(ValueError):
    """A network that cannot go on; the text says why in one line."""


@dataclass
class Flight:
    """Mass that waits on links, with a row for each link.

    Attributes
    ----------
    links : ndarray
        sender * n + receiver, int64 (m,), ascending.
    x, w : ndarray
        What waits there: (m, d) in the dtype of the state, and float64 (m,).
    """

    links: Ints
    x: Matrix
    w: Floats


@dataclass
class State:
    """One quantity carried by Push-Sum.

    Attributes
    ----------
    x : ndarray
        Mass, float32 or float64 of shape (n, d), a row for each client.
    w : ndarray
        Weight, float64 (n,).
    flight : Flight
        What is on the way.
    lost_x, lost_w : ndarray, float
        What was lost for good, float64 (d,) and its weight.
    """

    x: Matrix
    w: Floats
    flight: Flight
    lost_x: Floats
    lost_w: float = 0.0

    @classmethod
    def of(cls, x: Matrix) -> State:
        """Start from the values x (n, d), which the state takes over: w = 1."""
        size = x.shape[1]
        nothing = Flight(
            np.zeros(0, np.int64), np.zeros((0, size), x.dtype), np.zeros(0)
        )
        return cls(x, np.ones(len(x)), nothing, np.zeros(size))

    def z(self, rows: Any = slice(None)) -> Matrix:
        """Return the clients' values x / w, in the dtype of x; zeros where w is 0.

        Parameters
        ----------
        rows : slice or sequence of int
            Which clients.
        """
        w = self.w[rows]
        inverse = np.divide(1.0, w, out=np.zeros_like(w), where=w > 0)
        z: Matrix = self.x[rows] * inverse.astype(self.x.dtype)[:, None]
        return z

    def mean(self) -> Floats:
        """Return what all agree on in the end, float64 (d,): sum of x over sum of w."""
        total = self.total()
        mean: Floats = total[0] / total[1]
        return mean

    def total(self) -> tuple[Floats, float]:
        """Return the sums of x and of w, in flight included."""
        x = column_sums(self.x) + column_sums(self.flight.x)
        return x, float(self.w.sum() + self.flight.w.sum())


def column_sums(x: Matrix) -> Floats:
    """Return the sums over rows, float64 (d,), without a float64 copy of x."""
    total = np.zeros(x.shape[1])
    width = max(BLOCK // (8 * max(len(x), 1)), WIDTH)
    for s in range(0, x.shape[1], width):
        total[s : s + width] = x[:, s : s + width].sum(axis=0, dtype=np.float64)
    return total


def mix(links: Links, state: State, policy: Policy = "keep") -> State:
    """Push once: x <- P x and w <- P w over what arrives.

    Parameters
    ----------
    links : Links
        P and what of it is lost.
    state : State
        Changed in place; x is overwritten block of columns by block of columns, so that no second
        (n, d) matrix is needed.
    policy : {"keep", "renorm", "running", "vanish"}
        What becomes of lost mass (see `faults.Faults`).

    Returns
    -------
    State
        The same state.

    Raises
    ------
    ValueError
        If running sums would keep more than `IN_FLIGHT` bytes on the links.
    """
    matrix = delivered(links, policy)
    if len(state.flight.links) or (links.lost.nnz and policy == "running"):
        _mix_in_flight(links, matrix, state)
        return state
    matrix = on_grid(matrix) if state.x.dtype == np.float32 else matrix
    if links.lost.nnz and policy == "vanish":
        # What the columns lack of one, as they are used: rounded to the grid.
        gone = 1.0 - np.asarray(matrix.sum(axis=0))
        state.lost_w += float(gone @ state.w)
        state.lost_x += gone @ state.x
    _multiply(matrix, state.x)
    state.w = matrix @ state.w
    return state


def average(network: Network, x: Matrix, first: int, pushes: int) -> tuple[Matrix, int]:
    """Return every client's estimate of the mean of x after some pushes, (n, d).

    x, which is overwritten, has a weight of its own that starts at one. The second number is how
    many messages were sent over arcs.

    Parameters
    ----------
    network : Network
        Of which rounds ``first`` to ``first + pushes - 1`` are used.
    x : ndarray
        (n, d), float32 or float64.
    first, pushes : int
        Which rounds.
    """
    state, sent = State.of(x), 0
    for t in range(first, first + pushes):
        links = network.at(t)
        sent += links.P.nnz - network.n  # what clients keep is no message
        mix(links, state, network.faults.policy)
    return state.z(), sent


def on_grid(matrix: csr_array) -> csr_array:
    """Round shares to multiples of 2^-24, what is kept making up for it.

    Float32 holds such numbers exactly, so the columns still sum to one in it. Shares rounded one
    by one would add or take a little mass in every round, always the same way.
    """
    parts = matrix.tocoo()
    own = parts.row == parts.col
    shares = np.where(own, parts.data, np.rint(parts.data * GRID) / GRID)
    short = np.bincount(parts.col, parts.data - shares, minlength=matrix.shape[1])
    shares[own] += short[parts.col[own]]
    shares = np.rint(shares * GRID) / GRID
    return csr_array((shares, (parts.row, parts.col)), shape=matrix.shape)


def _multiply(matrix: csr_array, x: Matrix) -> None:
    """Overwrite x (n, d) by matrix @ x, a block of columns at a time, on all cores."""
    n, d = x.shape
    small = _operand(matrix, x.dtype)

    def block(start: int, end: int) -> None:
        x[:, start:end] = small @ x[:, start:end]

    _by_blocks(block, n, d, x.dtype.itemsize)


def _operand(matrix: csr_array, dtype: np.dtype[Any]) -> Any:
    """Return the matrix as it multiplies fastest, in x's dtype (or the product is float64)."""
    if matrix.nnz * SPARSE > matrix.shape[0] * matrix.shape[1]:
        return matrix.toarray().astype(dtype)
    return matrix.astype(dtype)


def _by_blocks(block: Callable[[int, int], None], n: int, d: int, item: int) -> None:
    """Call ``block(start, end)`` over all columns; blocks do not depend on each other."""
    width = max(BLOCK // (item * max(n, 1)), WIDTH)
    cores = _cores() if n * d > SMALL else 1
    width = max(min(width, -(-d // cores)), 1)
    starts = range(0, d, width)
    if cores == 1:
        for s in starts:
            block(s, min(s + width, d))
        return
    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(lambda s: block(s, min(s + width, d)), starts))


def _mix_in_flight(links: Links, arrived: csr_array, state: State) -> None:
    """Push once where a lost message waits on its link until the next one arrives.

    A link is one more node of the network: it takes the share that is lost on it, keeps it, and
    gives all to the receiver when a message arrives. So the whole is one product with a
    column-stochastic matrix over clients and links.
    """
    n, old = len(state.w), state.flight.links
    lost, there = links.lost.tocoo(), arrived.tocoo()
    fresh = lost.col.astype(np.int64) * n + lost.row
    open_ = there.col.astype(np.int64) * n + there.row
    free = np.isin(old, open_)
    new = np.union1d(old[~free], fresh)
    if len(new) * state.x.shape[1] * state.x.itemsize > IN_FLIGHT:
        raise Unbalanced(
            f"faults.policy=running keeps a model on each of {len(new)} links: too much "
            "memory; take faults.policy=keep, fewer clients or a smaller model"
        )

    def places(
        rows: Any, columns: Any, values: Any, shape: tuple[int, int]
    ) -> csr_array:
        return csr_array((values, (rows, columns)), shape=shape)

    at = np.arange(len(old))
    ones = np.ones(len(old))
    release = places(old[free] % n, at[free], ones[free], (n, len(old)))
    take = places(np.searchsorted(new, fresh), lost.col, lost.data, (len(new), n))
    stay = places(
        np.searchsorted(new, old[~free]), at[~free], ones[~free], (len(new), len(old))
    )
    whole = block_array([[arrived, release], [take, stay]], format="csr")
    if state.x.dtype == np.float32:
        whole = on_grid(whole)
    operand = whole.astype(state.x.dtype)
    flight = np.empty((len(new), state.x.shape[1]), state.x.dtype)

    def block(start: int, end: int) -> None:
        columns = slice(start, end)
        both = np.concatenate([state.x[:, columns], state.flight.x[:, columns]])
        mixed = operand @ both
        state.x[:, columns], flight[:, columns] = mixed[:n], mixed[n:]

    _by_blocks(block, n + len(new), state.x.shape[1], state.x.itemsize)
    w = whole @ np.concatenate([state.w, state.flight.w])
    state.w, state.flight = w[:n], Flight(new, flight, w[n:])


def hand_over(state: State, client: int, heir: int | None) -> None:
    """Take a client out: what it has and what waits on its links goes to an heir, or is lost."""
    n, links = len(state.w), state.flight.links
    on_links = (links // n == client) | (links % n == client)
    x = state.x[client].astype(np.float64) + column_sums(state.flight.x[on_links])
    w = float(state.w[client] + state.flight.w[on_links].sum())
    state.x[client], state.w[client] = 0.0, 0.0
    state.flight = Flight(
        links[~on_links], state.flight.x[~on_links], state.flight.w[~on_links]
    )
    if heir is None:
        state.lost_x += x
        state.lost_w += w
    else:
        state.x[heir] += x.astype(state.x.dtype)
        state.w[heir] += w
