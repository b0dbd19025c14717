"""Federated automatic differentiation, the clients' half: evaluate, push forward, pull back.

A message carries a plan (which registered functions to apply to what), the values that the server
broadcast and, for a derivative, tangents or cotangents. A client evaluates the plan on its own
data; what comes out is summed over the clients of its node before anything leaves. Nothing is kept
from one message to the next: a derivative is computed anew from the message, and what a function
draws has an address, so the second evaluation equals the first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from strategies.fad_site import FUNCTIONS, Site

#: A plan may not be longer; a message is not trusted.
LONGEST = 256
CALL = re.compile(r"([\w.-]{1,64})@(\d{1,9})((?: \d{1,4})*)")


class BadPlan(ValueError):
    """A plan that must not be evaluated; the text says why."""


@dataclass(frozen=True)
class Call:
    """One mapped function: its name, the round of its draws, and the values that it takes."""

    name: str
    round: int
    arguments: tuple[int, ...]

    def text(self) -> str:
        """Return it as it travels: ``NAME@ROUND ARGUMENT ...``."""
        return " ".join([f"{self.name}@{self.round}", *map(str, self.arguments)])


@dataclass(frozen=True)
class Plan:
    """What to evaluate: values 0 to leaves - 1 arrive, each call appends one.

    Attributes
    ----------
    leaves : int
        How many values arrive.
    calls : tuple of Call
        In order; arguments are places of earlier values.
    outputs : tuple of int
        The places of the values that are summed over clients.
    """

    leaves: int
    calls: tuple[Call, ...]
    outputs: tuple[int, ...]

    def __call__(self, site: Site, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Evaluate on one client's data."""
        values = list(leaves)
        for call in self.calls:
            at = replace(site, round=call.round)
            given = [values[i] for i in call.arguments]
            values.append(FUNCTIONS[call.name](at, *given))
        return tuple(values[i] for i in self.outputs)

    @classmethod
    def parse(cls, leaves: int, calls: Sequence[str], outputs: Sequence[int]) -> Plan:
        """Read a plan that arrived, or raise BadPlan."""
        if len(calls) > LONGEST or not 0 < len(outputs) <= LONGEST:
            raise BadPlan(f"a plan of {len(calls)} calls and {len(outputs)} outputs")
        read = []
        for place, text in enumerate(calls, leaves):
            found = CALL.fullmatch(text)
            if not found:
                raise BadPlan(f"cannot read {text[:80]!r}")
            arguments = tuple(int(a) for a in found[3].split())
            if found[1] not in FUNCTIONS:
                raise BadPlan(f"no function is registered as '{found[1]}'")
            if any(a >= place for a in arguments):
                raise BadPlan(f"{text[:80]!r} takes a value that is not there yet")
            read.append(Call(found[1], int(found[2]), arguments))
        if not all(0 <= o < leaves + len(read) for o in outputs):
            raise BadPlan("an output is no value of the plan")
        return cls(leaves, tuple(read), tuple(outputs))


@dataclass(frozen=True)
class Question:
    """What the server asks of some clients.

    Attributes
    ----------
    plan : Plan
        What to evaluate.
    clients : tuple of int
        On whom.
    leaves : tuple of Tensor
        The values that it broadcasts.
    tangents : mapping of int to Tensor
        By leaf, p directions (p, *shape) to push forward; the same p for all.
    columns : tuple of int
        Leaves whose whole Jacobian comes back: the directions are the unit vectors.
    cotangents : mapping of int to Tensor
        By output, what to pull back. If there are any, no values are returned.
    wanted : tuple of int
        The leaves to pull back to.
    """

    plan: Plan
    clients: tuple[int, ...]
    leaves: tuple[Tensor, ...]
    tangents: Mapping[int, Tensor] = field(default_factory=dict)
    columns: tuple[int, ...] = ()
    cotangents: Mapping[int, Tensor] = field(default_factory=dict)
    wanted: tuple[int, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What the clients of a node return together.

    Attributes
    ----------
    clients : tuple of int
        Who is in the sums.
    faults : dict of int to str
        Who is not, and why.
    sums : dict of str to Tensor
        ``y0`` the sum of output 0; ``t0`` (p, *shape) its tangents; ``j0.2`` its Jacobian
        columns (numel, *shape) of leaf 2; ``g2`` what was pulled back to leaf 2.
    """

    clients: tuple[int, ...]
    faults: dict[int, str]
    sums: dict[str, Tensor]


def answer(question: Question, site_of: Callable[[int], Site]) -> Answer:
    """Evaluate a question on the clients of a node, and sum over them.

    A client that fails, or whose numbers are not finite, is named and left out of the sums.
    """
    sums: dict[str, Tensor] = {}
    done: list[int] = []
    faults: dict[int, str] = {}
    dtypes: dict[str, torch.dtype] = {}
    for k in question.clients:
        try:
            found = _one(question, site_of(k))
            for name, value in found.items():
                if not bool(torch.isfinite(value).all()):
                    raise ArithmeticError(f"{name} is not finite")
                if name in sums and sums[name].shape != value.shape:
                    raise ValueError(f"{name} differs in shape from the other clients'")
        except Exception as error:
            faults[k] = f"{type(error).__name__}: {error}"[:300]
            continue
        for name, value in found.items():
            dtypes[name] = value.dtype
            term = value.detach().to("cpu", torch.float64)
            sums[name] = sums[name] + term if name in sums else term
        done.append(k)
    return Answer(tuple(done), faults, {n: s.to(dtypes[n]) for n, s in sums.items()})


def _one(question: Question, site: Site) -> dict[str, Tensor]:
    """Return one client's part of every sum."""
    device = site.x.device
    leaves = [v.to(device) for v in question.leaves]
    if question.cotangents:
        return _pull(question, site, leaves)
    with torch.no_grad():
        found = {f"y{i}": y for i, y in enumerate(question.plan(site, leaves))}
    if question.tangents:
        tangents = {i: t.to(device) for i, t in question.tangents.items()}
        pushed = _push(question.plan, site, leaves, tangents)
        found |= {f"t{i}": t for i, t in enumerate(pushed)}
    for leaf in question.columns:
        value = leaves[leaf]
        unit = torch.eye(value.numel(), dtype=value.dtype, device=device)
        basis = {leaf: unit.view(value.numel(), *value.shape)}
        pushed = _push(question.plan, site, leaves, basis)
        found |= {f"j{i}.{leaf}": t for i, t in enumerate(pushed)}
    return found


def _push(
    plan: Plan, site: Site, leaves: list[Tensor], tangents: Mapping[int, Tensor]
) -> list[Tensor]:
    """Push p directions through a plan: for each output (p, *shape)."""
    places = sorted(tangents)

    def run(*moving: Tensor) -> tuple[Tensor, ...]:
        values = list(leaves)
        for place, value in zip(places, moving, strict=True):
            values[place] = value
        return plan(site, values)

    primals = tuple(leaves[i] for i in places)
    rows = [
        torch.func.jvp(run, primals, tuple(tangents[i][j] for i in places))[1]
        for j in range(len(tangents[places[0]]))
    ]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def _pull(question: Question, site: Site, leaves: list[Tensor]) -> dict[str, Tensor]:
    """Pull the cotangents back to the wanted leaves."""
    wanted = [leaves[i].detach().clone().requires_grad_() for i in question.wanted]
    for place, leaf in zip(question.wanted, wanted, strict=True):
        leaves[place] = leaf
    with torch.enable_grad():
        outputs: Any = question.plan(site, leaves)
    pairs = [
        (outputs[o], c.to(outputs[o].device))
        for o, c in question.cotangents.items()
        if outputs[o].requires_grad
    ]
    ends, seeds = [y for y, _ in pairs], [c for _, c in pairs]
    found: Sequence[Tensor | None] = [None] * len(wanted)
    if pairs:
        found = torch.autograd.grad(ends, wanted, seeds, allow_unused=True)
    return {
        f"g{place}": torch.zeros_like(leaf) if g is None else g
        for place, leaf, g in zip(question.wanted, wanted, found, strict=True)
    }
