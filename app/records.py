"""Reading what a run recorded: the round records, the summary, and numbers out of them.

A round record is one JSON line of ``metrics.jsonl``. A metric in it is named as in
TensorBoard: the keys joined by ``/``, for example ``clients/accuracy_mean``. Nothing
here needs torch, so that comparing runs starts at once.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.errors import UserError

Records = Sequence[Mapping[str, Any]]
Floats = NDArray[np.float64]

ROUNDS = "metrics.jsonl"
SUMMARY = "summary.json"
AXES = ("rounds", "bytes", "links", "seconds", "gradients")


def read_rounds(path: Path) -> list[dict[str, Any]]:
    """Read the round records of a run.

    A last line that is not whole, because the process died while it wrote, is left out.

    Parameters
    ----------
    path : Path
        The run directory.

    Returns
    -------
    list of dict
        In the order written; a value that was NaN or infinite is None.

    Raises
    ------
    UserError
        If there is no such file, or a line before the last is not a JSON object.
    """
    file = Path(path) / ROUNDS
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from error
    written = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    records: list[dict[str, Any]] = []
    for number, line in written:
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or "round" not in record:
                raise ValueError("no round record")
        except ValueError as error:
            if number == written[-1][0]:
                break
            raise UserError(f"{file}, line {number}: not a round record.") from error
        records.append(record)
    return records


def read_summary(path: Path) -> dict[str, Any] | None:
    """Read the summary of a run, or return None if the run did not finish.

    Raises
    ------
    UserError
        If the file is there and is not a JSON object.
    """
    file = Path(path) / SUMMARY
    try:
        summary = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON.") from error
    if not isinstance(summary, dict):
        raise UserError(f"{file}: holds no JSON object.")
    return summary


def lookup(record: Mapping[str, Any], metric: str) -> Any:
    """Return the value at the keys of ``metric`` (joined by ``/``), None if absent."""
    value: Any = record
    for key in metric.split("/"):
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value


def scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the finite numbers of a record, each with its keys joined by ``/``."""
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{key}/")
        elif isinstance(value, (bool, int, float)) and math.isfinite(value):
            yield f"{prefix}{key}", float(value)


def traffic(record: Mapping[str, Any], *directions: str) -> float:
    """Return the bytes of one round, over all kinds, in ``down``, ``up`` or both."""
    return float(
        sum(
            value or 0
            for direction in directions or ("down", "up")
            for value in (lookup(record, f"bytes/{direction}") or {}).values()
        )
    )


def cumulative(records: Records, axis: str) -> Floats:
    """Return where each record stands on an axis.

    Parameters
    ----------
    records : sequence of dict
        Round records in order.
    axis : str
        ``rounds`` (the round number), ``bytes``, ``links`` (bytes that a network's links
        would carry), ``seconds`` or ``gradients`` (sums from the first record up to this
        one, in the recorded unit).

    Returns
    -------
    ndarray
        One number for each record.

    Raises
    ------
    ValueError
        If the axis is none of these.
    """
    if axis == "rounds":
        return np.array([record["round"] for record in records], dtype=float)
    if axis == "bytes":
        spent = [traffic(record) for record in records]
    elif axis == "links":
        spent = [
            float(lookup(record, "strategy/link_bytes") or 0) for record in records
        ]
    elif axis == "seconds":
        spent = [float(lookup(record, "seconds/round") or 0) for record in records]
    elif axis == "gradients":
        spent = [float(record.get("gradients") or 0) for record in records]
    else:
        raise ValueError(f"axis {axis!r} is none of {', '.join(AXES)}")
    return np.cumsum(np.array(spent, dtype=float))


def series(
    records: Records, metric: str, axis: str = "rounds"
) -> tuple[Floats, Floats]:
    """Return one metric against one axis, at the rounds that evaluated it.

    A value recorded as null was evaluated and not finite: it comes back as NaN.
    """
    *parents, last = metric.split("/")
    here, values = [], []
    for place, record in enumerate(records):
        holder = lookup(record, "/".join(parents)) if parents else record
        if isinstance(holder, Mapping) and last in holder:
            value = holder[last]
            here.append(place)
            values.append(float(value) if isinstance(value, (int, float)) else math.nan)
    at = np.array(here, dtype=int)
    return cumulative(records, axis)[at], np.array(values, dtype=float)


def falls(metric: str) -> bool:
    """Return whether a metric is better when smaller: any loss or error is."""
    return "loss" in metric or "error" in metric


def plain(value: Any, *, finite: bool) -> Any:
    """Return a value as plain Python, ready for JSON or YAML.

    Parameters
    ----------
    value : object
        Mappings, sequences, sets, scalars, paths, enums, arrays or tensors, nested.
    finite : bool
        Whether NaN and infinities become None, since JSON has no word for them.
    """
    if isinstance(value, Mapping):
        return {
            key if isinstance(key, str) else str(key): plain(item, finite=finite)
            for key, item in value.items()
        }
    if isinstance(value, Enum):
        return plain(value.value, finite=finite)
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value) if isinstance(value, (set, frozenset)) else value
        return [plain(item, finite=finite) for item in items]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) or not finite else None
    if isinstance(value, PurePath):
        return str(value)
    if hasattr(value, "tolist"):  # numpy and torch, scalars and arrays alike
        return plain(value.tolist(), finite=finite)
    raise TypeError(f"cannot record a {type(value).__name__}: {value!r}")


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a file whole or not at all: neither a reader nor a power failure sees half of it."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
