"""What clients measure: the model that they received, or their own, on samples kept for it.

An algorithm that is `Individual` has each client judged with its own model, made of what it
receives now and of what it remembers. Two parts of a client's samples serve: on the one
(``validation``) it is measured what may decide, on the other what is told.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from logging import WARNING
from typing import TYPE_CHECKING, Any, cast

import torch
from flwr.app import ConfigRecord, Context
from flwr.common.logger import log
from torch import Tensor

from app.hypers import Hypers, hypers_of
from app.safely import brief, one_by_one, trained
from app.store import recall
from strategies.algorithm import Client, Individual, Vectors
from strategies.engine import choose
from strategies.individual import Practising, surveyed
from strategies.local import Job, Part, Trainer
from strategies.personal_objective import PersonalObjective
from strategies.privacy import Unprotected
from strategies.wire import WORST

if TYPE_CHECKING:
    from app.node import Node

Row = dict[str, Any]
Scores = dict[int, Row]
Predict = Callable[[Tensor], Tensor]


def evaluate(run: Trainer, scores: Callable[[], Scores]) -> dict[str, Any]:
    """Return the report's part on what each client measured, without those that failed."""
    try:
        rows = scores()
    except Exception as error:  # an evaluation that fails must not cost the training
        log(WARNING, "evaluation failed: %s", brief(error))
        rows = {}
    rows = {k: worst(row) for k, row in rows.items()}
    columns = ["samples", "held_out", "loss"]
    if run.objective.classification:
        columns.append("accuracy")
    if rows and all("validation_loss" in row for row in rows.values()):
        columns += [f"validation_{name}" for name in columns[2:]]
    report: dict[str, Any] = {
        f"eval_{n}": [r[n] for r in rows.values()] for n in columns
    }
    return {"evaluated": list(rows), **report}


def worst(row: Row) -> Row:
    """Return a row with the worst of all in place of a loss that is not finite, or beyond it.

    Who diverged must not leave the means and the decile.
    """
    found = dict(row)
    for kind in ("", "validation_"):
        if not abs(row.get(f"{kind}loss", 0.0)) <= WORST:
            found |= {f"{kind}loss": WORST, f"{kind}accuracy": 0.0}
    return found


def received(
    node: Node, run: Trainer, down: Vectors, order: ConfigRecord, context: Context
) -> Scores:
    """Return what each client that is to evaluate measures on its own samples.

    Clients that share their tensors and the model are judged together, in large batches.
    """
    clients = cast(list[int], order["evaluate"])
    if isinstance(run.algorithm, Individual):
        return individually(node, run, down, order, context)
    if hyper := hypers_of(node, order, context):
        return one_by_one(
            clients, lambda k: scored(run, predictor(run, down, hyper, k), node, k)
        )
    parts = [node.samples(k).judged() for k in clients]
    if not parts:
        return {}
    found = _together(run, down, [part for _, part in parts])
    checks = [node.samples(k).validation for k in clients]
    if all(map(len, checks)):
        more = _together(run, down, checks)
        found = [
            row | _validation(check) for row, check in zip(found, more, strict=True)
        ]
    held_out = [{"held_out": int(kept)} for kept, _ in parts]
    rows = [row | kept for row, kept in zip(found, held_out, strict=True)]
    return dict(zip(clients, rows, strict=True))


def individually(
    node: Node,
    run: Trainer,
    down: Vectors,
    order: ConfigRecord,
    context: Context,
    own: Mapping[int, Vectors] | None = None,
) -> Scores:
    """Return what each client measures with a model of its own on its own samples.

    Parameters
    ----------
    node, run, down, order, context
        Who judges, how, from what, whom and by which versions of their memories, and where these
        are.
    own : mapping of int to Vectors, optional
        What a client alone received, in place of ``down``.
    """
    algorithm = run.algorithm
    assert isinstance(algorithm, Individual), "the caller has asked"
    starts = jobs = _jobs(node, run, down, order, context, own or {})
    if isinstance(algorithm, Practising) and algorithm.practice:
        starts = _practised(node, run, algorithm.practice, down, jobs, order)
    ready = {job.client.id: job for job in starts}

    def judged(k: int) -> Row:
        mine = {**down, **ready[k].own}
        net = run.objective.net(mine["buffers"])
        predict = functools.partial(algorithm.predict, net, mine, ready[k].memory)
        return scored(run, predict, node, k)

    return one_by_one(ready, judged)


def _jobs(
    node: Node,
    run: Trainer,
    down: Vectors,
    order: ConfigRecord,
    context: Context,
    own: Mapping[int, Vectors],
) -> list[Job]:
    """Return the clients to judge, with their memories after a look at their samples."""
    fresh, versions = run.fresh(down["theta"]), order["evaluated_versions"]
    store, jobs = node.store(context, order) if fresh else None, []
    pairs = zip(
        cast(list[int], order["evaluate"]), cast(list[int], versions), strict=True
    )
    for k, version in pairs:
        try:
            mine, samples = own.get(k, {}), node.samples(k)
            blank = run.fresh(mine["theta"]) if fresh and mine else fresh
            memory = recall(store, k, version, blank) if store else {}
            size = len(samples.train)
            share = size / cast(float, order["mean_samples"])
            client = Client(k, size, share, samples.entropy)
            jobs.append(Job(client, samples.train, memory, mine))
        except Exception as error:
            log(WARNING, "client %s cannot be judged: %s", k, brief(error))
    try:
        return surveyed(run, down, jobs)
    except Exception as error:  # of one of them, or of all at once
        log(WARNING, "clients look at their samples one by one: %s", brief(error))
    each = {job.client.id: job for job in jobs}
    return list(one_by_one(each, lambda k: surveyed(run, down, [each[k]])[0]).values())


def _practised(
    node: Node,
    run: Trainer,
    epochs: int,
    down: Vectors,
    jobs: list[Job],
    order: ConfigRecord,
) -> list[Job]:
    """Return the jobs with the models that their clients get by some epochs of training.

    Who cannot train is left out.
    """
    local = replace(run.local, epochs=epochs, steps=0)
    more = replace(run, local=local, privacy=Unprotected())  # what stays needs none
    config, round_ = node.config, cast(int, order["round"])
    engine = choose(config.engine, run.objective, len(jobs), config.torch_device)
    models, faults = dict[int, Vectors](), dict[str, str]()
    for _, part in trained(more, down, jobs, round_, engine, faults):
        for row, client in enumerate(part.clients):
            models[client.id] = {n: v[row] for n, v in part.up.items()}
    for name, why in faults.items():
        log(WARNING, "client %s cannot be judged: %s", name, why)
    found = []
    for job in (job for job in jobs if job.client.id in models):
        change, start = models[job.client.id], {**down, **job.own}
        mine = {"theta": start["theta"] + change["delta"]}
        if "buffers" in change:
            mine["buffers"] = change["buffers"]
        found.append(replace(job, own={**job.own, **mine}))
    return found


def predictor(run: Trainer, down: Vectors, hyper: Hypers | None, k: int) -> Predict:
    """Return what client k predicts with a model: in its own way, if it has hyper-parameters."""
    goal = run.objective
    if hyper is not None and isinstance(goal, PersonalObjective):
        return functools.partial(goal.predictions, down["theta"], hyper(k))
    return goal.predictor(down["theta"], down["buffers"])


def scored(run: Trainer, predict: Predict, node: Node, k: int) -> Row:
    """Return a client's row: loss and accuracy of predictions on its own samples."""
    samples = node.samples(k)
    held_out, part = samples.judged()
    row = score(run, predict, part) | {"held_out": int(held_out)}
    if len(samples.validation):
        row |= _validation(score(run, predict, samples.validation))
    return row


def score(run: Trainer, predict: Predict, part: Part) -> Row:
    """Return number of samples, loss and accuracy of predictions on some samples."""
    judged = run.objective.judge(predict, part.x, part.y, part.index)
    return _row(run, len(part), *judged)


def _together(run: Trainer, down: Vectors, parts: list[Part]) -> list[Row]:
    """Return a row for each of several parts, which share their tensors or are only one."""
    index, sizes = torch.cat([p.index for p in parts]), [len(p) for p in parts]
    place = down["theta"], down["buffers"], parts[0].x, parts[0].y, index
    losses, hits = run.objective.scores(*place)
    right = hits if run.objective.classification else torch.zeros(len(losses))
    pairs = zip(
        sizes, torch.split(losses, sizes), torch.split(right, sizes), strict=True
    )
    return [_row(run, *pair) for pair in pairs]


def _row(run: Trainer, samples: int, losses: Tensor, hits: Tensor) -> Row:
    right = hits.to(torch.float64).mean() if run.objective.classification else 0.0
    return {
        "samples": samples,
        "loss": float(losses.mean()),
        "accuracy": float(right),
    }


def _validation(row: Row) -> Row:
    return {f"validation_{name}": row[name] for name in ("loss", "accuracy")}
