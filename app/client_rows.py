"""The lines of ``clients.csv``: one for each client that trained or judged in a round.

A line is a row, always, so that one that was torn when a run died is told by its missing
line end.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CLIENTS = "clients.csv"
COLUMNS = (
    "round",
    "client",
    "node",
    "role",
    "split",
    "samples",
    "loss",
    "accuracy",
    "validation_loss",
    "validation_accuracy",
    "train_loss",
    "steps",
    "gradients",
    "seconds",
    "metrics",
    "error",
)
HEADER = ",".join(COLUMNS) + "\n"
_NUMBERS = {int, float, type(None)}


def lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return one line for each row; missing values stay empty.

    Raises
    ------
    ValueError
        If a row has a column that the file has not.
    """
    unknown = {key for row in rows for key in row} - set(COLUMNS)
    if unknown:
        raise ValueError(f"{CLIENTS} has no column {sorted(unknown)}")
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [v if type(v) in _NUMBERS else _cell(v) for v in map(row.get, COLUMNS)]
        for row in rows
    )
    return text.getvalue()


def until(file: Path, last_round: int) -> str:
    """Return a file's header and its whole lines up to a round; a header if it is not there."""
    if not file.exists():
        return HEADER
    whole = file.read_text(encoding="utf-8", errors="replace").split("\n")[1:-1]
    rounds = [(line, line.split(",", 1)[0]) for line in whole]
    kept = [line for line, r in rounds if r.isdecimal() and int(r) <= last_round]
    return HEADER + "".join(f"{line}\n" for line in kept)


def _cell(value: Any) -> Any:
    """Return a value as one cell: text on one line, metrics as ``name=value name=value``."""
    if isinstance(value, Mapping):
        return " ".join(f"{name}={number:.6g}" for name, number in value.items())
    return " ".join(value.split()) if isinstance(value, str) else value
