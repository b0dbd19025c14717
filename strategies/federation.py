"""The Flower strategy that drives any algorithm: who takes part, what is accepted, what is known.

A round is one message to every node that hosts a member of the cohort. Clients, not nodes, are
sampled, weighed and counted. The ledger holds, for each client, the last round whose reply was
accepted; the next message names that version of the client's memory, so a lost, late or refused
reply changes nothing anywhere.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

from strategies.acceptance import Accepted
from strategies.algorithm import Algorithm, Cohort, Vectors
from strategies.individual import sizes
from strategies.mean import Mean
from strategies.privacy import Privacy, Unprotected
from strategies.randomness import generator
from strategies.roster import Roster, hypers_of, versions_of
from strategies.round_record import Round, replies_of
from strategies.wire import add_bytes, pack, unpack, weigh


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
    work : callable
        From a client's samples to the length of its training, by which nodes share the work.
    metrics : sequence of str
        Names of the numbers that the local optimizer tells of each training; None if nodes
        keep to themselves what they measure.
    min_replies : int
        Clients that must be accepted for a round to count; with fewer the model stays.
    privacy : Privacy, optional
        What protects the clients' differences.
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
        work: Callable[[int], int] = int,
        metrics: Sequence[str] | None = (),
        min_replies: int = 0,
        privacy: Privacy | None = None,
    ) -> None:
        self.algorithm = algorithm
        self._initial = theta, buffers
        self.server = algorithm.start(theta)
        self.buffers = buffers
        self.roster = Roster(clients, holdout, seed)
        self.per_round = per_round
        self.evaluate_every = evaluate_every
        self.evaluate_clients = evaluate_clients
        self.work = work
        self.metrics = metrics
        self.min_replies = min_replies
        self.privacy: Privacy = privacy or Unprotected()
        self.ledger: dict[int, int] = {}
        #: Versions of the clients' hyper-parameters, None if they have none (see `bilevel`).
        self.hyper: dict[int, int] | None = None
        self.since = 0  # the last round before the inner training that goes on now
        self.probes: dict[int, float] = {}
        self.keep = 0
        self.state_dir = ""
        # Tells this run from others in a node's own directory; a resumed run keeps it.
        self.key = secrets.token_hex(8)
        self.round = Round(0)
        self._asked: dict[int, tuple[list[int], list[int]]] = {}
        self._probe = probe_direction(seed, len(theta))
        self._sizes = sizes(algorithm, theta)

    # A round.

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return one message for each node that has work in this round."""
        theta = unpack(arrays, {"theta": len(self._probe)}, self.server["theta"].dtype)
        self.server |= theta
        self.roster.call(grid)
        cohort = self.roster.draw(server_round, self.per_round)
        t = server_round - 1
        due = self.evaluate_every and t % self.evaluate_every == 0
        # A model that begins anew would be judged untrained.
        due = due and not self.since == t > 0
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
        self.round = Round(server_round)
        self._asked, messages, hosts = {}, [], self.roster.hosts
        places = self.roster.place(train, self.work)
        for node in sorted({*places.values(), *(hosts[k] for k in evaluate)}):
            mine = [k for k in train if places[k] == node]
            judged = [k for k in evaluate if hosts[k] == node]
            order: dict[str, Any] = {
                "round": server_round,
                "train": mine,
                "versions": [self.ledger.get(k, 0) for k in mine],
                "evaluate": judged,
                **versions_of(self.algorithm, judged, self.ledger),
                "keep": self.keep,
                "mean_samples": self.roster.mean_samples,
                "since": self.since,
                **hypers_of(self.hyper, {*mine, *judged}),
                **self.place(),
            }
            content = RecordDict({"down": down, "order": ConfigRecord(order)})
            add_bytes(self.round.down, weigh(content))
            messages.append(Message(content, node, kind, group_id=str(server_round)))
            self._asked[node] = mine, judged
        return messages

    def place(self) -> dict[str, str]:
        """Return what tells a node where this run's memories are."""
        here = {"state_dir": self.state_dir} if self.state_dir else {}
        return {"run": self.key, **here}

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Accept what can be accepted, and take the algorithm's server step.

        Replies are taken in the order of the clients that they cover, so that the sum does not
        depend on who answered first. With no usable reply the model stays as it is.
        """
        mean = Mean()
        probes: dict[int, float] = {}
        for accepted in self._accepted(replies):
            if accepted.trained:
                clients = [self.roster.client(k) for k in accepted.trained]
                mean.add(accepted.up, sum(map(self.algorithm.weight, clients)))
                probes |= accepted.probes()
        self.round.short = len(probes) < self.min_replies
        usable = probes and not self.round.short
        arrays = self._step(server_round, mean, probes) if usable else None
        if arrays is None:
            log(WARNING, "round %s: nothing usable, the model stays", server_round)
        self.round.enter_failed(self.roster)
        return arrays, None

    def _accepted(self, replies: Iterable[Message]) -> Iterator[Accepted]:
        """Yield what may be used of the replies, and enter it and the faults into the round."""
        expected = {**self._sizes, "buffers": len(self.buffers)}
        dtype = self.server["theta"].dtype
        return replies_of(
            replies,
            self.round,
            self._asked,
            self.roster,
            expected,
            dtype,
            self.metrics,
            excess=self.privacy.excess,
        )

    def _step(
        self, server_round: int, mean: Mean, probes: dict[int, float]
    ) -> ArrayRecord | None:
        """Take the server step, unless it would leave the finite numbers."""
        values = mean.value(self.server["theta"].dtype)
        buffers = values.pop("buffers", self.buffers)
        values = self.privacy.publish(values, len(probes))
        newcomers = sum(self.ledger.get(k, 0) <= self.since for k in probes)
        clock = server_round - self.since
        cohort = Cohort(len(probes), self.roster.clients, newcomers, clock)
        server = self.algorithm.update(self.server, values, cohort)
        if not all(bool(torch.isfinite(v).all()) for v in server.values()):
            self.round.failed |= dict.fromkeys(
                probes, "the server's step is not finite"
            )
            for k in probes:
                for told in ("train_loss", "steps", "gradients", "seconds", "metrics"):
                    self.round.rows[k].pop(told, None)
            return None
        self.server, self.buffers = server, buffers
        self.round.accepted = sorted(probes)
        self.ledger |= dict.fromkeys(probes, server_round)
        self.probes |= probes
        self.round.gap = self._gap()
        return pack({"theta": server["theta"]})

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
        judges = self._evaluators(self.roster.trainable())
        return self._messages(server_round, [], judges, MessageType.EVALUATE)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Enter the clients' scores into the round's rows."""
        list(self._accepted(replies))  # which enters them; there is nothing to average
        return None

    def norms(self) -> dict[str, float]:
        """Return the norm of each of the server's vectors, and a single number as it is."""
        return {
            name if len(vector) == 1 else f"{name}_norm": float(
                vector if len(vector) == 1 else torch.linalg.vector_norm(vector)
            )
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
            "run": self.key,
            "since": self.since,
        }
        return {**self.server, "buffers": self.buffers}, rest

    def restore(self, vectors: Vectors, rest: Mapping[str, Any]) -> None:
        """Continue from what ``state`` returned."""
        self.buffers = vectors["buffers"]
        self.server = {n: v for n, v in vectors.items() if n != "buffers"}
        self.ledger = {int(k): r for k, r in rest["ledger"].items()}
        self.probes = {int(k): p for k, p in rest["probes"].items()}
        self.roster.mean_samples = rest["mean_samples"]
        self.key, self.since = rest["run"], rest["since"]

    def restart(self, round_: int) -> None:
        """Begin inner training anew after a round: the first model, clients without memory."""
        theta, self.buffers = self._initial
        self.server = self.algorithm.start(theta)
        self.since, self.probes = round_, {}


def probe_direction(seed: int, size: int) -> Tensor:
    """Return the run's audit direction: a random unit vector of shape (size,), float64."""
    random = generator(seed, "audit")
    vector = torch.randn(size, generator=random, dtype=torch.float64)
    norm: Tensor = torch.linalg.vector_norm(vector)
    return vector / norm
