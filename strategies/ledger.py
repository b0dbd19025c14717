"""The relay's books: nothing of what clients carry appears or disappears unseen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from strategies.algorithm import Client
from strategies.faults import Mask
from strategies.network import Network
from strategies.pushsum import (
    BLOCK,
    WIDTH,
    Flight,
    Matrix,
    State,
    Unbalanced,
    hand_over,
)
from strategies.roster import Roster
from strategies.topology import Floats, Ints

#: Largest relative gap in the sums that rounding explains.
TOLERANCE = {np.dtype(np.float32): 1e-5, np.dtype(np.float64): 1e-11}


def opened(
    value: Matrix, network: Network, weigh: Callable[[Client], float], roster: Roster
) -> State:
    """Return the state in which all clients that are there have the value (d,), in their weights.

    Raises
    ------
    Unbalanced
        If a client that the network starts with has not joined.
    """
    n = network.n
    here = network.faults.present(0, n)
    missing = sorted({*np.flatnonzero(here).tolist()} - roster.samples.keys())
    if missing:
        raise Unbalanced(
            f"client {missing[0]} is not there: a network starts with all of its "
            "clients; leave min_clients=0"
        )
    weights = np.zeros(n)
    for k in np.flatnonzero(here).tolist():
        weights[k] = weigh(roster.client(k))
    weights *= here.sum() / weights.sum()
    state = State.of(weights.astype(value.dtype)[:, None] * value)
    # What x says, also where float32 cannot hold the weight: z is the value exactly.
    state.w = weights.astype(value.dtype).astype(np.float64)
    return state


def admit(
    rows: Ints, weights: Floats, weigh: Callable[[Client], float], roster: Roster
) -> None:
    """Give those of some clients who joined later their weights, on the scale of the others."""
    for k in rows[weights[rows] == 0].tolist():
        first = int(np.flatnonzero(weights)[0])
        scale = weights[first] / weigh(roster.client(first))
        weights[k] = scale * weigh(roster.client(k))


def say_goodbye(
    network: Network,
    carried: Mapping[str, State],
    t: int,
    retire: Callable[[int], None],
) -> None:
    """Take out those who crash or leave as round t begins; ``retire`` is called for each before."""
    crashed, left = network.faults.going(t)
    present = network.faults.present(t, network.n)
    for k in [*crashed, *left]:
        retire(k)
        heir = network.heir(k, t, present) if k in left else None
        for state in carried.values():
            hand_over(state, k, heir)


def audit(
    before: tuple[tuple[Floats, float], Floats, float], state: State, where: str
) -> dict[str, float]:
    """Compare the sums of mass and weight before and after a mixing.

    Parameters
    ----------
    before : tuple
        ``state.total()``, and what was lost so far of x and of w.
    state : State
        After the mixing.
    where : str
        For the message.

    Returns
    -------
    dict
        ``x`` (norm of the sum of x), ``w`` (sum of w at the clients), ``w_in_flight``, ``w_lost``,
        ``x_gap`` and ``w_gap``, relative, and ``mean_error``: how far what was lost has moved the
        mean that all carry, over the norm of the mean of all that was put in.

    Raises
    ------
    Unbalanced
        If a gap is larger than rounding explains.
    """
    (x, w), lost_x, lost_w = before
    total_x, total_w = state.total()
    spread = float(np.linalg.norm(state.x)) * len(state.w) ** 0.5
    gone = state.lost_x - lost_x
    # Mass that cannot be summed is no balance either: a NaN must not pass as small.
    x_gap = float(np.linalg.norm(total_x + gone - x)) / max(spread, 1e-30)
    w_gap = abs(total_w + state.lost_w - lost_w - w) / max(w, 1e-30)
    # What the mean would be had nothing been lost: of all that was ever put in.
    whole = (total_x + state.lost_x) / (total_w + state.lost_w)
    error = np.linalg.norm(total_x / max(total_w, 1e-300) - whole)
    allowed = TOLERANCE[state.x.dtype]
    if not (x_gap <= allowed and w_gap <= 1e-9):
        raise Unbalanced(
            f"{where}: mass is not balanced after mixing (x off by {x_gap:.1e}, w by "
            f"{w_gap:.1e} of the whole); training has diverged, or this is a defect"
        )
    return {
        "x": float(np.linalg.norm(total_x)),
        "w": float(state.w.sum()),
        "w_in_flight": float(state.flight.w.sum()),
        "w_lost": state.lost_w,
        "x_gap": x_gap,
        "w_gap": w_gap,
        "mean_error": float(error / max(float(np.linalg.norm(whole)), 1e-30)),
    }


def smallest(w: Floats, present: Mask, limit: float) -> None:
    """Check that nobody who has mass has next to none.

    Raises
    ------
    Unbalanced
        Naming the client with the least.
    """
    there = present & (w > 0)
    if there.any() and w[there].min() < limit:
        k = int(np.flatnonzero(there)[w[there].argmin()])
        raise Unbalanced(
            f"client {k} has a weight of {w[k]:.1e}, below strategy.min_weight="
            f"{limit:g}: it receives next to nothing, and its model would move by its "
            "training divided by that; take a denser topology or faults.policy=keep"
        )


def distance(state: State, mean: Floats) -> float:
    """Return the root mean square over clients of |z_i - mean|, over the norm of the mean."""
    n, d = state.x.shape
    inverse = np.divide(1.0, state.w, out=np.zeros(n), where=state.w > 0)
    scale, there = inverse.astype(state.x.dtype)[:, None], state.w > 0
    width, total = max(BLOCK // (state.x.itemsize * n), WIDTH), 0.0
    for s in range(0, d, width):
        off = state.x[:, s : s + width] * scale
        off -= mean[s : s + width].astype(off.dtype)
        total += float(np.square(off[there], dtype=np.float64).sum())
    norm = float(np.linalg.norm(mean))
    return float(np.sqrt(total / max(there.sum(), 1)) / max(norm, 1e-30))


def saved(
    carried: Mapping[str, State], kept: Mapping[str, Matrix], weights: Floats
) -> dict[str, Tensor]:
    """Return the arrays of the whole network as named tensors."""
    found = {"weights": weights} | {f"kept.{n}": m for n, m in kept.items()}
    for name, state in carried.items():
        arrays = {
            "x": state.x,
            "w": state.w,
            "links": state.flight.links,
            "flight_x": state.flight.x,
            "flight_w": state.flight.w,
            "lost_x": state.lost_x,
        }
        found |= {f"{name}.{n}": a for n, a in arrays.items()}
    return {n: torch.from_numpy(a) for n, a in found.items()}


def restored(
    names: Sequence[str], tensors: Mapping[str, Tensor], lost: Mapping[str, float]
) -> tuple[dict[str, State], dict[str, Matrix], Floats]:
    """Return what is carried, by name, what is kept, and the weights, as they were saved.

    ``lost`` is the weight lost of each that is carried. Empty arrays are not in a checkpoint.
    """
    arrays = {n: t.numpy() for n, t in tensors.items()}
    carried = {}
    for name in names:
        state = carried[name] = State.of(arrays[f"{name}.x"])
        state.w, state.lost_x = arrays[f"{name}.w"], arrays[f"{name}.lost_x"]
        state.lost_w = lost[name]
        if f"{name}.links" in arrays:
            parts = (arrays[f"{name}.{n}"] for n in ("links", "flight_x", "flight_w"))
            state.flight = Flight(*parts)
    kept = {
        n.removeprefix("kept."): a for n, a in arrays.items() if n.startswith("kept.")
    }
    return carried, kept, arrays["weights"]
