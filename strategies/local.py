"""Local training: how long it is, which samples each step takes, and the pure step itself.

    step:  (theta, anchor, state, gradient) -> (theta, state)

The engines in `engine.py` run it, one client after another or many at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from strategies.algorithm import Algorithm, Client, Vectors
from strategies.objective import Objective
from strategies.randomness import permutations, uniforms
from strategies.sgd import SGD


@dataclass(frozen=True)
class Local:
    """How long a client trains in a round.

    Attributes
    ----------
    epochs : int
        Passes over its data, each in a new order.
    batch : int
        Samples in a step; 0 takes all of the client's samples. The last batch of an epoch
        may be smaller.
    steps : int
        Exact number of local steps instead of ``epochs``; 0 leaves it to ``epochs``.
    clip : float
        Largest norm of the data's gradient, over all parameters; 0 does not clip. The terms
        that an algorithm or weight decay adds are not clipped, so that they stay exact.
    """

    epochs: Annotated[int, Ge(1)] = 5
    batch: Annotated[int, Ge(0)] = 10
    steps: Annotated[int, Ge(0)] = 0
    clip: Annotated[float, Ge(0)] = 0.0

    def steps_of(self, samples: int) -> int:
        """Return the number of local steps of a client with so many samples."""
        return self.steps or self.epochs * -(-samples // (self.batch or samples))


@dataclass(frozen=True)
class Part:
    """A client's samples: rows of tensors that all clients of a process share.

    Attributes
    ----------
    x, y : Tensor
        Inputs (N, ...) and targets (N,), on the device where training takes place.
    index : Tensor
        The client's rows, int64 of shape (n_k,), on the same device.
    """

    x: Tensor
    y: Tensor
    index: Tensor

    def __len__(self) -> int:
        """Return n_k."""
        return len(self.index)


@dataclass(frozen=True)
class Job:
    """One client's local training in a round.

    Attributes
    ----------
    client : Client
        Its facts.
    part : Part
        Its training samples.
    memory : Vectors
        Its memory, of the version that the server names.
    """

    client: Client
    part: Part
    memory: Vectors


@dataclass(frozen=True)
class Trainer:
    """Everything that local training needs besides a client's data.

    Attributes
    ----------
    algorithm : Algorithm
        The algorithm, of which the client half is used.
    optimizer : SGD
        The local optimizer.
    local : Local
        The length of local training.
    objective : Objective
        Model and loss.
    seed : int
        The run's seed.
    """

    algorithm: Algorithm
    optimizer: SGD
    local: Local
    objective: Objective
    seed: int


def clip(gradient: Tensor, largest: float) -> Tensor:
    """Scale a gradient (d,) down to the norm ``largest``; 0 leaves it as it is."""
    if not largest:
        return gradient
    norm = torch.linalg.vector_norm(gradient)
    return gradient * torch.clamp(largest / (norm + 1e-12), max=1.0)


def step(
    trainer: Trainer,
    theta: Tensor,
    anchor: Tensor,
    state: tuple[Vectors, Vectors],
    gradient: Tensor,
    round_: int,
) -> tuple[Tensor, tuple[Vectors, Vectors]]:
    """Return theta and state after one local step along one batch's gradient.

    ``state`` is the pair (algorithm's, optimizer's). All arguments are tensors or constants:
    the step is vectorized over clients by mapping it.
    """
    constant, moving = state
    gradient = clip(gradient, trainer.local.clip)
    direction = trainer.algorithm.direction(gradient, theta, anchor, constant)
    theta, moving = trainer.optimizer.step(theta, direction, moving, round_)
    return theta, (constant, moving)


def orders(
    local: Local, seed: int, round_: int, clients: Sequence[int], samples: int
) -> list[Tensor]:
    """Return which of its samples each client takes in each local step.

    Parameters
    ----------
    local : Local
        The length of local training.
    seed, round_ : int
        The address of the draw; every epoch is a new permutation.
    clients : sequence of int
        Clients with ``samples`` samples each.
    samples : int
        n_k.

    Returns
    -------
    list of Tensor
        For each step int64 of shape (len(clients), B); the last batch of an epoch may be
        smaller.
    """
    found: list[Tensor] = []
    total, epoch = local.steps_of(samples), 0
    while len(found) < total:
        drawn = permutations(seed, "batches", round_, clients, samples, epoch)
        found.extend(torch.split(drawn, local.batch or samples, dim=1))
        epoch += 1
    return found[:total]


def noise_of(
    trainer: Trainer, round_: int, clients: Sequence[int], first: int, like: Tensor
) -> dict[str, Tensor]:
    """Draw the dropout noise of one batch, (len(clients), B, ...) for each layer.

    ``first`` is the position of the batch in each client's sequence of samples, so that the
    numbers do not depend on the engine.
    """
    noise, rows = {}, like.shape[1]
    for name, shape in trainer.objective.noise_shapes.items():
        width = math.prod(shape)
        purpose = f"noise {name}"
        drawn = uniforms(
            trainer.seed, purpose, round_, clients, first * width, rows * width
        )
        noise[name] = drawn.view(len(clients), rows, *shape).to(like.device)
    return noise


@dataclass
class Trained:
    """What the local training of some clients gave, a row for each.

    Attributes
    ----------
    clients : list of Client
        Who they are.
    up, memory : Vectors
        Matrices (n, d): for the server, and for the clients' next participation.
    losses : Tensor
        Mean training loss of each over its steps, shape (n,).
    steps : list of int
        Local steps of each, with one gradient evaluation in a step.
    seconds : float
        Wall time of all of them together.
    """

    clients: list[Client]
    up: Vectors
    memory: Vectors
    losses: Tensor
    steps: list[int]
    seconds: float

    def faults(self) -> dict[int, str]:
        """Say, by row, whose result must not be used, and why."""
        found: dict[int, str] = {}
        for name, matrix in {"loss": self.losses[:, None], **self.up}.items():
            fine = torch.isfinite(matrix).all(dim=1).tolist()
            why = f"{name} is not finite (training diverged)"
            found |= {row: why for row, good in enumerate(fine) if not good}
        return found


@dataclass
class Mean:
    """A weighted mean of vectors by name, accumulated in float64 in the order of arrival."""

    sums: Vectors = field(default_factory=dict)
    weight: float = 0.0

    def add(self, vectors: Mapping[str, Tensor], weight: float) -> None:
        """Add one vector (d,) for each name, with a weight."""
        rows = {name: vector[None] for name, vector in vectors.items()}
        self.add_rows(rows, [weight])

    def add_rows(self, rows: Mapping[str, Tensor], weights: Sequence[float]) -> None:
        """Add rows (n, d) for each name, with a weight each."""
        for name, matrix in rows.items():
            scale = torch.tensor(weights, dtype=torch.float64, device=matrix.device)
            # Not one product of w and the matrix: its order of summation may change with n.
            term = (scale[:, None] * matrix).sum(0)
            self.sums[name] = self.sums[name] + term if name in self.sums else term
        self.weight += sum(weights)

    def value(self, dtype: torch.dtype) -> Vectors:
        """Return the mean in the given dtype; empty if nothing was added."""
        return {n: (s / self.weight).to(dtype) for n, s in self.sums.items()}
