"""Nothing lost: files that are whole or missing, memories that begin anew, rounds taken again."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import Result, grid_of
from flwr.app import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from app import checkpoint, durable, rounds
from app.client_app import in_turn
from app.config import load
from app.errors import UserError
from app.local_grid import LocalGrid
from app.rounds import Rounds
from app.run import Run
from app.run_config import to_run_config
from app.store import DirectoryStore, directory_of, recall, remember
from strategies.recovery import MEMORIES

Door = Callable[..., Result]
EACH = ("nodes=6", "clients_per_round=6", "rounds=5", "dtype=float64")


# Files.


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(5), "b": torch.arange(3), "empty": torch.zeros(0)}
    durable.write(tmp_path / "x", tensors, {"z": 1, "a": [1.5, None]})
    back, header = durable.read(tmp_path / "x")
    assert list(header) == ["z", "a"] and header == {"z": 1, "a": [1.5, None]}
    assert back.keys() == {"a", "b"}
    assert all(torch.equal(back[n], tensors[n]) for n in back)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@settings(max_examples=150)
@given(st.data())
def test_any_flipped_bit_or_lost_byte_is_seen(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x"
        durable.write(file, {"a": torch.arange(6.0)}, {"round": 3}, synced=False)
        whole = file.read_bytes()
        if data.draw(st.booleans()):
            torn = whole[: data.draw(st.integers(0, len(whole) - 1))]
        else:
            at = data.draw(st.integers(0, len(whole) - 1))
            bit = 1 << data.draw(st.integers(0, 7))
            torn = whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :]
        file.write_bytes(torn)
        try:
            tensors, header = durable.read(file)
        except durable.Torn:
            return
        # A flip in the format's own padding or in the order of its keys changes nothing.
        assert torch.equal(tensors["a"], torch.arange(6.0)) and header == {"round": 3}


def test_a_disk_that_fills_up_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    durable.write(tmp_path / "x", {"a": torch.zeros(4)}, {})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        durable.write(tmp_path / "x", {"a": torch.ones(4)}, {})
    assert torch.equal(durable.read(tmp_path / "x")[0]["a"], torch.zeros(4))
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_what_a_dead_writer_left_is_swept(tmp_path: Path) -> None:
    dead, mine = tmp_path / ".x.999999999.part", tmp_path / f".x.{os.getpid()}.part"
    dead.touch()
    mine.touch()
    durable.sweep(tmp_path)
    assert not dead.exists() and mine.exists()


def test_checkpoints_keep_the_last_and_know_their_format(tmp_path: Path) -> None:
    for round_ in (2, 4, 6, 8):
        checkpoint.save(tmp_path, round_, {"theta": torch.ones(2)}, {"n": 1}, keep=3)
    assert [int(p.stem) for p in sorted(tmp_path.iterdir())] == [4, 6, 8]
    assert checkpoint.oldest(tmp_path) == 4
    (tmp_path / "mine.safetensors").write_bytes(b"put here by somebody")
    newest = checkpoint.newest(tmp_path)
    assert newest and newest[0] == 8 and checkpoint.oldest(tmp_path) == 4
    checkpoint.cut(tmp_path, 6)
    assert (tmp_path / "mine.safetensors").exists()
    assert checkpoint.newest(tmp_path)[0] == 6  # type: ignore[index]
    durable.write(tmp_path / "00000010.safetensors", {}, {"format": 99, "round": 10})
    with pytest.raises(UserError, match="format"):
        checkpoint.newest(tmp_path)


def test_a_checkpoint_that_the_disk_does_not_tell_is_not_passed_over(
    tmp_path: Path,
) -> None:
    """It may be whole: an older one would have it cut off."""
    checkpoint.save(tmp_path, 2, {"theta": torch.ones(2)}, {})
    (tmp_path / "00000003.safetensors").mkdir()  # whose content cannot be read
    with pytest.raises(UserError, match=r"00000003\.safetensors: cannot be read"):
        checkpoint.newest(tmp_path)


def test_a_torn_checkpoint_does_not_outlast_whole_ones(run: Door) -> None:
    given = (*EACH, "name=torn", "checkpoint_every=2")
    path = run(*given).path
    (path / "summary.json").write_text("")  # as after a power failure
    folder = path / "checkpoints"
    (folder / "00000009.safetensors").write_bytes(b"half")
    result = run(
        *given, "checkpoint_every=1", "checkpoint_keep=1", "resume=auto", "rounds=7"
    )
    assert result.path == path and result.summary["rounds"] == 7
    assert [p.name for p in folder.iterdir()] == ["00000007.safetensors"]


def test_the_logs_are_on_the_disk_before_their_checkpoint(
    run: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of a round that no log has would leave a hole in a resumed run."""
    synced, real, save = [], os.fsync, checkpoint.save

    def sync(file: int) -> None:
        synced.append(os.fstat(file).st_ino)
        real(file)

    def watched(*given: Any) -> int:
        synced.append("checkpoint")
        return save(*given)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(checkpoint, "save", watched)
    path = run("rounds=2", "checkpoint_every=1").path
    logs = {(path / name).stat().st_ino for name in ("metrics.jsonl", "clients.csv")}
    ends = [i for i, what in enumerate(synced) if what == "checkpoint"]
    assert len(ends) == 2
    for start, end in zip([0, *ends], ends, strict=False):
        assert logs <= set(synced[start:end])


def test_a_node_keeps_the_memories_of_the_last_runs(tmp_path: Path) -> None:
    for i in range(5):
        path = directory_of(tmp_path, f"{i:016x}")
        os.utime(path, (i, i))
    assert len(list(tmp_path.iterdir())) == 3
    assert (tmp_path / f"{4:016x}").exists()


def test_a_long_runs_memories_outlive_short_runs(tmp_path: Path) -> None:
    long = directory_of(tmp_path, "f" * 16)
    for i in range(9):
        os.utime(long, (1, 1))
        directory_of(tmp_path, "f" * 16)  # it is at work still
        directory_of(tmp_path, f"{i:016x}")
    assert long.exists() and len(list(tmp_path.iterdir())) == 3


def test_a_node_touches_nothing_else_in_its_state_dir(tmp_path: Path) -> None:
    for i in range(9):
        (tmp_path / f"mine-{i}").mkdir()
    for i in range(5):
        directory_of(tmp_path, f"{i:016x}")
    assert len(list(tmp_path.glob("mine-*"))) == 9
    with pytest.raises(ValueError, match="no name of a run"):
        directory_of(tmp_path, "../elsewhere")


def test_a_late_round_leaves_the_version_of_a_later_one(tmp_path: Path) -> None:
    store, fresh = DirectoryStore(tmp_path), {"g": torch.zeros(2)}
    for version, named in ((4, 0), (6, 4), (5, 4)):  # 5 was given up, and ends last
        remember(store, 3, version, named, 4, {"g": torch.full((2,), float(version))})
    assert recall(store, 3, 6, fresh)["g"].tolist() == [6, 6]
    remember(store, 3, 7, 6, 6, fresh)
    assert store.versions(3) == [6, 7]


def test_messages_of_a_node_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_work, most = [0], [0]

    def call(*_: Any) -> Any:
        at_work[0] += 1
        most[0] = max(most[0], at_work[0])
        time.sleep(0.05)
        at_work[0] -= 1

    def answer(config: dict[str, str]) -> int:
        most[0] = 0
        context: Any = SimpleNamespace(node_config=config)
        work: Any = in_turn
        threads = [Thread(target=work, args=(None, context, call)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return most[0]

    assert answer({"state-dir": str(tmp_path)}) == 1
    assert answer({}) == 3
    assert answer({"state-dir": str(tmp_path / "not there")}) == 3

    def as_nfs(file: Any, how: int) -> None:
        if stat.S_ISDIR(
            os.fstat(file if isinstance(file, int) else file.fileno()).st_mode
        ):
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(file, how)

    flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", as_nfs)
    assert answer({"state-dir": str(tmp_path)}) == 1


# A memory that is lost.


class Disks(LocalGrid):
    """Six nodes, each with a state directory of its own; one may be spoilt before a round.

    Parameters
    ----------
    overrides : sequence of str
        The run's settings.
    folder : Path
        Where the directories are.
    spoil : callable
        Called with round and the directory of node 2's memories before each round.
    """

    def __init__(
        self, overrides: Sequence[str], folder: Path, spoil: Callable[[int, Path], None]
    ) -> None:
        super().__init__(to_run_config(overrides), 0)
        self.folder, self.spoil = folder, spoil
        for k in range(6):
            self.add_node({"clients": str(k), "state-dir": str(folder / str(k))})

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Spoil what is to be spoilt, then send."""
        sent = list(messages)
        rounds = [int(m.content.config_records["order"].get("round", 0)) for m in sent]
        if any(rounds):
            self.spoil(max(rounds), self.folder / "2")
        return super().send_and_receive(sent, timeout=timeout)


def wipe(round_: int, folder: Path) -> None:
    """Lose everything before round 3."""
    if round_ == 3:
        shutil.rmtree(folder)


def rot(round_: int, folder: Path) -> None:
    """Flip a bit of every memory before round 3."""
    for file in folder.rglob("*.safetensors") if round_ == 3 else ():
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(bytes(data))


def memories(run: Run, grid: Disks) -> torch.Tensor:
    """Return the mean over all clients of what they remember."""
    federation = run.federation
    assert federation.algorithm.mirror is not None
    name = federation.algorithm.mirror[0]
    fresh = federation.algorithm.fresh(federation.server["theta"])
    total = torch.zeros_like(federation.server["theta"])
    for k in range(6):
        if version := federation.ledger.get(k, 0):
            store = DirectoryStore(grid.folder / str(k) / federation.key)
            with contextlib.suppress(KeyError):  # lost, and not yet begun anew
                total = total + store.load(k, version, fresh)[name]
    return total / 6


class Backwards(Disks):
    """Disks whose nodes answer in the opposite order."""

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Return the last reply first."""
        return list(super().send_and_receive(messages, timeout=timeout))[::-1]


def test_who_answers_first_does_not_change_what_is_made_anew(
    run: Door, tmp_path: Path
) -> None:
    found = []
    for grid in (Disks, Backwards):
        result = run(
            *(*EACH, "strategy=feddyn", "partition=dirichlet"),
            grid=lambda o, grid=grid: grid(o, tmp_path / grid.__name__, wipe),
        )
        assert result.records[4]["reset"] == [2]
        found.append(result.theta)
    assert torch.equal(*found)


@pytest.mark.parametrize("spoil", [wipe, rot])
@pytest.mark.parametrize(
    "given",
    [
        ("strategy=feddyn",),
        ("strategy=feddyn", "strategy.mean_of_all=true"),
        ("strategy=scaffold",),
    ],
    ids=["feddyn", "feddyn-all", "scaffold"],
)
def test_who_lost_its_memory_begins_anew_and_the_books_agree(
    run: Door, tmp_path: Path, given: tuple[str, ...], spoil: Any
) -> None:
    runs: list[Run] = []
    grids: list[Disks] = []
    seen: list[float] = []

    def make(overrides: Sequence[str]) -> LocalGrid:
        grids.append(Disks(overrides, tmp_path / "disks", spoil))
        return grids[-1]

    def look(record: Any) -> tuple[bool, dict[str, float]]:
        federation = runs[0].federation
        assert federation.algorithm.mirror is not None
        vector = federation.server[federation.algorithm.mirror[1]]
        gap = vector - memories(runs[0], grids[0])
        seen.append(float(gap.norm() / vector.norm()))
        return False, {}

    result = run(
        *EACH,
        *given,
        "partition=dirichlet",
        grid=make,
        edit=runs.append,
        callbacks=[look],
    )
    failed = [sorted(r["clients"]["failed"]) for r in result.records[1:]]
    assert failed == [[], [], ["2"], [], []]
    assert "memory of round 2 is lost" in result.records[3]["clients"]["failed"]["2"]
    assert [r.get("reset") for r in result.records[1:]] == [None, None, None, [2], None]
    assert result.records[4]["clients"]["cohort"] == [0, 1, 2, 3, 4, 5]
    # h is the mean of the memories again, from the round in which the client begins anew.
    assert [gap < 1e-9 for gap in seen] == [True, True, False, True, True]
    assert result.records[5]["checks"]["memory_gap"] < 1e-9
    if "strategy.mean_of_all=true" in given:
        federation, total = (
            runs[0].federation,
            torch.zeros_like(runs[0].federation.server["h"]),
        )
        for k in range(6):
            store = DirectoryStore(tmp_path / "disks" / str(k) / federation.key)
            fresh = federation.algorithm.fresh(total)
            total = total + store.load(k, federation.ledger[k], fresh)["last"]
        torch.testing.assert_close(federation.server["all"], total / 6)


@pytest.mark.parametrize("strategy", ["feddyn", "scaffold", "fedsophia"])
def test_who_lost_its_memory_does_not_end_a_run_that_needs_all(
    run: Door, tmp_path: Path, strategy: str
) -> None:
    result = run(
        *(*EACH, f"strategy={strategy}", "min_replies=6"),
        grid=lambda o: Disks(o, tmp_path / "disks", wipe),
    )
    assert [r.get("reset") for r in result.records[1:]] == [None, None, [2], None, None]
    assert result.records[3]["attempts"] == 2
    assert all(r["clients"]["cohort"] == list(range(6)) for r in result.records[1:])


@pytest.mark.parametrize("least", [0, 3])
@pytest.mark.parametrize("strategy", ["feddyn", "scaffold"])
def test_a_nodes_whole_memory_begins_anew_at_once(
    run: Door, strategy: str, least: int
) -> None:
    """One disk holds the memories of many, and not all of them are in the next cohort."""
    grids: list[LocalGrid] = []

    def make(overrides: Sequence[str]) -> LocalGrid:
        grids.append(grid_of(overrides, 2))
        return grids[-1]

    def forget(record: Any) -> tuple[bool, dict[str, float]]:
        if record["round"] == 8:
            context = list(grids[0]._contexts.values())[1]
            for key in list(context.state):
                del context.state[key]
        return False, {}

    given = ["clients=12", "clients_per_round=3", "rounds=12", "dtype=float64"]
    given += [f"strategy={strategy}", f"min_replies={least}", "partition=dirichlet"]
    result = run(*given, grid=make, callbacks=[forget])
    taken = {k for r in result.records[1:9] for k in r["clients"]["cohort"]}
    anew = [r.get("reset", []) for r in result.records[1:]]
    assert sorted(k for of in anew for k in of) == [k for k in sorted(taken) if k % 2]
    assert len([of for of in anew if of]) == 1, "all of them at once"
    assert all(not r["clients"]["failed"] for r in result.records[11:])
    assert result.records[-1]["checks"]["memory_gap"] < 1e-9


def test_who_was_about_to_begin_anew_does_so_after_a_resume(
    run: Door, tmp_path: Path
) -> None:
    given = (*EACH, "checkpoint_every=1", "partition=dirichlet")

    def make(name: str) -> Callable[[Sequence[str]], LocalGrid]:
        return lambda overrides: Disks(overrides, tmp_path / name, wipe)

    def die(record: Any) -> tuple[bool, dict[str, float]]:
        if record["round"] == 4:
            raise RuntimeError("killed")
        return False, {}

    whole = run(*given, grid=make("whole"))
    assert whole.records[4]["reset"] == [2]
    with pytest.raises(RuntimeError, match="killed"):
        run(*given, "name=half", grid=make("half"), callbacks=[die])
    resumed = run(*given, f"resume={tmp_path}/runs/half", grid=make("half"))
    assert [r.get("reset") for r in resumed.records] == [
        r.get("reset") for r in whole.records
    ]
    assert torch.equal(resumed.theta, whole.theta)


def test_a_disk_that_does_not_read_is_no_lost_memory(
    run: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file may be whole: the client is left out, and its memory is there the next time."""
    read, bad = durable.read, [True]

    def failing(file: Path) -> Any:
        if bad[0] and file.name == "00000002.safetensors" and "/2/" in str(file):
            bad[0] = False
            raise OSError(errno.EIO, "Input/output error")
        return read(file)

    monkeypatch.setattr(durable, "read", failing)
    result = run(*EACH, grid=lambda o: Disks(o, tmp_path / "disks", lambda *_: None))
    assert [sorted(r["clients"]["failed"]) for r in result.records[1:]] == [
        *([], [], ["2"]),
        *([], []),
    ]
    assert "state-dir: OSError" in result.records[3]["clients"]["failed"]["2"]
    assert not any("reset" in r for r in result.records)
    assert all(r["checks"]["memory_gap"] < 1e-9 for r in result.records[1:])


def test_until_all_can_be_asked_it_sits_out(run: Door, tmp_path: Path) -> None:
    grids: list[Disks] = []
    names: list[int] = []

    def spoil(round_: int, folder: Path) -> None:
        wipe(round_, folder)
        if round_ == 3 and not names:
            names.append(list(grids[0]._contexts)[5])
            gone.append(grids[0]._contexts.pop(names[0]))
        if round_ == 4 and gone:
            grids[0]._contexts[names[0]] = gone.pop()

    gone: list[Any] = []

    def make(overrides: Sequence[str]) -> LocalGrid:
        grids.append(Disks(overrides, tmp_path / "disks", spoil))
        return grids[-1]

    result = run(*EACH, "rounds=6", grid=make)
    resets = [r.get("reset") for r in result.records[1:]]
    assert resets.count([2]) == 1 and resets.index([2]) >= 4
    assert result.records[-1]["clients"]["failed"] == {}
    assert result.records[-1]["checks"]["memory_gap"] < 1e-9


def test_skip_leaves_it_out_and_fail_ends_the_run(run: Door, tmp_path: Path) -> None:
    def make(name: str) -> Callable[[Sequence[str]], LocalGrid]:
        return lambda overrides: Disks(overrides, tmp_path / name, wipe)

    result = run(*EACH, "lost_state=skip", grid=make("skip"))
    failed = [sorted(r["clients"]["failed"]) for r in result.records[1:]]
    assert failed == [[], [], ["2"], ["2"], ["2"]]
    assert all(r["checks"]["memory_gap"] < 1e-9 for r in result.records[1:])
    with pytest.raises(
        UserError, match=r"client 2: the memory of round 2 is lost.*resume"
    ):
        run(*EACH, "lost_state=fail", grid=make("fail"))


def test_optimizer_memories_begin_anew_without_asking(
    run: Door, tmp_path: Path
) -> None:
    kinds = set[str]()

    class Heard(Disks):
        def send_and_receive(
            self, messages: Iterable[Message], *, timeout: float | None = None
        ) -> Iterable[Message]:
            sent = list(messages)
            kinds.update(m.metadata.message_type for m in sent)
            return super().send_and_receive(sent, timeout=timeout)

    given = (*EACH, "strategy=fedsophia")
    result = run(*given, grid=lambda o: Heard(o, tmp_path / "disks", wipe))
    assert MEMORIES not in kinds and len(kinds) == 2
    assert [r.get("reset") for r in result.records[1:]] == [None, None, None, [2], None]


def test_a_read_only_disk_costs_its_node_and_no_more(run: Door, tmp_path: Path) -> None:
    def block(round_: int, folder: Path) -> None:
        if (
            round_ == 3
        ):  # a file in the place of the directory: nothing can be made there
            shutil.rmtree(folder)
            folder.write_text("")

    result = run(*EACH, grid=lambda o: Disks(o, tmp_path / "disks", block))
    failed = [r["clients"]["failed"] for r in result.records[1:]]
    assert [sorted(f) for f in failed] == [[], [], ["2"], ["2"], ["2"]]
    assert "state-dir" in failed[2]["2"] or "Not a directory" in failed[2]["2"]
    assert result.summary["status"] == "finished"


def test_two_runs_of_one_node_do_not_meet(run: Door, tmp_path: Path) -> None:
    def make(overrides: Sequence[str]) -> LocalGrid:
        return Disks(overrides, tmp_path / "disks", lambda *_: None)

    first = run(*EACH, grid=make)
    assert torch.equal(
        run(*EACH, "seed=1", grid=make).theta, run(*EACH, "seed=1").theta
    )
    assert torch.equal(first.theta, run(*EACH, grid=make).theta)
    assert all(
        len(list((tmp_path / "disks" / str(k)).iterdir())) == 3 for k in range(6)
    )


# Rounds below the minimum.


class Deaf(LocalGrid):
    """A grid that loses the replies of some attempts: of (attempt from 0) -> clients."""

    def __init__(self, overrides: Sequence[str], lost: dict[int, set[int]]) -> None:
        super().__init__(to_run_config(overrides), 6)
        self.lost, self.turn = lost, 0

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send all, and lose what is to be lost."""
        sent = {m.metadata.dst_node_id: m for m in messages}
        gone = self.lost.get(self.turn, set())
        self.turn += 1
        for reply in super().send_and_receive(sent.values(), timeout=timeout):
            order = sent[reply.metadata.src_node_id].content.config_records["order"]
            if not gone & set(order["train"]):  # type: ignore[arg-type]
                yield reply


@pytest.mark.parametrize("strategy", ["feddyn", "scaffold", "fedavg"])
def test_a_round_taken_again_leaves_no_trace(run: Door, strategy: str) -> None:
    given = (*EACH, f"strategy={strategy}", "min_replies=4")
    result = run(*given, grid=lambda o: Deaf(o, {1: {0, 1, 2}, 2: {3, 4, 5}, 5: {0}}))
    plain = run(*EACH, f"strategy={strategy}", grid=lambda o: Deaf(o, {3: {0}}))
    assert torch.equal(result.theta, plain.theta)
    assert [r.get("attempts") for r in result.records[1:]] == [
        None,
        3,
        None,
        None,
        None,
    ]
    twice, once = result.records[2], plain.records[2]
    assert twice["bytes"]["down"]["model"] == 3 * once["bytes"]["down"]["model"]
    assert twice["gradients"] == 2 * once["gradients"]
    assert sum("attempt" in line for line in result.lines) == 2


def test_a_run_without_enough_replies_ends_and_can_be_resumed(
    run: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (*EACH, "min_replies=6", "attempts=2", "checkpoint_every=1", "name=stuck")
    waits: list[int] = []
    monkeypatch.setattr(rounds, "gather", lambda *_: waits.append(1))
    with pytest.raises(
        UserError,
        match=r"round 3: fewer than min_replies=6 .* 2 attempts \(client \d: .*\); resume",
    ):
        run(*given, grid=lambda o: Deaf(o, {2: {0}, 3: {0}}))
    assert len(waits) == 1  # and not after the last attempt
    result = run(*given, "resume=auto")
    assert torch.equal(result.theta, run(*EACH).theta)


def test_a_memory_that_counts_no_more_is_not_begun_anew() -> None:
    """Lost in the round before training began anew: that was its new beginning."""
    books: Any = SimpleNamespace(
        ledger={2: 3, 4: 7}, hyper=None, since=5, probes={}, roster=Mock()
    )
    taking = Rounds(books, load(()), print)
    taking.lost = {2, 4}
    assert taking._begin_anew(Mock()) == [4]
    assert taking.lost == set() and books.ledger == {2: 3}


@pytest.mark.parametrize("strategy", ["feddyn", "scaffold"])
def test_thirty_percent_of_replies_lost_for_fifty_rounds(
    run: Door, strategy: str
) -> None:
    draw = random.Random(1)
    lost = {t: {k for k in range(6) if draw.random() < 0.3} for t in range(50)}
    result = run(
        f"strategy={strategy}",
        "nodes=6",
        "clients_per_round=6",
        "rounds=50",
        "evaluate_clients=none",
        "evaluate_every=10",
        "local.batch=20",
        grid=lambda o: Deaf(o, lost),
    )
    assert result.summary["failures"] == sum(map(len, lost.values())) > 60
    assert result.summary["accuracy"] > 0.85
    checks = [r["checks"] for r in result.records[1:]]
    assert all(c["memory_gap"] < 1e-5 for c in checks)
