"""`python -m bench.overhead`: what a client's round costs by local optimizer, side by side.

    python -m bench.overhead                            MLP and CNN, 15 repeats
    python -m bench.overhead --models mlp_sophia --repeats 30

One client takes 10 local steps of batch 512 on images of noise in the shape of MNIST's, in the
loop engine, one optimizer after another and over and over: a machine that slows down slows all of
them. A figure is the median over the repeats, and so is the ratio to FedAvg's in the same repeat.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence

import torch

from app.config import Config, load
from app.environment import environment
from app.errors import UserError
from app.host import objective, setting, trainer
from app.tables import show
from strategies.algorithm import Client, Vectors
from strategies.engine import loop
from strategies.local import Job, Part, Trainer

MODELS = ("mlp_sophia", "cnn_sophia")
OPTIMIZERS = {
    "FedAvg, SGD": ["strategy=fedavg", "optimizer=sgd"],
    "FedAvg, AdamW": ["strategy=fedavg", "optimizer=adamw"],
    "Fed-Sophia, GNB, tau=10": ["strategy=fedsophia"],
    "Fed-Sophia, GNB, tau=1": ["strategy=fedsophia", "optimizer.tau=1"],
    "Fed-Sophia, Hutchinson, tau=10": [
        "strategy=fedsophia",
        "optimizer.estimator=hutchinson",
    ],
}
TASK = (
    *("data=described", "data.shape=[1,28,28]", "data.classes=10"),
    *("local.steps=10", "local.batch=512", "local.clip=0", "device=cpu"),
)
SAMPLES = 1200


class Local:
    """One client that trains round after round with one optimizer.

    Parameters
    ----------
    model : str
        A choice of `conf/model`.
    settings : sequence of str
        The strategy and its optimizer, as Hydra overrides.
    part : Part
        Its samples.
    """

    def __init__(self, model: str, settings: Sequence[str], part: Part) -> None:
        given = (*TASK, f"model={model}", *settings)
        config: Config = load(given)
        torch.set_num_threads(config.threads)
        goal = objective(config, setting(given).dataset)
        self.run: Trainer = trainer(config, goal)
        self.theta, self.buffers = goal.initial()
        self.memory: Vectors = self.run.fresh(self.theta)
        self.part, self.round = part, 0

    def train(self) -> float:
        """Train one round and return its seconds."""
        self.round += 1
        job = Job(Client(0, SAMPLES, 1.0), self.part, self.memory)
        down = {"theta": self.theta, "buffers": self.buffers}
        began = time.perf_counter()
        trained = loop(self.run, down, job, self.round)
        seconds = time.perf_counter() - began
        self.theta = self.theta + trained.up["delta"][0]
        self.memory = {name: rows[0] for name, rows in trained.memory.items()}
        return seconds


def measure(model: str, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each repeat by optimizer, after one round that is not counted."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 1, 28, 28, generator=random)
    y = torch.randint(0, 10, (SAMPLES,), generator=random)
    part = Part(x, y, torch.arange(SAMPLES))
    clients = {name: Local(model, s, part) for name, s in OPTIMIZERS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in clients}
    for repeat in range(repeats + 1):
        for name, client in clients.items():
            spent = client.train()
            if repeat:
                seconds[name].append(spent)
    return seconds


def rows(model: str, seconds: dict[str, list[float]]) -> list[list[str]]:
    """Return a line for each optimizer: milliseconds of a step, and the ratio to the first."""
    base, *_ = seconds.values()
    lines = []
    for name, own in seconds.items():
        ratio = statistics.median(s / b for s, b in zip(own, base, strict=True))
        step = statistics.median(own) * 100  # ten steps, in milliseconds
        lines.append([model, name, f"{step:.2f}", f"{ratio:.2f}"])
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 2 after a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.overhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args(argv)
    try:
        names = given.models.split(",")
        for name in names:
            if name not in MODELS:
                raise UserError(f"--models {name}: choose among {', '.join(MODELS)}.")
        if given.repeats < 1:
            raise UserError(f"--repeats {given.repeats}: at least 1.")
        table = [["model", "client", "ms a step", "to FedAvg"]]
        for name in names:
            table += rows(name, measure(name, given.repeats))
        machine = environment("cpu")["machine"]
        print(f"{machine['cpu']}, one core of {machine['cores']}")
        show(table)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
