"""What goes wrong in a network: links that lose, clients that sleep, crash, leave, join or lag.

Faults know nothing of the topology. Each draw comes from (seed, t) and the link or client that it
is about, so a round's faults can be had without those before it, and a link's fate does not depend
on which other links there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Lt
from numpy.typing import NDArray

from strategies.randomness import chances

Mask = NDArray[np.bool_]
Rate = Annotated[float, Ge(0), Lt(1)]
CHANGES = ("crash", "leave", "join")
Policy = Literal["keep", "renorm", "running", "vanish"]


@dataclass(frozen=True)
class Faults:
    """The faults of a run. Clients are named by id, rounds from 1.

    Attributes
    ----------
    loss : float
        Chance that a link loses its message in a round.
    policy : {"keep", "renorm", "running", "vanish"}
        What becomes of its mass: it stays with the sender; the sender knows which links are up
        and divides among those; it waits on the link for the next message that arrives, as with
        the running sums of Hadjicostis et al. 2016; or it is gone, which is wrong and there to
        be looked at.
    sleep : float
        Chance that a client sleeps through a round: no training, no links, its mass stays.
    straggle : float
        Chance that a client's reply comes too late: its training is lost, its mass is mixed.
    crash, leave, join : dict of int to int, or None
        Client to round. A client that crashes takes its mass along; one that leaves hands it to a
        neighbour; one that joins has none until it receives some.
    """

    loss: Rate = 0.0
    policy: Policy = "keep"
    sleep: Rate = 0.0
    straggle: Rate = 0.0
    crash: dict[int, int] | None = None
    leave: dict[int, int] | None = None
    join: dict[int, int] | None = None

    def __post_init__(self) -> None:
        for name in CHANGES:
            for k, round_ in self._when(name).items():
                if k < 0 or round_ < 1 + (name == "join"):
                    first = 2 if name == "join" else 1
                    raise ValueError(
                        f"{name}={{{k}: {round_}}}: client ids count from 0, "
                        f"rounds here from {first}"
                    )
        crash, leave = self._when("crash"), self._when("leave")
        if both := crash.keys() & leave.keys():
            raise ValueError(f"client {min(both)} cannot both crash and leave")
        for k, round_ in self._when("join").items():
            if round_ >= (crash | leave).get(k, round_ + 1):
                raise ValueError(f"client {k} goes before it joins")

    def check(self, n: int) -> None:
        """Raise ValueError if a client is named that is none of 0 to n - 1."""
        named = [k for what in CHANGES for k in self._when(what)]
        if named and max(named) >= n:
            raise ValueError(f"client {max(named)}: there are clients 0 to {n - 1}")
        if not all(self.present(t, n).any() for t in self._changes()):
            raise ValueError("crash, leave and join leave a round without any client")

    def _changes(self) -> list[int]:
        rounds = [r for what in CHANGES for r in self._when(what).values()]
        return [0, *(round_ - 1 for round_ in rounds)]

    def _when(self, what: str) -> dict[int, int]:
        return getattr(self, what) or {}

    def lost(
        self, seed: int, t: int, src: NDArray[np.int64], dst: NDArray[np.int64]
    ) -> Mask:
        """Return which arcs lose their message in round t, shape (m,)."""
        if not self.loss:
            return np.zeros(len(src), dtype=bool)
        # Which link it is, whatever the number of clients.
        place = (src.astype(np.uint64) << np.uint64(32)) | dst.astype(np.uint64)
        return chances(seed, "loss", t, place) < self.loss

    def awake(self, seed: int, t: int, n: int) -> Mask:
        """Return who is there and awake in round t, shape (n,)."""
        here = self.present(t, n)
        if self.sleep:
            here &= chances(seed, "sleep", t, np.arange(n)) >= self.sleep
        return here

    def late(self, seed: int, t: int, n: int) -> Mask:
        """Return whose reply comes too late in round t, shape (n,)."""
        if not self.straggle:
            return np.zeros(n, dtype=bool)
        return chances(seed, "straggle", t, np.arange(n)) < self.straggle

    def present(self, t: int, n: int) -> Mask:
        """Return who has joined and has not gone by round t, shape (n,)."""
        here = np.ones(n, dtype=bool)
        for k, round_ in self._when("join").items():
            here[k] = t >= round_ - 1
        for k, round_ in (self._when("crash") | self._when("leave")).items():
            here[k] &= t < round_ - 1
        return here

    def going(self, t: int) -> tuple[list[int], list[int]]:
        """Return who crashes and who leaves at the beginning of round t."""

        def now(when: Mapping[int, int]) -> list[int]:
            return sorted(k for k, round_ in when.items() if round_ == t + 1)

        return now(self._when("crash")), now(self._when("leave"))
