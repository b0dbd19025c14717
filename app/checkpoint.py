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
    for old in _files(folder)[:-keep]:
        old.unlink()
    return oldest(folder)


def oldest(folder: Path) -> int:
    """Return the round of the oldest checkpoint that is kept, 0 if there is none.

    Clients keep what they need to continue from it, should a later one prove torn.
    """
    return min(map(_round, _files(folder)), default=0)


def newest(folder: Path) -> tuple[int, Vectors, dict[str, Any]] | None:
    """Return round, vectors and rest of the newest whole checkpoint, or None.

    Raises
    ------
    UserError
        If it was written by another version of the program, or the disk does not tell.
    """
    for file in reversed(_files(folder)):
        try:
            vectors, header = durable.read(file)
        except durable.Torn:
            continue  # the one before it serves
        except OSError as error:  # it may be whole, and would be lost to an older one
            raise UserError(f"{file}: cannot be read ({error})") from error
        if header.pop("format", None) != FORMAT:
            raise UserError(f"{file}: written in a format this version does not know")
        return header.pop("round"), vectors, header
    return None


def cut(folder: Path, round_: int) -> None:
    """Remove checkpoints of later rounds: torn ones, which would be kept in place of whole ones."""
    for file in _files(folder):
        if _round(file) > round_:
            file.unlink()


def _files(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first, and nothing that was put there beside."""
    return sorted(f for f in folder.glob("*.safetensors") if f.stem.isdecimal())


def _round(file: Path) -> int:
    return int(file.stem)
