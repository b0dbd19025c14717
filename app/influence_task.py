"""What a run that estimates influence works on: the clients' samples, the model, its training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from torch import Tensor

from app.binding import bind
from app.config import Config
from app.errors import UserError
from app.host import Setting, objective
from strategies.families import Own, SampleWeights
from strategies.influence import Influence
from strategies.objective import Batch, Objective
from strategies.personalization import Personal
from strategies.randomness import permutations
from strategies.sgd import SGD
from strategies.weighted import Task, descend, minimize


def clients_of(given: Setting, samples: int) -> tuple[list[Own], list[np.ndarray]]:
    """Return what the clients have, and the rows of their training samples in the data.

    Parameters
    ----------
    given : Setting
        The run's.
    samples : int
        At most so many of each client, drawn with the seed; 0 takes all.
    """
    config, parts = given.config, given.parts
    if samples:
        orders = (
            permutations(config.seed, "influence samples", 0, [k], len(part))[0].numpy()
            for k, part in enumerate(parts)
        )
        cut = zip(parts, orders, strict=True)
        parts = [np.sort(part[order[:samples]]) for part, order in cut]
        given = replace(given, parts=parts, _cut={})
    x, y = given.dataset.train.x, given.dataset.train.y
    found, rows = [], []
    for k in range(config.clients):
        train, kept = given.samples(k).train.index, given.samples(k).validation.index
        found.append(Own(x[train], y[train], x[kept], y[kept]))
        rows.append(train.cpu().numpy())
    return found, rows


def task_of(given: Setting, how: Influence) -> tuple[Task, Objective, list[np.ndarray]]:
    """Return the clients' task, the model, and where the training samples lie in the data.

    Raises
    ------
    UserError
        If data or model do not do: classes, and a model that is a function of its weights.
    """
    config, data = given.config, given.dataset
    what = f"estimate={config.estimate.name}"
    if not data.classes or data.vocabulary:
        raise UserError(f"data={config.data.name}: {what} is about samples of classes")
    model = objective(config, data)
    if model.noise_shapes:
        raise UserError(f"model={config.model.name}: {what} needs model.dropout=0")
    theta, buffers = model.initial()
    if len(buffers):
        raise UserError(
            f"model={config.model.name}: {what} cannot follow its statistics"
        )

    def net(theta: Tensor, x: Tensor) -> Tensor:
        return model.outputs(theta, buffers, Batch(x, x, {}))[0]

    decay = _sgd(config).weight_decay
    personal = Personal(net, len(theta), data.classes, (SampleWeights(),), decay=decay)
    own, rows = clients_of(given, how.samples)
    return Task(personal, tuple(own), config.local.batch, config.seed), model, rows


def _sgd(config: Config) -> SGD:
    """Return the optimizer, which `app.network_check` has seen to be this one."""
    found = bind("optimizer", config.optimizer)()
    assert isinstance(found, SGD)
    return found


def trainers(
    task: Task, config: Config, how: Influence, start: Tensor
) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Train, and return the model, the one to compare retrained ones with, and how to retrain.

    Raises
    ------
    UserError
        If a linear model has no minimizer, or training does not stay finite.
    """
    rate, ones = _sgd(config), task.ones()

    def minimizer(weights: Tensor, near: Tensor) -> Tensor:
        try:
            return minimize(task, near, weights)
        except ValueError as error:
            raise UserError(f"data={config.data.name}: {error}") from None

    if config.model.name == "linear":
        theta = minimizer(ones, start)
        return theta, theta, lambda weights: minimizer(weights, theta)
    theta = descend(task, start, ones, rate, how.train_steps)
    if not theta.isfinite().all():
        raise UserError(
            f"optimizer.lr={rate.lr:g}: training does not stay finite; take a smaller one"
        )
    if not how.retrain_steps:

        def anew(weights: Tensor) -> Tensor:
            return descend(task, start, weights, rate, how.train_steps)

        return theta, theta, anew

    def further(weights: Tensor) -> Tensor:
        return descend(task, theta, weights, rate, how.retrain_steps)

    return theta, further(ones), further
