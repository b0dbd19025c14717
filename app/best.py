"""The model that validation prefers, in a run's directory: now, and at each checkpoint.

A run that goes on from a checkpoint has what was best then. So the model that loses its place is
set aside as long as a checkpoint is kept that knows it as the best.
"""

from __future__ import annotations

import os
from pathlib import Path

from app import durable
from strategies.algorithm import Vectors

BEST = "best.safetensors"


def put(place: Path, round_: int, vectors: Vectors, former: int | None) -> None:
    """Write the best model so far.

    Parameters
    ----------
    place : Path
        The run's directory.
    round_ : int
        The round that it is of.
    vectors : Vectors
        The model, and those of the clients if each has one.
    former : int or None
        The round of the best one so far, if that has to be set aside.
    """
    if former is not None and _is_of(place / BEST, former):
        aside = _aside(place, former)
        aside.parent.mkdir(exist_ok=True)
        os.replace(place / BEST, aside)
        durable.sync(aside.parent)
    durable.write(place / BEST, vectors, {"round": round_})


def restore(place: Path, round_: int | None, at: int) -> None:
    """Let the best model be that of a round again, or none, as a run goes on after round ``at``."""
    for later in _all_aside(place):
        if later > at:
            _aside(place, later).unlink()
    file = place / BEST
    if round_ is not None and _is_of(file, round_):
        return
    file.unlink(missing_ok=True)
    if round_ is not None and _is_of(_aside(place, round_), round_):
        durable.write(file, *durable.read(_aside(place, round_)))


def prune(place: Path, oldest: int, best: int) -> None:
    """Drop the models that no checkpoint from round ``oldest`` on can name."""
    # The newest from before that round may be what was best in it.
    earlier = sorted(r for r in {*_all_aside(place), best} if r < oldest)
    for round_ in earlier[:-1]:
        _aside(place, round_).unlink(missing_ok=True)


def _all_aside(place: Path) -> list[int]:
    folder = _aside(place, 0).parent
    return [int(file.name.split("-")[1]) for file in folder.glob("best-*")]


def _aside(place: Path, round_: int) -> Path:
    return place / "checkpoints" / f"best-{round_}"


def _is_of(file: Path, round_: int) -> bool:
    """Return whether a file is whole and the model of a round."""
    try:
        return durable.read(file)[1] == {"round": round_}
    except (FileNotFoundError, durable.Torn):
        return False
