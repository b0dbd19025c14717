"""A node's part in an estimate of hyper-gradients: what each client computes on its own samples.

Beside what training sends, only vectors of R^d leave it (see `strategies.bilevel`).
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, cast

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from torch import Tensor

from app.hypers import alone, beside, own_of
from app.judging import score, scored, worst
from app.node import Node
from app.personal_check import settings
from app.safely import brief
from app.store import Lost, recall, remember
from strategies.algorithm import Vectors
from strategies.hyper_client import Member
from strategies.hyper_wire import SCORES
from strategies.personal_objective import PersonalObjective
from strategies.wire import WORST, Refused, pack, unpack


def work(message: Message, context: Context) -> Message:
    """Let the clients that the message names measure, estimate or take their step."""
    node = Node(context)
    order = message.content.config_records["order"]
    how, goal = settings(node.config), node.trainer().objective
    if how is None or not isinstance(goal, PersonalObjective):
        raise Refused("this run has no hyper-parameters")
    each = bool(order["each"])
    task = replace(goal.task, decay=node.trainer().optimizer.penalty)
    clients = cast(list[int], order["clients"])
    sent = _arrived(message, goal, len(clients) if each else 1)
    place = node.store(context, order)
    store, what = beside(place), str(order["what"])
    named = cast(list[int], order["hyper_versions"])
    shares = cast(list[float], order["shares"])
    version, keep = cast(int, order["version"]), cast(int, order["keep"])
    done, lost, faults = list[int](), list[int](), dict[str, Any]()
    measured = list[int]()
    rows, up = list[list[float]](), list[Tensor]()
    first, took = goal.initial()[0], list[int]()
    for i, k in enumerate(clients):
        try:
            samples, local, gradients = node.samples(k), first, 0
            fresh = how.fresh(goal.zeros(len(samples.train)))
            memory = recall(store, k, named[i], fresh)
            # Any model serves as its own as long as l = 0 and nobody asks for the derivative.
            if how.interpolates and named[i]:
                local, _ = alone(node, how, place, k)
            mine = {n: block[i if each else 0] for n, block in sent.items()}
            client = Member(
                id=k,
                total=cast(int, order["total"]),
                share=shares[i],
                how=how,
                task=task,
                own=own_of(samples, how, local),
                theta=mine.get("theta", first),
                memory=memory,
                seed=node.config.seed,
                at=cast(int, order["at"]),
            )
            if scores := _scores(node, client, order):
                measured.append(k)
                rows.append([scores[name] for name in SCORES])
            if how.interpolates and not named[i] and what == "start":
                local, gradients = alone(node, how, place, k)
                client = replace(client, own=replace(client.own, local=local))
            u, after = _answer(client, order, mine)
            if u is not None and not bool(torch.isfinite(u).all()):
                raise ArithmeticError("the hyper-gradient is not finite")
            if after:
                remember(store, k, version, named[i], keep, after)
        except Exception as error:
            if isinstance(error, Lost):
                lost.append(k)
            faults[str(k)] = brief(error)
            continue
        done.append(k)
        took.append(gradients)  # in the client's first estimate alone
        if u is not None:
            up.append(u)
    columns = list(zip(*rows, strict=True)) or [()] * len(SCORES)
    report: dict[str, Any] = {"clients": done, "lost": lost, "scored": measured}
    report |= {n: list(c) for n, c in zip(SCORES, columns, strict=True)}
    if how.interpolates and what == "start":
        report["alone"] = took
    content = RecordDict(
        {
            "up": pack({"u": _sent(up, each)} if up else {}),
            "report": MetricRecord(report),
            "faults": ConfigRecord(faults),
        }
    )
    return Message(content, reply_to=message)


def _arrived(message: Message, goal: PersonalObjective, rows: int) -> Vectors:
    """Return the matrices that a message brings, a row for each client or one for all."""
    record = message.content.array_records["down"]
    theta, _ = goal.initial()
    found = unpack(record, {n: rows * len(theta) for n in record}, theta.dtype)
    if not found.keys() <= {"theta", "z"}:
        raise Refused(f"brings {sorted(found)}"[:300])
    return {n: v.view(rows, -1).to(theta.device) for n, v in found.items()}


def _sent(up: list[Tensor], each: bool) -> Tensor:
    """Return clients' vectors as they leave: a row for each, or their sum."""
    block = torch.stack(up)
    return block.reshape(-1) if each else block.double().sum(0).to(block.dtype)


def _answer(
    client: Member, order: ConfigRecord, mine: Vectors
) -> tuple[Tensor | None, Vectors]:
    """Return what a client sends, and its memory if it changes."""
    what, step = str(order["what"]), cast(int, order["step"])
    if order["best"]:
        client = replace(client, memory=client.memory | {"best": client.memory["l"]})
    if what == "look":
        return None, {}
    if what == "keep":
        return None, client.memory
    if what == "start":
        return client.start()
    if what == "push":
        return client.push(mine["z"], step)
    if what == "step":
        return None, client.last(mine["z"], step)
    if what == "curvature":
        return client.curvature(mine["z"], step), {}
    if what == "settle":
        return None, client.memory | {"l": client.memory["best"]}
    raise Refused(f"asks for {what[:40]!r}")


def _scores(node: Node, client: Member, order: ConfigRecord) -> dict[str, float]:
    """Return what a client measures with its own model and l, if it is asked to.

    Who has diverged is among the others with the worst.
    """
    if order["what"] not in ("look", "start"):
        return {}
    run, lam, own = node.trainer(), client.memory["l"], client.own
    goal = cast(PersonalObjective, run.objective)
    has = {"l": lam} if own.local is None else {"l": lam, "local": own.local}
    predict = functools.partial(goal.predictions, client.theta, has)
    samples = node.samples(client.id)
    row = scored(run, predict, node, client.id)
    row = worst(row)
    chooses = {n: row.get(f"validation_{n}") for n in ("loss", "accuracy")}
    if not len(samples.validation):  # what it trains on is all that may choose
        chooses = worst(score(run, predict, samples.train))
    row |= {f"choosing_{n}": chooses[n] for n in ("loss", "accuracy")}
    cost = float(client.task.outer(client.theta, lam, own))
    return row | {"outer_cost": cost if abs(cost) <= WORST else WORST}
