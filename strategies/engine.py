"""The engines: local training of many clients, one after another or all at once.

`loop` trains client after client. `vectorized` holds a chunk of clients as a matrix with a row
for each and maps the same step over the rows by `torch.func.vmap`: on small models it saves almost
all of the time that goes into calling operations, on large ones it wins nothing. Clients of unequal
length are sorted by it, so that those that have finished drop out; batches of unequal size are
padded with samples of weight zero. Both engines give the same numbers up to rounding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn

from strategies.algorithm import Client, Vectors
from strategies.local import Job, Trainer, orders, step
from strategies.objective import Batch, Objective
from strategies.randomness import uniforms

Choice = Literal["auto", "loop", "vmap"]
#: Parameters above which, on a CPU, a client's own arithmetic outweighs the calls around it.
SMALL = 60_000
#: Numbers that a chunk of the vectorized engine may hold at once, in all its vectors.
ROOM = {"cpu": 2**22, "cuda": 2**30}


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

    def fault(self, row: int) -> str:
        """Say why a client's result must not be used; empty if it may be."""
        for name, matrix in self.up.items():
            if not bool(torch.isfinite(matrix[row]).all()):
                return f"{name} is not finite (training diverged)"
        return "" if math.isfinite(float(self.losses[row])) else "loss is not finite"


def unfit(objective: Objective) -> str:
    """Say why a model cannot be vectorized over clients; empty if it can."""
    if objective.buffer_layout.size:
        return "the model has buffers (BatchNorm) that training writes"
    return ""


def choose(
    choice: Choice, objective: Objective, cohort: int, device: torch.device
) -> str:
    """Return ``loop`` or ``vmap``, by a rule on model, cohort and device alone.

    Parameters
    ----------
    choice : {"auto", "loop", "vmap"}
        What was asked for.
    objective : Objective
        The model: its size, whether it convolves or recurs, whether it has buffers.
    cohort : int
        Clients to train on a node.
    device : torch.device
        Where.
    """
    if choice != "auto":
        return choice
    if cohort < 2 or unfit(objective):
        return "loop"
    if device.type == "cuda":
        return "vmap"
    heavy = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase)
    convolves = any(isinstance(m, heavy) for m in objective.module.modules())
    return "vmap" if objective.layout.size <= SMALL and not convolves else "loop"


def train(
    trainer: Trainer,
    down: Mapping[str, Tensor],
    jobs: Sequence[Job],
    round_: int,
    engine: str = "loop",
) -> Iterator[Trained]:
    """Train clients from what the server sent, and yield their results in chunks.

    Parameters
    ----------
    trainer : Trainer
        Algorithm, optimizer, length and objective.
    down : mapping of str to Tensor
        ``theta`` of shape (d,), ``buffers`` of shape (b,), and what the algorithm adds.
    jobs : sequence of Job
        The clients.
    round_ : int
        The round, from 1.
    engine : {"loop", "vmap"}
        How.
    """
    if engine == "loop":
        for job in jobs:
            yield loop(trainer, down, job, round_)
        return
    longest = sorted(
        jobs, key=lambda j: (-trainer.local.steps_of(len(j.part)), j.client.id)
    )
    vectors = 4 + len(trainer.algorithm.up) + 2 * len(jobs[0].memory) if jobs else 1
    room = ROOM[down["theta"].device.type] // (vectors * max(len(down["theta"]), 1))
    size = max(room, 2)
    for start in range(0, len(longest), size):
        yield vectorized(trainer, down, longest[start : start + size], round_)


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


def loop(
    trainer: Trainer, down: Mapping[str, Tensor], job: Job, round_: int
) -> Trained:
    """Train one client."""
    began = time.perf_counter()
    objective, algorithm = trainer.objective, trainer.algorithm
    theta, buffers, part = down["theta"], down["buffers"], job.part
    anchor = theta
    state = algorithm.begin(down, job.memory, job.client), trainer.optimizer.init(theta)
    losses, first, noisy = [], 0, bool(objective.noise_shapes)
    who = [job.client.id]
    for drawn in orders(trainer.local, trainer.seed, round_, who, len(part)):
        rows = part.index[drawn[0].to(part.index.device)]
        noise = noise_of(trainer, round_, who, first, drawn) if noisy else {}
        noise = {n: v[0].to(part.x.device) for n, v in noise.items()}
        batch = Batch(part.x.index_select(0, rows), part.y.index_select(0, rows), noise)
        gradient, loss, buffers = objective.gradient(theta, buffers, batch)
        theta, state = step(trainer, theta, anchor, state, gradient, round_)
        losses.append(loss)
        first += drawn.shape[1]
    up, memory = algorithm.finish(theta, anchor, state[0], state[1]["effort"])
    if buffers.numel():
        up["buffers"] = buffers
    return Trained(
        [job.client],
        {n: v[None] for n, v in up.items()},
        {n: v[None] for n, v in memory.items()},
        torch.stack(losses).mean()[None],
        [len(losses)],
        time.perf_counter() - began,
    )


@dataclass
class Schedule:
    """The batches of clients that are trained together, padded to one size.

    Attributes
    ----------
    rows : Tensor
        Rows of the shared samples, int64 (n, T, B).
    weights : Tensor
        Weight of each in its batch's mean loss, (n, T, B): 1/size or 0.
    first : Tensor
        Position of each batch in its client's sequence of samples, int64 (n, T).
    steps : list of int
        Local steps of each client, descending.
    """

    rows: Tensor
    weights: Tensor
    first: Tensor
    steps: list[int]


def schedule(
    trainer: Trainer, jobs: Sequence[Job], round_: int, dtype: torch.dtype
) -> Schedule:
    """Draw and pad the batches of some clients, sorted by their number of steps."""
    local = trainer.local
    steps = [local.steps_of(len(job.part)) for job in jobs]
    width = max(min(local.batch or len(j.part), len(j.part)) for j in jobs)
    rows = torch.zeros(len(jobs), steps[0], width, dtype=torch.int64)
    weights = torch.zeros(len(jobs), steps[0], width, dtype=dtype)
    first = torch.zeros(len(jobs), steps[0], dtype=torch.int64)
    # Clients with as many samples have batches of the same sizes: one draw serves them all.
    places = sorted(range(len(jobs)), key=lambda i: len(jobs[i].part))
    for samples, group in groupby(places, key=lambda i: len(jobs[i].part)):
        at = torch.tensor(list(group))
        who = [jobs[i].client.id for i in at.tolist()]
        index = torch.stack([jobs[i].part.index.cpu() for i in at.tolist()])
        done = 0
        for t, drawn in enumerate(orders(local, trainer.seed, round_, who, samples)):
            size = drawn.shape[1]
            rows[at, t, :size] = index.gather(1, drawn)
            weights[at, t, :size] = 1.0 / size
            first[at, t] = done
            done += size
    return Schedule(rows, weights, first, steps)


def stacked(states: Sequence[Vectors]) -> Vectors:
    """Return rows (n, ...) of the vectors of n clients."""
    return {name: torch.stack([s[name] for s in states]) for name in states[0]}


def vectorized(
    trainer: Trainer, down: Mapping[str, Tensor], jobs: Sequence[Job], round_: int
) -> Trained:
    """Train a chunk of clients at once, given in descending order of their steps."""
    began = time.perf_counter()
    algorithm, optimizer = trainer.algorithm, trainer.optimizer
    anchor, shared = down["theta"], jobs[0].part
    plan = schedule(trainer, jobs, round_, anchor.dtype)
    constant = stacked([algorithm.begin(down, j.memory, j.client) for j in jobs])
    moving = stacked([optimizer.init(anchor)] * len(jobs))
    theta = anchor.expand(len(jobs), -1)
    ids = [job.client.id for job in jobs]
    one = _client_step(trainer, anchor, down["buffers"], round_)
    sums = torch.zeros(len(jobs), dtype=anchor.dtype, device=anchor.device)
    done: list[tuple[Tensor, Vectors]] = []
    active = len(jobs)
    for t in range(plan.steps[0]):
        still = sum(s > t for s in plan.steps[:active])
        if still < active:  # the shortest have finished: put their rows aside
            done.append((theta[still:], {n: v[still:] for n, v in moving.items()}))
            theta, active = theta[:still], still
            moving = {n: v[:still] for n, v in moving.items()}
            constant = {n: v[:still] for n, v in constant.items()}
        rows = plan.rows[:active, t].to(anchor.device)
        flat = rows.reshape(-1)
        x = shared.x.index_select(0, flat).view(*rows.shape, *shared.x.shape[1:])
        y = shared.y.index_select(0, flat).view(rows.shape)
        noise = _padded_noise(
            trainer, round_, ids[:active], plan.first[:active, t], rows
        )
        weights = plan.weights[:active, t].to(anchor.device)
        theta, moving, loss = one(theta, constant, moving, x, y, weights, noise)
        sums[:active] += loss
    done.append((theta, moving))
    theta = torch.cat([part for part, _ in reversed(done)])
    effort = torch.cat([state["effort"] for _, state in reversed(done)])
    constant = stacked([algorithm.begin(down, j.memory, j.client) for j in jobs])
    up, memory = torch.func.vmap(lambda a, b, c: algorithm.finish(a, anchor, b, c))(
        theta, constant, effort
    )
    counts = torch.tensor(plan.steps, dtype=anchor.dtype, device=anchor.device)
    seconds = time.perf_counter() - began
    return Trained(
        [j.client for j in jobs], up, memory, sums / counts, plan.steps, seconds
    )


def _client_step(
    trainer: Trainer, anchor: Tensor, buffers: Tensor, round_: int
) -> Callable[..., Any]:
    """Return the local step of one client, gradient included, mapped over clients."""

    def one(
        theta: Tensor,
        constant: Vectors,
        moving: Vectors,
        x: Tensor,
        y: Tensor,
        weights: Tensor,
        noise: Vectors,
    ) -> tuple[Tensor, Vectors, Tensor]:
        def loss_of(point: Tensor) -> Tensor:
            batch = Batch(x, y, noise, weights)
            return trainer.objective.loss(point, buffers, batch)[0]

        gradient, loss = torch.func.grad_and_value(loss_of)(theta)
        state = constant, moving
        theta, state = step(trainer, theta, anchor, state, gradient, round_)
        return theta, state[1], loss

    return torch.func.vmap(one)


def _padded_noise(
    trainer: Trainer, round_: int, ids: list[int], first: Tensor, rows: Tensor
) -> dict[str, Tensor]:
    """Draw the noise of one step of several clients, each at its own position."""
    if not trainer.objective.noise_shapes:
        return {}
    parts = [
        noise_of(trainer, round_, [k], int(at), rows[:1])
        for k, at in zip(ids, first, strict=True)
    ]
    return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
