"""Two published ways of dividing data that flwr-datasets lacks, as its `Partitioner`.

`app.partition` is the way in. This module is apart from it because importing
flwr-datasets takes seconds, which only those who divide data should pay.
"""

from abc import abstractmethod

import datasets
import numpy as np
from flwr_datasets.partitioner import Partitioner

from app.errors import UserError


class IndexPartitioner(Partitioner):  # type: ignore[misc]
    """A partitioner that is one function from labels to lists of row numbers."""

    def __init__(self, num_partitions: int, partition_by: str, seed: int) -> None:
        super().__init__()
        self._num_partitions = num_partitions
        self._partition_by = partition_by
        self._seed = seed
        self._rows: list[np.ndarray] | None = None

    @abstractmethod
    def divide(self, labels: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        """Return the row numbers of each partition, given the label of each row."""

    def load_partition(self, partition_id: int) -> datasets.Dataset:
        """Return one partition; the first call divides the data."""
        if self._rows is None:
            labels = np.asarray(self.dataset[self._partition_by])
            self._rows = self.divide(labels, np.random.default_rng(self._seed))
        return self.dataset.select(self._rows[partition_id])

    @property
    def num_partitions(self) -> int:
        """Number of partitions."""
        return self._num_partitions


class BalancedDirichletPartitioner(IndexPartitioner):
    """The per-client Dirichlet division of Acar et al. 2021.

    Each client has its own mix of classes p_k ~ Dir(alpha) and a fixed size. Until all
    are full, a random client that is not full draws a class from p_k, and takes a
    random sample of it. Late clients find some classes empty, so that their mix
    deviates from p_k: the price of exact sizes.

    Parameters
    ----------
    sizes : np.ndarray
        Number of samples of each client; their sum is at most the number of rows.
    partition_by : str
        Column of the class.
    alpha : float
        Concentration: small means few classes for each client.
    seed : int
        Seed of every draw.
    """

    def __init__(
        self, sizes: np.ndarray, partition_by: str, alpha: float, seed: int
    ) -> None:
        super().__init__(len(sizes), partition_by, seed)
        self._sizes = sizes
        self._alpha = alpha

    def divide(self, labels: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        """Return the row numbers of each partition, given the label of each row."""
        classes = np.unique(labels)
        pools = [rng.permutation(np.flatnonzero(labels == c)).tolist() for c in classes]
        mixes = rng.dirichlet(np.full(len(classes), self._alpha), len(self._sizes))
        cumulative = _cumulative(mixes, pools)
        room = self._sizes.tolist()
        filling = [client for client, size in enumerate(room) if size > 0]
        rows: list[list[int]] = [[] for _ in room]
        draws = rng.random((sum(room), 2))
        for which, what in draws:
            place = int(which * len(filling))
            client = filling[place]
            pool = pools[int(cumulative[client].searchsorted(what, side="right"))]
            rows[client].append(pool.pop())
            room[client] -= 1
            if room[client] == 0:
                filling[place] = filling[-1]
                filling.pop()
            if not pool:
                # The published loop draws again until it meets a class that is left,
                # which may take forever; drawing from what is left is the same law.
                cumulative = _cumulative(mixes, pools)
        return [np.array(chosen, dtype=np.int64) for chosen in rows]


def _cumulative(mixes: np.ndarray, pools: list[list[int]]) -> np.ndarray:
    """Return each client's distribution function over the classes that are left."""
    left = np.array([len(pool) for pool in pools])
    weights = mixes * (left > 0)
    # A client may want only classes that are gone: it then takes what there is.
    weights[weights.sum(axis=1) < 1e-300] = left
    totals = weights.cumsum(axis=1)
    last = int(np.flatnonzero(left)[-1]) if left.any() else 0
    totals /= np.maximum(totals[:, -1:], 1e-300)
    # Rounding must not let a draw near 1 fall on an empty class at the end.
    totals[:, last:] = 1.0
    return totals


class LabelsPartitioner(IndexPartitioner):
    """The k-labels-per-client, power-law division of Elbakary et al. 2024.

    Client u owns the classes (u + j) mod C, j < k. It first takes ``base`` samples of
    each. Then, for each owned class, it asks for share * randint(1, 10) + randint(10,
    200) + 200 more, where the shares of a class are log-normal and add up to its size;
    it gets them only if strictly more are left. Samples that nobody gets stay unused.

    Parameters
    ----------
    num_partitions : int
        Number of clients.
    partition_by : str
        Column of the class.
    labels : int
        Classes of each client, k.
    base : int
        Samples of each owned class that every client gets.
    sigma : float
        Spread of the log-normal shares.
    seed : int
        Seed of every draw.
    """

    def __init__(
        self,
        num_partitions: int,
        partition_by: str,
        labels: int,
        base: int,
        sigma: float,
        seed: int,
    ) -> None:
        super().__init__(num_partitions, partition_by, seed)
        self._labels = labels
        self._base = base
        self._sigma = sigma

    def divide(self, labels: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        """Return the row numbers of each partition, given the label of each row."""
        classes = np.unique(labels)
        count, clients, own = len(classes), self.num_partitions, self._labels
        if own > count:
            raise UserError(
                f"partition.labels_per_client={own}: the data have {count} classes."
            )
        pools = [rng.permutation(np.flatnonzero(labels == c)) for c in classes]
        owned = [[(u + j) % count for j in range(own)] for u in range(clients)]
        taken = np.zeros(count, dtype=int)
        rows: list[list[np.ndarray]] = [[] for _ in range(clients)]

        def take(client: int, label: int, number: int) -> None:
            rows[client].append(pools[label][taken[label] : taken[label] + number])
            taken[label] += number

        need = self._base * np.bincount(np.concatenate(owned), minlength=count)
        for label, pool in enumerate(pools):
            if need[label] > len(pool):
                raise UserError(
                    f"partition.base={self._base} needs {need[label]} samples of class "
                    f"{classes[label]} for {clients} clients, the data have "
                    f"{len(pool)}: "
                    "lower it, labels_per_client, or the number of clients."
                )
        for client, mine in enumerate(owned):
            for label in mine:
                take(client, label, self._base)
        shares = rng.lognormal(0, self._sigma, (count, clients, own))
        left = np.array([max(len(pool) - clients, 0) for pool in pools])
        shares *= left[:, None, None] / shares.sum(axis=(1, 2), keepdims=True)
        # The published code lets neighbouring clients share a row of shares.
        row = max(clients // count, 1)
        for client, mine in enumerate(owned):
            for j, label in enumerate(mine):
                extra = int(shares[label, client // row, j]) * int(rng.integers(1, 11))
                extra += int(rng.integers(10, 201)) + 200
                if taken[label] + extra < len(pools[label]):
                    take(client, label, extra)
        return [np.concatenate(parts) for parts in rows]
