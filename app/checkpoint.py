"""The server's checkpoints: one safetensors file each, with its JSON inside.

A file appears whole or not at all. The last two are kept, so that a crash while one is written
leaves the other.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from app.errors import UserError
from strategies.algorithm import Vectors

FORMAT = 1
KEEP = 2


def save(folder: Path, round_: int, vectors: Vectors, rest: dict[str, Any]) -> int:
    """Write the checkpoint of a round and drop all but the last two.

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

    Returns
    -------
    int
        The round of the oldest checkpoint that is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{round_:08d}.safetensors"
    part = file.with_suffix(".part")
    # Two names may share one tensor (theta and active before the first round): copies do not.
    tensors = {n: v.detach().cpu().clone() for n, v in vectors.items() if v.numel()}
    header = {"format": FORMAT, "round": round_, **rest}
    save_file(tensors, part, {"fedgrad": json.dumps(header)})
    with part.open("rb") as written:
        os.fsync(written.fileno())
    os.replace(part, file)
    for old in sorted(folder.glob("*.safetensors"))[:-KEEP]:
        old.unlink()
    return oldest(folder)


def oldest(folder: Path) -> int:
    """Return the round of the oldest checkpoint that is kept, 0 if there is none.

    Clients keep what they need to continue from it, should a later one prove torn.
    """
    return min((int(f.stem) for f in folder.glob("*.safetensors")), default=0)


def newest(folder: Path) -> tuple[int, Vectors, dict[str, Any]] | None:
    """Return round, vectors and rest of the newest readable checkpoint, or None.

    Raises
    ------
    UserError
        If it was written by a later version of the program.
    """
    for file in sorted(folder.glob("*.safetensors"), reverse=True):
        try:
            with safe_open(file, "pt") as opened:
                header = json.loads(opened.metadata()["fedgrad"])
                vectors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            continue  # torn or foreign: the one before it serves
        if header.pop("format") != FORMAT:
            raise UserError(f"{file}: written in a format this version does not know")
        return header.pop("round"), vectors, header
    return None
