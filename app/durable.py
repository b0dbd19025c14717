"""Tensors in files that are whole or not there: replaced atomically, synced, with a checksum.

A file is safetensors with JSON in its header. It is written beside its place, synced to the disk,
and renamed; then the folder is synced, so that the name survives a power failure as well. The
checksum is over header and tensors: a torn file is found by its length, a rotten one by its sum.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

ENTRY = "fedgrad"


class Torn(ValueError):
    """A file that is torn, rotten or foreign; the text names it."""


def write(
    file: Path,
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
    synced: bool = True,
) -> None:
    """Put a file in its place, whole.

    Parameters
    ----------
    file : Path
        Where; its folder must exist.
    tensors : mapping of str to Tensor
        What; empty ones are left out.
    header : mapping
        JSON that goes with them.
    synced : bool
        Wait for the disk: needed to survive a power failure, not the death of a process.

    Raises
    ------
    OSError
        If the disk refuses: the file is then as it was before.
    """
    # Two names may share one tensor: copies do not.
    held = {n: v.detach().cpu().clone() for n, v in tensors.items() if v.numel()}
    text = json.dumps(dict(header))
    data = save(held, {ENTRY: text, "sum": _sum(held, text)})
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as opened:
            opened.write(data)
            opened.flush()
            if synced:
                os.fsync(opened.fileno())
        os.replace(part, file)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    if synced:
        sync(file.parent)


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the header of a file.

    Raises
    ------
    FileNotFoundError
        If there is none.
    OSError
        If the disk does not tell: it may be whole.
    Torn
        If it is not whole.
    """
    try:
        with safe_open(file, "pt") as opened:
            told = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        text = told[ENTRY]
        if told["sum"] != _sum(tensors, text):
            raise Torn(f"{file}: its checksum is wrong")
        header = json.loads(text)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise Torn(f"{file}: torn or foreign ({type(error).__name__})") from error
    if not isinstance(header, dict):
        raise Torn(f"{file}: its header is no mapping")
    return tensors, header


def sync(folder: Path) -> None:
    """Make the names in a folder survive a power failure, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sweep(folder: Path) -> None:
    """Remove what processes that died while writing have left in a folder."""
    for part in folder.glob(".*.part"):
        with contextlib.suppress(OSError, ValueError):
            if not _alive(int(part.name.split(".")[-2])):
                part.unlink()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


def _sum(tensors: Mapping[str, Tensor], text: str) -> str:
    """Return the checksum of header and tensors, in the order of their names."""
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
