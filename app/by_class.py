"""Divisions of the training samples by class: each client has its own mix of classes.

They are partitions as `app.partition` describes them, and their labels must be classes.
"""

from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from app.data import Positive
from app.errors import UserError
from app.partition import Spread, divide, enough, lognormal_sizes

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

Concentration = Annotated[float, Field(gt=0)]


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
    every client has ``minimum`` samples. See `app.partition.iid` for the other
    parameters.

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
    return divide(make, _classes(labels), clients, seed, minimum, hint)


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
    the remainder; here sizes then differ by one. See `app.partition.iid` for the other
    parameters.

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

    enough(len(labels), clients, minimum)
    sizes = lognormal_sizes(len(labels), clients, sigma, minimum, seed)

    def make() -> "Partitioner":
        return BalancedDirichletPartitioner(sizes, "label", alpha, seed)

    return divide(make, _classes(labels), clients, seed, minimum)


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
    that no client has stays unused. See `app.partition.iid` for the other parameters.

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
    return divide(make, labels, clients, seed, minimum, hint)


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

    Not every sample is used: see `app.partitioners.LabelsPartitioner`, and
    `app.partition.iid` for the other parameters.

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

    return divide(make, _classes(labels), clients, seed, minimum)


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


def _classes(labels: np.ndarray) -> np.ndarray:
    if labels.dtype.kind not in "iu":
        raise UserError(
            "this partition divides by class, but the targets are real numbers: choose "
            "partition=iid, size or natural."
        )
    return labels
