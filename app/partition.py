"""Who holds what: divisions of the training samples among clients.

A partition is a function ``f(labels, natural, clients, seed, **knobs)`` that returns
one sorted array of row numbers for each client: no row twice, at least ``minimum`` rows
each, and always the same for the same seed. The knobs' defaults stand in
``conf/partition/NAME.yaml``. The work is done by flwr-datasets' partitioners, and by
two of the same kind in `app.partitioners`.

Rows are shuffled by the seed before they are divided, so that no division follows the
order of a file.
"""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from app.data import Positive
from app.errors import UserError

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

Concentration = Annotated[float, Field(gt=0)]
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

    return _divide(lambda: IidPartitioner(clients), labels, clients, seed, minimum)


def dirichlet(
    labels: np.ndarray,
    natural: np.ndarray | None,
    clients: int,
    seed: int,
    alpha: Concentration = 0.1,
    minimum: Positive = 1,
) -> list[np.ndarray]:
    """Divide each class among the clients by shares ~ Dir(alpha) (Hsu et al. 2019).

    Sizes differ from client to client. Shares are drawn again, ten times at most, until
    every client has ``minimum`` samples. See `iid` for the other parameters.

    Parameters
    ----------
    alpha : float
        Concentration: small means few classes, and unequal sizes.

    Raises
    ------
    UserError
        If the labels are no classes, or ``minimum`` cannot be met.
    """
    from flwr_datasets.partitioner import DirichletPartitioner

    def make() -> "Partitioner":
        return DirichletPartitioner(
            clients, "label", alpha, minimum, shuffle=False, seed=seed
        )

    hint = f"raise partition.alpha={alpha} or take fewer clients"
    return _divide(make, _classes(labels), clients, seed, minimum, hint)


def dirichlet_balanced(
    labels: np.ndarray,
    natural: np.ndarray | None,
    clients: int,
    seed: int,
    alpha: Concentration = 0.1,
    sigma: Spread = 0.0,
    minimum: Positive = 1,
) -> list[np.ndarray]:
    """Give each client its own Dir(alpha) mix of classes at a set size.

    The division of Acar et al. 2021. Where clients does not divide n, their code drops
    the remainder; here sizes then differ by one. See `iid` for the other parameters.

    Parameters
    ----------
    alpha : float
        Concentration: small means few classes.
    sigma : float
        Spread of the log-normal sizes; 0 makes them equal.

    Raises
    ------
    UserError
        If the labels are no classes, or there are too few samples.
    """
    from app.partitioners import BalancedDirichletPartitioner

    _enough(len(labels), clients, minimum)
    sizes = _sizes(len(labels), clients, sigma, minimum, seed)

    def make() -> "Partitioner":
        return BalancedDirichletPartitioner(sizes, "label", alpha, seed)

    return _divide(make, _classes(labels), clients, seed, minimum)


def shards(
    labels: np.ndarray,
    natural: np.ndarray | None,
    clients: int,
    seed: int,
    classes_per_client: Positive = 2,
    assignment: Literal[
        "first-deterministic", "deterministic", "random"
    ] = "first-deterministic",
    minimum: Positive = 1,
) -> list[np.ndarray]:
    """Give each client samples of a few classes only (after McMahan et al. 2017).

    The samples of a class are divided equally among the clients that have it; a class
    that no client has stays unused. See `iid` for the other parameters.

    Parameters
    ----------
    classes_per_client : int
        Number of classes of each client.
    assignment : str
        Client k has class k mod C and random others (``first-deterministic``), classes
        k, k+1, ... mod C (``deterministic``), or random ones (``random``).

    Raises
    ------
    UserError
        If the labels are no classes, there are fewer classes than
        ``classes_per_client``, or a class has too few samples.
    """
    from flwr_datasets.partitioner import PathologicalPartitioner

    kinds = len(np.unique(_classes(labels)))
    if classes_per_client > kinds:
        raise UserError(
            f"partition.classes_per_client={classes_per_client}: the data have {kinds}."
        )

    def make() -> "Partitioner":
        return PathologicalPartitioner(
            clients, "label", classes_per_client, assignment, shuffle=False, seed=seed
        )

    hint = "lower partition.classes_per_client or take fewer clients"
    return _divide(make, labels, clients, seed, minimum, hint)


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

    parts = _divide(make, column[rows], clients, seed, minimum)
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

    _enough(len(labels), clients, minimum)
    sizes = _sizes(len(labels), clients, sigma, minimum, seed).tolist()
    return _divide(lambda: SizePartitioner(sizes), labels, clients, seed, minimum)


def k_labels(
    labels: np.ndarray,
    natural: np.ndarray | None,
    clients: int,
    seed: int,
    labels_per_client: Positive = 3,
    base: Positive = 10,
    sigma: Spread = 2.0,
    minimum: Positive = 1,
) -> list[np.ndarray]:
    """Give each client a few classes and power-law amounts (Elbakary et al. 2024).

    Not every sample is used: see `app.partitioners.LabelsPartitioner`, and `iid` for
    the other parameters.

    Parameters
    ----------
    labels_per_client : int
        Client u has the classes u, u+1, ... (mod C), so many of them.
    base : int
        Samples of each of its classes that every client gets first.
    sigma : float
        Spread of the log-normal shares of the rest.

    Raises
    ------
    UserError
        If the labels are no classes, or are too few for ``labels_per_client`` or
        ``base``.
    """
    from app.partitioners import LabelsPartitioner

    def make() -> "Partitioner":
        return LabelsPartitioner(clients, "label", labels_per_client, base, sigma, seed)

    return _divide(make, _classes(labels), clients, seed, minimum)


def label_counts(
    labels: np.ndarray, parts: list[np.ndarray], classes: int
) -> np.ndarray:
    """Count the samples of each class that each client holds.

    Parameters
    ----------
    labels : np.ndarray
        Class of each sample, (n,) integers.
    parts : list[np.ndarray]
        Row numbers of each client.
    classes : int
        Number of classes.

    Returns
    -------
    np.ndarray
        (clients, classes) int64.
    """
    return np.stack([np.bincount(labels[part], minlength=classes) for part in parts])


def _divide(
    make: Callable[[], "Partitioner"],
    labels: np.ndarray,
    clients: int,
    seed: int,
    minimum: int,
    hint: str = "take fewer clients",
) -> list[np.ndarray]:
    """Run a partitioner on shuffled rows, and check what it promises."""
    import datasets

    _enough(len(labels), clients, minimum)
    order = np.random.default_rng((seed, 1)).permutation(len(labels))
    table = datasets.Dataset.from_dict({"label": labels[order], "row": order})
    try:
        # It warns of each failed attempt; the error below, if any, tells all at once.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            partitioner = make()
            partitioner.dataset = table
            loaded = [partitioner.load_partition(k) for k in range(clients)]
    except ValueError as error:
        reason = str(error).strip().split(". ")[0]
        raise UserError(
            f"partition into {clients} clients: {reason}; {hint}."
        ) from error
    parts = [np.sort(part.with_format("numpy")["row"][:]) for part in loaded]
    least = min(range(clients), key=lambda k: len(parts[k]))
    if len(parts[least]) < minimum:
        raise UserError(
            f"partition: client {least} gets {len(parts[least])} samples, "
            f"partition.minimum={minimum} are needed; {hint}."
        )
    return parts


def _enough(rows: int, clients: int, minimum: int) -> None:
    if clients < 1:
        raise UserError(f"clients={clients}: at least one client is needed.")
    if rows < clients * minimum:
        raise UserError(
            f"{clients} clients with partition.minimum={minimum} need "
            f"{clients * minimum} "
            f"samples, the training set has {rows}: take fewer clients."
        )


def _classes(labels: np.ndarray) -> np.ndarray:
    if labels.dtype.kind not in "iu":
        raise UserError(
            "this partition divides by class, but the targets are real numbers: choose "
            "partition=iid, size or natural."
        )
    return labels


def _sizes(
    rows: int, clients: int, sigma: float, minimum: int, seed: int
) -> np.ndarray:
    """Return log-normal sizes, at least ``minimum``, that add up to ``rows``."""
    weights = np.random.default_rng((seed, 2)).lognormal(0, sigma, clients)
    # Rounding the cumulated shares, not the shares, keeps the sum exact.
    ends = np.round((rows - clients * minimum) * weights.cumsum() / weights.sum())
    sizes: np.ndarray = minimum + np.diff(ends.astype(np.int64), prepend=0)
    return sizes
