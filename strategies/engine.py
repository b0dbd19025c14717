"""The engines: local training of many clients, one after another or all at once.

`loop` trains client after client. `vectorized` (its own file) maps the same step over the rows of
a matrix of clients. Both give the same numbers up to rounding; `choose` says which is used.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from strategies.algorithm import Witness
from strategies.curvature import Place
from strategies.individual import prepared
from strategies.local import Job, Trained, Trainer, noise_of, orders
from strategies.objective import Batch, Objective
from strategies.step import step
from strategies.vectorized import vectorized

Choice = Literal["auto", "loop", "vmap"]
#: Parameters above which, on a CPU, a client's own arithmetic outweighs the calls around it.
SMALL = 60_000
#: Numbers that a chunk of the vectorized engine may hold at once, in all its vectors.
ROOM = {"cpu": 2**22, "cuda": 2**30}


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
        ``theta`` of shape (d,), ``buffers`` of shape (b,), and what the algorithm adds;
        a job may have its own in their place.
    jobs : sequence of Job
        The clients.
    round_ : int
        The round, from 1.
    engine : {"loop", "vmap"}
        How.
    """
    jobs = prepared(trainer, down, jobs)
    if engine == "loop":
        for job in jobs:
            yield loop(trainer, down, job, round_)
        return
    longest = sorted(
        jobs, key=lambda j: (-trainer.local.steps_of(j.client.samples), j.client.id)
    )
    vectors = 4 + len(trainer.algorithm.up) + 2 * len(jobs[0].memory) if jobs else 1
    vectors += sum("local" in job.hyper for job in jobs[:1])
    length = len({**down, **jobs[0].own}["theta"]) if jobs else 1
    room = ROOM[down["theta"].device.type] // (vectors * max(length, 1))
    size = max(room, 2)
    for start in range(0, len(longest), size):
        yield vectorized(trainer, down, longest[start : start + size], round_)


def loop(
    trainer: Trainer, down: Mapping[str, Tensor], job: Job, round_: int
) -> Trained:
    """Train one client."""
    began = time.perf_counter()
    objective, optimizer = trainer.objective, trainer.optimizer
    received, part = {**down, **job.own}, job.part
    anchor, buffers = received["theta"], received["buffers"]
    theta = anchor.clone()
    state = trainer.begin(down, job)
    losses, first, noisy = [], 0, bool(objective.noise_shapes)
    who = [job.client.id]
    drawings = orders(trainer.local, trainer.seed, round_, who, len(part))
    drawings = drawings[: optimizer.length(round_, len(drawings))]
    due = optimizer.refreshes(job.memory, round_, len(drawings))
    for t, drawn in enumerate(drawings):
        rows = part.index.index_select(0, drawn[0].to(part.index.device))
        noise = noise_of(trainer, round_, who, first, drawn) if noisy else {}
        noise = {n: v[0].to(part.x.device) for n, v in noise.items()}
        x, y = part.x.index_select(0, rows), part.y.index_select(0, rows)
        batch = Batch(x, y, noise)
        if job.hyper:
            places = drawn[0].to(part.x.device)
            batch = replace(batch, hyper={**job.hyper, "places": places})
        if t in due and optimizer.curvature:
            place = Place(trainer.seed, round_, job.client.id, t, first)
            random = trainer.draw(place, batch.y.shape).to(theta.device)
            estimate = optimizer.curvature.estimate
            h = estimate(objective, theta, buffers, batch, random)
            state = state[0], optimizer.refresh(state[1], h)
        product = None
        if trainer.phased:
            progress = theta.new_tensor((t + 0.5) / len(drawings))
            state = {**state[0], "progress": progress}, state[1]
        if optimizer.along:
            vector = state[1][optimizer.along]
            product, _ = objective.product(theta, buffers, batch, vector)
        if optimizer.models(round_):
            away = theta - anchor
            gradient, loss = objective.product(anchor, buffers, batch, away)
        elif trainer.costing:
            own = functools.partial(trainer.costing.cost, state=state[0])
            slope = torch.func.grad_and_value(functools.partial(objective.cost, own))
            gradient, loss = slope(theta, buffers, batch)
        else:
            gradient, loss, buffers = objective.gradient(theta, buffers, batch)
        if t == 0 and isinstance(trainer.algorithm, Witness):
            seen = trainer.algorithm.witness(state[0], gradient, loss)
            state = seen, state[1]
        theta, state = step(trainer, theta, anchor, state, gradient, round_, product)
        losses.append(loss)
        first += drawn.shape[1]
    theta = trainer.release(theta[None], anchor[None])[0]
    up, memory, told = trainer.finish(theta, anchor, state)
    if buffers.numel():
        up["buffers"] = buffers
    return Trained(
        [job.client],
        {n: v[None] for n, v in up.items()},
        {n: v[None] for n, v in memory.items()},
        torch.stack(losses).mean()[None],
        [len(losses)],
        [trainer.evaluations(round_, len(losses), due, len(theta))],
        {n: v[None] for n, v in told.items()},
        time.perf_counter() - began,
    )
