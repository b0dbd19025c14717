"""Who is there: which node hosts which client, how many samples each has, who is drawn.

Nodes are asked (a roll call); nothing is assumed from node ids or their order, so a node may join
late and takes part from the next round on.
"""

from __future__ import annotations

from logging import WARNING

import torch
from flwr.app import Message, MessageType, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid

from strategies.algorithm import Client
from strategies.randomness import generator
from strategies.wire import Refused, ids, numbers

ROLL_CALL = f"{MessageType.QUERY}.roll_call"


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
        self._nodes: dict[int, list[int]] = {}

    def call(self, grid: Grid, timeout: float = 60.0) -> None:
        """Ask every node not yet known whom it hosts; forget the nodes that have left.

        A client that two nodes claim stays with the first.
        """
        present = set(grid.get_node_ids())
        for node in self._nodes.keys() - present:
            for k in self._nodes.pop(node):
                del self.hosts[k]
        new = sorted(present - self._nodes.keys())
        if not new:
            return
        messages = [Message(RecordDict(), node, ROLL_CALL) for node in new]
        replies = list(grid.send_and_receive(messages, timeout=timeout))
        for reply in sorted(replies, key=lambda r: r.metadata.src_node_id):
            node = reply.metadata.src_node_id
            self._nodes[node] = []
            try:
                hosted = self._hosted(reply)
            except Refused as error:
                self.faults[node] = str(error)
                log(WARNING, "node %s refused at the roll call: %s", node, error)
                continue
            if doubled := hosted.keys() & self.hosts.keys():
                log(
                    WARNING,
                    "node %s claims hosted clients %s",
                    node,
                    sorted(doubled)[:9],
                )
            hosted = {k: n for k, n in hosted.items() if k not in self.hosts}
            self._nodes[node] = list(hosted)
            self.hosts |= dict.fromkeys(hosted, node)
            self.samples |= hosted

    def _hosted(self, reply: Message) -> dict[int, int]:
        """Return client -> samples as a node told it, or raise Refused."""
        if reply.has_error():
            raise Refused(reply.error.reason)
        report = reply.content.metric_records.get("hosted")
        if report is None:
            raise Refused("no list of hosted clients")
        named = ids(report, "clients")
        counts = numbers(report, "samples", len(named))
        hosted = {k: int(n) for k, n in zip(named, counts, strict=True)}
        bad = [k for k in hosted if not 0 <= k < self.clients + self.holdout]
        if bad or len(hosted) != len(named) or min(hosted.values(), default=1) < 1:
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

    def client(self, k: int) -> Client:
        """Return the facts about client k."""
        return Client(k, self.samples[k], self.samples[k] / self.mean_samples)

    def draw(self, server_round: int, size: int) -> list[int]:
        """Return the cohort of a round, sorted.

        The draw ranks all m clients and takes the first that are there: a client that is missing
        does not change who else is drawn.
        """
        random = generator(self.seed, "cohort", server_round)
        ranks = torch.randperm(self.clients, generator=random).tolist()
        return sorted([k for k in ranks if k in self.hosts][:size])
