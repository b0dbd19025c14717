"""The Flower strategy that drives any algorithm: who takes part, what is accepted, what is known.

A round is one message to every node that hosts a member of the cohort. Clients, not nodes, are
sampled, weighed and counted. The ledger holds, for each client, the last round whose reply was
accepted; the next message names that version of the client's memory, so a lost, late or refused
reply changes nothing anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from logging import WARNING
from typing import Any

import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from strategies.algorithm import Algorithm, Cohort, Vectors
from strategies.local import Mean
from strategies.randomness import generator
from strategies.roster import Roster
from strategies.wire import Refused, ids, numbers, pack, reasons, unpack, weigh

TRAINED = ("samples", "train_loss", "steps", "seconds", "probe")
EVALUATED = ("eval_samples", "eval_held_out", "eval_loss")


@dataclass
class Round:
    """What happened in a round, for the record.

    Attributes
    ----------
    number : int
        The round, from 1.
    asked, accepted : list of int
        The cohort that was asked, and whose replies count.
    failed : dict of int to str
        Who was left out, and why.
    rows : list of dict
        One row for each client and what it reported.
    down, up : dict of str to int
        Bytes of model, state and metrics.
    gap : float or None
        Relative gap between the mirrored server vector and the mean of the clients' memories.
    busy : float
        Seconds of the node that worked longest.
    engines : set of str
        The engines that the nodes chose.
    """

    number: int
    asked: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    down: dict[str, int] = field(default_factory=dict)
    up: dict[str, int] = field(default_factory=dict)
    gap: float | None = None
    busy: float = 0.0
    engines: set[str] = field(default_factory=set)


class Federation(Strategy):
    """Drive an algorithm over clients that are hosted by nodes.

    Parameters
    ----------
    algorithm : Algorithm
        The algorithm, of which the server half is used.
    theta, buffers : Tensor
        theta^0 of shape (d,), and the model's buffers of shape (b,).
    clients : int
        m, the clients that may be trained: ids 0 to m - 1.
    per_round : int
        Size of the cohort.
    holdout : int
        Further clients, ids m to m + holdout - 1, which are evaluated and never trained.
    seed : int
        The run's seed.
    evaluate_every : int
        Clients evaluate the model they receive every so many rounds; 0 never.
    evaluate_clients : str
        ``"all"``, ``"cohort"`` (both with the held-out clients) or ``"none"``.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        theta: Tensor,
        buffers: Tensor,
        *,
        clients: int,
        per_round: int,
        holdout: int = 0,
        seed: int = 0,
        evaluate_every: int = 1,
        evaluate_clients: str = "all",
    ) -> None:
        self.algorithm = algorithm
        self.server = algorithm.start(theta)
        self.buffers = buffers
        self.roster = Roster(clients, holdout, seed)
        self.per_round = per_round
        self.evaluate_every = evaluate_every
        self.evaluate_clients = evaluate_clients
        self.ledger: dict[int, int] = {}
        self.probes: dict[int, float] = {}
        self.keep = 0
        self.state_dir = ""
        self.round = Round(0)
        self._asked: dict[int, list[int]] = {}
        self._probe = probe_direction(seed, len(theta))

    # A round.

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return one message for each node that has work in this round."""
        theta = unpack(arrays, {"theta": len(self._probe)}, self.server["theta"].dtype)
        self.server |= theta
        self.roster.call(grid)
        cohort = self.roster.draw(server_round, self.per_round)
        due = self.evaluate_every and (server_round - 1) % self.evaluate_every == 0
        return self._messages(
            server_round,
            cohort,
            self._evaluators(cohort) if due else [],
            MessageType.TRAIN,
        )

    def _evaluators(self, cohort: list[int]) -> list[int]:
        """Return who evaluates the model that is sent now."""
        if self.evaluate_clients == "none":
            return []
        everyone = self.evaluate_clients == "all"
        trained = self.roster.trainable() if everyone else cohort
        return trained + self.roster.held_out()

    def _messages(
        self, server_round: int, train: list[int], evaluate: list[int], kind: str
    ) -> list[Message]:
        """Return one message for each node that hosts any of these clients."""
        down = pack({**self.algorithm.down(self.server), "buffers": self.buffers})
        self.round = Round(server_round, asked=train)
        self._asked, messages, hosts = {}, [], self.roster.hosts
        for node in sorted({hosts[k] for k in [*train, *evaluate]}):
            mine = [k for k in train if hosts[k] == node]
            order: dict[str, Any] = {
                "round": server_round,
                "train": mine,
                "versions": [self.ledger.get(k, 0) for k in mine],
                "evaluate": [k for k in evaluate if hosts[k] == node],
                "keep": self.keep,
                "mean_samples": self.roster.mean_samples,
            }
            if self.state_dir:
                order["state_dir"] = self.state_dir
            content = RecordDict({"down": down, "order": ConfigRecord(order)})
            _add(self.round.down, weigh(content))
            messages.append(Message(content, node, kind, group_id=str(server_round)))
            self._asked[node] = mine
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Accept what can be accepted, and take the algorithm's server step.

        Replies are taken in the order of the clients that they cover, so that the sum does not
        depend on who answered first. With no usable reply the model stays as it is.
        """
        mean = Mean()
        probes: dict[int, float] = {}
        ordered = sorted(
            replies, key=lambda r: self._asked.get(r.metadata.src_node_id, [])
        )
        for reply in ordered:
            node = reply.metadata.src_node_id
            try:
                up, report = self._accept(reply)
            except Refused as error:
                asked = self._asked.pop(node, [])
                log(WARNING, "round %s: node %s refused: %s", server_round, node, error)
                self.round.failed |= dict.fromkeys(asked, str(error))
                continue
            self._asked.pop(node)
            if report["trained"]:
                mean.add(up, report["weight"])
                probes |= dict(zip(report["trained"], report["probe"], strict=True))
        for asked in self._asked.values():
            self.round.failed |= dict.fromkeys(asked, "no reply before the deadline")
        self.round.accepted = sorted(probes)
        self._enter_failed()
        if not probes:
            log(WARNING, "round %s: no usable reply, the model stays", server_round)
            return None, None
        size = len(probes)
        newcomers = sum(k not in self.ledger for k in probes)
        values = mean.value(self.server["theta"].dtype)
        self.buffers = values.pop("buffers", self.buffers)
        cohort = Cohort(size, self.roster.clients, newcomers)
        self.server = self.algorithm.update(self.server, values, cohort)
        self.ledger |= dict.fromkeys(probes, server_round)
        self.probes |= probes
        self.round.gap = self._gap()
        return pack({"theta": self.server["theta"]}), None

    def _accept(self, reply: Message) -> tuple[Vectors, dict[str, Any]]:
        """Return a reply's mean and report, with its rows entered, or raise Refused."""
        node = reply.metadata.src_node_id
        if node not in self._asked:
            raise Refused("was not asked in this round")
        if reply.has_error():
            raise Refused(reply.error.reason)
        _add(self.round.up, weigh(reply.content))
        report = reply.content.metric_records.get("report")
        faults = reasons(reply.content.config_records.get("faults", ConfigRecord()))
        if report is None:
            raise Refused("no report")
        trained, evaluated = ids(report, "trained"), ids(report, "evaluated")
        if sorted([*trained, *faults]) != self._asked[node]:
            raise Refused(f"answers for clients {sorted([*trained, *faults])}"[:300])
        if any(self.roster.hosts.get(k) != node for k in evaluated):
            raise Refused("evaluates clients that it does not host")
        columns = {n: numbers(report, n, len(trained)) for n in TRAINED}
        if columns["samples"] != [self.roster.samples[k] for k in trained]:
            raise Refused("report: samples differ from the roll call")
        scores = {n: numbers(report, n, len(evaluated)) for n in EVALUATED}
        if "eval_accuracy" in report:
            scores["eval_accuracy"] = numbers(report, "eval_accuracy", len(evaluated))
        weight = sum(self.algorithm.weight(self.roster.client(k)) for k in trained)
        up: Vectors = {}
        if trained:
            self.round.engines.add("vmap" if report.get("engine") == 1 else "loop")
            record = reply.content.array_records.get("up", ArrayRecord())
            sizes = dict.fromkeys(self.algorithm.up, len(self._probe))
            sizes["buffers"] = len(self.buffers)
            up = unpack(record, sizes, self.server["theta"].dtype)
        self._enter(node, trained, columns, evaluated, scores)
        self.round.failed |= faults
        self.round.busy = max(self.round.busy, numbers(report, "busy", 1)[0])
        return up, {"trained": trained, "weight": weight, "probe": columns["probe"]}

    def _enter(
        self,
        node: int,
        trained: list[int],
        columns: Mapping[str, list[float]],
        evaluated: list[int],
        scores: Mapping[str, list[float]],
    ) -> None:
        """Enter a node's report into the round's rows, one for each client."""
        rows: dict[int, dict[str, Any]] = {}
        for k in sorted({*trained, *evaluated}):
            role = "train" if k < self.roster.clients else "holdout"
            rows[k] = {
                "round": self.round.number,
                "client": k,
                "node": node,
                "role": role,
            }
        for i, k in enumerate(trained):
            rows[k] |= {
                "samples": self.roster.samples[k],
                "train_loss": columns["train_loss"][i],
                "steps": int(columns["steps"][i]),
                "gradients": int(columns["steps"][i]),
                "seconds": columns["seconds"][i],
            }
        for i, k in enumerate(evaluated):
            rows[k] |= {
                "samples": self.roster.samples[k],
                "split": "test" if scores["eval_held_out"][i] else "train",
                **{
                    n: scores[f"eval_{n}"][i]
                    for n in ("loss", "accuracy")
                    if f"eval_{n}" in scores
                },
            }
        self.round.rows.extend(rows.values())

    def _enter_failed(self) -> None:
        """Enter why clients were left out, each into its row."""
        rows = {row["client"]: row for row in self.round.rows}
        for k, why in sorted(self.round.failed.items()):
            if k not in rows:
                node, role = self.roster.hosts.get(k), "train"
                rows[k] = {
                    "round": self.round.number,
                    "client": k,
                    "node": node,
                    "role": role,
                }
                self.round.rows.append(rows[k])
            rows[k]["error"] = why

    def _gap(self) -> float | None:
        """Compare the mirrored server vector with the mean of the clients' memories.

        Every client reports the product of its memory with one fixed random direction: a number
        for each client is enough to see a memory that the server does not account for.
        """
        if self.algorithm.mirror is None:
            return None
        vector = self.server[self.algorithm.mirror[1]].to(torch.float64)
        mean = sum(self.probes.values()) / self.roster.clients
        scale = max(max(map(abs, self.probes.values())), 1e-12)
        return abs(float(vector @ self._probe) - mean) / scale

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return messages that only evaluate, for the model after the last round."""
        theta = unpack(arrays, {"theta": len(self._probe)}, self.server["theta"].dtype)
        self.server |= theta
        return self._messages(
            server_round, [], self._evaluators([]), MessageType.EVALUATE
        )

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Enter the clients' scores into the round's rows."""
        for reply in replies:
            try:
                self._accept(reply)
            except Refused as error:
                log(
                    WARNING,
                    "evaluation: node %s refused: %s",
                    reply.metadata.src_node_id,
                    error,
                )
        return None

    def norms(self) -> dict[str, float]:
        """Return the norm of each of the server's vectors."""
        return {
            f"{name}_norm": float(torch.linalg.vector_norm(vector))
            for name, vector in self.server.items()
        }

    def summary(self) -> None:
        """Nothing: the run's own record says it all."""

    # What a checkpoint holds.

    def state(self) -> tuple[Vectors, dict[str, Any]]:
        """Return the vectors and the JSON-able rest from which ``restore`` continues."""
        rest = {
            "ledger": {str(k): r for k, r in self.ledger.items()},
            "probes": {str(k): p for k, p in self.probes.items()},
            "mean_samples": self.roster.mean_samples,
        }
        return {**self.server, "buffers": self.buffers}, rest

    def restore(self, vectors: Vectors, rest: Mapping[str, Any]) -> None:
        """Continue from what ``state`` returned."""
        self.buffers = vectors["buffers"]
        self.server = {n: v for n, v in vectors.items() if n != "buffers"}
        self.ledger = {int(k): r for k, r in rest["ledger"].items()}
        self.probes = {int(k): p for k, p in rest["probes"].items()}
        self.roster.mean_samples = rest["mean_samples"]


def _add(total: dict[str, int], part: Mapping[str, int]) -> None:
    for name, value in part.items():
        total[name] = total.get(name, 0) + value


def probe_direction(seed: int, size: int) -> Tensor:
    """Return the run's audit direction: a random unit vector of shape (size,), float64."""
    random = generator(seed, "audit")
    vector = torch.randn(size, generator=random, dtype=torch.float64)
    norm: Tensor = torch.linalg.vector_norm(vector)
    return vector / norm
