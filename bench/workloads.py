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


def drawn(clients: int, *settings: str) -> tuple[str, ...]:
    """Return the settings of clients of 50 synthetic samples each, all of them in each round."""
    return (
        "data=synthetic_feddyn",
        "data.dimension=60",
        "data.classes=10",
        f"data.clients={clients}",
        "data.average_samples=50",
        "partition=natural",
        f"clients={clients}",
        f"clients_per_round={clients}",
        "local.epochs=1",
        *settings,
    )


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
            drawn(1000, "model=linear"),
            0.5,
        ),
    )
}
#: How cost grows: with the clients, and with the parameters (in millions) of ten clients.
GROWTH = {
    **{
        f"C{n}": Workload(
            f"C{n}", f"logistic 60-10, {n:,} clients", drawn(n, "model=linear"), 0.5
        )
        for n in (10, 100, 1000, 10000)
    },
    **{
        f"P{millions:g}": Workload(
            f"P{millions:g}",
            f"MLP of {millions:g} million parameters, 10 clients",
            # 60 inputs, 10 outputs and their biases make 71 parameters for a hidden unit.
            drawn(10, "model=mlp", f"model.hidden=[{round(millions * 1e6 / 71)}]"),
            0.1,
        )
        for millions in (0.1, 1.0, 10.0)
    },
}
ALL = WORKLOADS | GROWTH
