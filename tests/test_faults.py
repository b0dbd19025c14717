"""Replies that are late, lost or wrong: named, counted, left out, and the round goes on."""

from __future__ import annotations

import csv
import io
import json
import math
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Result
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.common.constant import ErrorCode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import app.node
import app.store
import strategies.wire
from app.errors import UserError
from app.local_grid import LocalGrid
from app.run import Run
from app.run_config import to_run_config
from app.store import ContextStore, DirectoryStore, Store
from strategies.algorithm import Algorithm
from strategies.fedavg import FedAvg
from strategies.feddyn import FedDyn
from strategies.federation import Federation
from strategies.roster import ROLL_CALL
from strategies.scaffold import Scaffold

Door = Callable[..., Result]
Tamper = Callable[[Message, Message], Iterable[Message]]
#: A node for each of six clients, all of them in every round.
EACH = ("nodes=6", "clients_per_round=6", "rounds=4")


class Tampered(LocalGrid):
    """A grid on whose way back replies may be changed.

    Parameters
    ----------
    overrides : sequence of str
        The run's settings.
    tamper : callable
        Of a message and its reply: the replies that arrive instead.
    when : collection of tuple
        The pairs (round, client) of which it gets the replies.
    nodes : int
        How many nodes there are.
    """

    def __init__(
        self,
        overrides: Sequence[str],
        tamper: Tamper,
        when: Iterable[tuple[int, int]],
        nodes: int = 6,
    ) -> None:
        super().__init__(to_run_config(overrides), nodes)
        self.tamper = tamper
        self.when = set(when)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send all, and change some of what comes back."""
        sent = {m.metadata.dst_node_id: m for m in messages}
        replies = super().send_and_receive(sent.values(), timeout=timeout)
        arrived: list[Message] = []
        for reply in replies:
            message = sent[reply.metadata.src_node_id]
            records = message.content.config_records
            nobody = ConfigRecord({"round": 0, "train": []})
            order = records.get("order", nobody)
            hit = any((order["round"], k) in self.when for k in order["train"])
            arrived += self.tamper(message, reply) if hit else [reply]
        return arrived


def up(reply: Message) -> ArrayRecord:
    """Return what the reply's node sends up."""
    return reply.content.array_records["up"]


def report(reply: Message) -> MetricRecord:
    """Return the reply's report."""
    return reply.content.metric_records["report"]


def raw(array: np.ndarray, **header: Any) -> Array:
    """Return an array of which the header may lie."""
    stream = io.BytesIO()
    told = np.lib.format.header_data_from_array_1_0(array) | header
    np.lib.format.write_array_header_1_0(stream, told)
    data = stream.getvalue() + array.tobytes()
    return Array(str(array.dtype), array.shape, "numpy.ndarray", data)


def with_delta(change: Callable[[np.ndarray], Array]) -> Tamper:
    """Return what changes the delta of a reply."""

    def tamper(message: Message, reply: Message) -> list[Message]:
        up(reply)["delta"] = change(up(reply)["delta"].numpy())
        return [reply]

    return tamper


def with_value(value: float, dtype: str = "float32") -> Tamper:
    """Return what writes one number into the delta."""

    def change(delta: np.ndarray) -> Array:
        delta = delta.astype(dtype)
        delta[3] = value
        return Array(delta)

    return with_delta(change)


def with_report(**fields: Any) -> Tamper:
    """Return what replaces fields of the report; None removes one."""

    def tamper(message: Message, reply: Message) -> list[Message]:
        for name, value in fields.items():
            del report(reply)[name]
            if value is not None:
                report(reply)[name] = value
        return [reply]

    return tamper


def with_bytes(change: Callable[[bytes], bytes]) -> Tamper:
    """Return what changes the serialized delta."""

    def altered(delta: np.ndarray) -> Array:
        array = Array(delta)
        array.data = change(array.data)
        return array

    return with_delta(altered)


def edit(change: Callable[[Message], object]) -> Tamper:
    """Return what does something to a reply."""

    def tamper(message: Message, reply: Message) -> list[Message]:
        change(reply)
        return [reply]

    return tamper


def renamed(reply: Message) -> None:
    """Send the delta under another name."""
    up(reply)["theta"] = up(reply).pop("delta")


def error_reply(message: Message, reply: Message) -> list[Message]:
    """Send an error instead."""
    return [Message(Error(code=2, reason="out of memory"), reply_to=message)]


FAULTS: dict[str, tuple[Tamper, str]] = {
    "NaN in the update": (with_value(math.nan), "NaN or infinity"),
    "infinity in the update": (with_value(-math.inf), "NaN or infinity"),
    "too large for the model's dtype": (with_value(1e300, "float64"), "infinity"),
    "finite, but no sum with it is": (
        with_delta(lambda d: Array(np.full_like(d, 3e38))),
        r"delta has numbers up to 3.0e\+38: sums with them would overflow",
    ),
    "one huge number": (with_value(-2e19), "would overflow"),
    "wrong shape": (with_delta(lambda d: Array(d[:-1])), "shape"),
    "a matrix": (with_delta(lambda d: Array(d.reshape(2, -1))), "shape"),
    "integers": (with_delta(lambda d: Array(d.astype("int32"))), "dtype"),
    "half precision": (with_delta(lambda d: Array(d.astype("float16"))), "dtype"),
    "other byte order": (with_delta(lambda d: raw(d.astype(">f4"))), "dtype"),
    "wrong key": (edit(renamed), r"missing \['delta'\], not expected \['theta'\]"),
    "missing key": (edit(lambda r: up(r).pop("delta")), r"missing \['delta'\]"),
    "extra key": (
        edit(lambda r: up(r).update(more=Array(np.zeros(3, np.float32)))),
        r"not expected \['more'\]",
    ),
    "no arrays": (edit(lambda r: r.content.pop("up")), "missing"),
    "truncated array": (with_bytes(lambda b: b[:-5]), "bytes"),
    "truncated header": (with_bytes(lambda b: b[:20]), "not a numpy array"),
    "no bytes": (with_bytes(lambda b: b""), "not a numpy array"),
    "noise": (with_bytes(lambda b: bytes(range(256)) * 4), "not a numpy array"),
    "trailing bytes": (with_bytes(lambda b: b + b"more"), "bytes"),
    "a flood of bytes": (with_bytes(lambda b: b * 50), "too many"),
    "pickled objects": (
        with_delta(lambda d: raw(np.zeros(0, np.float32), descr="|O", shape=d.shape)),
        "dtype object",
    ),
    "a pickle": (with_bytes(lambda b: pickle.dumps({"a": 1})), "not a numpy array"),
    "a huge claimed header": (
        with_delta(lambda d: raw(d, shape=(10**12,))),
        "shape",
    ),
    "no report": (edit(lambda r: r.content.pop("report")), "no report"),
    "wrong client": (with_report(trained=[4]), "answers for clients"),
    "no client": (with_report(trained=[]), "answers for clients"),
    "client twice": (with_report(trained=[2, 2]), "answers for clients"),
    "client as a float": (with_report(trained=[2.0]), "trained"),
    "clients missing": (with_report(trained=None), "trained"),
    "other samples": (with_report(samples=[10**6]), "samples differ"),
    "samples missing": (with_report(samples=None), "samples"),
    "loss is NaN": (with_report(train_loss=[math.nan]), "train_loss"),
    "two losses": (with_report(train_loss=[1.0, 2.0]), "train_loss"),
    "a loss that is no list": (with_report(train_loss=1.0), "train_loss"),
    "an accuracy of five": (with_report(eval_accuracy=[5.0]), "accuracy is impossible"),
    "a loss beyond means": (with_report(eval_loss=[-1e31]), "eval_loss is impossible"),
    "probe is NaN": (with_report(probe=[math.nan]), "probe"),
    "seconds are infinite": (with_report(seconds=[math.inf]), "seconds"),
    "busy for NaN seconds": (with_report(busy=[math.nan]), "busy"),
    "busy missing": (with_report(busy=None), "busy"),
    "steps beyond counting": (with_report(steps=[1e300]), "steps"),
    "gradients missing": (with_report(gradients=None), "gradients"),
    "no gradients": (with_report(gradients=[0]), "gradients"),
    "evaluates another's client": (with_report(evaluated=[3]), "evaluate"),
    "evaluates twice": (
        with_report(evaluated=[2, 2], eval_loss=[1.0, 1.0], eval_samples=[1, 1]),
        "evaluate",
    ),
    "faults of another": (
        edit(lambda r: r.content.__setitem__("faults", ConfigRecord({"3": "no"}))),
        "answers for clients",
    ),
    "faults under strange digits": (
        edit(lambda r: r.content.__setitem__("faults", ConfigRecord({"\u00b2": "no"}))),
        "faults",
    ),
    "an error": (error_reply, "out of"),
    "nothing": (lambda message, reply: [], "no reply before the deadline"),
}


#: The run in which client 2's reply of round 2 never arrives, once it has been made.
LOST: list[Result] = []


@pytest.fixture
def lost(run: Door) -> Result:
    """Give that run: all that is looked at is in memory."""
    if not LOST:
        LOST.append(run(*EACH, grid=lambda o: Tampered(o, lambda *_: [], [(2, 2)])))
    return LOST[0]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_counted_and_left_out(
    run: Door, lost: Result, name: str
) -> None:
    tamper, why = FAULTS[name]
    result = run(*EACH, grid=lambda o: Tampered(o, tamper, [(2, 2)]))
    failed = [r["clients"]["failed"] for r in result.records[1:]]
    assert [list(f) for f in failed] == [[], ["2"], [], []]
    assert re.search(why, failed[1]["2"]), failed[1]["2"]
    assert "\n" not in failed[1]["2"]
    assert [r["clients"]["cohort"] for r in result.records[1:]] == [
        [0, 1, 2, 3, 4, 5],
        [0, 1, 3, 4, 5],
        [0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4, 5],
    ]
    assert result.summary["failures"] == 1 and result.summary["status"] == "finished"
    told = [line for line in result.lines if re.search(r"clients 2\b", line)]
    assert len(told) == 1 and told[0].startswith("round 2/4")
    # It costs what a lost reply costs, and nothing else.
    assert torch.equal(result.theta, lost.theta)
    assert result.records[2]["gradients"] == lost.records[2]["gradients"]
    assert all(r["checks"]["memory_gap"] < 1e-5 for r in result.records[1:])
    with open(result.path / "clients.csv", newline="") as file:
        rows = [
            r for r in csv.DictReader(file) if (r["round"], r["client"]) == ("2", "2")
        ]
    assert not any(row["train_loss"] or row["steps"] for row in rows)


def test_absurd_but_finite_seconds_do_no_harm(run: Door) -> None:
    tamper = with_report(seconds=[-1e300], busy=[1e300])
    result = run(*EACH, grid=lambda o: Tampered(o, tamper, [(2, 2)]))
    assert result.summary["failures"] == 0
    told = result.records[2]["seconds"]
    assert 0 <= told["client"] <= told["round"] < 60
    assert torch.equal(result.theta, run(*EACH).theta)


def test_a_reply_that_comes_twice_counts_once(run: Door) -> None:
    result = run(*EACH, grid=lambda o: Tampered(o, lambda m, r: [r, r], [(2, 2)]))
    assert result.summary["failures"] == 0
    assert torch.equal(result.theta, run(*EACH).theta)
    assert result.records[2]["clients"]["cohort"] == [0, 1, 2, 3, 4, 5]


def test_a_node_that_was_not_asked_is_not_heard(run: Door) -> None:
    def stranger(message: Message, reply: Message) -> list[Message]:
        reply.metadata.__dict__["_src_node_id"] = 77
        return [reply]

    result = run(*EACH, grid=lambda o: Tampered(o, stranger, [(2, 2)]))
    assert list(result.records[2]["clients"]["failed"]) == ["2"]
    lost = run(*EACH, grid=lambda o: Tampered(o, lambda *_: [], [(2, 2)]))
    assert torch.equal(result.theta, lost.theta)


def test_a_reply_of_an_earlier_round_is_not_taken(run: Door) -> None:
    kept: list[Message] = []

    def late(message: Message, reply: Message) -> list[Message]:
        kept.append(reply)
        return kept[:-1]

    when = [(2, 2), (3, 2)]
    result = run(*EACH, grid=lambda o: Tampered(o, late, when))
    lost = run(*EACH, grid=lambda o: Tampered(o, lambda *_: [], when))
    assert list(result.records[3]["clients"]["failed"]) == ["2"]
    assert torch.equal(result.theta, lost.theta)


EVERY = [(t, k) for t in range(1, 5) for k in range(6)]


@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        *((s, "nothing") for s in ("fedavg", "feddyn", "scaffold", "fedprox")),
        *(("feddyn", n) for n in ("NaN in the update", "an error", "no report")),
    ],
)
def test_with_no_usable_reply_the_model_stays(
    run: Door, strategy: str, name: str
) -> None:
    tamper = FAULTS[name][0]
    given = (*EACH, f"strategy={strategy}")
    result = run(*given, grid=lambda o: Tampered(o, tamper, EVERY))
    assert torch.equal(result.theta, run(*given, "rounds=0").theta)
    assert result.summary["status"] == "finished" and result.summary["failures"] == 24
    assert [len(r["clients"]["failed"]) for r in result.records[1:]] == [6] * 4
    assert result.path.joinpath("summary.json").exists()


def test_an_update_that_overflows_the_model_is_undone(
    run: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the bound on replies there is a second look, at the model itself."""
    monkeypatch.setattr(strategies.wire, "largest", lambda dtype: math.inf)
    huge = with_delta(lambda d: Array(np.full_like(d, 3e38)))
    when = [(2, k) for k in range(6)]
    result = run(*EACH, grid=lambda o: Tampered(o, huge, when))
    assert bool(torch.isfinite(result.theta).all())
    why = result.records[2]["clients"]["failed"]
    assert list(why.values()) == ["the server's step is not finite"] * 6
    none = run(*EACH, grid=lambda o: Tampered(o, lambda *_: [], when))
    assert torch.equal(result.theta, none.theta)


def test_a_round_ends_at_its_deadline(run: Door) -> None:
    result = run("nodes=2", "processes=2", "deadline=0.000001", "rounds=2")
    for record in result.records[1:]:
        assert record["clients"]["cohort"] == []
        assert set(record["clients"]["failed"].values()) == {
            "no reply before the deadline"
        }
    assert torch.equal(result.theta, run("rounds=0").theta)


# A node that is gone: the SuperLink answers for it.


class Away(LocalGrid):
    """A grid whose SuperLink says of every first roll call that the node is gone."""

    def __init__(self, overrides: Sequence[str], code: int) -> None:
        super().__init__(to_run_config(overrides), 2)
        self.code, self.calls = code, 0

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand them over; a node that is gone answers nothing itself."""
        sent = list(messages)
        names = list(super().push_messages(sent))
        for name, message in zip(names, sent, strict=True):
            if message.metadata.message_type == ROLL_CALL:
                self.calls += 1
                if self.calls <= 2:
                    error = Error(code=self.code, reason="the node is gone")
                    self._replies[name] = Message(error, reply_to=message)
        return names


def test_a_node_that_goes_before_it_answers_is_asked_again(run: Door) -> None:
    result = run(grid=lambda o: Away(o, ErrorCode.NODE_UNAVAILABLE))
    assert torch.equal(result.theta, run().theta)
    with pytest.raises(UserError, match="the node is gone"):
        run(grid=lambda o: Away(o, ErrorCode.CLIENT_APP_RAISED_EXCEPTION))


# A client that fails on its node.


def broken(
    monkeypatch: pytest.MonkeyPatch,
    when: set[tuple[int, int]],
    how: str,
    once: bool = True,
) -> None:
    """Let clients fail when they are told to begin from a version of their memory."""
    left = set(when)

    def recall(*args: Any) -> Any:
        _, client, version, _ = args
        memory = app.store.recall(*args)
        if (client, version) not in left:
            return memory
        if once:
            left.discard((client, version))
        if how == "raises":
            raise RuntimeError("no more\nmemory")
        value = 1e21 if how == "grows" else math.nan
        return {n: torch.full_like(v, value) for n, v in memory.items()}

    monkeypatch.setattr(app.node, "recall", recall)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("raises", "RuntimeError: no more"),
        ("diverges", "not finite"),
        ("grows", "delta is not below"),
    ],
)
def test_a_client_that_fails_does_not_cost_its_node(
    run: Door, monkeypatch: pytest.MonkeyPatch, how: str, why: str
) -> None:
    # One step: a second one would not be finite.
    given = ("nodes=2", "clients_per_round=6", f"local.steps={int(how == 'grows')}")
    broken(monkeypatch, {(2, 1), (5, 1)}, how)
    result = run(*given)
    failed = result.records[2]["clients"]["failed"]
    assert sorted(failed) == ["2", "5"]
    assert all(why in text and "\n" not in text for text in failed.values())
    assert result.records[2]["clients"]["cohort"] == [0, 1, 3, 4]
    assert [len(r["clients"]["failed"]) for r in result.records[1:]] == [0, 2, 0]


def test_clients_that_fail_cost_what_lost_ones_cost(
    run: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = run(*EACH, grid=lambda o: Tampered(o, lambda *_: [], [(2, 2), (3, 4)]))
    broken(monkeypatch, {(2, 1), (4, 2)}, "raises")
    whole = run(*EACH, "nodes=2")
    torch.testing.assert_close(whole.theta, lost.theta, rtol=1e-4, atol=1e-6)
    assert [r["clients"]["cohort"] for r in whole.records[1:]] == [
        r["clients"]["cohort"] for r in lost.records[1:]
    ]


def test_all_clients_fail(run: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, {(k, 0) for k in range(6)}, "raises", once=False)
    result = run("nodes=2")
    assert torch.equal(result.theta, run("rounds=0").theta)
    assert result.summary["failures"] == 9


# What clients remember stays what the server accounts for.


@pytest.mark.parametrize("memory", ["context", "directory"])
@pytest.mark.parametrize(
    ("given", "mirror"),
    [
        (("strategy=feddyn",), ("gradient", "h")),
        (("strategy=feddyn", "strategy.weighting=samples"), ("gradient", "h")),
        (("strategy=scaffold",), ("control", "control")),
    ],
    ids=["feddyn", "feddyn-samples", "scaffold"],
)
def test_the_servers_vector_is_the_mean_of_the_clients_memories(
    run: Door, given: tuple[str, ...], mirror: tuple[str, str], memory: str
) -> None:
    tasks: list[Run] = []
    grids: list[Tampered] = []
    # Lost once, lost and refused in a row, lost in its first round, and the last round's loss.
    when = [(2, 2), (3, 3), (4, 3), (5, 3), (1, 0), (2, 0), (9, 1)]
    turn = iter(range(99))

    def tamper(message: Message, reply: Message) -> Iterable[Message]:
        how = (FAULTS["nothing"], FAULTS["NaN in the update"], FAULTS["busy missing"])
        return how[next(turn) % 3][0](message, reply)

    def make(overrides: Sequence[str]) -> LocalGrid:
        grids.append(Tampered(overrides, tamper, when))
        return grids[-1]

    result = run(
        *EACH,
        *given,
        "rounds=9",
        "dtype=float64",
        "partition=dirichlet",
        f"client_memory={memory}",
        grid=make,
        edit=tasks.append,
    )
    assert result.summary["failures"] == len(when)
    federation = tasks[0].federation
    total: torch.Tensor | float = 0.0
    fresh = federation.algorithm.fresh(federation.server["theta"])
    for k, context in enumerate(grids[0]._contexts.values()):
        store: Store = ContextStore(context.state)
        if memory == "directory":
            store = DirectoryStore(result.path / "clients")
        version = federation.ledger[k]
        assert version == (8 if k == 1 else 9)
        total = total + store.load(k, version, fresh)[mirror[0]]
    vector = federation.server[mirror[1]]
    assert float(vector.norm()) > 1e-3
    torch.testing.assert_close(vector, total / 6, rtol=1e-9, atol=1e-12)
    assert all(
        r["checks"]["memory_gap"] < 1e-9 for r in result.records[1:] if r["checks"]
    )


@pytest.mark.parametrize("memory", ["context", "directory"])
def test_the_memory_of_a_refused_reply_is_dropped_the_next_time(
    run: Door, memory: str
) -> None:
    seen: list[tuple[int, ...]] = []
    grids: list[Tampered] = []
    tasks: list[Run] = []

    def make(overrides: Sequence[str]) -> LocalGrid:
        grids.append(Tampered(overrides, FAULTS["wrong shape"][0], [(2, 2), (3, 2)]))
        return grids[-1]

    def look(record: Any) -> tuple[bool, dict[str, float]]:
        context = list(grids[0]._contexts.values())[2]
        store: Store = ContextStore(context.state)
        if memory == "directory":
            store = DirectoryStore(tasks[0].directory.path / "clients")
        seen.append(tuple(store.versions(2)))
        return False, {}

    run(
        *EACH,
        "rounds=5",
        f"client_memory={memory}",
        grid=make,
        edit=tasks.append,
        callbacks=[look],
    )
    assert seen[0] == (1,)
    assert set(seen[1]) == {1, 2}
    assert set(seen[2]) == {1, 3}, "the version that the server names must stay"
    assert 4 in seen[3] and 2 not in seen[3] and 3 not in seen[3]
    assert 5 in seen[4]


# Any reply at all.

D = 6
NODES = {11: [0, 3], 12: [1, 4], 13: [2, 5]}
ALGORITHMS: dict[str, Algorithm] = {
    "fedavg": FedAvg(),
    "feddyn": FedDyn(mean_of_all=True),
    "scaffold": Scaffold(),
}


class RollCall:
    """A grid that answers roll calls and nothing else."""

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes."""
        return list(NODES)

    def __init__(self) -> None:
        self.replies: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Answer."""
        for message in messages:
            assert message.metadata.message_type == ROLL_CALL
            ids = NODES[message.metadata.dst_node_id]
            message.metadata.__dict__["_message_id"] = name = f"call-{ids[0]}"
            record = MetricRecord({"clients": ids, "samples": [k + 1 for k in ids]})
            self.replies[name] = Message(
                RecordDict({"hosted": record}), reply_to=message
            )
            yield name

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the answers."""
        return [self.replies.pop(name) for name in message_ids]


def honest(message: Message, algorithm: Algorithm) -> Message:
    """Return a reply that must be accepted."""
    order = message.content.config_records["order"]
    ids, judged = list(order["train"]), list(order["evaluate"])  # type: ignore[arg-type]
    fields: dict[str, Any] = {
        "trained": ids,
        "samples": [k + 1 for k in ids],
        "train_loss": [1.0 for _ in ids],
        "steps": [3 for _ in ids],
        "gradients": [4 for _ in ids],
        "seconds": [0.1 for _ in ids],
        "probe": [0.0 for _ in ids],
        "evaluated": judged,
        "eval_samples": [1 for _ in judged],
        "eval_loss": [1.0 for _ in judged],
        "eval_accuracy": [0.5 for _ in judged],
        "eval_held_out": [0 for _ in judged],
        "busy": [0.2],
    }
    vectors = {n: Array(np.full(D, 0.1, np.float32)) for n in algorithm.up}
    content = RecordDict(
        {
            "up": ArrayRecord(vectors),
            "report": MetricRecord(fields),
            "faults": ConfigRecord({}),
        }
    )
    return Message(content, reply_to=message)


NUMBERS = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.integers(-2, 7),
    st.floats(),
    st.sampled_from([3e38, -3e38, 1e300, math.nan, math.inf, 1e-45]),
)


@st.composite
def arrays(draw: st.DrawFn) -> Array:
    """Any array, honest or not."""
    dtype = draw(
        st.sampled_from(["float32", "float64", "float16", "int64", ">f4", "bool"])
    )
    shape = draw(
        st.sampled_from([(D,), (D,), (D,), (D - 1,), (D, 1), (), (0,), (2, 3)])
    )
    value = draw(NUMBERS)
    with np.errstate(all="ignore"):
        if dtype == "int64" and not abs(value) < 2**63:
            value = 7
        values = np.full(shape, value, dtype=np.dtype(dtype))
    claimed = draw(st.sampled_from([shape, shape, (D,), (10**15,), (-1,)]))
    array = raw(values, shape=claimed)
    cut = draw(st.integers(0, len(array.data)))
    kind = draw(st.sampled_from(["as it is", "as it is", "cut", "noise", "longer"]))
    if kind == "cut":
        array.data = array.data[:cut]
    elif kind == "noise":
        array.data = draw(st.binary(max_size=200))
    elif kind == "longer":
        array.data += draw(st.binary(max_size=20))
    return array


FIELDS = [
    "trained",
    "samples",
    "train_loss",
    "steps",
    "gradients",
    "seconds",
    "probe",
    "evaluated",
    "eval_samples",
    "eval_loss",
    "eval_accuracy",
    "eval_held_out",
    "busy",
]
LISTS = st.one_of(
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4),
    st.lists(st.integers(-1, 6), max_size=4),
    st.lists(st.floats(), max_size=4),
)
MUTATIONS = st.one_of(
    st.tuples(st.just("array"), st.sampled_from(["delta", "control", "x"]), arrays()),
    st.tuples(st.just("report"), st.sampled_from(FIELDS), st.one_of(LISTS, NUMBERS)),
    st.tuples(st.just("forget"), st.sampled_from([*FIELDS, "delta"]), st.none()),
    st.tuples(
        st.just("record"),
        st.sampled_from(["up", "report", "faults"]),
        st.integers(0, 3),
    ),
    st.tuples(
        st.just("faults"),
        st.text(st.characters(categories=["N", "Lu"]), max_size=3),
        st.one_of(st.text(max_size=9), st.integers(0, 3), st.binary(max_size=4)),
    ),
    st.tuples(st.just("error"), st.text(max_size=9), st.none()),
    st.tuples(st.just("from"), st.sampled_from([11, 12, 13, 14, 0]), st.none()),
    st.tuples(st.just("twice"), st.none(), st.none()),
    st.tuples(st.just("lost"), st.none(), st.none()),
)


def mutate(
    message: Message, reply: Message, mutation: tuple[str, Any, Any]
) -> list[Message]:
    """Return what arrives instead of a reply."""
    kind, name, value = mutation
    content = reply.content
    if kind == "array" and "up" in content.array_records:
        up(reply)[name] = value
    elif kind == "report" and "report" in content.metric_records:
        report(reply)[name] = value
    elif kind == "forget":
        for record in content.values():
            record.pop(name, None)
    elif kind == "record":
        records = [ArrayRecord({}), MetricRecord({}), ConfigRecord({}), None]
        content.pop(name, None)
        if records[value] is not None:
            content[name] = records[value]
    elif kind == "faults":
        content["faults"] = ConfigRecord({name: value})
    elif kind == "error":
        return [Message(Error(code=2, reason=name), reply_to=message)]
    elif kind == "from":
        reply.metadata.__dict__["_src_node_id"] = name
    elif kind == "twice":
        return [reply, reply]
    elif kind == "lost":
        return []
    return [reply]


def whole(array: Array) -> bool:
    """Say whether numpy itself finds a vector of D finite numbers in an array, and nothing else."""
    stream = io.BytesIO(array.data)
    try:
        values = np.load(stream, allow_pickle=False)
    except Exception:
        return False
    fits = values.shape == (D,) and values.dtype in (np.float32, np.float64)
    return fits and not stream.read() and bool(np.isfinite(values).all())


def column(fields: MetricRecord, name: str, length: int) -> bool:
    """Say whether a report has so many finite numbers of a name."""
    values = fields.get(name)
    return (
        isinstance(values, list)
        and len(values) == length
        and all(math.isfinite(v) for v in values)
    )


def sound(message: Message, reply: Message, algorithm: Algorithm) -> bool:
    """Say, by other means than the server's, whether a reply may be used."""
    order = message.content.config_records["order"]
    asked, judged = list(order["train"]), list(order["evaluate"])  # type: ignore[arg-type]
    if reply.has_error() or "report" not in reply.content.metric_records:
        return False
    fields = reply.content.metric_records["report"]
    ids: Any = fields.get("trained")
    names = list(reply.content.config_records.get("faults", {}))
    if not isinstance(ids, list) or not all(n.isdecimal() for n in names):
        return False
    if sorted([*ids, *map(int, names)]) != asked:
        return False
    told: Any = fields.get("evaluated")
    vectors = reply.content.array_records.get("up", ArrayRecord({}))
    return (
        (not ids or vectors.keys() == set(algorithm.up))
        and (not ids or all(map(whole, vectors.values())))
        and fields.get("samples") == [k + 1 for k in ids]
        and all(column(fields, n, len(ids)) for n in FIELDS[2:7])
        and isinstance(told, list)
        and set(told) <= set(judged)
        and all(column(fields, n, len(told)) for n in ("eval_loss", "eval_held_out"))
        and all(n >= 1 for n in [*fields["steps"], *fields["gradients"]])  # type: ignore[misc]
        and column(fields, "busy", 1)
    )


def harmless(
    name: str, mutations: list[tuple[int, tuple[str, Any, Any]]]
) -> Counter[str]:
    """Assert that two rounds of such replies do no harm; return what came of them."""
    algorithm = ALGORITHMS[name]
    start = torch.linspace(-1, 1, D)
    federation = Federation(
        algorithm, start.clone(), torch.zeros(0), clients=6, per_round=6
    )
    grid: Any = RollCall()
    counts: Counter[str] = Counter()
    federation.roster.call(grid)
    federation.roster.fix_mean()
    for round_ in (1, 2):
        arrays = ArrayRecord({"theta": Array(federation.server["theta"].numpy())})
        messages = list(
            federation.configure_train(round_, arrays, ConfigRecord(), grid)
        )
        before = {n: v.clone() for n, v in federation.server.items()}
        ledger = dict(federation.ledger)
        replies, usable = [], set[int]()
        for message in messages:
            node = message.metadata.dst_node_id
            arrived = [honest(message, algorithm)]
            for where, mutation in mutations:
                if where == node and arrived and not arrived[0].has_error():
                    arrived = mutate(message, arrived[0], mutation)
            replies += arrived
            for reply in arrived:
                if reply.metadata.src_node_id == node and sound(
                    message, reply, algorithm
                ):
                    usable |= set(NODES[node])
            counts["mutated"] += any(where == node for where, _ in mutations)
        federation.aggregate_train(round_, replies)
        told = federation.round
        counts["rounds"] += 1
        counts["left out"] += len(told.failed)
        counts["accepted"] += len(told.accepted)
        assert {n: v.shape for n, v in federation.server.items()} == {
            n: v.shape for n, v in before.items()
        }
        assert all(bool(torch.isfinite(v).all()) for v in federation.server.values())
        assert not set(told.accepted) & told.failed.keys()
        assert set(told.accepted) <= usable
        assert set(told.accepted) | told.failed.keys() == set(range(6))
        assert all(type(k) is int for k in [*federation.ledger, *told.accepted])
        changed = {k for k, v in federation.ledger.items() if ledger.get(k) != v}
        assert changed == set(told.accepted)
        if not told.accepted:
            assert all(torch.equal(v, before[n]) for n, v in federation.server.items())
        trained = [row["client"] for row in told.rows.values() if "train_loss" in row]
        assert sorted(trained) == told.accepted
        assert int(sum(row.get("gradients", 0) for row in told.rows.values())) >= 0
        vectors, rest = federation.state()
        federation.restore(vectors, json.loads(json.dumps(rest)))
    return counts


REPLIES = given(
    st.sampled_from(sorted(ALGORITHMS)),
    st.lists(
        st.tuples(st.sampled_from([11, 12, 13]), MUTATIONS), min_size=1, max_size=5
    ),
)


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@REPLIES
def test_no_reply_can_harm_the_server(name: str, mutations: Any) -> None:
    harmless(name, mutations)


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_an_honest_reply_is_accepted(name: str) -> None:
    algorithm = ALGORITHMS[name]
    federation = Federation(
        algorithm, torch.zeros(D), torch.zeros(0), clients=6, per_round=6
    )
    grid: Any = RollCall()
    federation.roster.call(grid)
    federation.roster.fix_mean()
    arrays = ArrayRecord({"theta": Array(np.zeros(D, np.float32))})
    messages = federation.configure_train(1, arrays, ConfigRecord(), grid)
    federation.aggregate_train(1, [honest(m, algorithm) for m in messages])
    assert federation.round.accepted == [0, 1, 2, 3, 4, 5]
    assert federation.round.failed == {}
    assert not torch.equal(federation.server["theta"], torch.zeros(D))
