"""Randomness by address: every draw comes from (seed, purpose, round, client).

No generator is shared or carried along, so a result does not depend on how many nodes there are,
on which client ran first, or on a restart. Numbers are a hash of their address and their position
(SplitMix64, Steele et al. 2014), so those of many clients are drawn in one vectorized operation
and equal those drawn for each client alone.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def address(seed: int, purpose: str, round_: int = 0, client: int = 0) -> int:
    """Return the 64-bit key of one purpose in one round for one client.

    Parameters
    ----------
    seed : int
        The run's seed.
    purpose : str
        What is drawn, for example ``"cohort"`` or ``"batches"``.
    round_ : int
        The round, 0 before the first.
    client : int
        The client, 0 where the draw belongs to the server.
    """
    # A hash rather than arithmetic: neighbouring addresses must not give correlated streams.
    text = f"{seed}/{purpose}/{round_}/{client}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def words(
    seed: int, purpose: str, round_: int, clients: Sequence[int], start: int, count: int
) -> np.ndarray:
    """Return random 64-bit words of several clients.

    Parameters
    ----------
    seed, purpose, round_
        The address (see `address`).
    clients : sequence of int
        The clients; one row each.
    start, count : int
        Which positions of each client's stream.

    Returns
    -------
    ndarray
        uint64, shape (len(clients), count).
    """
    keys = np.array(
        [address(seed, purpose, round_, k) for k in clients], dtype=np.uint64
    )
    places = np.arange(start + 1, start + count + 1, dtype=np.uint64) * GOLDEN
    return _mixed(keys[:, None] + places)


def _mixed(z: np.ndarray) -> np.ndarray:
    """Return SplitMix64's hash of 64-bit words."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = z ^ (z >> np.uint64(31))
    return mixed


def chances(seed: int, purpose: str, round_: int, places: np.ndarray) -> np.ndarray:
    """Return one number uniform on [0, 1) for each place, float64 of the same shape.

    The number of a place does not depend on which other places are asked for: so the fate of a
    link does not change when others join the network.
    """
    key = np.uint64(address(seed, purpose, round_))
    hashed = _mixed(key + (places.astype(np.uint64) + np.uint64(1)) * GOLDEN)
    uniform: np.ndarray = (hashed >> np.uint64(11)) * 2.0**-53
    return uniform


def permutations(
    seed: int,
    purpose: str,
    round_: int,
    clients: Sequence[int],
    size: int,
    epoch: int = 0,
) -> Tensor:
    """Return a random permutation of 0..size-1 for each client, int64 (len(clients), size)."""
    keys = words(seed, purpose, round_, clients, epoch * size, size)
    return torch.from_numpy(np.argsort(keys, axis=1, kind="stable"))


def uniforms(
    seed: int, purpose: str, round_: int, clients: Sequence[int], start: int, count: int
) -> Tensor:
    """Return numbers uniform on [0, 1), float32 of shape (len(clients), count)."""
    # 24 bits are what a float32 holds exactly.
    bits = words(seed, purpose, round_, clients, start, count) >> np.uint64(40)
    return torch.from_numpy(bits.astype(np.float32) * np.float32(2.0**-24))


def signs(
    seed: int, purpose: str, round_: int, clients: Sequence[int], start: int, count: int
) -> Tensor:
    """Return Rademacher numbers, -1 or 1, float64 of shape (len(clients), count)."""
    bits = words(seed, purpose, round_, clients, start, count) >> np.uint64(63)
    return torch.from_numpy(bits.astype(np.float64) * 2 - 1)


def normals(
    seed: int, purpose: str, round_: int, clients: Sequence[int], start: int, count: int
) -> Tensor:
    """Return standard normal numbers, float64 of shape (len(clients), count)."""
    drawn = words(seed, purpose, round_, clients, 2 * start, 2 * count)
    # Box and Muller 1958, from 53 bits each; the first lies in (0, 1].
    first, second = (
        ((drawn >> np.uint64(11)).astype(np.float64) * 2.0**-53)
        .reshape(len(clients), count, 2)
        .transpose(2, 0, 1)
    )
    radius = np.sqrt(-2 * np.log1p(-first))
    return torch.from_numpy(radius * np.cos(2 * np.pi * second))


def generator(
    seed: int, purpose: str, round_: int = 0, client: int = 0
) -> torch.Generator:
    """Return a torch generator standing at the given address, for draws off the hot path."""
    return torch.Generator().manual_seed(address(seed, purpose, round_, client) >> 1)
