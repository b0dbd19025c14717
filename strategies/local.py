"""Local training: how long it is, which samples each step takes, and what comes before and after.

`step.py` has the step itself; the engines run it, one client after another or many at once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from strategies.algorithm import Algorithm, Client, Vectors
from strategies.curvature import Place
from strategies.individual import Costing, Phased, first
from strategies.objective import Objective
from strategies.optimizer import Optimizer
from strategies.privacy import Privacy, Unprotected
from strategies.randomness import permutations, uniforms
from strategies.vector import largest


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
    own : Vectors
        What was sent to it alone, in place of what all received: ``theta``, ``buffers``.
    hyper : Vectors
        What it has of its own, if clients have: hyper-parameters ``l`` (p,), and perhaps a model
        ``local`` (d,).
    """

    client: Client
    part: Part
    memory: Vectors
    own: Vectors = field(default_factory=dict)
    hyper: Vectors = field(default_factory=dict)


@dataclass(frozen=True)
class Trainer:
    """Everything that local training needs besides a client's data.

    Attributes
    ----------
    algorithm : Algorithm
        The algorithm, of which the client half is used.
    optimizer : Optimizer
        The local optimizer.
    local : Local
        The length of local training.
    objective : Objective
        Model and loss.
    seed : int
        The run's seed.
    privacy : Privacy
        What protects the clients' differences.
    """

    algorithm: Algorithm
    optimizer: Optimizer
    local: Local
    objective: Objective
    seed: int
    privacy: Privacy = field(default_factory=Unprotected)

    @functools.cached_property
    def costing(self) -> Costing | None:
        """The algorithm if it has a cost of its own; asked once, as steps are many."""
        return self.algorithm if isinstance(self.algorithm, Costing) else None

    @functools.cached_property
    def phased(self) -> Phased | None:
        """The algorithm if it holds parts of the vector."""
        return self.algorithm if isinstance(self.algorithm, Phased) else None

    def fresh(self, theta: Tensor) -> Vectors:
        """Return the memory of a client that has not taken part yet."""
        memory, optimizer = self.algorithm.fresh(theta), self.optimizer
        if not optimizer.kept:
            return memory
        return {**memory, **optimizer.fresh(first(self.algorithm, theta)[1])}

    def begin(self, down: Mapping[str, Tensor], job: Job) -> tuple[Vectors, Vectors]:
        """Return the state before the first local step: the algorithm's, the optimizer's."""
        names, sent = self.optimizer.kept, self.algorithm.needs
        down = {**down, **job.own} if job.own else down
        own: Vectors = job.memory
        kept: Vectors = {}
        if names or sent:
            own = {n: v for n, v in job.memory.items() if n not in names}
            kept = {n: v for n, v in job.memory.items() if n in names}
            kept |= {n: down[n] for n in sent if n in down}
        return (
            self.algorithm.begin(down, own, job.client),
            self.optimizer.init(down["theta"], kept),
        )

    def release(self, theta: Tensor, anchor: Tensor) -> Tensor:
        """Return clients' models (n, d), from anchors (n, d), as they may be shown."""
        if isinstance(self.privacy, Unprotected):
            return theta
        shown = [self.privacy.release(row) for row in theta - anchor]
        return anchor + torch.stack(shown)

    def finish(
        self, theta: Tensor, anchor: Tensor, state: tuple[Vectors, Vectors]
    ) -> tuple[Vectors, Vectors, Vectors]:
        """Return what goes up, the memory, and the numbers to tell, after local training."""
        constant, moving = state
        effort = moving.get("effort")
        if effort is None:
            effort = torch.full_like(theta[0], math.nan)
        up, memory = self.algorithm.finish(theta, anchor, constant, effort)
        up = up | {n: moving[n] for n in self.algorithm.up if n not in up}
        memory = memory | {n: moving[n] for n in self.optimizer.kept}
        return up, memory, self.optimizer.told(moving)

    def draw(self, place: Place, targets: torch.Size) -> Tensor:
        """Return the random numbers of one client's estimate of the curvature."""
        curvature, size = self.optimizer.curvature, self.objective.layout.size
        assert curvature is not None, "an optimizer that refreshes has an estimator"
        return curvature.draw(place, targets, size)

    def evaluations(
        self, round_: int, steps: int, due: Collection[int], length: int
    ) -> int:
        """Return the gradient evaluations of so many steps, with so many estimates.

        Each is that of one model: an objective may have several, and so may, with an algorithm
        that has a cost of its own, the vector trained, of this ``length``.
        """
        optimizer, models = self.optimizer, self.objective.models
        if self.costing:
            return models * steps * max(length // self.objective.layout.size, 1)
        each = 2 if optimizer.models(round_) else 1
        products = 2 * steps if optimizer.along else 0
        estimates = optimizer.curvature.cost * len(due) if optimizer.curvature else 0
        return models * (each * steps + products + estimates)


def missing(algorithm: Algorithm, optimizer: Optimizer) -> list[str]:
    """Return what an algorithm needs in the state of an optimizer that has it not."""
    state = optimizer.init(torch.zeros(1), {})
    return [name for name in algorithm.needs if name not in state]


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
    steps, gradients : list of int
        Local steps of each, and the gradient evaluations that they took, estimates included.
    told : Vectors
        Numbers (n,) about each one's training, by the names in the optimizer's ``metrics``.
    seconds : float
        Wall time of all of them together.
    """

    clients: list[Client]
    up: Vectors
    memory: Vectors
    losses: Tensor
    steps: list[int]
    gradients: list[int]
    told: Vectors
    seconds: float

    def faults(self) -> dict[int, str]:
        """Say, by row, whose result must not be used, and why."""
        found: dict[int, str] = {}
        told = {name: numbers[:, None] for name, numbers in self.told.items()}
        rest = [*told.items(), ("loss", self.losses[:, None]), *self.memory.items()]
        for name, matrix in [*rest, *self.up.items()]:
            if not matrix.shape[1]:
                continue
            low, high = matrix.aminmax(dim=1)
            bounds = {"finite": math.inf}
            if name in self.up and matrix is self.up[name]:
                # One that is too large to be sent would spoil its node's mean.
                most = largest(matrix.dtype) / matrix.shape[1] ** 0.5
                bounds = {f"below {most:.1e}": most} | bounds
            for word, most in bounds.items():
                fine = ((low > -most) & (high < most)).tolist()  # NaN is in no bounds
                why = f"{name} is not {word} (training diverged)"
                found |= {row: why for row, good in enumerate(fine) if not good}
        return found
