"""Who is there: which node hosts which client, how many samples each has, who trains where.

Nodes are asked (a roll call); nothing is assumed from node ids or their order, so a node may join
late and takes part from the next round on.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from logging import WARNING
from time import monotonic

import torch
from flwr.app import Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.common.logger import log
from flwr.serverapp import Grid

from strategies.algorithm import Algorithm, Client, Individual
from strategies.mail import arrived
from strategies.randomness import generator
from strategies.wire import Refused, cause, ids, numbers

ROLL_CALL = f"{MessageType.QUERY}.roll_call"
#: What the SuperLink answers for a node that is gone: no fault of what the node would say.
GONE = frozenset(
    {
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        ErrorCode.NODE_UNAVAILABLE,
    }
)

#: Seconds after which a node that was refused, or has not answered, is asked again.
AGAIN = 60.0
#: Samples that a client may claim to have.
MOST = 10**9


class Roster:
    """The clients of a federation and the nodes that host them.

    Parameters
    ----------
    clients : int
        m, the clients that may be trained: ids 0 to m - 1.
    holdout : int
        Further clients, ids m to m + holdout - 1, evaluated and never trained.
    seed : int
        The run's seed.

    Attributes
    ----------
    hosts : dict of int to int
        The node that hosts each client that is there.
    samples : dict of int to int
        n_k of each client that was ever there.
    mean_samples : float
        The mean of n_k that scales the clients' shares, fixed before the first round.
    faults : dict of int to str
        Why a node's answer to the roll call was refused.
    """

    def __init__(self, clients: int, holdout: int, seed: int) -> None:
        self.clients = clients
        self.holdout = holdout
        self.seed = seed
        self.hosts: dict[int, int] = {}
        self.samples: dict[int, int] = {}
        self.mean_samples = 0.0
        self.faults: dict[int, str] = {}
        self._claims: dict[int, dict[int, int]] = {}
        self._free: set[int] = set()
        self._clients: dict[int, Client] = {}
        self._pending: dict[str, Message] = {}
        self._asked: dict[int, float] = {}
        self._told: set[tuple[int, int]] = set()

    @property
    def waiting(self) -> bool:
        """Whether a node that is there has not answered yet."""
        return bool(self._pending)

    def call(self, grid: Grid) -> None:
        """Ask the nodes that are new whom they host, and take in the answers that are there.

        Nothing is waited for: an answer that comes later counts from the next call on. A client
        that two nodes claim is the older node's, until that one leaves. A node whose answer was
        refused, or does not come, is asked again after a while; one that went before it answered,
        when it is back.
        """
        present, now = set(grid.get_node_ids()), monotonic()
        self._claims = {n: c for n, c in self._claims.items() if n in present}
        self._asked = {
            n: t for n, t in self._asked.items() if n in present and now - t < AGAIN
        }
        self._pending = {
            name: m
            for name, m in self._pending.items()
            if m.metadata.dst_node_id in self._asked
        }
        for node in sorted(present - self._claims.keys() - self._asked.keys()):
            message = Message(RecordDict(), node, ROLL_CALL)
            taken = [name for name in grid.push_messages([message]) if name]
            self._pending |= dict.fromkeys(taken, message)
            self._asked[node] = now
        replies = list(arrived(grid, self._pending)) if self._pending else []
        for name, reply in sorted(replies, key=lambda r: r[1].metadata.src_node_id):
            del self._pending[name]
            node = reply.metadata.src_node_id
            if reply.has_error() and reply.error.code in GONE:
                del self._asked[node]
                log(WARNING, "node %s: %s", node, cause(reply))
                continue
            try:
                self._claims[node] = self._hosted(reply)
                self.faults.pop(node, None)
                report = reply.content.metric_records["hosted"]
                self._free.discard(node)
                if report.get("bound") == 0:
                    self._free.add(node)
            except Refused as error:
                self.faults[node] = str(error)
                log(WARNING, "node %s refused at the roll call: %s", node, error)
        self.hosts = {}
        for node, claim in self._claims.items():
            for k, samples in claim.items():
                if self.hosts.setdefault(k, node) == node:
                    self.samples[k] = samples
                elif node not in self._free and (node, k) not in self._told:
                    self._told.add((node, k))
                    host = self.hosts[k]
                    log(WARNING, "node %s claims client %s of node %s", node, k, host)

    def forget(self, node: int) -> None:
        """Ask a node anew whom it hosts: it is not what it told."""
        self._claims.pop(node, None)
        self._asked.pop(node, None)

    def _hosted(self, reply: Message) -> dict[int, int]:
        """Return client -> samples as a node told it, or raise Refused."""
        if reply.has_error():
            raise Refused(cause(reply))
        report = reply.content.metric_records.get("hosted")
        if report is None:
            raise Refused("no list of hosted clients")
        named = ids(report, "clients")
        counts = numbers(report, "samples", len(named))
        hosted = {k: int(n) for k, n in zip(named, counts, strict=True)}
        bad = [k for k in hosted if not 0 <= k < self.clients + self.holdout]
        possible = all(1 <= n <= MOST for n in hosted.values())
        if bad or len(hosted) != len(named) or not possible:
            raise Refused(f"hosts impossible clients or samples: {bad or named}"[:300])
        return hosted

    def trainable(self) -> list[int]:
        """Return the clients that are there and may be trained."""
        return sorted(k for k in self.hosts if k < self.clients)

    def held_out(self) -> list[int]:
        """Return the clients that are there and are never trained."""
        return sorted(k for k in self.hosts if k >= self.clients)

    def fix_mean(self) -> None:
        """Fix the mean of n_k over the training clients that are there, once for the run."""
        counts = [self.samples[k] for k in self.trainable()]
        self.mean_samples = sum(counts) / len(counts)

    def place(self, cohort: list[int], work: Callable[[int], int]) -> dict[int, int]:
        """Return the node that trains each client of a cohort.

        A client trains on its host. Nodes that hold every client's samples and remember nothing,
        as in a simulation of FedAvg, share their part of the cohort evenly instead: the largest
        first, to the node with the least to do so far. The node's place in the order of its
        clients, not its id, breaks ties, so that a run repeats.

        Parameters
        ----------
        cohort : list of int
            Whom to place.
        work : callable
            From a number of samples to the length of a training.
        """
        where = {k: self.hosts[k] for k in cohort}
        free = [
            node
            for node, claim in sorted(
                self._claims.items(), key=lambda item: min(item[1], default=0)
            )
            if claim and node in self._free
        ]
        loads = [(0, place, node) for place, node in enumerate(free)]
        movable = [k for k in cohort if where[k] in set(free)]
        for k in sorted(movable, key=lambda k: (-work(self.samples[k]), k)):
            load, place, node = loads[0]
            where[k] = node
            heapq.heapreplace(loads, (load + work(self.samples[k]), place, node))
        return where

    def client(self, k: int) -> Client:
        """Return the facts about client k."""
        known = self._clients.get(k)
        if known is None or known.samples != self.samples[k]:
            share = self.samples[k] / self.mean_samples
            known = self._clients[k] = Client(k, self.samples[k], share)
        return known

    def draw(self, server_round: int, size: int) -> list[int]:
        """Return the cohort of a round, sorted.

        The draw ranks all m clients and takes the first that are there: a client that is missing
        does not change who else is drawn.
        """
        ranks = self.ranks(server_round)
        return sorted([k for k in ranks if k in self.hosts][:size])

    def ranks(self, server_round: int) -> list[int]:
        """Return all m clients in the order in which a round wants them."""
        random = generator(self.seed, "cohort", server_round)
        found: list[int] = torch.randperm(self.clients, generator=random).tolist()
        return found


def versions_of(
    algorithm: Algorithm, judged: list[int], ledger: Mapping[int, int]
) -> dict[str, list[int]]:
    """Return what names the memories by which clients are judged, if they are needed for it."""
    if not isinstance(algorithm, Individual):
        return {}
    return {"evaluated_versions": [ledger.get(k, 0) for k in judged]}


def hypers_of(
    versions: Mapping[int, int] | None, clients: set[int]
) -> dict[str, list[int]]:
    """Return what an order says of the hyper-parameters of some clients, if they have any."""
    if versions is None:
        return {}
    mine = sorted(clients & versions.keys())
    return {"hyper": mine, "hyper_versions": [versions[k] for k in mine]}
