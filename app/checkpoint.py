"""The server's checkpoints: one safetensors file each, with its JSON inside (see `app.durable`).

The last few are kept: should the newest prove torn or rotten, the one before it serves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from app import durable
from app.errors import UserError
from strategies.algorithm import Vectors

FORMAT = 2


def save(
    folder: Path, round_: int, vectors: Vectors, rest: dict[str, Any], keep: int = 2
) -> int:
    """Write the checkpoint of a round and drop all but the last ``keep``.

    Parameters
    ----------
    folder : Path
        Where checkpoints are kept.
    round_ : int
        The round that has just ended.
    vectors : Vectors
        The server's vectors.
    rest : dict
        What else the strategy needs to continue; JSON.
    keep : int
        How many to keep.

    Returns
    -------
    int
        The round of the oldest checkpoint that is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    durable.sweep(folder)
    file = folder / f"{round_:08d}.safetensors"
    durable.write(file, vectors, {"format": FORMAT, "round": round_, **rest})
    for old in sorted(folder.glob("*.safetensors"))[:-keep]:
        old.unlink()
    return oldest(folder)


def oldest(folder: Path) -> int:
    """Return the round of the oldest checkpoint that is kept, 0 if there is none.

    Clients keep what they need to continue from it, should a later one prove torn.
    """
    return min((int(f.stem) for f in folder.glob("*.safetensors")), default=0)


def newest(folder: Path) -> tuple[int, Vectors, dict[str, Any]] | None:
    """Return round, vectors and rest of the newest whole checkpoint, or None.

    Raises
    ------
    UserError
        If it was written by another version of the program.
    """
    for file in sorted(folder.glob("*.safetensors"), reverse=True):
        try:
            vectors, header = durable.read(file)
        except (durable.Torn, OSError):
            continue  # the one before it serves
        if header.pop("format", None) != FORMAT:
            raise UserError(f"{file}: written in a format this version does not know")
        return header.pop("round"), vectors, header
    return None


def cut(folder: Path, round_: int) -> None:
    """Remove checkpoints of later rounds: torn ones, which would be kept in place of whole ones."""
    for file in folder.glob("*.safetensors"):
        if int(file.stem) > round_:
            file.unlink()
