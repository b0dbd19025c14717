"""The Flower ClientApp: what a node does with a message.

One handler serves training and evaluation: the message names the clients to train, each with the
version of its memory, and the clients that evaluate the received model. A client that fails is
named in the reply and left out of its mean.
"""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any, cast

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from app.config import from_run_config, load
from app.host import Samples, hosted, objective, samples, setting, trainer
from app.store import ContextStore, DirectoryStore, Store, recall, remember
from strategies.algorithm import Client, Vectors
from strategies.federation import probe_direction
from strategies.local import Mean, Trainer, fault, train
from strategies.wire import pack, unpack

app = ClientApp()


class Node:
    """A node's view of a run: its clients, their samples, and how to train them."""

    def __init__(self, context: Context) -> None:
        self.overrides = tuple(from_run_config(context.run_config))
        self.config = load(self.overrides)
        self.node = context.node_config
        total = self.config.clients + self.config.holdout_clients
        self.ids = hosted(self.node, total)
        torch.set_num_threads(self.config.threads)

    def samples(self, k: int) -> Samples:
        """Return the samples of hosted client k."""
        return samples(self.node, self.ids, self.overrides, k)

    def trainer(self) -> Trainer:
        """Return the run's trainer, built once for each process."""
        return _trainer(self.overrides)

    def store(self, context: Context, directory: str) -> Store:
        """Return where the clients' memories are: a directory if there is one."""
        path = str(self.node.get("state-dir", directory))
        return DirectoryStore(Path(path)) if path else ContextStore(context.state)


@functools.lru_cache(maxsize=2)
def _trainer(overrides: tuple[str, ...]) -> Trainer:
    config = load(overrides)
    return trainer(config, objective(config, setting(overrides).dataset))


@functools.lru_cache(maxsize=2)
def _probe(seed: int, size: int) -> Tensor:
    return probe_direction(seed, size)


@app.query("roll_call")
def roll_call(message: Message, context: Context) -> Message:
    """Tell which clients live here, and how many training samples each has."""
    node = Node(context)
    counts = [len(node.samples(k).train.y) for k in node.ids]
    report = MetricRecord({"clients": node.ids, "samples": counts})
    return Message(RecordDict({"hosted": report}), reply_to=message)


@app.train()
def work(message: Message, context: Context) -> Message:
    """Train and evaluate the clients that the message names."""
    began = time.perf_counter()
    node = Node(context)
    order = message.content.config_records["order"]
    run = node.trainer()
    theta, buffers = run.objective.initial()
    names = run.algorithm.down(run.algorithm.start(theta))
    sizes = {**{n: len(v) for n, v in names.items()}, "buffers": len(buffers)}
    arrived = unpack(message.content.array_records["down"], sizes, theta.dtype)
    down = {n: v.to(node.config.torch_device) for n, v in arrived.items()}
    evaluated = evaluate(node, run, down, cast(list[int], order["evaluate"]))
    mean, trained, faults = train_all(node, run, down, order, context)
    busy = [time.perf_counter() - began]
    report = MetricRecord({**evaluated, **trained, "busy": busy})
    up = pack(mean.value(theta.dtype))
    content = RecordDict({"up": up, "report": report, "faults": ConfigRecord(faults)})
    return Message(content, reply_to=message)


@app.evaluate()
def judge(message: Message, context: Context) -> Message:
    """Evaluate the received model: the same message with nobody to train."""
    return work(message, context)


def evaluate(
    node: Node, run: Trainer, down: Vectors, clients: list[int]
) -> dict[str, Any]:
    """Evaluate the received model on each client's own samples."""
    rows = []
    for k in clients:
        held_out, part = node.samples(k).judged()
        scores = run.objective.evaluate(down["theta"], down["buffers"], part.x, part.y)
        rows.append({"samples": len(part.y), "held_out": int(held_out), **scores})
    report: dict[str, Any] = {"evaluated": clients}
    for name in rows[0] if rows else ("samples", "held_out", "loss"):
        report[f"eval_{name}"] = [row[name] for row in rows]
    return report


def train_all(
    node: Node, run: Trainer, down: Vectors, order: ConfigRecord, context: Context
) -> tuple[Mean, dict[str, Any], dict[str, Any]]:
    """Train the named clients in turn.

    Returns
    -------
    Mean
        Of what they send up, in the algorithm's weights.
    dict
        The report: one entry for each client that trained.
    dict
        Client id to the reason why it did not.
    """
    round_, keep = cast(int, order["round"]), cast(int, order["keep"])
    mean_samples = cast(float, order["mean_samples"])
    store = node.store(context, str(order.get("state_dir", "")))
    mirror = run.algorithm.mirror
    probe = _probe(run.seed, len(down["theta"])) if mirror else None
    mean = Mean()
    faults: dict[str, Any] = {}
    report: dict[str, list[Any]] = {
        n: [] for n in ("trained", "samples", "train_loss", "steps", "seconds", "probe")
    }
    pairs = zip(
        cast(list[int], order["train"]), cast(list[int], order["versions"]), strict=True
    )
    for k, version in pairs:
        began = time.perf_counter()
        try:
            part = node.samples(k).train
            client = Client(k, len(part.y), len(part.y) / mean_samples)
            fresh = run.algorithm.fresh(down["theta"])
            memory = recall(store, k, version, fresh)
            outcome = train(run, down, memory, client, part.x, part.y, round_)
            if reason := fault(outcome.up, outcome.loss):
                raise ArithmeticError(reason)
            remember(store, k, round_, version, keep, outcome.memory)
        except Exception as error:  # one client's fault must not cost the others theirs
            faults[str(k)] = f"{type(error).__name__}: {error}"[:300]
            continue
        mean.add(outcome.up, run.algorithm.weight(client))
        report["trained"].append(k)
        report["samples"].append(client.samples)
        report["train_loss"].append(outcome.loss)
        report["steps"].append(outcome.steps)
        report["seconds"].append(time.perf_counter() - began)
        value = 0.0
        if mirror and probe is not None:
            value = float(outcome.memory[mirror[0]].to("cpu", torch.float64) @ probe)
        report["probe"].append(value)
    return mean, report, faults
