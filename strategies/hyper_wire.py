"""What an exchange of an estimate brings, checked on arrival, and what is told of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from torch import Tensor

from strategies.wire import (
    Refused,
    add_bytes,
    cause,
    ids,
    limit,
    measured,
    numbers,
    reasons,
    unpack,
    weigh,
)

#: What clients measure with their own models and hyper-parameters: the outer cost, then loss and
#: accuracy on the samples that choose the best step, and on those that are told.
SCORES = (
    "outer_cost",
    "choosing_loss",
    "choosing_accuracy",
    "held_out",
    "loss",
    "accuracy",
)


@dataclass
class Told:
    """What an estimate, or a look at the clients, came to.

    Attributes
    ----------
    scores : dict of int to dict
        What each client measured before the step, whether or not it took it.
    moved : list of int
        Whose hyper-parameters took a step.
    failed : dict of int to str
        Whose did not, and why.
    lost : list of int
        Those of them whose memory is not there any more.
    largest : float or None
        The largest eigenvalue of the mean Hessian that a client found, if it was looked for.
    residual : float or None
        What conjugate gradients have left of g, relative to it.
    warnings : list of str
        What speaks against the settings.
    exchanges, messages : int
        How often nodes were asked, and messages to and from them.
    down, up : dict of str to int
        Bytes in these.
    link_messages, link_bytes : int
        What the network's links would carry.
    gradients : int
        Of all clients and learners; a product with second derivatives counts as two. Those of
        clients that have trained alone for their first estimate are among them.
    seconds : float
        Of it all.
    """

    scores: dict[int, dict[str, float]] = field(default_factory=dict)
    moved: list[int] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    lost: list[int] = field(default_factory=list)
    largest: float | None = None
    residual: float | None = None
    warnings: list[str] = field(default_factory=list)
    exchanges: int = 0
    messages: int = 0
    down: dict[str, int] = field(default_factory=dict)
    up: dict[str, int] = field(default_factory=dict)
    link_messages: int = 0
    link_bytes: int = 0
    gradients: int = 0
    seconds: float = 0.0

    def accept(
        self,
        reply: Message,
        name: str,
        mine: list[int] | None,
        size: int,
        dtype: torch.dtype,
        each: bool,
    ) -> tuple[list[int], Tensor | None]:
        """Return whom a reply covers and the vector that it brings, and take in what it tells.

        Parameters
        ----------
        reply : Message
            What arrived.
        name : str
            The exchange that it should answer: ``ROUND.WHAT.STEP``.
        mine : list of int or None
            The clients that its node was asked for.
        size : int
            d.
        dtype : torch.dtype
            Of the vector.
        each : bool
            Whether it has a row for each client, not their sum.

        Raises
        ------
        Refused
            Saying what is wrong.
        """
        if mine is None:
            raise Refused("was not asked, or has answered already")
        if reply.metadata.group_id != name:
            raise Refused("answers something else")
        if reply.has_error():
            raise Refused(cause(reply))
        content, what = reply.content, name.split(".")[1]
        report = content.metric_records.get("report")
        if report is None:
            raise Refused("no report")
        faults = reasons(content.config_records.get("faults", ConfigRecord()))
        told, lost, scored = (ids(report, n) for n in ("clients", "lost", "scored"))
        whole = faults.keys() >= set(lost) and set(mine) >= set(scored)
        if sorted([*told, *faults]) != mine or not whole:
            raise Refused(f"answers for clients {sorted([*told, *faults])}"[:300])
        rows: Iterator[tuple[float, ...]] = iter(())
        if what in ("look", "start"):
            rows = zip(*measured(report, SCORES, len(scored)).values(), strict=True)
        alone = numbers(report, "alone", len(told)) if "alone" in report else []
        if not all(0 <= n < 2**40 for n in alone):
            raise Refused("report: alone is impossible")
        up = None
        if what in ("start", "push", "curvature") and told:
            length = size * (len(told) if each else 1)
            record = content.array_records.get("up", ArrayRecord())
            vectors = unpack(record, {"u": length}, dtype)
            limit(vectors)
            up = vectors["u"]
        self.gradients += int(sum(alone))
        self.failed |= faults
        self.lost += lost
        for k, row in zip(scored, rows, strict=False):
            self.scores[k] = dict(zip(SCORES, row, strict=True))
        add_bytes(self.up, weigh(content))
        return told, up
