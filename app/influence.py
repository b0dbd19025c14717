"""A run that estimates influence: train, predict for each sample, check by retraining, tell.

It is computed in one process (see `app.estimation`, whose directory it shares); what a client would
keep to itself, ``influence/client-K.csv``, lies in the run's directory beside the others'.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from app import influence_plots, influence_report
from app.binding import bind
from app.callbacks import Callback
from app.config import Config, load
from app.errors import UserError
from app.estimation import directory_of, links_of
from app.host import Setting, setting
from app.influence_report import Look
from app.influence_task import task_of, trainers
from app.records import write_atomic
from app.summary import summarize
from strategies.hyperproblem import Found
from strategies.influence import Influence, left_out, predict, selected
from strategies.network import Network
from strategies.weighted import Task

Say = Callable[[str], None]
#: Depths at which the estimate is kept and recorded, at most.
KEPT = 100


def estimate(
    overrides: Sequence[str], callbacks: Sequence[Callback], say: Say
) -> dict[str, Any]:
    """Estimate influence, check it, leave everything in a run directory, return the summary.

    Parameters
    ----------
    overrides, callbacks, say
        As for a run that trains. Callbacks see the records at the end, when retraining has shown
        what the estimate after each step was worth.

    Raises
    ------
    UserError
        If the settings, the data or the network do not do.
    """
    config, began = load(overrides), time.perf_counter()
    torch.set_num_threads(config.threads)
    how: Influence = bind("estimate", config.estimate)()
    given = setting(tuple(overrides))
    task, model, rows = task_of(given, how)
    count = sum(task.sizes)
    if how.check > count:
        raise UserError(
            f"estimate.check={how.check}: there are only {count} training samples"
        )
    links = links_of(config, how)
    theta, base, retrain = trainers(task, config, how, model.initial()[0])
    with contextlib.closing(directory_of(config)) as directory:
        say(f"run directory: {directory.path}")
        loss, accuracy = task.judged(theta)
        slope = float(task.slope(theta, task.ones()).norm())
        first = {"samples": count, "accuracy": accuracy, "slope": slope}
        say(f"trained: validation loss {loss:.4g}, accuracy {accuracy:.4f}")

        looks, doubts = _looks(task, theta, links, how)
        say(f"estimated for {count} samples in {looks[-1].seconds:.1f} s")
        predicted = looks[-1].predicted
        chosen = selected(how, predicted, config.seed)
        labels, known = given.dataset.train.y.tolist(), dict[int, float]()
        listed = functools.partial(
            influence_report.listed, rows, labels, predicted.numpy(), known
        )
        file = directory.path / "influence.csv"
        # Retraining takes longest: what is known is kept before it and all along.
        write_atomic(file, influence_report.as_csv(listed()))
        changes = left_out(task, chosen.tolist(), retrain, base)
        for sample, change in zip(chosen.tolist(), changes, strict=True):
            known[sample] = change
            write_atomic(file, influence_report.as_csv(listed()))
            if len(known) % 10 == 0:
                say(f"retrained without a sample: {len(known)} of {len(chosen)}")

        actual = np.array(list(known.values()))
        records: list[dict[str, Any]] = [{"round": 0, "loss": loss, "influence": first}]
        records += _records(config, how, looks, chosen, actual)
        for record in records:
            directory.round(record)
            for callback in callbacks:
                callback(record)
        found = influence_report.agreement(predicted[chosen].numpy(), actual)
        if how.check:
            doubts += influence_report.disagreement(found)
        for doubt in doubts:
            say(f"warning: {doubt}")
        table = listed()
        _figures(directory.path, table, found if how.check else {}, given)
        _lists(directory.path / "influence", table, given, say)
        summary = {
            "status": "finished",
            "name": directory.path.name,
            **summarize(config, records),
            "influence": {**first, **found, "warnings": doubts},
            "seconds": time.perf_counter() - began,
        }
        say(directory.finish(summary, model.layout.unflatten(theta)))
        say(influence_report.told(found, len(chosen)))
        say(f"run directory: {directory.path}")
        return summary


def _looks(
    task: Task, theta: Tensor, links: Network, how: Influence
) -> tuple[list[Look], list[str]]:
    """Estimate, and return what was kept on the way and what speaks against it."""
    looks, every, began = list[Look](), math.ceil(how.depth / KEPT), time.perf_counter()

    def watch(m: int, found: Found) -> None:
        if how.method == "push" and (m == 0 or (m % every and m != how.depth)):
            return
        predicted = -torch.cat(found.v).to("cpu", torch.float64)
        seconds = time.perf_counter() - began
        looks.append(Look(m, predicted, found.messages, found.bytes, seconds))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        try:
            predict(task, theta, links, how, watch)
        except ValueError as error:
            raise UserError(f"estimate.method={how.method}: {error}") from None
    doubts = [str(w.message) for w in caught]
    if how.method == "push":
        doubts += influence_report.unsettled(looks)
    return looks, doubts


def _records(
    config: Config,
    how: Influence,
    looks: Sequence[Look],
    chosen: Tensor,
    actual: np.ndarray,
) -> list[dict[str, Any]]:
    """Return a round record for each look: what it was worth, and its cost since the last."""
    records, last = [], Look(0, torch.zeros(0), 0, 0, 0.0)
    products = 2 if config.local.batch and how.independent else 1
    for look in looks:
        # A product with second derivatives counts as two gradients. Before the first step stand
        # those that check alpha, and the outer cost's gradient; conjugate gradients exchange that
        # too, and end with one more product.
        gradients = 2 * products * (look.step - last.step)
        if not last.step:
            gradients += 1 + (2 * how.power_steps if how.method == "push" else 0)
        told: dict[str, Any] = {
            "norm": float(look.predicted.norm()),
            "messages": look.messages - last.messages,
        }
        if how.check:
            told |= influence_report.agreement(look.predicted[chosen].numpy(), actual)
        records.append(
            {
                "round": look.step,
                "influence": told,
                "bytes": {"down": {}, "up": {"state": look.bytes - last.bytes}},
                "strategy": {"link_bytes": look.bytes - last.bytes},
                "seconds": {"round": look.seconds - last.seconds},
                "gradients": config.clients * gradients,
            }
        )
        last = look
    return records


def _figures(
    place: Path,
    table: influence_report.Rows,
    found: influence_report.Agreement,
    given: Setting,
) -> None:
    """Write the figures that there is something for."""
    if found:
        influence_plots.scatter(table, found, place / "influence.png")
    data = given.dataset
    if data.train.x.ndim == 4:
        influence_plots.sheet(table, data.train.x, data.labels, place / "samples.png")


def _lists(
    folder: Path, table: influence_report.Rows, given: Setting, say: Say
) -> None:
    """Write each client's own list, and of images its own sheet for the first so many."""
    folder.mkdir(exist_ok=True)
    data, most = given.dataset, influence_plots.SHEETS
    pictured = data.train.x.ndim == 4
    clients = groupby(table, key=lambda row: int(row["client"]))
    for place, (k, rows) in enumerate(clients):
        mine, file = list(rows), folder / f"client-{k}.csv"
        write_atomic(file, influence_report.as_csv(mine))
        if pictured and place < most:
            picture = file.with_suffix(".png")
            influence_plots.sheet(mine, data.train.x, data.labels, picture)
    if pictured and given.config.clients > most:
        say(f"pictures of the first {most} clients; the lists are of all")
