"""The Flower strategy of the decentralized mode: a relay that carries mass and averages nothing.

    down   z_i = x_i / w_i, a row for each client that a node hosts
    up     z_i' - z_i, a row for each client that trained there
    then   the algorithm takes the differences in, and P(t) moves what all carry

A client whose reply is late, lost or refused has a difference of zero; its mass is at the relay
and is mixed all the same. The sums of mass and of weight are compared before and after every
mixing, and a gap ends the run.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from strategies import ledger
from strategies.acceptance import Accepted
from strategies.gossip import Gossip
from strategies.network import Network
from strategies.pushsum import Matrix, State, mix
from strategies.roster import Roster, hypers_of, versions_of
from strategies.round_record import Round, replies_of
from strategies.topology import Floats
from strategies.watch import Watch
from strategies.wire import add_bytes, pack, weigh

ACTION = "relay"


class Relay(Strategy):
    """Carry what clients push to each other over a directed network that changes.

    Parameters
    ----------
    algorithm : Gossip
        What is carried, and how training enters it.
    network : Network
        Topology, weights and faults.
    theta, buffers : Tensor
        The model that all clients start from, (d,) and (b,); both are carried.
    per_round : int
        How many clients train in a round, at most; all are mixed.
    seed, evaluate_every, evaluate_clients, work, metrics, min_replies
        As for `Federation`.
    """

    def __init__(
        self,
        algorithm: Gossip,
        network: Network,
        theta: Tensor,
        buffers: Tensor,
        *,
        per_round: int,
        seed: int = 0,
        evaluate_every: int = 1,
        evaluate_clients: str = "all",
        work: Callable[[int], int] = int,
        metrics: Sequence[str] | None = (),
        min_replies: int = 0,
    ) -> None:
        self.algorithm, self.network = algorithm, network
        self._initial = self.server, self.buffers = {"theta": theta}, buffers
        self.roster = Roster(network.n, 0, seed)
        self.per_round, self.min_replies = per_round, min_replies
        self.evaluate_every, self.evaluate_clients = evaluate_every, evaluate_clients
        self.work, self.metrics = work, metrics
        self.ledger: dict[int, int] = {}
        self.hyper: dict[int, int] | None = None  # the ledger of `bilevel.py`
        self.since = 0  # the last round before the inner training that goes on now
        self.probes: dict[int, float] = {}  # there is no server vector to audit by them
        self.keep, self.state_dir = 0, ""
        self.key = secrets.token_hex(8)  # of this run; a resumed run keeps it
        self.round = Round(0)
        self.carried: dict[str, State] = {}
        self.kept: dict[str, Matrix] = {}
        self.mass: dict[str, float] = {}
        self.watch = Watch(network, algorithm.tau)
        self._asked: dict[int, tuple[list[int], list[int]]] = {}
        self._told: dict[str, Any] = {}
        self._wanted = 0

    def _begin(self) -> None:
        """Give every client that is there from the start the model, in its weight."""
        value = torch.cat([self.server["theta"], self.buffers]).numpy()
        model = ledger.opened(value, self.network, self.algorithm.weight, self.roster)
        self.weights = model.w.copy()
        self.carried, self.kept = self.algorithm.start(model)

    # A round.

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return one message for each node that has work in this round."""
        self.roster.call(grid)
        if not self.carried:
            self._begin()
        t, again = server_round - 1, self.round.number == server_round
        self.round = Round(server_round)
        if not again:  # else too few have answered: what came before them has happened
            retire = partial(self.algorithm.retire, self.carried, self.kept)
            ledger.say_goodbye(self.network, self.carried, t, retire)
            self.links = self.network.at(t)
            if self.algorithm.mixes_first:
                self._mix(server_round)
        late = self.network.faults.late(self.network.seed, t, self.network.n)
        trains = self.algorithm.trains(server_round - self.since)

        def able(drawn: list[int]) -> list[int]:
            awake = self.links.awake
            return [k for k in drawn if trains and awake[k] and self._has_mass(k)]

        training = able(self.roster.draw(server_round, self.per_round))
        # Whom the round would have, were all nodes there: a node that is gone lowers no minimum.
        whole = able(self.roster.ranks(server_round)[: self.per_round])
        self._wanted = sum(not late[k] for k in whole)
        why = "its reply came too late (faults.straggle)"
        self.round.failed |= {k: why for k in training if late[k]}
        due = self.evaluate_every and t % self.evaluate_every == 0
        due = due and not self.since == t > 0  # as with a server
        return self._messages(
            [k for k in training if not late[k]],
            self._evaluators(training) if due else [],
            MessageType.TRAIN,
        )

    def _has_mass(self, k: int) -> bool:
        return bool(self.carried["model"].w[k] > 0)  # one that has just joined has none

    def _evaluators(self, trained: list[int]) -> list[int]:
        if self.evaluate_clients == "none":
            return []
        who = self.roster.trainable() if self.evaluate_clients == "all" else trained
        return [k for k in who if self._has_mass(k)]

    def _messages(
        self, train: list[int], evaluate: list[int], kind: str
    ) -> list[Message]:
        """Return one message for each node that works for any of these clients."""
        number, hosts = self.round.number, self.roster.hosts
        places = {k: hosts[k] for k in evaluate} | self.roster.place(train, self.work)
        self._asked, messages = {}, []
        for node in sorted({*places.values()}):
            mine = [k for k in train if places[k] == node]
            judged = [k for k in evaluate if places[k] == node]
            rows = sorted({*mine, *judged})
            order: dict[str, Any] = {
                "round": number,
                "rows": rows,
                "train": mine,
                "versions": [self.ledger.get(k, 0) for k in mine],
                "evaluate": judged,
                **versions_of(self.algorithm.solver, judged, self.ledger),
                "keep": self.keep,
                "mean_samples": self.roster.mean_samples,
                "since": self.since,
                **hypers_of(self.hyper, {*rows}),
                **self.place(),
            }
            block = torch.from_numpy(self.carried["model"].z(rows)).reshape(-1)
            down = pack({"theta": block})
            content = RecordDict({"down": down, "order": ConfigRecord(order)})
            add_bytes(self.round.down, weigh(content))
            kind_ = f"{kind}.{ACTION}"
            messages.append(Message(content, node, kind_, group_id=str(number)))
            self._asked[node] = mine, judged
        return messages

    def place(self) -> dict[str, str]:
        """Return what tells a node where this run's memories are."""
        here = {"state_dir": self.state_dir} if self.state_dir else {}
        return {"run": self.key, **here}

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Take in the differences that can be accepted, and mix."""
        found = [reply for reply in self._accepted(replies) if reply.trained]
        if sum(len(r.trained) for r in found) < min(self.min_replies, self._wanted):
            self.round.short = True
            self.round.enter_failed(self.roster)
            return None, None
        for reply in found:
            self._take(reply)
        self.round.accepted.sort()
        if not self.algorithm.mixes_first:
            self._mix(server_round)
        self.round.enter_failed(self.roster)
        self._report()
        return pack(self.server), None

    def _accepted(self, replies: Iterable[Message]) -> Iterator[Accepted]:
        """Yield what may be used of the replies."""
        return replies_of(
            replies,
            self.round,
            self._asked,
            self.roster,
            {"delta": self.carried["model"].x.shape[1]},
            self.server["theta"].dtype,
            self.metrics,
            each=True,
        )

    def _take(self, reply: Accepted) -> None:
        """Take in a node's differences, each in its client's weight."""
        rows = np.array(reply.trained, dtype=np.int64)
        change = reply.up["delta"].view(len(rows), -1)
        ledger.admit(rows, self.weights, self.algorithm.weight, self.roster)
        weight = torch.from_numpy(self.weights[rows]).to(change.dtype)
        change = change * weight[:, None]
        size = len(self.server["theta"])
        # The server's rate is the model's; buffers are averaged as they are.
        change[:, :size] = self.algorithm.scaled(change[:, :size])
        self.algorithm.take(self.carried, self.kept, rows, change.numpy())
        self.round.accepted += reply.trained
        self.ledger |= dict.fromkeys(reply.trained, self.round.number)

    def _mix(self, server_round: int) -> None:
        """Push everything that is carried once, and audit it."""
        faults = self.network.faults
        for name, state in self.carried.items():
            before = state.total(), state.lost_x.copy(), state.lost_w
            mix(self.links, state, faults.policy)
            found = ledger.audit(before, state, name)
            if name == "model":
                self.mass = found
        present = faults.present(server_round - 1, self.network.n)
        ledger.smallest(self.carried["model"].w, present, self.algorithm.min_weight)
        self.watch.see(self.links, server_round - 1)

    def restart(self, round_: int) -> None:
        """Begin inner training anew after a round: the first model, clients without memory."""
        self.server, self.buffers = self._initial
        self.since = round_
        self._begin()

    # What is told.

    def _report(self) -> None:
        """Measure where the network stands after a round."""
        model = self.carried["model"]
        mean = model.mean()
        self._stand(mean)
        self._told = {
            **self.watch.told(self.links, model, mean, len(self.carried)),
            "mass": self.mass,
            **self.algorithm.audit(self.carried, self.kept),
        }

    def _stand(self, mean: Floats) -> None:
        """Take what all would agree on as the model that is told."""
        whole = torch.from_numpy(mean).to(self.server["theta"].dtype)
        split = len(self.server["theta"])
        self.server, self.buffers = {"theta": whole[:split]}, whole[split:]

    def norms(self) -> dict[str, Any]:
        """Return what the record says of the network."""
        return self._told

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return messages that only evaluate, for the models after the last round."""
        self.round = Round(server_round)
        if not self.carried:
            self._begin()
        judges = self._evaluators(self.roster.trainable())
        return self._messages([], judges, MessageType.EVALUATE)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Enter the clients' scores into the round's rows."""
        list(self._accepted(replies))
        return None

    def summary(self) -> None:
        """Nothing: the run's own record says it all."""

    # What a checkpoint holds.

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors and the JSON-able rest from which ``restore`` continues."""
        tensors = ledger.saved(self.carried, self.kept, self.weights)
        rest = {
            "ledger": {str(k): r for k, r in self.ledger.items()},
            "mean_samples": self.roster.mean_samples,
            "run": self.key,
            "since": self.since,
            "done": self.round.number,
            "lost": {n: s.lost_w for n, s in self.carried.items()},
            "window": self.watch.state(),
        }
        return tensors, rest

    def restore(self, vectors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
        """Continue from what ``state`` returned."""
        names = self.algorithm.carries
        self.carried, self.kept, self.weights = ledger.restored(
            names, vectors, rest["lost"]
        )
        self.ledger = {int(k): r for k, r in rest["ledger"].items()}
        self.roster.mean_samples = rest["mean_samples"]
        self.key, self.since = rest["run"], rest["since"]
        self.watch.restore(int(rest["done"]), rest["window"])
        self._stand(self.carried["model"].mean())
