"""What an algorithm may ask of its clients beyond steps along the model's gradient at theta.

Each is a small protocol that an algorithm has or has not, beside `strategies.algorithm`. What has
none of them runs as if this file did not exist.

    Plural      theta is K learners of the model, one after the other: (K d,)
    Surveying   a look at all of the client's training samples with some models, first of all
    Rooted      training starts at a vector of the client's own, of any length
    Costing     the client minimizes something else than the model's loss at theta
    Phased      a step moves a part of the vector only
    Practising  a client trains from what it receives before it is judged
    Tailored    it has to know the model's layout
    Weighing    how much each client counts in the mean is learned

`prepared` is the part that comes before the first step; judging a client begins with it too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from strategies.algorithm import Algorithm, Client, Vectors, Witness
from strategies.vector import Layout

if TYPE_CHECKING:
    from strategies.local import Job, Trainer


@dataclass(frozen=True)
class Seen:
    """A batch, as an algorithm that is `Costing` may use it.

    Attributes
    ----------
    outputs : callable
        From a model (d,) to its outputs (B, ...) on the batch, in training mode.
    losses : callable
        From outputs to the loss of each sample, (B,).
    y : Tensor
        The targets.
    """

    outputs: Callable[[Tensor], Tensor]
    losses: Callable[[Tensor], Tensor]
    y: Tensor


@runtime_checkable
class Plural(Protocol):
    """An algorithm with several learners, whose first weights differ."""

    @property
    def learners(self) -> int:
        """How many, K."""


@runtime_checkable
class Surveying(Protocol):
    """An algorithm whose clients judge some models on their training samples, first of all."""

    def candidates(self, down: Mapping[str, Tensor]) -> Tensor:
        """Return the models to judge, (K, d)."""

    def survey(self, memory: Vectors, losses: Tensor) -> Vectors:
        """Return all of the memory after the look.

        ``losses`` (K, n_k) are those of each model on each sample. What is not about them stays
        as it is: the optimizer's vectors, say.
        """


@runtime_checkable
class Rooted(Protocol):
    """An algorithm whose clients start from vectors of their own."""

    def origin(self, down: Mapping[str, Tensor], memory: Vectors) -> Tensor:
        """Return where a client starts: the ``theta`` of ``begin``, the ``anchor`` of the rest."""


@runtime_checkable
class Costing(Protocol):
    """An algorithm with a training cost of its own making."""

    def cost(self, batch: Seen, theta: Tensor, state: Vectors) -> Tensor:
        """Return the cost of each sample, (B,), at the vector that is trained."""


@runtime_checkable
class Phased(Protocol):
    """An algorithm some of whose steps leave a part of the vector exactly as it is."""

    def moves(self, theta: Tensor, progress: Tensor) -> Tensor:
        """Return which entries a step may move, bool like ``theta``.

        ``progress`` is the share of this client's steps at the middle of the step, 0-dim.
        """


@runtime_checkable
class Practising(Protocol):
    """An algorithm that is judged after some more training."""

    @property
    def practice(self) -> int:
        """How many epochs a client trains from what it receives before it is judged."""


@runtime_checkable
class Tailored(Protocol):
    """An algorithm that has to know where the parts of the model lie in theta."""

    def tailored(self, layout: Layout) -> Self:
        """Return it with what it needs; ValueError if it cannot serve such a model."""


@runtime_checkable
class Weighing(Protocol):
    """An algorithm that learns its clients' weights: it minimizes no mean known beforehand."""

    @property
    def learned(self) -> tuple[str, ...]:
        """The server's vectors by which clients are weighed."""


def unfit(trainer: Trainer) -> str:
    """Say why an algorithm cannot train this model with this optimizer; empty if it can."""
    algorithm, optimizer = trainer.algorithm, trainer.optimizer
    if not isinstance(algorithm, Costing | Rooted):
        return ""
    if optimizer.curvature or optimizer.along or optimizer.models(2):
        return "its clients' cost is not the model's loss alone; use optimizer=sgd"
    if trainer.objective.buffer_layout.size and isinstance(algorithm, Costing):
        return "its clients train several models, and this one has buffers (BatchNorm)"
    return ""


def prepared(
    trainer: Trainer, down: Mapping[str, Tensor], jobs: Sequence[Job]
) -> list[Job]:
    """Return the jobs after the clients' look at their samples, each with its own start."""
    algorithm = trainer.algorithm
    found = surveyed(trainer, down, jobs)
    if isinstance(algorithm, Rooted):
        for i, job in enumerate(found):
            start = algorithm.origin({**down, **job.own}, job.memory)
            found[i] = replace(job, own={**job.own, "theta": start})
    return found


def first(algorithm: Algorithm, theta: Tensor) -> tuple[Vectors, Tensor]:
    """Return the memory and the start of a client of no samples that never took part."""
    down, memory = algorithm.down(algorithm.start(theta)), algorithm.fresh(theta)
    if isinstance(algorithm, Surveying):
        models = algorithm.candidates(down)
        memory = algorithm.survey(memory, models.new_zeros(len(models), 1))
    if isinstance(algorithm, Rooted):
        return memory, algorithm.origin(down, memory)
    return memory, theta


def sizes(algorithm: Algorithm, theta: Tensor) -> dict[str, int]:
    """Return the length of each vector that a client returns, from a training of no steps."""
    memory, start = first(algorithm, theta)
    down = {**algorithm.down(algorithm.start(theta)), "theta": start}
    state = algorithm.begin(down, memory, Client(0, 1, 1.0))
    if isinstance(algorithm, Witness):
        state = algorithm.witness(state, torch.zeros_like(start), theta.new_zeros(()))
    up, _ = algorithm.finish(start, start, state, theta.new_ones(()))
    return {n: len(up.get(n, start)) for n in algorithm.up}


def surveyed(
    trainer: Trainer, down: Mapping[str, Tensor], jobs: Sequence[Job]
) -> list[Job]:
    """Return jobs after their clients' look at their samples, if the algorithm wants one.

    Clients that received the same and share their tensors look together, in large batches.
    """
    algorithm = trainer.algorithm
    if not isinstance(algorithm, Surveying) or not jobs:
        return list(jobs)
    shared = jobs[0].part.x
    if len(jobs) > 1 and any(job.own or job.part.x is not shared for job in jobs):
        return [alone for job in jobs for alone in surveyed(trainer, down, [job])]
    received, part = {**down, **jobs[0].own}, jobs[0].part
    index = torch.cat([job.part.index for job in jobs])
    place = received["buffers"], part.x, part.y, index
    models = algorithm.candidates(received)
    losses = [trainer.objective.scores(model, *place)[0] for model in models]
    seen = torch.stack(losses).to(models.dtype)
    each = torch.split(seen, [len(job.part) for job in jobs], dim=1)
    return [
        replace(job, memory=algorithm.survey(job.memory, mine))
        for job, mine in zip(jobs, each, strict=True)
    ]
