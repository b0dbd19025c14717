"""What clients measure: the model that they received, or their own, on samples kept for it.

An algorithm that is `Individual` has each client judged with its own model, made of what it
receives now and of what it remembers. Two parts of a client's samples serve: on the one
(``validation``) it is measured what may decide, on the other what is told.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from logging import WARNING
from typing import TYPE_CHECKING, Any, cast

import torch
from flwr.app import ConfigRecord, Context
from flwr.common.logger import log
from torch import Tensor

from app.store import recall
from strategies.algorithm import Individual, Vectors
from strategies.local import Part, Trainer

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
    rows = {k: row for k, row in rows.items() if math.isfinite(row["loss"])}
    columns = ["samples", "held_out", "loss"]
    if run.objective.classification:
        columns.append("accuracy")
    if rows and all(
        math.isfinite(r.get("validation_loss", math.nan)) for r in rows.values()
    ):
        columns += [f"validation_{name}" for name in columns[2:]]
    report: dict[str, Any] = {
        f"eval_{n}": [r[n] for r in rows.values()] for n in columns
    }
    return {"evaluated": list(rows), **report}


def received(
    node: Node, run: Trainer, down: Vectors, order: ConfigRecord, context: Context
) -> Scores:
    """Return what each client that is to evaluate measures on its own samples.

    Clients that share their tensors and the model are judged together, in large batches.
    """
    clients = cast(list[int], order["evaluate"])
    if isinstance(run.algorithm, Individual):
        return individually(node, run, dict.fromkeys(clients, down), order, context)
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
    down: Mapping[int, Vectors],
    order: ConfigRecord,
    context: Context,
) -> Scores:
    """Return what each client measures with a model of its own on its own samples.

    Parameters
    ----------
    node, run, order, context
        Who judges, how, whom and by which versions of their memories, and where these are.
    down : mapping of int to Vectors
        What each client received.
    """
    algorithm = run.algorithm
    assert isinstance(algorithm, Individual), "the caller has asked"
    clients = cast(list[int], order["evaluate"])
    versions = cast(list[int], order["evaluated_versions"])
    found: Scores = {}
    for k, version in zip(clients, versions, strict=True):
        try:
            mine = down[k]
            fresh = run.fresh(mine["theta"])
            store = node.store(context, order) if fresh and version else None
            memory = recall(store, k, version, fresh) if store else fresh
            predict = functools.partial(
                algorithm.predict, run.objective.net(mine["buffers"]), mine, memory
            )
            found[k] = scored(run, predict, node, k)
        except Exception as error:  # one must not cost the others theirs
            log(WARNING, "client %s cannot be judged: %s", k, brief(error))
    return found


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


def brief(error: Exception) -> str:
    """Return an exception in one line of at most 300 letters."""
    return f"{type(error).__name__}: {error}"[:300]
