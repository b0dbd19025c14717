"""Randomness by address: every draw comes from (seed, purpose, round, client).

No generator is shared or carried along, so a result does not depend on how many nodes there are,
on which client ran first, or on a restart.
"""

import hashlib

import torch


def address(seed: int, purpose: str, round_: int = 0, client: int = 0) -> int:
    """Return the 63-bit seed of one purpose in one round for one client.

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
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def generator(
    seed: int, purpose: str, round_: int = 0, client: int = 0
) -> torch.Generator:
    """Return a fresh CPU generator standing at the given address."""
    return torch.Generator().manual_seed(address(seed, purpose, round_, client))
