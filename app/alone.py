"""One process at a time: a lock on a file, which goes when its process does, however that ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from app.errors import UserError


def hold(file: Path, busy: str) -> IO[bytes]:
    """Return an existing file, open: no other process can hold it until it is closed.

    Raises
    ------
    UserError
        Saying ``busy``, if another one holds it.
    """
    lock = file.open("r+b")  # NFS grants a lock of one's own to those who may write
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UserError(busy) from None
    return lock


@contextmanager
def turn(folder: Path) -> Iterator[None]:
    """Wait until no other process has its turn in a folder; one that cannot be opened has no turns.

    Raises
    ------
    OSError
        If the disk grants no lock.
    """
    try:
        lock = os.open(folder, os.O_RDONLY)  # of a disk that can only be read as well
    except OSError:
        yield
        return
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            # NFS locks what is open for writing, so no folder, but a file in it.
            with (folder / ".turn").open("a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield
        else:
            yield
    finally:
        os.close(lock)
