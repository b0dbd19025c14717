"""What a node may answer, and the round's record of what it answered.

A reply is accepted whole or refused whole, before anything of it is used. Clients that their own
node reports as failed are left out; a refused reply leaves out all that it should have covered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from logging import WARNING
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.common.logger import log

from strategies.algorithm import Vectors
from strategies.roster import Roster
from strategies.wire import (
    Refused,
    cause,
    ids,
    limit,
    numbers,
    possible,
    reasons,
    unpack,
    weigh,
)

#: What a node reports of each trained client, besides the optimizer's own metrics.
TRAINED = ("samples", "train_loss", "steps", "gradients", "seconds", "probe")
#: What nodes may keep to themselves.
PRIVATE = {"train_loss"}
#: Why a client is left out whose node did not answer.
SILENT = "no reply before the deadline"
EVALUATED = ("eval_samples", "eval_held_out", "eval_loss")
#: The scores of a classification, and those on the samples that may decide.
SCORES = ("loss", "accuracy", "validation_loss", "validation_accuracy")
OPTIONAL = tuple(f"eval_{name}" for name in SCORES[1:])


class Changed(Refused):
    """What a node answers is not what it told at the roll call, as after it got other data."""


@dataclass(frozen=True)
class Accepted:
    """A reply that may be used.

    Attributes
    ----------
    node : int
        Who answered.
    up : Vectors
        The weighted mean over the trained clients, each of shape (d,), or a row of each of
        them, one after another.
    trained, evaluated : list of int
        The clients that it covers.
    columns, scores : dict of str to list of float
        What the node reports of each trained, of each evaluated client.
    metrics : dict of str to list of float
        What the local optimizer tells of each trained client's training.
    faults : dict of int to str
        The clients that failed there, and why.
    lost : list of int
        Those among them whose memory is not there any more.
    busy : float
        Seconds that the node worked.
    engine : str
        How it trained: ``loop`` or ``vmap``.
    """

    node: int
    up: Vectors
    trained: list[int]
    evaluated: list[int]
    columns: dict[str, list[float]]
    scores: dict[str, list[float]]
    metrics: dict[str, list[float]]
    faults: dict[int, str]
    lost: list[int]
    busy: float
    engine: str

    def probes(self) -> dict[int, float]:
        """Return each trained client's audit number."""
        return dict(zip(self.trained, self.columns["probe"], strict=True))


def accept(
    reply: Message,
    round_: int,
    asked: tuple[list[int], list[int]] | None,
    roster: Roster,
    sizes: Mapping[str, int],
    dtype: torch.dtype,
    metrics: Sequence[str] | None = (),
    each: bool = False,
) -> Accepted:
    """Check a reply in every respect.

    Parameters
    ----------
    reply : Message
        What a node sent.
    round_ : int
        The round that is under way.
    asked : tuple of list of int, or None
        Whom the node was asked to train and to evaluate; None if it was not asked.
    roster : Roster
        Who hosts whom, with how many samples.
    sizes : mapping of str to int
        The vectors that must come up, and their lengths.
    dtype : torch.dtype
        The dtype to return.
    metrics : sequence of str
        Names of the numbers that the local optimizer tells of each training; None if nodes
        keep to themselves what they measure.
    each : bool
        Whether the vectors come for each trained client, not as a mean.

    Raises
    ------
    Refused
        Saying what is wrong.
    """
    if asked is None:
        raise Refused("was not asked in this round, or has answered already")
    if reply.metadata.group_id != str(round_):
        raise Refused("answers another round")
    if reply.has_error():
        raise Refused(cause(reply))
    content = reply.content
    report = content.metric_records.get("report")
    if report is None:
        raise Refused("no report")
    faults = reasons(content.config_records.get("faults", ConfigRecord()))
    trained, evaluated = ids(report, "trained"), ids(report, "evaluated")
    if sorted([*trained, *faults]) != asked[0]:
        raise Refused(f"answers for clients {sorted([*trained, *faults])}"[:300])
    scored = set(evaluated)
    if evaluated != [k for k in asked[1] if k in scored]:
        raise Refused(f"evaluates clients {evaluated}"[:300])
    names = TRAINED if metrics is not None else set(TRAINED) - PRIVATE
    columns = {n: numbers(report, n, len(trained)) for n in names}
    if columns["samples"] != [roster.samples[k] for k in trained]:
        raise Changed("report: samples differ from the roll call")
    scores = {n: numbers(report, n, len(evaluated)) for n in EVALUATED}
    scores |= {n: numbers(report, n, len(evaluated)) for n in OPTIONAL if n in report}
    possible(scores)
    told = {n: numbers(report, f"metrics.{n}", len(trained)) for n in metrics or ()}
    busy = numbers(report, "busy", 1)[0]
    counts = [*columns["steps"], *columns["gradients"]]
    if busy < 0 or not all(1 <= n < 2**40 for n in counts):
        raise Refused("report: seconds, steps or gradients are impossible")
    lost = ids(report, "lost") if "lost" in report else []
    if not faults.keys() >= set(lost):
        raise Refused(f"report: clients {lost} lost what was not asked for"[:300])
    up: Vectors = {}
    if trained:
        if each:
            sizes = {n: size * len(trained) for n, size in sizes.items()}
        up = unpack(content.array_records.get("up", ArrayRecord()), sizes, dtype)
        limit(up)
    return Accepted(
        reply.metadata.src_node_id,
        up,
        trained,
        evaluated,
        columns,
        scores,
        told,
        faults,
        lost,
        busy,
        "vmap" if report.get("engine") == 1 else "loop",
    )


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


def add_bytes(total: dict[str, int], part: Mapping[str, int]) -> None:
    """Add bytes by kind."""
    for name, value in part.items():
        total[name] = total.get(name, 0) + value


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
