"""What a client remembers, versioned by the round that produced it.

A version is written under its round; the server's ledger names the version to load. So a lost,
late or refused reply, a restarted node and a resumed server are the same case: load the version
named and drop the others.

`ContextStore` keeps versions in Flower's `Context.state`, which lives as long as the node.
`DirectoryStore` keeps them as files, which survive a restart.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path
from typing import Protocol

from flwr.app import ArrayRecord, RecordDict

from app import durable
from strategies.algorithm import Vectors
from strategies.wire import Refused, pack, unpack

#: Runs whose memories a node keeps in its ``state-dir``, and what their names look like.
RUNS, KEY = 3, re.compile(r"[0-9a-f]{16}")


class Lost(Exception):
    """The version that the server names is not here any more."""


class Store(Protocol):
    """Versions of the memories of the clients that a node hosts."""

    def versions(self, client: int) -> list[int]:
        """Return the rounds of which a version is here, ascending."""

    def load(self, client: int, version: int, like: Vectors) -> Vectors:
        """Return a version with the names, lengths and dtype of ``like``; KeyError if missing."""

    def save(self, client: int, version: int, memory: Vectors) -> None:
        """Write a version."""

    def drop(self, client: int, version: int) -> None:
        """Remove a version."""


class ContextStore:
    """Versions in the state of a Flower context.

    Parameters
    ----------
    state : RecordDict
        The context's state.
    kind : str
        What is kept: names of one kind do not meet those of another.
    """

    def __init__(self, state: RecordDict, kind: str = "memory") -> None:
        self.state = state
        self.kind = kind

    def versions(self, client: int) -> list[int]:
        """Return the rounds of which a version is here, ascending."""
        prefix = f"{self.kind}.{client}."
        found = [
            key.removeprefix(prefix) for key in self.state if key.startswith(prefix)
        ]
        return sorted(int(v) for v in found)

    def load(self, client: int, version: int, like: Vectors) -> Vectors:
        """Return a version; KeyError if it is not here."""
        record = self.state[f"{self.kind}.{client}.{version}"]
        if not isinstance(record, ArrayRecord):
            raise KeyError(f"{self.kind}.{client}.{version} is no array record")
        dtype = next(iter(like.values())).dtype
        return unpack(record, {n: len(v) for n, v in like.items()}, dtype)

    def save(self, client: int, version: int, memory: Vectors) -> None:
        """Write a version."""
        self.state[f"{self.kind}.{client}.{version}"] = pack(memory)

    def drop(self, client: int, version: int) -> None:
        """Remove a version."""
        del self.state[f"{self.kind}.{client}.{version}"]


class DirectoryStore:
    """Versions as files ``CLIENT/ROUND.safetensors`` below a directory (see `app.durable`).

    A torn or rotten file is a version that is missing.

    Parameters
    ----------
    path : Path
        The directory, made when needed.
    synced : bool
        Whether a version must survive a power failure, not only the death of the process.
    """

    def __init__(self, path: Path, synced: bool = False) -> None:
        self.path = path
        self.synced = synced

    def _file(self, client: int, version: int) -> Path:
        return self.path / str(client) / f"{version:08d}.safetensors"

    def versions(self, client: int) -> list[int]:
        """Return the rounds of which a version is here, ascending."""
        folder = self.path / str(client)
        return sorted(
            int(p.stem) for p in folder.glob("*.safetensors") if p.stem.isdigit()
        )

    def load(self, client: int, version: int, like: Vectors) -> Vectors:
        """Return a version; KeyError if it is not here or not whole."""
        file = self._file(client, version)
        try:
            vectors, header = durable.read(file)
        except FileNotFoundError:
            raise KeyError(f"{file} is missing") from None
        except durable.Torn as error:
            raise KeyError(str(error)) from None
        if header != {"client": client, "version": version}:
            raise KeyError(f"{file} is about {header}")
        for name, vector in like.items():
            if name not in vectors or vectors[name].shape != vector.shape:
                raise KeyError(f"{file} holds another model's memory")
        return {n: vectors[n].to(v.dtype) for n, v in like.items()}

    def save(self, client: int, version: int, memory: Vectors) -> None:
        """Write a version: after a crash all of it is there, or nothing."""
        file = self._file(client, version)
        _make(file.parent, self.synced)
        durable.sweep(file.parent)
        header = {"client": client, "version": version}
        durable.write(file, memory, header, self.synced)

    def drop(self, client: int, version: int) -> None:
        """Remove a version."""
        self._file(client, version).unlink(missing_ok=True)


def _make(folder: Path, synced: bool) -> None:
    """Make a folder and those above it; their names survive a power failure if ``synced``."""
    if folder.exists():
        return
    _make(folder.parent, synced)
    folder.mkdir(exist_ok=True)
    if synced:
        durable.sync(folder.parent)


def directory_of(state_dir: Path, run: str) -> Path:
    """Return the folder of one run below a node's ``state-dir``, and forget old runs.

    The memories of the last `RUNS` runs are kept, so that a run may be resumed after another.
    Whatever else is in the folder is not touched.

    Raises
    ------
    ValueError
        If that is no name of a run.
    """
    if not KEY.fullmatch(run):
        raise ValueError(f"{run[:40]!r} is no name of a run")
    mine = state_dir / run
    if mine.exists():
        with contextlib.suppress(OSError):  # of a disk that can only be read
            os.utime(mine)  # a long run is not an old one
    else:
        _make(mine, synced=True)
        runs = (p for p in state_dir.iterdir() if KEY.fullmatch(p.name))
        others = [p for p in runs if p.is_dir() and p != mine]
        for old in sorted(others, key=lambda p: p.stat().st_mtime)[: 1 - RUNS or None]:
            shutil.rmtree(old, ignore_errors=True)
    return mine


def recall(store: Store, client: int, version: int, fresh: Vectors) -> Vectors:
    """Return the version that the server names; version 0 is a client that never took part.

    Raises
    ------
    Lost
        If the version is not here.
    """
    if not fresh or version == 0:
        return fresh
    try:
        memory = store.load(client, version, fresh)
    except (KeyError, Refused) as error:
        text = error.args[0] if error.args else error
        raise Lost(f"the memory of round {version} is lost: {text}") from error
    return {n: v.to(fresh[n].device) for n, v in memory.items()}


def remember(
    store: Store, client: int, version: int, named: int, keep: int, memory: Vectors
) -> None:
    """Write a new version and drop those that nobody can name any more.

    Parameters
    ----------
    store : Store
        Where versions are kept.
    client, version : int
        Whose memory it is, and the round that produced it.
    named : int
        The version that the server named in this round. Those between it and this round belong
        to replies that were never accepted. One of a later round is left alone: this round may be
        over, and this process late.
    keep : int
        The round of the last server checkpoint: a server resumed from it names the newest version
        that is not later, so older ones may go.
    memory : Vectors
        The new version; empty for an algorithm without memory.
    """
    if not memory:
        return
    store.save(client, version, memory)
    here = [v for v in store.versions(client) if v != version]
    # The oldest that can be named: a refused version in between must not stand in for it.
    oldest = max((v for v in here if v <= min(keep, named)), default=0)
    for other in here:
        if named < other < version or other < oldest:
            store.drop(client, other)
