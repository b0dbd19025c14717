"""What happened in a round, for the record: the replies that were taken, and who was left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from logging import WARNING
from typing import Any

import torch
from flwr.app import Message
from flwr.common.logger import log

from strategies.acceptance import SCORES, Accepted, Changed, accept
from strategies.algorithm import Vectors
from strategies.roster import Roster
from strategies.wire import Refused, add_bytes, weigh

#: Why a client is left out whose node did not answer.
SILENT = "no reply before the deadline"


@dataclass
class Round:
    """What happened in a round, for the record.

    Attributes
    ----------
    number : int
        The round, from 1.
    accepted : list of int
        The clients whose replies count.
    failed : dict of int to str
        Who was left out, and why.
    rows : dict of int to dict
        For each client a row of what it reported.
    down, up : dict of str to int
        Bytes of model, state and metrics.
    gap : float or None
        Relative gap between the mirrored server vector and the mean of the clients' memories.
    lost : list of int
        Those of them who have lost their memory.
    short : bool
        Whether too few replies could be accepted, so that nothing came of the round.
    busy : float
        Seconds of the node that worked longest.
    engines : set of str
        The engines that the nodes chose.
    """

    number: int
    accepted: list[int] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    down: dict[str, int] = field(default_factory=dict)
    up: dict[str, int] = field(default_factory=dict)
    gap: float | None = None
    lost: list[int] = field(default_factory=list)
    short: bool = False
    busy: float = 0.0
    engines: set[str] = field(default_factory=set)

    def row(self, k: int, roster: Roster) -> dict[str, Any]:
        """Return client k's row, made if there is none yet."""
        if k not in self.rows:
            self.rows[k] = {
                "round": self.number,
                "client": k,
                "node": roster.hosts.get(k),
                "role": "train" if k < roster.clients else "holdout",
            }
        return self.rows[k]

    def enter(self, reply: Accepted, roster: Roster) -> None:
        """Enter an accepted reply, a row for each client."""
        rows = {
            k: self.row(k, roster) for k in sorted({*reply.trained, *reply.evaluated})
        }
        for i, k in enumerate(reply.trained):
            rows[k] |= {
                "node": reply.node,
                "samples": roster.samples[k],
                "steps": int(reply.columns["steps"][i]),
                "gradients": int(reply.columns["gradients"][i]),
                "seconds": reply.columns["seconds"][i],
            }
            if "train_loss" in reply.columns:
                rows[k]["train_loss"] = reply.columns["train_loss"][i]
            if reply.metrics:
                rows[k]["metrics"] = {n: v[i] for n, v in reply.metrics.items()}
        for i, k in enumerate(reply.evaluated):
            rows[k] |= {
                "samples": roster.samples[k],
                "split": "test" if reply.scores["eval_held_out"][i] else "train",
            }
            for name in SCORES:
                if f"eval_{name}" in reply.scores:
                    rows[k][name] = reply.scores[f"eval_{name}"][i]
        if reply.trained:
            self.engines.add(reply.engine)
        self.failed |= reply.faults
        self.lost += reply.lost
        self.busy = max(self.busy, reply.busy)

    def enter_failed(self, roster: Roster) -> None:
        """Enter why clients were left out, each into its row."""
        for k, why in sorted(self.failed.items()):
            self.row(k, roster)["error"] = why


def replies_of(
    replies: Iterable[Message],
    round_: Round,
    asked: dict[int, tuple[list[int], list[int]]],
    roster: Roster,
    sizes: Mapping[str, int],
    dtype: torch.dtype,
    metrics: Sequence[str] | None = (),
    each: bool = False,
    excess: Callable[[Vectors], str] = lambda up: "",
) -> Iterator[Accepted]:
    """Yield what may be used of a round's replies, and enter it and the faults into the round.

    Replies are taken in the order of the clients that they cover, whoever answered first; those
    who have not answered come last.

    Parameters
    ----------
    replies : iterable of Message
        What arrived.
    round_ : Round
        The round that is under way.
    asked : dict
        From node to whom it was asked to train and to evaluate; answered ones are taken out.
    roster, sizes, dtype, metrics, each
        As for `accept`.
    excess : callable
        Says what is wrong with the vectors of a reply that is well formed.
    """

    def first(reply: Message) -> list[int]:
        train, evaluate = asked.get(reply.metadata.src_node_id, ([], []))
        return [*train, *evaluate][:1]

    for reply in sorted(replies, key=first):
        node, number = reply.metadata.src_node_id, round_.number
        mine = asked.pop(node, None)
        try:
            accepted = accept(reply, number, mine, roster, sizes, dtype, metrics, each)
            if accepted.up and (why := excess(accepted.up)):
                raise Refused(why)
        except Refused as error:
            log(WARNING, "round %s: node %s refused: %s", number, node, error)
            if isinstance(error, Changed):
                roster.forget(node)
            round_.failed |= dict.fromkeys(mine[0] if mine else [], str(error))
            continue
        add_bytes(round_.up, weigh(reply.content))
        round_.enter(accepted, roster)
        yield accepted
    for node, (train, _) in asked.items():
        log(WARNING, "round %s: node %s: %s", round_.number, node, SILENT)
        round_.failed |= dict.fromkeys(train, SILENT)
