"""A node at work: it evaluates and trains the clients that it hosts, and reports on each.

A client that fails is named in the report and left out of the node's mean.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from logging import WARNING
from pathlib import Path
from typing import Any, cast

import torch
from flwr.app import ConfigRecord, Context, RecordDict
from flwr.common.logger import log
from torch import Tensor

from app import safely
from app.config import load
from app.host import objective, trainer, undivided
from app.hypers import hypers_of
from app.node_config import hosted, source
from app.personal_check import settings
from app.programs import program_of
from app.run_config import from_run_config
from app.store import (
    ContextStore,
    DirectoryStore,
    Lost,
    Store,
    directory_of,
    recall,
    remember,
)
from strategies.acceptance import TRAINED
from strategies.algorithm import Client, Vectors
from strategies.engine import choose
from strategies.fad_client import Answer, answer
from strategies.fad_site import Site
from strategies.fad_wire import unpack_question
from strategies.federation import probe_direction
from strategies.local import Job, Trainer


class Node:
    """A node's view of a run: its clients, their samples, and how to train them."""

    def __init__(self, context: Context) -> None:
        self.overrides = tuple(from_run_config(context.run_config))
        self.config = load(self.overrides)
        self.node = context.node_config
        total = self.config.clients + self.config.holdout_clients
        self.ids = hosted(self.node, total)
        self.samples = source(self.node, self.ids, self.overrides)
        torch.set_num_threads(self.config.threads)

    def trainer(self) -> Trainer:
        """Return the run's trainer, built once for each process."""
        return _trainer(self.overrides)

    def binds_clients(self) -> bool:
        """Return whether a client can train here alone: its samples or its memory are here."""
        run, own = self.trainer(), {"clients", "data-path"} & self.node.keys()
        remembers = run.fresh(run.objective.initial()[0])
        return bool(own or remembers or settings(self.config))

    def store(self, context: Context, order: ConfigRecord) -> Store:
        """Return where this run's memories are.

        In the node's own ``state-dir`` if it has one; else in the run's directory, if it is
        on this machine (a simulation); else in Flower's context.
        """
        if "state-dir" in self.node:
            own = Path(str(self.node["state-dir"])).expanduser()
            place = directory_of(own, str(order["run"]))
            return DirectoryStore(place, synced=True)
        path = Path(str(order.get("state_dir", "")))
        if path.is_absolute() and path.parent.is_dir():
            return DirectoryStore(path)
        return ContextStore(context.state)


@functools.lru_cache(maxsize=2)
def _trainer(overrides: tuple[str, ...]) -> Trainer:
    # A node with a file of its own never divides the others' data, which takes seconds.
    config = load(overrides)
    return trainer(config, objective(config, undivided(overrides)))


@functools.lru_cache(maxsize=2)
def _probe(seed: int, size: int) -> Tensor:
    return probe_direction(seed, size)


def train_all(
    node: Node,
    run: Trainer,
    down: Vectors,
    order: ConfigRecord,
    context: Context,
    collect: Callable[[list[Client], Vectors], None],
    own: Mapping[int, Vectors] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train the named clients.

    Parameters
    ----------
    node, run, down, order, context
        Who trains, how, from what, and where memories are.
    collect : callable
        Gets clients and what they send up, a row for each, as soon as they have trained.
    own : mapping of int to Vectors, optional
        What was sent to a client alone, in place of ``down``.

    Returns
    -------
    dict
        The report: one entry for each client that trained.
    dict
        Client id to the reason why it did not.
    """
    round_, keep = cast(int, order["round"]), cast(int, order["keep"])
    since = cast(int, order["since"])  # inner training has begun anew after this round
    named = dict(
        zip(
            cast(list[int], order["train"]),
            cast(list[int], order["versions"]),
            strict=True,
        )
    )
    faults: dict[str, Any] = {}
    fresh = run.fresh(down["theta"])
    lost, jobs = [], []
    mean_samples = cast(float, order["mean_samples"])
    try:
        store = node.store(context, order)
    except OSError as error:  # a disk that is full or read-only costs all its clients
        faults |= dict.fromkeys(map(str, named), f"state-dir: {safely.brief(error)}")
        named = {}
    hyper = hypers_of(node, order, context)
    for k, version in named.items():
        try:
            samples = node.samples(k)
            part, size = samples.train, len(samples.train)
            mine = (own or {}).get(k, {})
            blank = run.fresh(mine["theta"]) if fresh and mine else fresh
            memory = recall(store, k, version if version > since else 0, blank)
            client = Client(k, size, size / mean_samples, samples.entropy)
            has = hyper(k) if hyper else {}
            jobs.append(Job(client, part, memory, mine, has))
        except Lost as error:
            faults[str(k)] = str(error)[:300]
            lost.append(k)
        except OSError as error:
            faults[str(k)] = f"state-dir: {safely.brief(error)}"
        except Exception as error:
            faults[str(k)] = safely.brief(error)
    device = node.config.torch_device
    engine = choose(node.config.engine, run.objective, len(jobs), device)
    rows: list[list[float]] = []
    metrics = [] if run.privacy.silent else list(run.optimizer.metrics)
    results = safely.trained(run, down, jobs, round_ - since, engine, faults)
    for used, trained in results:
        engine = used
        bad, losses, good = trained.faults(), trained.losses.tolist(), []
        seconds = trained.seconds / len(trained.clients)
        told = [trained.told[name].tolist() for name in metrics]
        for row, client in enumerate(trained.clients):
            k, probe = client.id, 0.0
            try:
                if row in bad:
                    raise ArithmeticError(bad[row])
                if trained.memory:
                    memory = {n: m[row] for n, m in trained.memory.items()}
                    remember(store, k, round_, named[k], keep, memory)
                    probe = _audit(run, memory)
            except OSError as error:
                faults[str(k)] = f"state-dir: {safely.brief(error)}"
                continue
            except Exception as error:
                faults[str(k)] = safely.brief(error)
                continue
            good.append(row)
            counts = trained.steps[row], trained.gradients[row]
            numbers = [column[row] for column in told]
            rows.append(
                [k, client.samples, losses[row], *counts, seconds, probe, *numbers]
            )
        if good:
            up = trained.up
            if len(good) < len(trained.clients):
                up = {n: m[good] for n, m in up.items()}
            collect([trained.clients[row] for row in good], up)
    for name, why in faults.items():
        log(WARNING, "round %s: client %s is left out: %s", round_, name, why)
    names = ["trained", *TRAINED, *(f"metrics.{name}" for name in metrics)]
    columns = list(zip(*sorted(rows), strict=True)) or [()] * len(names)
    report: dict[str, Any] = {n: list(c) for n, c in zip(names, columns, strict=True)}
    if run.privacy.silent:
        del report["train_loss"]
    report |= {"lost": lost, "engine": int(engine == "vmap")}
    return report, faults


def remembered(
    node: Node, run: Trainer, theta: Tensor, order: ConfigRecord, context: Context
) -> tuple[Vectors, list[int], list[int]]:
    """Return the sum of what the algorithm keeps at clients, whose it is, and who has lost it."""
    store = node.store(context, order)
    fresh, mine = run.fresh(theta), run.algorithm.fresh(theta)
    sums = {n: torch.zeros(len(v), dtype=torch.float64) for n, v in mine.items()}
    found, lost = [], []
    pairs = zip(
        cast(list[int], order["clients"]),
        cast(list[int], order["versions"]),
        strict=True,
    )
    for k, version in pairs:
        try:
            memory = recall(store, k, version, fresh)
        except Lost as error:
            log(WARNING, "client %s: %s", k, error)
            lost.append(k)
            continue
        sums = {n: v + memory[n].to("cpu", torch.float64) for n, v in sums.items()}
        found.append(k)
    return sums, found, lost


def _audit(run: Trainer, memory: Vectors) -> float:
    """Return the product of a memory with the run's audit direction."""
    if run.algorithm.mirror is None:
        return 0.0
    vector = memory[run.algorithm.mirror[0]].to("cpu", torch.float64)
    return float(vector @ _probe(run.seed, len(vector)))


def respond(node: Node, content: RecordDict) -> Answer:
    """Answer a program's question on the node's clients."""
    if node.config.program is not None:
        program_of(node.config.program)
    question = unpack_question(content)  # it may name the program's functions only
    trainer = node.trainer()

    def site(k: int) -> Site:
        part = node.samples(k).train
        x, y = part.x[part.index], part.y[part.index]
        return Site(k, x, y, node.config.seed, trainer=trainer)

    return answer(question, site)
