"""Clients as the rows of a matrix: the same local step, mapped by `torch.func.vmap`.

On small models it saves almost all of the time that goes into calling operations; on large
ones it wins nothing. Clients are sorted by their number of steps, so that those that have
finished drop out; batches of unequal size are padded with samples of weight zero.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from strategies.algorithm import Vectors, Witness
from strategies.curvature import Place
from strategies.local import Job, Trained, Trainer, noise_of, orders
from strategies.objective import Batch
from strategies.step import step


@dataclass
class Schedule:
    """The batches of clients that are trained together, padded to one size.

    Attributes
    ----------
    rows : Tensor
        Rows of the shared samples, int64 (n, T, B).
    places : Tensor
        Which of its client's samples each is, int64 (n, T, B).
    weights : Tensor
        Weight of each in its batch's mean loss, (n, T, B): 1/size or 0.
    first : Tensor
        Position of each batch in its client's sequence of samples, int64 (n, T).
    steps : list of int
        Local steps of each client, descending.
    """

    rows: Tensor
    places: Tensor
    weights: Tensor
    first: Tensor
    steps: list[int]


def schedule(
    trainer: Trainer, jobs: Sequence[Job], round_: int, dtype: torch.dtype
) -> Schedule:
    """Draw and pad the batches of some clients, sorted by their number of steps."""
    local = trainer.local
    sizes = [job.client.samples for job in jobs]
    length = trainer.optimizer.length
    steps = [length(round_, local.steps_of(size)) for size in sizes]
    width = min(local.batch or max(sizes), max(sizes))
    rows = torch.zeros(len(jobs), steps[0], width, dtype=torch.int64)
    places = torch.zeros_like(rows)
    weights = torch.zeros(len(jobs), steps[0], width, dtype=dtype)
    first = torch.zeros(len(jobs), steps[0], dtype=torch.int64)
    # Clients with as many samples have batches of the same sizes: one draw serves them all.
    by_size = sorted(range(len(jobs)), key=sizes.__getitem__)
    for samples, group in groupby(by_size, key=sizes.__getitem__):
        at = torch.tensor(list(group))
        mine = [jobs[i] for i in at.tolist()]
        who = [job.client.id for job in mine]
        index = torch.stack([job.part.index for job in mine]).cpu()
        done, drawings = 0, orders(local, trainer.seed, round_, who, samples)
        for t, drawn in enumerate(drawings[: length(round_, len(drawings))]):
            size = drawn.shape[1]
            rows[at, t, :size] = index.gather(1, drawn)
            places[at, t, :size] = drawn
            weights[at, t, :size] = 1.0 / size
            first[at, t] = done
            done += size
    return Schedule(rows, places, weights, first, steps)


def stacked(states: Sequence[Vectors]) -> Vectors:
    """Return rows (n, ...) of the vectors of n clients."""
    return {name: torch.stack([s[name] for s in states]) for name in states[0]}


def anchors(down: Mapping[str, Tensor], jobs: Sequence[Job]) -> Tensor:
    """Return where each client starts, (n, d): one vector in all rows, or each one's own."""
    if not any(job.own for job in jobs):
        return down["theta"].expand(len(jobs), -1)
    return torch.stack([{**down, **job.own}["theta"] for job in jobs])


def begun(
    trainer: Trainer, down: Mapping[str, Tensor], jobs: Sequence[Job]
) -> tuple[Vectors, Vectors]:
    """Return the rows of the states before the first local step, of algorithm and optimizer."""
    algorithm, optimizer = trainer.algorithm, trainer.optimizer
    if optimizer.kept or algorithm.needs or any(job.own for job in jobs):
        states = [trainer.begin(down, job) for job in jobs]
        return stacked([c for c, _ in states]), stacked([m for _, m in states])
    # The optimizer starts alike for all: one state serves for thousands of small clients.
    same = optimizer.init(down["theta"], {})
    moving = {n: v.expand(len(jobs), *v.shape).clone() for n, v in same.items()}
    begin = algorithm.begin
    return stacked([begin(down, job.memory, job.client) for job in jobs]), moving


def vectorized(
    trainer: Trainer, down: Mapping[str, Tensor], jobs: Sequence[Job], round_: int
) -> Trained:
    """Train a chunk of clients at once, given in descending order of their steps."""
    began = time.perf_counter()
    optimizer = trainer.optimizer
    anchor, shared = anchors(down, jobs), jobs[0].part
    plan = schedule(trainer, jobs, round_, anchor.dtype)
    # Who has fewer samples has fewer hyper-parameters, and no batch asks for those that are added.
    hyper = {
        n: pad_sequence([job.hyper[n] for job in jobs], batch_first=True)
        for n in jobs[0].hyper
    }
    constant, moving = begun(trainer, down, jobs)
    due = [
        optimizer.refreshes(j.memory, round_, steps)
        for j, steps in zip(jobs, plan.steps, strict=True)
    ]
    theta = anchor.clone(memory_format=torch.contiguous_format)
    estimates = any(due)
    ids = [job.client.id for job in jobs]
    first = _client_step(trainer, down["buffers"], round_, first=True)
    later = _client_step(trainer, down["buffers"], round_)
    renew = _client_refresh(trainer, down["buffers"])
    sums = torch.zeros(len(jobs), dtype=anchor.dtype, device=anchor.device)
    done: list[tuple[Tensor, Vectors]] = []
    active, full = len(jobs), constant
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
        y = shared.y.index_select(0, flat).view(*rows.shape, *shared.y.shape[1:])
        noise = _padded_noise(
            trainer, round_, ids[:active], plan.first[:active, t], rows
        )
        weights = plan.weights[:active, t].to(anchor.device)
        fresh = [row for row in range(active) if t in due[row]] if estimates else []
        if fresh:
            places = [
                Place(trainer.seed, round_, ids[k], t, int(plan.first[k, t]))
                for k in fresh
            ]
            batch = x, y, weights, noise
            moving = _refreshed(renew, trainer, theta, moving, batch, fresh, places)
        if trainer.phased:
            counts = torch.tensor(plan.steps[:active]).to(theta)
            constant = {**constant, "progress": (t + 0.5) / counts}
        one = later if t else first
        own = {n: v[:active] for n, v in hyper.items()}
        if own:
            own["places"] = plan.places[:active, t].to(anchor.device)
        given = theta, anchor[:active], constant, moving, x, y, weights, noise, own
        theta, constant, moving, loss = one(*given)
        full = full if t else constant
        sums[:active] += loss
    done.append((theta, moving))
    theta = torch.cat([part for part, _ in reversed(done)])
    names = done[0][1]
    moving = {n: torch.cat([state[n] for _, state in reversed(done)]) for n in names}
    theta = trainer.release(theta, anchor)
    up, memory, told = torch.func.vmap(
        lambda a, origin, *state: trainer.finish(a, origin, state)
    )(theta, anchor, full, moving)
    counts = torch.tensor(plan.steps, dtype=anchor.dtype, device=anchor.device)
    seconds = time.perf_counter() - began
    gradients = [
        trainer.evaluations(round_, steps, d, anchor.shape[1])
        for steps, d in zip(plan.steps, due, strict=True)
    ]
    return Trained(
        [j.client for j in jobs],
        up,
        memory,
        sums / counts,
        plan.steps,
        gradients,
        told,
        seconds,
    )


def _client_step(
    trainer: Trainer,
    buffers: Tensor,
    round_: int,
    first: bool = False,
) -> Callable[..., Any]:
    """Return the local step of one client, gradient included, mapped over clients."""
    algorithm, along = trainer.algorithm, trainer.optimizer.along

    def one(
        theta: Tensor,
        anchor: Tensor,
        constant: Vectors,
        moving: Vectors,
        x: Tensor,
        y: Tensor,
        weights: Tensor,
        noise: Vectors,
        hyper: Vectors,
    ) -> tuple[Tensor, Vectors, Vectors, Tensor]:
        batch = Batch(x, y, noise, weights, hyper)

        def loss_of(point: Tensor) -> Tensor:
            if trainer.costing:
                own = functools.partial(trainer.costing.cost, state=constant)
                return trainer.objective.cost(own, point, buffers, batch)
            return trainer.objective.loss(point, buffers, batch)[0]

        product = None
        if along:
            given = theta, buffers, batch, moving[along]
            product, _ = trainer.objective.product(*given)
        if trainer.optimizer.models(round_):
            given = anchor, buffers, batch, theta - anchor
            gradient, loss = trainer.objective.product(*given)
        else:
            gradient, loss = torch.func.grad_and_value(loss_of)(theta)
        if first and isinstance(algorithm, Witness):
            constant = algorithm.witness(constant, gradient, loss)
        state = constant, moving
        theta, state = step(trainer, theta, anchor, state, gradient, round_, product)
        return theta, *state, loss

    return torch.func.vmap(one)


def _refreshed(
    renew: Callable[..., Any],
    trainer: Trainer,
    theta: Tensor,
    moving: Vectors,
    batch: tuple[Tensor, Tensor, Tensor, Vectors],
    fresh: list[int],
    places: list[Place],
) -> Vectors:
    """Return the optimizer's states, those of the rows ``fresh`` after an estimate."""
    x, y, weights, noise = batch
    drawn = [trainer.draw(place, y.shape[1:]) for place in places]
    at = torch.tensor(fresh, device=theta.device)
    states = {n: v[at] for n, v in moving.items()}
    noises = {n: v[at] for n, v in noise.items()}
    given = theta[at], states, x[at], y[at], weights[at], noises
    renewed = renew(*given, torch.stack(drawn).to(theta.device))
    return {n: v.index_copy(0, at, renewed[n]) for n, v in moving.items()}


def _client_refresh(trainer: Trainer, buffers: Tensor) -> Callable[..., Any]:
    """Return the optimizer's refresh by an estimate of the curvature, mapped over clients."""
    optimizer, objective = trainer.optimizer, trainer.objective

    def renew(
        theta: Tensor,
        moving: Vectors,
        x: Tensor,
        y: Tensor,
        weights: Tensor,
        noise: Vectors,
        drawn: Tensor,
    ) -> Vectors:
        assert optimizer.curvature is not None, "there is something to refresh by"
        batch = Batch(x, y, noise, weights)
        estimate = optimizer.curvature.estimate
        return optimizer.refresh(
            moving, estimate(objective, theta, buffers, batch, drawn)
        )

    return torch.func.vmap(renew)


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
