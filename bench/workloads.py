"""The workloads that are timed: what they train, as settings and as plain numbers.

W1 to W3 take MNIST (``FEDGRAD_DATA`` names the folder that holds ``MNIST/raw``); W4 draws its own.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """One federated training.

    Attributes
    ----------
    name, what : str
        Its short name, and what it is.
    settings : tuple of str
        As Hydra overrides; data, model, clients, and length of training.
    lr : float
        Learning rate of plain SGD.
    """

    name: str
    what: str
    settings: tuple[str, ...]
    lr: float

    @property
    def overrides(self) -> list[str]:
        """All settings of a run: FedAvg, plain SGD, evaluation at the end alone."""
        return [
            *self.settings,
            f"optimizer.lr={self.lr}",
            "strategy=fedavg",
            "local.clip=0",
            "evaluate_every=0",
            "evaluate_clients=none",
            "device=cpu",
        ]


MNIST = ("data=mnist", "partition=iid", "clients=100")
WORKLOADS = {
    w.name: w
    for w in (
        Workload(
            "W1",
            "logistic 784-10, 100 of 100 clients, 1 epoch, batch 10",
            (*MNIST, "model=linear", "clients_per_round=100", "local.epochs=1"),
            0.05,
        ),
        Workload(
            "W2",
            "MLP 784-200-200-10, 10 of 100 clients, 5 epochs, batch 50",
            (*MNIST, "model=mlp_200", "clients_per_round=10", "local.batch=50"),
            0.1,
        ),
        Workload(
            "W3",
            "CNN 5x5(32)-5x5(64)-512-10, 10 of 100 clients, 1 epoch, batch 50",
            (
                *MNIST,
                "model=cnn_mnist",
                "clients_per_round=10",
                "local.epochs=1",
                "local.batch=50",
            ),
            0.1,
        ),
        Workload(
            "W4",
            "logistic 60-10, 1,000 of 1,000 clients of 50 samples, 1 epoch, batch 10",
            (
                "data=synthetic_feddyn",
                "data.dimension=60",
                "data.classes=10",
                "data.clients=1000",
                "data.average_samples=50",
                "partition=natural",
                "model=linear",
                "clients=1000",
                "clients_per_round=1000",
                "local.epochs=1",
            ),
            0.5,
        ),
    )
}
