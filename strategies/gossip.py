"""What every algorithm without a server is made of: local training, and what the relay carries.

    client i:   z_i' = local training from z_i          (the client half of any algorithm)
    relay:      the algorithm takes the difference z_i' - z_i into what is carried,
                then all that is carried is mixed with P(t)

The relay knows algorithms only through this class. Beside the carried quantities, which are mixed,
an algorithm may keep matrices of which each client holds its own row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt

from strategies.algorithm import Algorithm, Client, Cohort, Vectors

if TYPE_CHECKING:  # a node never mixes: it starts for every message, so without scipy
    from strategies.pushsum import Matrix, State
    from strategies.topology import Ints

    Carried = dict[str, State]
    Kept = dict[str, Matrix]


@dataclass(frozen=True)
class Gossip:
    """Settings and defaults of the algorithms without a server.

    Attributes
    ----------
    solver : Algorithm
        Its client half trains, its weights are the clients' weights in the mean, its server step
        scales the differences. Its server may keep nothing but the model.
    weights : {"push", "metropolis"}
        How a client divides its mass over its links (see `topology.shares`).
    min_weight : float
        A client whose weight falls below this ends the run: it receives next to nothing.
    tau : int
        Over how many of the last rounds the contraction is measured.
    judge : {"own", "test"}
        On which samples clients judge their own models: theirs, or the test set's.
    judge_samples : int
        At most so many of the test set.
    """

    solver: Algorithm
    weights: Literal["push", "metropolis"] = "push"
    min_weight: Annotated[float, Gt(0)] = 1e-6
    tau: Annotated[int, Ge(1)] = 8
    judge: Literal["own", "test"] = "test"
    judge_samples: Annotated[int, Ge(1)] = 1000

    #: The quantities that are carried; z of the first is the clients' model.
    carries: ClassVar[tuple[str, ...]] = ("model",)
    #: No server vector stands for the clients' memories.
    mirror: ClassVar[None] = None

    def __post_init__(self) -> None:
        held = self.solver.start(torch.zeros(1)).keys() - {"theta"}
        if held:
            kind = type(self.solver).__name__
            raise ValueError(
                f"solver: {kind} needs a server that keeps {', '.join(sorted(held))}; "
                "without one take fedavg, fedprox, finetune, ditto, fedrep or fedem"
            )

    @property
    def mixes_first(self) -> bool:
        """Whether a round begins with mixing, not ends with it."""
        return False

    def trains(self, round_: int) -> bool:
        """Return whether clients train in a round, from 1."""
        return True

    def weight(self, client: Client) -> float:
        """Return a client's weight in the mean that all agree on."""
        return self.solver.weight(client)

    def scaled(self, change: torch.Tensor) -> torch.Tensor:
        """Return differences (n, d) as the solver's server would apply them."""
        zero, one = change.new_zeros(()), Cohort(1, 1, 0)
        return self.solver.update({"theta": zero}, {"delta": change}, one)["theta"]

    def start(self, model: State) -> tuple[Carried, Kept]:
        """Return what is carried and kept before the first round."""
        return {"model": model}, {}

    def take(self, carried: Carried, kept: Kept, rows: Ints, change: Matrix) -> None:
        """Take the weighted differences (len(rows), d) of some clients into what is carried."""
        carried["model"].x[rows] += change

    def retire(self, carried: Carried, kept: Kept, k: int) -> None:
        """Settle what is kept for a client before it leaves or crashes."""

    def audit(self, carried: Carried, kept: Kept) -> dict[str, float]:
        """Return relative gaps that are zero but for rounding, by name."""
        return {}

    def models(self, server: Mapping[str, torch.Tensor]) -> Vectors:
        """Return the models worth evaluating: what all would agree on if training stopped."""
        return {"consensus": server["theta"]}


def solver_of(built: Gossip | Algorithm) -> Algorithm:
    """Return the algorithm whose client half trains."""
    return built.solver if isinstance(built, Gossip) else built
