"""One process at a time: a lock on a file, which goes when its process does, however that ends."""

from __future__ import annotations

import fcntl
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
