"""Who holds what: divisions of the training samples among clients.

A partition is a function ``f(labels, natural, clients, seed, **knobs)`` that returns
one sorted array of row numbers for each client: no row twice, at least ``minimum`` rows
each, and always the same for the same seed. The knobs' defaults stand in
``conf/partition/NAME.yaml``. The work is done by flwr-datasets' partitioners, and by
two of the same kind in `app.partitioners`.

Here are those that do not look at the classes, and what all have in common; the others
live in `app.by_class`.

Rows are shuffled by the seed before they are divided, so that no division follows the
order of a file.
"""

import functools
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from app.data import Positive
from app.errors import UserError

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

Spread = Annotated[float, Field(ge=0)]


def iid(
    labels: np.ndarray,
    natural: np.ndarray | None,
    clients: int,
    seed: int,
    minimum: Positive = 1,
) -> list[np.ndarray]:
    """Divide at random into equal parts (sizes differ by at most one).

    Parameters
    ----------
    labels : np.ndarray
        Target of each sample, (n,).
    natural : np.ndarray or None
        Natural client of each sample, (n,) integers; only `natural` looks at it.
    clients : int
        Number of parts.
    seed : int
        Decides every draw.
    minimum : int
        Least samples of a client.

    Returns
    -------
    list[np.ndarray]
        Sorted int64 row numbers of each client, disjoint.

    Raises
    ------
    UserError
        If the data cannot give every client ``minimum`` samples.
    """
    from flwr_datasets.partitioner import IidPartitioner

    return divide(lambda: IidPartitioner(clients), labels, clients, seed, minimum)


def natural(
    labels: np.ndarray,
    natural: np.ndarray | None,
    clients: int,
    seed: int,
    surplus: Literal["largest", "group"] = "largest",
    minimum: Positive = 1,
) -> list[np.ndarray]:
    """Keep the clients that the data have by nature: client k is the k-th id.

    Nothing is drawn, so the seed makes no difference. See `iid` for the other
    parameters.

    Parameters
    ----------
    surplus : str
        When the data have more natural clients than ``clients``: keep only the
        ``largest``, in the order of their ids, or ``group`` them so that the groups are
        about equally large.

    Raises
    ------
    UserError
        If the data have no natural clients, or fewer than ``clients``.
    """
    from flwr_datasets.partitioner import GroupedNaturalIdPartitioner

    if natural is None:
        raise UserError(
            "partition=natural: these data have no natural clients; choose another "
            "partition, or data that have them (text, synthetic_*, npz with client)."
        )
    ids, counts = np.unique(natural, return_counts=True)
    if len(ids) < clients:
        raise UserError(
            f"partition=natural: {clients} clients asked, the data have {len(ids)}."
        )
    by_size = np.argsort(-counts, kind="stable")
    owner = np.arange(len(ids))
    if surplus == "largest":
        owner[by_size[clients:]] = -1
    elif len(ids) > clients:
        # Largest first, each to the group that is smallest so far.
        load = np.zeros(clients, dtype=int)
        for place in by_size:
            owner[place] = load.argmin()
            load[owner[place]] += counts[place]
    column = owner[np.searchsorted(ids, natural)]
    rows = np.flatnonzero(column >= 0)

    def make() -> "Partitioner":
        return GroupedNaturalIdPartitioner("label", group_size=1, sort_unique_ids=True)

    parts = divide(make, column[rows], clients, seed, minimum)
    return [rows[part] for part in parts]


def size(
    labels: np.ndarray,
    natural: np.ndarray | None,
    clients: int,
    seed: int,
    sigma: Spread = 1.0,
    minimum: Positive = 1,
) -> list[np.ndarray]:
    """Divide at random into parts of log-normal sizes: like classes, unlike amounts.

    See `iid` for the other parameters.

    Parameters
    ----------
    sigma : float
        Spread of the sizes; 0 makes them equal.

    Raises
    ------
    UserError
        If the data cannot give every client ``minimum`` samples.
    """
    from flwr_datasets.partitioner import SizePartitioner

    enough(len(labels), clients, minimum)
    sizes = lognormal_sizes(len(labels), clients, sigma, minimum, seed).tolist()
    return divide(lambda: SizePartitioner(sizes), labels, clients, seed, minimum)


def divide(
    make: Callable[[], "Partitioner"],
    labels: np.ndarray,
    clients: int,
    seed: int,
    minimum: int,
    hint: str = "take fewer clients",
) -> list[np.ndarray]:
    """Run a partitioner on shuffled rows, and check what it promises."""
    import datasets

    enough(len(labels), clients, minimum)
    order = np.random.default_rng((seed, 1)).permutation(len(labels))
    table = datasets.Dataset.from_dict({"label": labels[order]})
    # All that a partitioner does with the table in the end is to select rows of it. Their
    # numbers are enough: another table for each client takes milliseconds.
    table.select = np.asarray
    table.shard = functools.partial(_shard, len(order))
    try:
        # It warns of each failed attempt; the error below, if any, tells all at once.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            partitioner = make()
            partitioner.dataset = table
            taken = [partitioner.load_partition(k) for k in range(clients)]
    except ValueError as error:
        reason = str(error).strip().split(". ")[0]
        raise UserError(
            f"partition into {clients} clients: {reason}; {hint}."
        ) from error
    parts = [np.sort(order[np.asarray(rows, dtype=np.int64)]) for rows in taken]
    least = min(range(clients), key=lambda k: len(parts[k]))
    if len(parts[least]) < minimum:
        raise UserError(
            f"partition: client {least} gets {len(parts[least])} samples, "
            f"partition.minimum={minimum} are needed; {hint}."
        )
    return parts


def _shard(rows: int, num_shards: int, index: int, contiguous: bool) -> np.ndarray:
    """Return the row numbers of one of equal consecutive parts, as `Dataset.shard` cuts them."""
    size, more = divmod(rows, num_shards)
    start = size * index + min(index, more)
    return np.arange(start, start + size + (index < more))


def enough(rows: int, clients: int, minimum: int) -> None:
    """Raise UserError unless every client can have ``minimum`` rows."""
    if clients < 1:
        raise UserError(f"clients={clients}: at least one client is needed.")
    if rows < clients * minimum:
        raise UserError(
            f"{clients} clients with partition.minimum={minimum} need "
            f"{clients * minimum} "
            f"samples, the training set has {rows}: take fewer clients."
        )


def lognormal_sizes(
    rows: int, clients: int, sigma: float, minimum: int, seed: int
) -> np.ndarray:
    """Return log-normal sizes, at least ``minimum``, that add up to ``rows``."""
    weights = np.random.default_rng((seed, 2)).lognormal(0, sigma, clients)
    # Rounding the cumulated shares, not the shares, keeps the sum exact.
    ends = np.round((rows - clients * minimum) * weights.cumsum() / weights.sum())
    sizes: np.ndarray = minimum + np.diff(ends.astype(np.int64), prepend=0)
    return sizes
