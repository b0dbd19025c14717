"""Exchanges: a sum over clients as a torch operation with both of its derivatives.

A sum is one question to each node and one answer. Its reverse derivative is one more exchange, with
the cotangent; its forward derivative travels in the same one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from strategies.fad_client import Answer, Plan, Question
from strategies.fad_ledger import Ledger

ONCE = "federated derivatives are differentiable once"


class Dropped(RuntimeError):
    """Clients whose values are in a result did not answer for its derivative.

    Attributes
    ----------
    clients : tuple of int
        Who they are.
    """

    def __init__(self, clients: Iterable[int], why: str) -> None:
        self.clients = tuple(sorted(clients))
        shown = ", ".join(map(str, self.clients[:9])) + (
            f" and {len(self.clients) - 9} more" if len(self.clients) > 9 else ""
        )
        super().__init__(f"clients {shown}: {why}")


class Unlike(ValueError):
    """Nodes' values of different shapes, which are no sum: nobody knows whose are right."""


class Transport(Protocol):
    """How questions reach clients: over Flower's Grid, or in one process."""

    def clients(self) -> list[int]:
        """Return the clients that are there."""

    def ask(self, question: Question) -> list[tuple[int, Question, Answer]]:
        """Ask every node that hosts some of the clients.

        Returns
        -------
        list
            Node, what it was asked, and its answer; one that did not answer has no clients.
        """


@dataclass(frozen=True)
class Clients:
    """The clients of a federation, as a place where values can be.

    Attributes
    ----------
    transport : Transport
        How they are reached.
    cohort : tuple of int
        Who takes part; all that are there by default.
    ledger : Ledger
        What has been sent.
    """

    transport: Transport
    cohort: tuple[int, ...] = ()
    ledger: Ledger = field(default_factory=Ledger)

    def __post_init__(self) -> None:
        if not self.cohort:
            object.__setattr__(self, "cohort", tuple(self.transport.clients()))

    def only(self, cohort: Iterable[int]) -> Clients:
        """Return some of the clients, on the same ledger.

        Raises
        ------
        ValueError
            If it is nobody.
        """
        some = tuple(sorted(cohort))
        if not some:
            raise ValueError("only(): name at least one client")
        return replace(self, cohort=some)


@dataclass
class Exchange:
    """One sum over clients: who is in it, and what is asked of them.

    Attributes
    ----------
    plan : Plan
        What they evaluate.
    clients : Clients
        Who is asked.
    columns : tuple of int
        Leaves whose Jacobian comes with the values.
    present : tuple of int
        Who answered.
    jacobians : dict
        (output, leaf) -> (numel, *shape of the output).
    """

    plan: Plan
    clients: Clients
    columns: tuple[int, ...]
    present: tuple[int, ...] = ()
    jacobians: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _why: str = ""

    def values(
        self, leaves: Sequence[Tensor], tangents: dict[int, Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        """Return the sums and, with tangents, theirs after them."""
        columns = () if tangents else self.columns
        question = Question(
            self.plan, self.clients.cohort, tuple(leaves), tangents or {}, columns
        )
        sums, self.present = self._ask(question)
        if not self.present:
            raise Dropped(self.clients.cohort, f"nobody answered{self._why}")
        like = leaves[0] if leaves else None
        outputs = range(len(self.plan.outputs))
        self.jacobians = {
            (o, leaf): sums[f"j{o}.{leaf}"] for o in outputs for leaf in columns
        }
        names = [f"y{o}" for o in outputs]
        names += [f"t{o}" for o in outputs] if tangents else []
        return tuple(
            sums[n] if like is None else sums[n].to(like.device) for n in names
        )

    def pull(
        self, leaves: Sequence[Tensor], cotangents: dict[int, Tensor], wanted: list[int]
    ) -> dict[int, Tensor]:
        """Return what was pulled back to the wanted leaves."""
        found: dict[int, Tensor] = {}
        for leaf in set(wanted) & set(self.columns):
            parts = [
                (c.cpu() * self.jacobians[o, leaf]).flatten(1).sum(1)
                if c.ndim
                else c.cpu() * self.jacobians[o, leaf]
                for o, c in cotangents.items()
            ]
            found[leaf] = torch.stack(parts).sum(0).view_as(leaves[leaf])
        far = tuple(i for i in wanted if i not in found)
        if far:
            question = Question(
                self.plan,
                self.present,
                tuple(leaves),
                cotangents=cotangents,
                wanted=far,
            )
            sums, present = self._ask(question)
            if lost := set(self.present) - set(present):
                why = f"in the value, but not in its derivative{self._why}"
                raise Dropped(lost, why)
            found |= {i: sums[f"g{i}"] for i in far}
        return {i: g.to(leaves[i].device, leaves[i].dtype) for i, g in found.items()}

    def _ask(self, question: Question) -> tuple[dict[str, Tensor], tuple[int, ...]]:
        """Ask, enter it into the ledger, and add up the nodes' sums."""
        sums: dict[str, Tensor] = {}
        present: list[int] = []
        replies = self.clients.transport.ask(question)
        self.clients.ledger.enter(replies)
        whys = (f" ({w})" for _, _, reply in replies for w in reply.faults.values())
        self._why = next(whys, "")
        for _, _, reply in sorted(replies, key=lambda r: r[2].clients):
            present += reply.clients
            for name, value in reply.sums.items():
                if sums.get(name, value).shape != value.shape:
                    raise Unlike(f"{name}: nodes return different shapes")
                sums[name] = sums[name] + value if name in sums else value
        return sums, tuple(sorted(present))


def sums(
    plan: Plan, leaves: Sequence[Tensor], clients: Clients, columns: tuple[int, ...]
) -> tuple[tuple[Tensor, ...], int]:
    """Return a plan's sums over the clients, in one exchange, and how many clients are in them.

    Parameters
    ----------
    plan : Plan
        What is summed.
    leaves : sequence of Tensor
        The values that it starts from; they may carry tangents.
    clients : Clients
        Who is asked.
    columns : tuple of int
        Leaves whose Jacobian comes with the values.
    """
    exchange = Exchange(plan, clients, columns)
    duals = [forward_ad.unpack_dual(x) for x in leaves]  # type: ignore[no-untyped-call]
    moving = [i for i, d in enumerate(duals) if d.tangent is not None]
    if not moving:
        return _Sum.apply(exchange, *leaves), len(exchange.present)
    primals = [d.primal for d in duals]
    tangents = [duals[i].tangent for i in moving]
    found = _Push.apply(exchange, tuple(moving), False, *primals, *tangents)
    half = len(plan.outputs)
    made = tuple(
        forward_ad.make_dual(y, t)  # type: ignore[no-untyped-call]
        for y, t in zip(found[:half], found[half:], strict=True)
    )
    return made, len(exchange.present)


class _Sum(torch.autograd.Function):
    """The sums as functions of the broadcast values; going back is an exchange of its own."""

    @staticmethod
    def forward(exchange: Exchange, *leaves: Tensor) -> tuple[Tensor, ...]:
        return exchange.values(leaves)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.exchange, *leaves = inputs
        ctx.save_for_backward(*leaves)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        wanted = [i for i, need in enumerate(ctx.needs_input_grad[1:]) if need]
        given = {o: c for o, c in enumerate(cotangents) if c is not None}
        found: tuple[Tensor, ...] = ()
        if given and wanted:
            places = tuple(given), tuple(wanted)
            leaves = ctx.saved_tensors
            found = _Pull.apply(ctx.exchange, places, *leaves, *given.values())
        by_leaf = dict(zip(wanted, found, strict=False))
        return None, *(by_leaf.get(i) for i in range(len(ctx.saved_tensors)))


class _Pull(torch.autograd.Function):
    """The way back, as a function of its own, so that a second derivative is noticed."""

    @staticmethod
    def forward(exchange: Exchange, places: Any, *values: Tensor) -> Any:
        outputs, wanted = places
        count = exchange.plan.leaves
        given = dict(zip(outputs, values[count:], strict=True))
        found = exchange.pull(values[:count], given, list(wanted))
        return tuple(found[i] for i in wanted)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        raise NotImplementedError(ONCE)


class _Push(torch.autograd.Function):
    """The sums and their tangents in one exchange."""

    @staticmethod
    def forward(
        exchange: Exchange, moving: tuple[int, ...], many: bool, *values: Tensor
    ) -> tuple[Tensor, ...]:
        count = exchange.plan.leaves
        given = zip(moving, values[count:], strict=True)
        tangents = {i: t if many else t[None] for i, t in given}
        found = exchange.values(values[:count], tangents)
        half = len(exchange.plan.outputs)
        return found if many else (*found[:half], *(t[0] for t in found[half:]))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        raise NotImplementedError(ONCE)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        """Several directions at once, as `torch.func.jacfwd` has them: all in one exchange."""
        exchange, moving, many, *values = inputs
        count, dims = exchange.plan.leaves, in_dims[3:]
        if many or any(d is not None for d in dims[:count]):
            raise NotImplementedError("only tangents may be mapped by vmap")
        tangents = [
            t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
            for t, d in zip(values[count:], dims[count:], strict=True)
        ]
        found = _Push.apply(exchange, moving, True, *values[:count], *tangents)
        half = len(exchange.plan.outputs)
        return found, tuple(itertools.chain([None] * half, [0] * half))
