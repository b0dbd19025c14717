"""pfl, Apple's simulator, on the same work: `python -m torch.distributed.run ... bench/pfl_app.py`.

Its own FedAvg, backend and data sets, tensors in memory, two processes, evaluation at the end
alone. The extra ``bench`` installs it.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.internal.ops import pytorch_ops
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from app.config import load
from app.host import objective, setting
from bench.workloads import ALL


class Wrapped(nn.Module):
    """A model with the two methods that pfl asks for."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss of a batch."""
        self.module.train()
        return F.cross_entropy(self.module(x), y)

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        """Return nothing: the benchmark evaluates at the end."""
        return {}


class Stamps(TrainingProcessCallback):
    """Notes when each round ends."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: Any, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """Note the time."""
        self.times.append(time.perf_counter())
        return False, Metrics()


def run(name: str, rounds: int) -> dict[str, Any]:
    """Train a workload and return the seconds of each round and the final accuracy."""
    torch.set_num_threads(1)
    np.random.seed(0)
    overrides = tuple(ALL[name].overrides)
    config, here = load(overrides), setting(overrides)
    train, test = here.dataset.train, here.dataset.test
    rows = [torch.from_numpy(part) for part in here.parts]

    @functools.cache
    def client(k: int) -> PyTorchTensorDataset:
        return PyTorchTensorDataset((train.x[rows[k]], train.y[rows[k]]), user_id=k)

    users = get_user_sampler("minimize_reuse", list(range(config.clients)))
    wrapped = Wrapped(objective(config, here.dataset).module)
    model = PyTorchModel(
        wrapped, torch.optim.SGD, torch.optim.SGD(wrapped.parameters(), lr=1.0)
    )
    stamps = Stamps()
    FederatedAveraging().run(
        backend=SimulatedBackend(FederatedDataset(client, users), None),
        model=model,
        # pfl evaluates in the rounds that are a multiple of the frequency, 0 among them.
        algorithm_params=NNAlgorithmParams(rounds, 10**9, config.clients_per_round, 0),
        model_train_params=NNTrainHyperParams(
            local_batch_size=config.local.batch,
            local_num_epochs=config.local.epochs,
            local_learning_rate=ALL[name].lr,
        ),
        callbacks=[stamps],
        send_metrics_to_platform=False,
    )
    wrapped.module.eval()
    with torch.no_grad():
        hits = (wrapped.module(test.x).argmax(-1) == test.y).double().mean()
    seconds = [b - a for a, b in pairwise(stamps.times)]
    return {"seconds": seconds, "accuracy": float(hits)}


if __name__ == "__main__":
    found = run(sys.argv[1], int(sys.argv[2]))
    if pytorch_ops.distributed.global_rank == 0:
        print(json.dumps(found), flush=True)
