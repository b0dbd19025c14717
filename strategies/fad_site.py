"""One client as the functions of a differentiated program see it, and the functions themselves.

No code travels: a message names functions, and a client calls only those that were registered in
its own process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from strategies.local import Trainer, noise_of, orders
from strategies.objective import Batch
from strategies.randomness import generator
from strategies.sgd import SGD
from strategies.step import clip
from strategies.tuned_sgd import TunedSGD


@dataclass(frozen=True)
class Site:
    """One client, as the functions that are mapped over clients see it.

    Attributes
    ----------
    id : int
        Its number.
    x, y : Tensor
        Its samples, (n_k, ...) and (n_k,): whatever the functions expect.
    seed : int
        The run's seed.
    round : int
        The round at which the function's draws are addressed.
    trainer : Trainer or None
        The run's model, loss and local training, if there is one.
    """

    id: int
    x: Tensor
    y: Tensor
    seed: int = 0
    round: int = 1
    trainer: Trainer | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of numbers: the model's; without one that of the samples."""
        if self.trainer is not None:
            return self.trainer.objective.initial()[0].dtype
        return self.x.dtype

    def generator(self, purpose: str) -> torch.Generator:
        """Return a generator at the address (seed, purpose, round, client)."""
        return generator(self.seed, f"fad {purpose}", self.round, self.id)

    def loss(self, theta: Tensor, rows: Tensor | None = None, first: int = 0) -> Tensor:
        """Return the mean loss at theta (d,) of some of the client's samples, or of all.

        ``first`` is the position of the rows in the sequence of samples that the client takes:
        the address of the dropout noise.
        """
        trainer = _present(self.trainer)
        rows = torch.arange(len(self.y)) if rows is None else rows
        drawn = noise_of(trainer, self.round, [self.id], first, rows[None])
        noise = {n: v[0].to(self.x.device) for n, v in drawn.items()}
        rows = rows.to(self.x.device)
        batch = Batch(self.x[rows], self.y[rows], noise)
        buffers = trainer.objective.initial()[1]
        return trainer.objective.loss(theta, buffers, batch)[0]


def _present(trainer: Trainer | None) -> Trainer:
    if trainer is None:
        raise ValueError("this client has no model; give its Site a trainer")
    return trainer


Function = Callable[..., Tensor]
FUNCTIONS: dict[str, Function] = {}


def register(function: Function) -> Function:
    """Let plans call a function by its name: ``function(site, *values) -> Tensor``.

    It has to be pure and differentiable; inner derivatives are taken by ``torch.func``, so that
    forward mode passes through them. Used as a decorator; a function may be defined again where
    it was (in a notebook), but two may not share a name.

    Raises
    ------
    ValueError
        If another function has the name.
    """
    name = function.__name__
    other = FUNCTIONS.get(name, function)
    if other.__module__ != function.__module__:
        raise ValueError(f"'{name}' is registered already, by {other.__module__}")
    FUNCTIONS[name] = function
    return function


@register
def times(site: Site, weight: Tensor, value: Tensor) -> Tensor:
    """Return weight (one number) times value."""
    return weight.reshape(()) * value


@register
def one(site: Site) -> Tensor:
    """Return 1."""
    return torch.ones((), dtype=site.dtype, device=site.x.device)


@register
def samples(site: Site) -> Tensor:
    """Return n_k, the number of the client's samples."""
    return torch.tensor(float(len(site.y)), dtype=site.dtype, device=site.x.device)


@register
def loss(site: Site, theta: Tensor) -> Tensor:
    """Return the mean loss of the client's samples at theta."""
    return site.loss(theta)


@register
def gradient(site: Site, theta: Tensor) -> Tensor:
    """Return the gradient of the client's mean loss at theta, shape (d,)."""
    found: Tensor = torch.func.grad(site.loss)(theta)
    return found


@register
def train(site: Site, theta: Tensor, lr: Tensor) -> Tensor:
    """Return theta_k after the run's local steps of SGD from theta at learning rate lr.

    Raises
    ------
    ValueError
        If clients step in another way.
    """
    trainer, first = _present(site.trainer), 0
    how = trainer.optimizer
    if not isinstance(how, SGD | TunedSGD) or (isinstance(how, SGD) and how.momentum):
        raise ValueError("train takes plain steps: optimizer=sgd optimizer.momentum=0")
    local, who = trainer.local, [site.id]
    for drawn in orders(local, site.seed, site.round, who, len(site.y)):
        found = torch.func.grad(site.loss)(theta, drawn[0], first)
        theta = theta - lr * (clip(found, local.clip) + how.weight_decay * theta)
        first += drawn.shape[1]
    return theta
