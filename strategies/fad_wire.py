"""How questions of a differentiated program reach the clients: in one process, or over a Grid.

server -> node   down     x0, x1, ... the broadcast values; t.. tangents; c.. cotangents
                 order    the plan, whom it is for, what is wanted
node -> server   up       the sums over the node's clients
                 report   who is in them
                 faults   client id -> one line, for those left out
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from logging import WARNING
from typing import Any, cast

import numpy as np
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.common.logger import log
from flwr.serverapp import Grid
from torch import Tensor

from strategies.fad_client import Answer, BadPlan, Plan, Question, answer
from strategies.fad_site import Site
from strategies.roster import Roster
from strategies.wire import Refused, cause, ids, reasons, shaped

DERIVE = f"{MessageType.QUERY}.derive"


@dataclass(frozen=True)
class InProcess:
    """Clients in this process, for tests and notebooks.

    Attributes
    ----------
    sites : sequence of Site
        The clients.
    nodes : int
        Over how many nodes they are spread: client k is on node k mod nodes.
    """

    sites: Sequence[Site]
    nodes: int = 1

    def clients(self) -> list[int]:
        """Return the clients that are there."""
        return [s.id for s in self.sites]

    def ask(self, question: Question) -> list[tuple[int, Question, Answer]]:
        """Evaluate on each node's clients."""
        site_of = {s.id: s for s in self.sites}
        here = [k for k in question.clients if k in site_of]
        found = []
        for node in range(self.nodes):
            mine = tuple(k for k in here if k % self.nodes == node)
            if mine:
                asked = _to(question, mine)
                found.append((node, asked, answer(asked, site_of.__getitem__)))
        return found


@dataclass(frozen=True)
class OverGrid:
    """Clients behind a Flower Grid, on the nodes that host them.

    Attributes
    ----------
    grid : Grid
        Flower's, or the local runtime's.
    roster : Roster
        Who hosts whom.
    exchange : callable
        Sends messages over the grid and returns the replies that came in time.
    """

    grid: Grid
    roster: Roster
    exchange: Callable[[list[Message]], Iterable[Message]]

    def clients(self) -> list[int]:
        """Return the clients that are there and may be trained."""
        return self.roster.trainable()

    def ask(self, question: Question) -> list[tuple[int, Question, Answer]]:
        """Send one message to each node that hosts some of the clients, and take its answer."""
        self.roster.call(self.grid)
        hosts = self.roster.hosts
        asked = {}
        for node in sorted({hosts[k] for k in question.clients if k in hosts}):
            mine = tuple(k for k in question.clients if hosts.get(k) == node)
            asked[node] = _to(question, mine)
        messages = [
            Message(pack_question(q), node, DERIVE) for node, q in asked.items()
        ]
        answers = {}
        for reply in self.exchange(messages):
            node = reply.metadata.src_node_id
            try:
                if node not in asked or node in answers:
                    raise Refused("was not asked, or has answered already")
                answers[node] = unpack_answer(reply, asked[node])
            except Refused as error:
                log(WARNING, "node %s refused: %s", node, error)
                if node in asked and node not in answers:
                    whys = dict.fromkeys(asked[node].clients, str(error))
                    answers[node] = Answer((), whys, {})
                continue
            for k, why in answers[node].faults.items():
                log(WARNING, "client %s: %s", k, why)
        nobody = Answer((), {}, {})
        return [(node, q, answers.get(node, nobody)) for node, q in asked.items()]


def _to(question: Question, clients: tuple[int, ...]) -> Question:
    """Return the same question to some of the clients."""
    return Question(**{**vars(question), "clients": clients})


def _arrays(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Return tensors of any shape as a record."""
    arrays = {
        n: np.asarray(t.detach().cpu().numpy(), order="C") for n, t in tensors.items()
    }
    return ArrayRecord({n: Array(a) for n, a in arrays.items()})


def _tensors(record: ArrayRecord) -> dict[str, Tensor]:
    """Return the tensors of a record, all of them finite, or raise Refused."""
    found = {}
    for name, array in record.items():
        try:
            found[name] = torch.from_numpy(shaped(array))
        except Refused as error:
            raise Refused(f"{name} {error}") from None
        if not bool(torch.isfinite(found[name]).all()):
            raise Refused(f"{name} holds NaN or infinity")
    return found


def pack_question(question: Question) -> RecordDict:
    """Return a question as it travels."""
    tensors = {f"x{i}": v for i, v in enumerate(question.leaves)}
    tensors |= {f"t{i}": v for i, v in question.tangents.items()}
    tensors |= {f"c{i}": v for i, v in question.cotangents.items()}
    order: dict[str, Any] = {
        "clients": list(question.clients),
        "leaves": len(question.leaves),
        "calls": [c.text() for c in question.plan.calls],
        "outputs": list(question.plan.outputs),
        "columns": list(question.columns),
        "wanted": list(question.wanted),
    }
    return RecordDict({"down": _arrays(tensors), "order": ConfigRecord(order)})


def unpack_question(content: RecordDict) -> Question:
    """Read a question that arrived at a node.

    Raises
    ------
    Refused, BadPlan
        If it cannot be evaluated.
    """
    order = content.config_records["order"]
    tensors = _tensors(content.array_records["down"])
    count = cast(int, order["leaves"])
    plan = Plan.parse(
        count, cast(list[str], order["calls"]), cast(list[int], order["outputs"])
    )

    def named(letter: str) -> dict[int, Tensor]:
        found = {n: t for n, t in tensors.items() if n.startswith(letter)}
        return {int(n[1:]): t for n, t in found.items()}

    leaves, tangents, cotangents = named("x"), named("t"), named("c")
    columns = tuple(cast(list[int], order["columns"]))
    wanted = tuple(cast(list[int], order["wanted"]))
    places = {*tangents, *columns, *wanted}
    if sorted(leaves) != list(range(count)) or not places <= leaves.keys():
        raise BadPlan("values are missing")
    if not cotangents.keys() <= set(range(len(plan.outputs))):
        raise BadPlan("a cotangent of no output")
    if any(t.shape[1:] != leaves[i].shape or not t.ndim for i, t in tangents.items()):
        raise BadPlan("tangents of another shape than their values")
    if len({len(t) for t in tangents.values()}) > 1:
        raise BadPlan("tangents of different numbers of directions")
    arrived = tuple(leaves[i] for i in range(count))
    clients = tuple(cast(list[int], order["clients"]))
    return Question(plan, clients, arrived, tangents, columns, cotangents, wanted)


def pack_answer(found: Answer) -> RecordDict:
    """Return an answer as it travels."""
    faults = {str(k): why for k, why in found.faults.items()}
    return RecordDict(
        {
            "up": _arrays(found.sums),
            "report": MetricRecord({"clients": list(found.clients)}),
            "faults": ConfigRecord(dict(faults)),
        }
    )


def unpack_answer(reply: Message, question: Question) -> Answer:
    """Read a node's answer, every name and shape checked that can be.

    Raises
    ------
    Refused
        Saying what is wrong.
    """
    if reply.has_error():
        raise Refused(cause(reply))
    report = reply.content.metric_records.get("report")
    if report is None:
        raise Refused("no report")
    clients = tuple(ids(report, "clients"))
    faults = reasons(reply.content.config_records.get("faults", ConfigRecord()))
    if sorted([*clients, *faults]) != sorted(question.clients):
        raise Refused(f"answers for clients {sorted([*clients, *faults])}"[:300])
    if not clients:
        return Answer((), faults, {})
    sums = _tensors(reply.content.array_records.get("up", ArrayRecord()))
    shapes = _shapes(question, sums)
    if sums.keys() != shapes.keys():
        raise Refused(f"returns {sorted(sums)}, expected {sorted(shapes)}"[:300])
    for name, shape in shapes.items():
        if tuple(sums[name].shape) != shape:
            raise Refused(f"{name} has shape {tuple(sums[name].shape)}, not {shape}")
    return Answer(clients, faults, sums)


def _shapes(
    question: Question, sums: Mapping[str, Tensor]
) -> dict[str, tuple[int, ...]]:
    """Return what an answer must hold; the values' own shapes are the clients' to say."""
    if question.cotangents:
        return {f"g{i}": tuple(question.leaves[i].shape) for i in question.wanted}
    found: dict[str, tuple[int, ...]] = {}
    for o in range(len(question.plan.outputs)):
        shape = tuple(sums[f"y{o}"].shape) if f"y{o}" in sums else ()
        found[f"y{o}"] = shape
        if question.tangents:
            found[f"t{o}"] = (len(next(iter(question.tangents.values()))), *shape)
        for leaf in question.columns:
            found[f"j{o}.{leaf}"] = (question.leaves[leaf].numel(), *shape)
    return found
