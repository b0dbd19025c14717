"""What a SuperLink hands on: replies in another name, or that cannot be opened; roll calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import httpx
import pytest
from flwr.app import Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.superlink.grid.http_grid import HttpGrid

from app.config import load
from app.errors import UserError
from app.exchange import exchange
from app.joining import wait_for_clients
from app.local_grid import LocalGrid
from strategies import mail, roster
from strategies.roster import Roster
from strategies.wire import cause

Answer = Callable[[Message], Message]


class Link(HttpGrid):
    """A SuperLink with nodes that answer as they are told to; one that is None takes nothing."""

    def __init__(self, **nodes: Answer | None) -> None:
        LocalGrid({}, 0)  # gives this process what a message needs to know of its run
        self.nodes = {int(name.removeprefix("n")): how for name, how in nodes.items()}
        self.sent: dict[str, Message] = {}
        self.pulls: list[int] = []
        self.pushes = 0

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes."""
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take all but those to nodes that take nothing."""
        names: list[Any] = []
        for message in messages:
            node = message.metadata.dst_node_id
            self.pushes += 1
            name = None if self.nodes[node] is None else f"m{self.pushes}-{node}"
            message.metadata.__dict__["_message_id"] = name or ""
            names.append(name)
            if name:
                self.sent[name] = message
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Answer all that was taken, once."""
        names = list(message_ids)
        self.pulls.append(len(names))
        asked = [self.sent.pop(name) for name in names if name in self.sent]
        answers = [(self.nodes[m.metadata.dst_node_id], m) for m in asked]
        return [how(m) for how, m in answers if how]

    def close(self) -> None:
        """Nothing is open."""


def honest(message: Message) -> Message:
    return Message(RecordDict(), reply_to=message)


def as_node(node: int) -> Answer:
    """Return how a node answers that says that it is another one."""

    def how(message: Message) -> Message:
        reply = honest(message)
        reply.metadata.__dict__["_src_node_id"] = node
        return reply

    return how


def unopened(message: Message) -> Message:
    raise ValueError("no such object")


def gone(message: Message) -> Message:
    """Answer as the SuperLink does for a node that is gone: in its own name."""
    reply = Message(Error(ErrorCode.NODE_UNAVAILABLE, "gone"), reply_to=message)
    reply.metadata.__dict__["_src_node_id"] = 1
    return reply


def told(link: Link) -> dict[int, str]:
    """Return what comes of a round by node: the reason of an error, or nothing."""
    sent = [Message(RecordDict(), node, "train", group_id="3") for node in link.nodes]
    replies = exchange(link, sent, 0.3)
    assert {r.metadata.group_id for r in replies} == {"3"}
    return {r.metadata.src_node_id: cause(r) if r.has_error() else "" for r in replies}


def test_what_the_superlink_answers_for_a_node_is_entered_for_that_node() -> None:
    refused = "the SuperLink did not take the message"
    found = told(Link(n11=honest, n12=gone, n13=None))
    assert found == {11: "", 12: "gone", 13: refused}


def test_messages_too_large_for_the_superlink_are_told_as_that() -> None:
    link = Link(n11=honest, n12=honest)
    link.push_messages = lambda _: []  # type: ignore[method-assign]
    assert set(told(link).values()) == {"the SuperLink did not take the message"}


def test_a_node_that_answers_as_another_is_told_and_the_other_is_heard() -> None:
    found = told(Link(n11=as_node(12), n12=honest))
    assert found == {11: "answered in another node's name", 12: ""}


def test_a_reply_that_cannot_be_opened_costs_its_own_node_alone() -> None:
    found = told(Link(n11=unopened, n12=honest, n13=honest))
    assert found == {11: "a reply that cannot be opened (ValueError)", 12: "", 13: ""}


def test_a_superlink_that_is_gone_is_not_a_nodes_fault() -> None:
    def down(message: Message) -> Message:
        raise httpx.ConnectError("refused")

    with pytest.raises(httpx.ConnectError):
        told(Link(n11=down))


def test_many_nodes_are_looked_at_in_few_requests() -> None:
    link = Link(**{f"n{i}": honest for i in range(100, 300)})
    assert len(told(link)) == 200
    assert len(link.pulls) <= mail.LOOKS and max(link.pulls) == 7


def test_an_error_is_one_short_line() -> None:
    def long(message: Message) -> Message:
        reason = "round 3: node 12 accepted\n" * 99
        return Message(Error(ErrorCode.UNKNOWN, reason), reply_to=message)

    (line,) = told(Link(n11=long)).values()
    assert "\n" not in line and len(line) == 300


# The roll call.


def hosts(*clients: int, samples: float = 5) -> Answer:
    """Return how a node answers that hosts some clients."""

    def how(message: Message) -> Message:
        report = {"clients": list(clients), "samples": [samples for _ in clients]}
        return Message(RecordDict({"hosted": MetricRecord(report)}), reply_to=message)

    return how


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the time by which a roster goes."""
    now = [0.0]
    monkeypatch.setattr("strategies.roster.monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("samples", [0, -3, 1e300, float(roster.MOST) * 2])
def test_impossible_numbers_of_samples_are_refused(samples: float) -> None:
    link, found = Link(n11=hosts(0, samples=samples), n12=hosts(1)), Roster(2, 0, 0)
    found.call(link)
    assert found.hosts == {1: 12}
    assert "impossible clients or samples" in found.faults[11]


def test_a_refused_node_is_asked_again_after_a_while(clock: list[float]) -> None:
    link, found = Link(n11=hosts(7), n12=hosts(1)), Roster(2, 0, 0)
    found.call(link)
    assert link.pushes == 2 and 11 in found.faults
    link.nodes[11] = hosts(0)
    found.call(link)
    assert link.pushes == 2  # not at every call: each starts a process on the node
    clock[0] = roster.AGAIN
    found.call(link)
    assert found.hosts == {0: 11, 1: 12} and found.faults == {}


def test_a_node_that_died_over_its_roll_call_is_asked_again(clock: list[float]) -> None:
    link, found = Link(n11=hosts(0)), Roster(1, 0, 0)
    link.pull_messages, kept = lambda _: [], link.pull_messages  # type: ignore[method-assign]
    found.call(link)
    assert found.waiting
    link.pull_messages = kept  # type: ignore[method-assign]
    link.sent.clear()
    found.call(link)
    assert found.hosts == {}
    clock[0] = roster.AGAIN
    found.call(link)
    assert found.hosts == {0: 11} and not found.waiting


def test_a_second_claim_is_told_and_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    link, found = Link(n11=hosts(0), n12=hosts(0, 1, samples=9)), Roster(2, 0, 0)
    with caplog.at_level("WARNING", logger="flwr"):
        found.call(link)
        found.call(link)
    assert found.hosts == {0: 11, 1: 12} and found.samples == {0: 5, 1: 9}
    lines = [r.message for r in caplog.records if "claims client" in r.message]
    assert lines == ["node 12 claims client 0 of node 11"]


def test_a_node_with_other_data_is_asked_anew() -> None:
    link, found = Link(n11=hosts(0)), Roster(1, 0, 0)
    found.call(link)
    link.nodes[11] = hosts(0, samples=8)
    found.call(link)
    assert found.samples == {0: 5}
    found.forget(11)
    found.call(link)
    assert found.samples == {0: 8}


def test_one_bad_node_does_not_keep_the_others_from_running() -> None:
    config = load(["clients=2", "clients_per_round=1", "min_clients=1"])
    found, lines = Roster(2, 0, 0), list[str]()
    link = Link(n11=hosts(7), n12=hosts(1))
    wait_for_clients(link, found, config, lines.append)
    assert found.hosts == {1: 12}
    with pytest.raises(UserError, match="hosts impossible clients"):
        wait_for_clients(Link(n11=hosts(7)), Roster(2, 0, 0), config, lines.append)
    short = load(["clients=2", "clients_per_round=1", "join_timeout=0.2"])
    with pytest.raises(UserError, match=r"1 of 2 clients joined .*refused: hosts imp"):
        wait_for_clients(link, Roster(2, 0, 0), short, lines.append)
