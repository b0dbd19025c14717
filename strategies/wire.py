"""What travels: vectors and reports as Flower records, checked on arrival, and their size.

One message goes to each node in a round, whatever the number of clients that it hosts:

    server -> node   down    theta, buffers, and what the algorithm adds (one array each)
                     order   round, whom to train from which version of memory, whom to evaluate
    node -> server   up      the weighted mean over the node's trained clients (one array each)
                     report  lists with one entry for each client
                     faults  client id -> one line, for those left out

Arrays are decoded without ``numpy.load``: a header that claims more than arrived allocates
nothing, and objects are refused.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from strategies.algorithm import Vectors
from strategies.vector import largest

#: Names of the vectors that FedAvg would send too; the others are an algorithm's own state.
MODEL = frozenset({"theta", "delta", "buffers"})
#: The loss of a model that is not finite: above all others, and a number that means can have.
WORST = 1e30
DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Refused(ValueError):
    """A message that must not be used; the text says why."""


def pack(vectors: Mapping[str, Tensor]) -> ArrayRecord:
    """Return the vectors as a record, one array each; empty ones are left out."""
    return ArrayRecord(
        {
            name: Array(np.ascontiguousarray(vector.detach().cpu().numpy()))
            for name, vector in vectors.items()
            if vector.numel()
        }
    )


def decode(array: Array, size: int) -> np.ndarray:
    """Return the array's numbers, shape (size,), without trusting anything about it.

    Raises
    ------
    Refused
        If it is not a vector of ``size`` float32 or float64 numbers.
    """
    if len(array.data) > 8 * size + 4096:
        raise Refused(f"has {len(array.data)} bytes, too many for {size} numbers")
    return shaped(array, (size,))


def shaped(array: Array, expected: tuple[int, ...] | None = None) -> np.ndarray:
    """Return the array's numbers in the expected shape or, without one, in its own.

    Raises
    ------
    Refused
        If it does not hold exactly the float32 or float64 numbers that its header says.
    """
    stream = io.BytesIO(array.data)
    try:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise Refused(f"is in format {version}, not (1, 0)")
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    except Refused:
        raise
    except Exception as error:
        raise Refused("is not a numpy array") from error
    if dtype not in (np.float32, np.float64):
        raise Refused(f"has dtype {dtype}, expected float32 or float64")
    if expected is not None and shape != expected:
        raise Refused(f"has shape {tuple(shape)}, expected {expected}")
    count = math.prod(shape)
    left = len(array.data) - stream.tell()
    if len(shape) > 8 or min(shape, default=0) < 0 or left != count * dtype.itemsize:
        raise Refused(f"has {len(array.data)} bytes, not what its header says")
    numbers = np.frombuffer(array.data, dtype, count, stream.tell())
    return numbers.reshape(shape).copy()


def unpack(
    record: ArrayRecord, sizes: Mapping[str, int], dtype: torch.dtype
) -> Vectors:
    """Return exactly the expected vectors of a record.

    Parameters
    ----------
    record : ArrayRecord
        What arrived.
    sizes : mapping of str to int
        The names that must be there, and their lengths.
    dtype : torch.dtype
        The dtype to return.

    Raises
    ------
    Refused
        If a name is missing or not expected, or a vector has another length or dtype, or holds
        NaN or infinity.
    """
    wanted = {name for name, size in sizes.items() if size}
    if record.keys() != wanted:
        missing = sorted(wanted - record.keys())
        extra = sorted(record.keys() - wanted)
        raise Refused(f"wrong keys: missing {missing}, not expected {extra}"[:300])
    vectors = {name: torch.zeros(0, dtype=dtype) for name in sizes}
    for name in wanted:
        try:
            numbers = decode(record[name], sizes[name])
        except Refused as error:
            raise Refused(f"{name} {error}") from None
        vectors[name] = torch.from_numpy(numbers).to(dtype)
        if not bool(torch.isfinite(vectors[name]).all()):
            raise Refused(f"{name} holds NaN or infinity")
    return vectors


def limit(vectors: Vectors) -> None:
    """Refuse vectors that may be longer than the largest norm."""
    for name, vector in vectors.items():
        most = float(vector.abs().max()) if len(vector) else 0.0
        if most * len(vector) ** 0.5 > largest(vector.dtype):
            raise Refused(
                f"{name} has numbers up to {most:.1e}: sums with them would overflow"
            )


def weigh(content: RecordDict) -> dict[str, int]:
    """Return the payload bytes of a message: of the model, of state, of metrics and orders.

    The count is of the values and their names, not of the protocol around them, so it is the same
    in every runtime.
    """
    size = {"model": 0, "state": 0, "metrics": 0}
    for record in content.values():
        for name, value in record.items():
            if name == "state_dir":  # where a simulation keeps memories is no traffic
                continue
            if isinstance(value, Array):
                kind = "model" if name in MODEL else "state"
                size[kind] += len(value.data) + len(name)
                continue
            values = value if isinstance(value, list) else [value]
            # A record's list is of one type, and most are long lists of numbers.
            if values and isinstance(values[0], str | bytes):
                bytes_ = sum(len(v) for v in values if isinstance(v, str | bytes))
            else:
                bytes_ = 8 * len(values)
            size["metrics"] += len(name) + bytes_
    return size


def add_bytes(total: dict[str, int], part: Mapping[str, int]) -> None:
    """Add bytes by kind."""
    for name, value in part.items():
        total[name] = total.get(name, 0) + value


def numbers(record: MetricRecord, name: str, length: int) -> list[float]:
    """Return a list of finite numbers of a report, one for each client.

    Raises
    ------
    Refused
        If it is missing, not a list of that length, or holds NaN or infinity.
    """
    values = record.get(name)
    if not isinstance(values, list) or len(values) != length:
        raise Refused(f"report: {name} must be a list of {length} numbers")
    array = np.array(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise Refused(f"report: {name} holds NaN or infinity")
    found: list[float] = array.tolist()
    return found


def measured(
    record: MetricRecord, names: Sequence[str], length: int
) -> dict[str, list[float]]:
    """Return what clients measured, by name, one number for each client.

    Raises
    ------
    Refused
        If one is no number, an accuracy is no share, or a loss is beyond what means can have.
    """
    found = {name: numbers(record, name, length) for name in names}
    for name, values in found.items():
        least, most = (0.0, 1.0) if name.endswith("accuracy") else (-WORST, WORST)
        if not all(least <= v <= most for v in values):
            raise Refused(f"report: {name} is impossible")
    return found


def ids(record: MetricRecord, name: str) -> list[int]:
    """Return a list of client ids of a report, or raise Refused."""
    values = record.get(name)
    if not isinstance(values, list) or not all(type(v) is int for v in values):
        raise Refused(f"report: {name} must be a list of client ids")
    return [int(v) for v in values]


def reasons(record: ConfigRecord) -> dict[int, str]:
    """Return the faults that a node reports, by client, each one line of at most 300 letters."""
    found = {}
    for key, value in record.items():
        if not (
            key.isascii() and key.isdigit() and len(key) < 10 and isinstance(value, str)
        ):
            raise Refused("faults: not a mapping of client ids to text")
        found[int(key)] = " ".join(value.split())[:300]
    return found


def cause(reply: Message) -> str:
    """Return the reason of an error reply as a line of at most 300 letters: a node wrote it."""
    return " ".join(str(reply.error.reason).split())[:300]
