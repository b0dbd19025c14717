"""FedAvg the way Flower's quickstart does it: a node for each client, a DataLoader, a module.

The data, the partition, the model and the settings are those of the benchmark's workloads; how
they are trained and sent is Flower's own strategy and the quickstart's client.
"""

import json
import sys
import time
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

client = ClientApp()
server = ServerApp()


@lru_cache(maxsize=1)
def prepared(root: str, name: str):
    """Return settings, data and partition, loaded once in each process."""
    sys.path.insert(0, root)
    from app.config import load
    from app.host import setting
    from bench.workloads import ALL

    overrides = tuple(ALL[name].overrides)
    return load(overrides), setting(overrides), ALL[name].lr


def model(root: str, name: str):
    """Return a new model."""
    config, here, _ = prepared(root, name)
    from app.host import objective

    return objective(config, here.dataset).module


@client.train()
def train(message: Message, context: Context) -> Message:
    """Train one client."""
    root, name = context.run_config["root"], context.run_config["workload"]
    config, here, lr = prepared(root, name)
    rows = here.parts[context.node_config["partition-id"]]
    data = here.dataset.train
    loader = DataLoader(
        TensorDataset(data.x[rows], data.y[rows]), config.local.batch, shuffle=True
    )
    module = model(root, name)
    module.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(module.parameters(), lr=lr)
    module.train()
    total = 0.0
    for _ in range(config.local.epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(module(x), y)
            loss.backward()
            optimizer.step()
            total += loss.item()
    metrics = MetricRecord({"train_loss": total, "num-examples": len(rows)})
    arrays = ArrayRecord(module.state_dict())
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run FedAvg and write the seconds of each round and the final accuracy."""
    given = context.run_config
    root, name, rounds = given["root"], given["workload"], given["rounds"]
    config, here, _ = prepared(root, name)
    strategy = FedAvg(
        fraction_train=config.clients_per_round / config.clients,
        fraction_evaluate=0.0,
        min_available_nodes=config.clients,
        min_evaluate_nodes=0,
    )
    stamps = []

    def stamp(_: int, __: ArrayRecord) -> None:
        stamps.append(time.perf_counter())

    module = model(root, name)
    result = strategy.start(
        grid, ArrayRecord(module.state_dict()), rounds, evaluate_fn=stamp
    )
    module.load_state_dict(result.arrays.to_torch_state_dict())
    module.eval()
    test = here.dataset.test
    with torch.no_grad():
        hits = (module(test.x).argmax(-1) == test.y).double().mean()
    seconds = [b - a for a, b in pairwise(stamps)]
    text = json.dumps({"seconds": seconds, "accuracy": float(hits)})
    Path(given["out"]).write_text(text)
