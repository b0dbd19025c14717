"""Local training: one pure step, and the engine that runs it over the clients of a node.

    step:  (theta, anchor, state, batch) -> (theta, state)

The loop engine runs client after client. A cohort's result is a weighted mean accumulated in
float64 in a fixed order, so that it does not depend on how clients are spread over nodes beyond
rounding.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from strategies.algorithm import Algorithm, Client, Vectors
from strategies.objective import Batch, Objective
from strategies.randomness import generator
from strategies.sgd import SGD


@dataclass(frozen=True)
class Local:
    """How long a client trains in a round.

    Attributes
    ----------
    epochs : int
        Passes over its data, each in a new order.
    batch : int
        Samples in a step; 0 takes all of the client's samples. The last batch of an epoch may be
        smaller.
    steps : int
        Exact number of local steps instead of ``epochs``; 0 leaves it to ``epochs``.
    clip : float
        Largest norm of the data's gradient, over all parameters; 0 does not clip. The terms that
        an algorithm or weight decay adds are not clipped, so that they stay exact.
    """

    epochs: Annotated[int, Ge(1)] = 5
    batch: Annotated[int, Ge(0)] = 10
    steps: Annotated[int, Ge(0)] = 0
    clip: Annotated[float, Ge(0)] = 0.0


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


@dataclass
class Outcome:
    """What one client's local training gave.

    Attributes
    ----------
    up, memory : Vectors
        For the server, and for the client's next participation.
    loss : float
        Mean training loss over the steps.
    steps : int
        Local steps, each with one gradient evaluation.
    seconds : float
        Wall time.
    """

    up: Vectors
    memory: Vectors
    loss: float
    steps: int
    seconds: float


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

    ``state`` is the pair (algorithm's, optimizer's). All arguments are tensors or constants: the
    step is vectorized over clients by mapping it.
    """
    constant, moving = state
    gradient = clip(gradient, trainer.local.clip)
    direction = trainer.algorithm.direction(gradient, theta, anchor, constant)
    theta, moving = trainer.optimizer.step(theta, direction, moving, round_)
    return theta, (constant, moving)


def orders(
    local: Local, samples: int, seed: int, round_: int, client: int
) -> Iterator[Tensor]:
    """Yield the sample indices of each local step, int64 of shape (B,).

    Every epoch is a new permutation drawn at the address ("batches", round, client).
    """
    random = generator(seed, "batches", round_, client)
    size = local.batch or samples
    done = 0
    while True:
        for part in torch.split(torch.randperm(samples, generator=random), size):
            yield part
            done += 1
            if done == local.steps:
                return
        if not local.steps and done == local.epochs * -(-samples // size):
            return


def train(
    trainer: Trainer,
    down: Mapping[str, Tensor],
    memory: Vectors,
    client: Client,
    x: Tensor,
    y: Tensor,
    round_: int,
) -> Outcome:
    """Train one client from what the server sent.

    Parameters
    ----------
    trainer : Trainer
        Algorithm, optimizer, length and objective.
    down : mapping of str to Tensor
        ``theta`` of shape (d,), ``buffers`` of shape (b,), and what the algorithm adds.
    memory : Vectors
        The client's memory of the version that the server names.
    client : Client
        Its facts.
    x, y : Tensor
        Its training samples, on the device where training takes place.
    round_ : int
        The round, from 1.

    Returns
    -------
    Outcome
        With ``buffers`` among ``up`` if the model has any.
    """
    began = time.perf_counter()
    objective, algorithm = trainer.objective, trainer.algorithm
    anchor = theta = down["theta"]
    buffers = down["buffers"]
    state = algorithm.begin(down, memory, client), trainer.optimizer.init(theta)
    random = generator(trainer.seed, "noise", round_, client.id)
    losses = []
    for index in orders(trainer.local, len(y), trainer.seed, round_, client.id):
        noise = {
            name: torch.rand(len(index), *shape, generator=random).to(x.device)
            for name, shape in objective.noise_shapes.items()
        }
        index = index.to(x.device)
        batch = Batch(x[index], y[index], noise)
        gradient, loss, buffers = objective.gradient(theta, buffers, batch)
        theta, state = step(trainer, theta, anchor, state, gradient, round_)
        losses.append(loss)
    up, memory = algorithm.finish(theta, anchor, state[0], state[1]["effort"])
    if buffers.numel():
        up["buffers"] = buffers
    mean = float(torch.stack(losses).mean())
    return Outcome(up, memory, mean, len(losses), time.perf_counter() - began)


@dataclass
class Mean:
    """A weighted mean of vectors by name, accumulated in float64 in the order of arrival."""

    sums: Vectors = field(default_factory=dict)
    weight: float = 0.0

    def add(self, vectors: Mapping[str, Tensor], weight: float) -> None:
        """Add vectors with a weight."""
        for name, vector in vectors.items():
            term = vector.to(torch.float64) * weight
            self.sums[name] = self.sums[name] + term if name in self.sums else term
        self.weight += weight

    def value(self, dtype: torch.dtype) -> Vectors:
        """Return the mean in the given dtype; empty if nothing was added."""
        return {n: (s / self.weight).to(dtype) for n, s in self.sums.items()}


def fault(up: Mapping[str, Tensor], loss: float) -> str:
    """Say why a client's result must not be used; empty if it may be."""
    for name, vector in up.items():
        if not bool(torch.isfinite(vector).all()):
            return f"{name} is not finite (training diverged)"
    return "" if loss == loss and abs(loss) != float("inf") else "loss is not finite"
