"""A node's part in a network without a server: each client trains and judges a model of its own.

The relay sends a block with a row z_i for each client, and gets back the rows z_i' - z_i of those
that trained. A row holds the parameters and then the buffers.
"""

from __future__ import annotations

import time
from typing import cast

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from torch import Tensor

from app.binding import bind
from app.host import setting
from app.hypers import hypers_of
from app.judging import (
    Row,
    Scores,
    evaluate,
    individually,
    predictor,
    score,
    scored,
)
from app.node import Node, train_all
from app.safely import one_by_one
from strategies.algorithm import Client, Individual, Vectors
from strategies.gossip import Gossip
from strategies.local import Part, Trainer
from strategies.randomness import permutations
from strategies.wire import Refused, pack, unpack


def work(message: Message, context: Context) -> Message:
    """Train and judge the clients that the message names, each from its own row."""
    began = time.perf_counter()
    node = Node(context)
    order = message.content.config_records["order"]
    run = node.trainer()
    rows = cast(list[int], order["rows"])
    own = _own(message, run, rows)
    evaluated = evaluate(run, lambda: _judged(node, run, order, context, own))
    down = next(iter(own.values())) if own else {}
    changes: dict[int, Tensor] = {}

    def collect(clients: list[Client], up: Vectors) -> None:
        for i, client in enumerate(clients):
            parts = [up["delta"][i]]
            if "buffers" in up:
                parts.append(up["buffers"][i] - own[client.id]["buffers"])
            changes[client.id] = torch.cat(parts)

    trained, faults = train_all(node, run, down, order, context, collect, own)
    busy = [time.perf_counter() - began]
    report = MetricRecord({**evaluated, **trained, "busy": busy})
    block = [changes[k] for k in cast(list[int], trained["trained"])]
    up = pack({"delta": torch.stack(block).reshape(-1)} if block else {})
    content = RecordDict({"up": up, "report": report, "faults": ConfigRecord(faults)})
    return Message(content, reply_to=message)


def _own(message: Message, run: Trainer, rows: list[int]) -> dict[int, Vectors]:
    """Return each client's row as its parameters and buffers, on the device."""
    theta, buffers = run.objective.initial()
    sizes = [len(theta), len(buffers)]
    if len(set(rows)) != len(rows):
        raise Refused("names a client twice")
    expected = {"theta": len(rows) * sum(sizes)}
    arrived = unpack(message.content.array_records["down"], expected, theta.dtype)
    block = arrived["theta"].view(len(rows), -1).to(theta.device)
    parts = (torch.split(row, sizes) for row in block)
    return {
        k: {"theta": mine, "buffers": state}
        for k, (mine, state) in zip(rows, parts, strict=True)
    }


def _judged(
    node: Node,
    run: Trainer,
    order: ConfigRecord,
    context: Context,
    own: dict[int, Vectors],
) -> Scores:
    """Return what each client measures with its own model.

    On common samples that is the model that it carries; on its own, what its algorithm makes of it.
    """
    gossip = bind("strategy", node.config.strategy)()
    assert isinstance(gossip, Gossip), "the relay drives no other"
    common = _test(node, gossip.judge_samples) if gossip.judge == "test" else None
    clients = cast(list[int], order["evaluate"])
    if common is None and isinstance(run.algorithm, Individual):
        down = next(iter(own.values())) if own else {}
        return individually(node, run, down, order, context, own)
    hyper = hypers_of(node, order, context)

    def judged(k: int) -> Row:
        predict = predictor(run, own[k], hyper, k)
        if common is None:
            return scored(run, predict, node, k)
        return score(run, predict, common) | {"held_out": 1}

    return one_by_one(clients, judged)


def _test(node: Node, most: int) -> Part | None:
    """Return at most so many samples of the test set, the same for all; None if there is none."""
    test = setting(node.overrides).dataset.test
    if not len(test.y):
        return None
    order = permutations(node.config.seed, "judge", 0, [0], len(test.y))[0]
    return Part(test.x, test.y, order[:most].sort().values.to(test.x.device))
