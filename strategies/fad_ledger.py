"""The ledger of a differentiated program: every message, what it carried, and whether it may.

Only two kinds of values ever cross the boundary, in a program and in its derivative: what the
server broadcasts, and sums over clients.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from strategies.fad_client import Answer, Question


@dataclass(frozen=True)
class Entry:
    """One kind of content of one message.

    Attributes
    ----------
    round : int
        The exchange that it belongs to, from 1.
    node : int
        The node at the other end.
    direction : str
        ``down`` to the node or ``up`` to the server.
    kind : str
        ``broadcast`` or ``sum``.
    role : str
        ``value``, ``tangent`` or ``cotangent``.
    derivative : bool
        Whether the exchange took place only for a derivative.
    bytes : int
        Of its numbers.
    clients : int
        How many clients it is meant for, or is the sum of.
    shapes : frozenset of tuple of int
        Of its tensors; of one direction, if it holds tangents.
    """

    round: int
    node: int
    direction: str
    kind: str
    role: str
    derivative: bool
    bytes: int
    clients: int
    shapes: frozenset[tuple[int, ...]]


@dataclass(frozen=True)
class Audit:
    """What a ledger says about a program and its derivative.

    Attributes
    ----------
    program, derivative : frozenset of str
        Kinds of values that crossed the boundary.
    foreign : frozenset of tuple of int
        Shapes that only the derivative's values have.
    rounds : int
        Exchanges of the program itself.
    derivative_rounds : int
        Exchanges that only its derivative needed.
    down, up : int
        Messages in each direction.
    bytes_down, bytes_up : int
        Bytes of the numbers in them.
    alone : int
        Messages up that hold the value of one client instead of a sum over several: nodes with
        one member of the cohort.
    """

    program: frozenset[str]
    derivative: frozenset[str]
    foreign: frozenset[tuple[int, ...]]
    rounds: int
    derivative_rounds: int
    down: int
    up: int
    bytes_down: int
    bytes_up: int
    alone: int

    @property
    def closed(self) -> bool:
        """Whether the derivative moved only what the program moves, in kind and in shape."""
        return self.derivative <= self.program and not self.foreign


@dataclass
class Ledger:
    """The messages of a program, in the order in which they were sent.

    Attributes
    ----------
    entries : list of Entry
        One for each kind of content.
    """

    entries: list[Entry] = field(default_factory=list)
    _round: int = 0

    def enter(self, replies: Sequence[tuple[int, Question, Answer]]) -> None:
        """Enter one exchange with the nodes."""
        self._round += 1
        for node, question, answer in replies:
            back = bool(question.cotangents)
            for role, tensors in _down(question):
                self._add(
                    node,
                    "down",
                    "broadcast",
                    role,
                    back,
                    tensors,
                    len(question.clients),
                )
            for role, tensors in _up(answer):
                self._add(node, "up", "sum", role, back, tensors, len(answer.clients))

    def _add(
        self,
        node: int,
        direction: str,
        kind: str,
        role: str,
        derivative: bool,
        tensors: Iterable[Tensor],
        clients: int,
    ) -> None:
        size, shapes = 0, set()
        for t in tensors:
            size += t.numel() * t.element_size()
            shapes.add(tuple(t.shape[1:] if role == "tangent" else t.shape))
        told = self._round, node, direction, kind, role, derivative, size, clients
        self.entries.append(Entry(*told, frozenset(shapes)))

    def audit(self) -> Audit:
        """Return what crossed the boundary."""
        own = [e for e in self.entries if e.role == "value" and not e.derivative]
        other = [e for e in self.entries if e.role != "value" or e.derivative]

        def kinds(entries: list[Entry]) -> frozenset[str]:
            return frozenset(e.kind for e in entries if e.shapes)

        def shapes(entries: list[Entry]) -> set[tuple[int, ...]]:
            return {s for e in entries for s in e.shapes}

        def messages(direction: str) -> set[tuple[int, int]]:
            return {(e.round, e.node) for e in self.entries if e.direction == direction}

        def total(direction: str) -> int:
            return sum(e.bytes for e in self.entries if e.direction == direction)

        back = {e.round for e in self.entries if e.derivative}
        up = {(e.round, e.node): e.clients for e in self.entries if e.direction == "up"}
        return Audit(
            kinds(own),
            kinds(other),
            frozenset(shapes(other) - shapes(own)),
            self._round - len(back),
            len(back),
            len(messages("down")),
            len(messages("up")),
            total("down"),
            total("up"),
            sum(clients == 1 for clients in up.values()),
        )


def _down(question: Question) -> Iterator[tuple[str, Iterable[Tensor]]]:
    """Yield what a question carries, by role; it is a message even without numbers."""
    yield "value", question.leaves
    if question.tangents:
        yield "tangent", question.tangents.values()
    if question.cotangents:
        yield "cotangent", question.cotangents.values()


def _up(answer: Answer) -> Iterator[tuple[str, Iterable[Tensor]]]:
    """Yield what an answer carries, by role; it is a message even without numbers.

    Of one that was refused the numbers are not known.
    """
    roles = {"y": "value", "t": "tangent", "j": "tangent", "g": "cotangent"}
    for first, role in roles.items():
        tensors = [s for n, s in answer.sums.items() if n.startswith(first)]
        if tensors:
            yield role, tensors
    if not answer.sums and (answer.clients or answer.faults):
        yield "value", ()
