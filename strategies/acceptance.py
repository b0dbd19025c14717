"""What a node may answer.

A reply is accepted whole or refused whole, before anything of it is used. Clients that their own
node reports as failed are left out; a refused reply leaves out all that it should have covered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message

from strategies.algorithm import Vectors
from strategies.roster import Roster
from strategies.wire import (
    Refused,
    cause,
    ids,
    limit,
    measured,
    numbers,
    reasons,
    unpack,
)

#: What a node reports of each trained client, besides the optimizer's own metrics.
TRAINED = ("samples", "train_loss", "steps", "gradients", "seconds", "probe")
#: What nodes may keep to themselves.
PRIVATE = {"train_loss"}
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
    kinds = [*EVALUATED, *(n for n in OPTIONAL if n in report)]
    scores = measured(report, kinds, len(evaluated))
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
