"""`estimate=hypergrad`: how far hyper-gradients over a network are from the exact ones.

Instead of training, the minimizer that the clients have in common is found by Newton's method, and
the estimate is watched step by step from there, in this process. So the error is that of the
estimate alone. The task is that of Terashita and Hara (arXiv 2210.02129v3, section 5.1): logistic
regression where client i's hyper-parameter is the weight l_i of its L2 term,

    f_i = mean over its training samples of log(1 + e^-m) + l_i/2 |theta|^2      l_i = 0
    F_i = mean over the samples that it keeps from training of log(1 + e^-m)

with m the margin. A run of it leaves a run directory as training does; a round is a step.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from app.binding import bind
from app.callbacks import Callback
from app.config import Config, load
from app.driver import network
from app.errors import UserError
from app.host import Setting, setting
from app.resume import new_directory
from app.rundir import RunDir
from app.summary import summarize
from strategies.hypergrad import HGP, hypergradients
from strategies.hyperproblem import Found, Lambdas, Problem, closed_form
from strategies.network import Network
from strategies.randomness import permutations

#: Newton's steps; from zero, a logistic regression with a minimizer takes about ten.
NEWTON = 50


def nothing() -> None:
    """Estimate nothing: the run trains."""


def logistic(given: Setting) -> Problem:
    """Return the clients' logistic regressions, at the minimizer that they have in common.

    Raises
    ------
    UserError
        If the data do not do: two classes, as many samples for each client, not separable.
    """
    config, data = given.config, given.dataset
    if data.classes != 2:
        raise UserError(
            f"data={config.data.name}: estimate={config.estimate.name} needs two classes; "
            "use data=synthetic_mixture"
        )
    n = config.clients
    cut = [given.samples(k) for k in range(n)]
    train, kept = ([getattr(c, side).index for c in cut] for side in ("train", "test"))
    if len({len(i) for i in train}) > 1 or len({len(i) for i in kept}) > 1:
        raise UserError(
            f"partition={config.partition.name}: estimate={config.estimate.name} needs as "
            "many samples at each client; use data=synthetic_mixture partition=natural"
        )
    signs = 2 * data.train.y.to(config.torch_dtype) - 1
    flat = data.train.x.flatten(1)
    # A row is a sample with its constant, times its label: the margin is its product with theta.
    rows = signs[:, None] * torch.cat([flat, torch.ones_like(flat[:, :1])], 1)
    inside, outside = rows[torch.stack(train)], rows[torch.stack(kept)]
    batch, count = config.local.batch, inside.shape[1]

    def losses(samples: Tensor, theta: Tensor) -> Tensor:
        return F.softplus(-torch.einsum("nbd,nd->nb", samples, theta)).mean(1)

    def inner(theta: Tensor, lambdas: Lambdas, drawn: Tensor | None) -> Tensor:
        samples = inside
        if drawn is not None:
            samples = inside.gather(1, drawn[..., None].expand(-1, -1, rows.shape[1]))
        decay = torch.cat(lambdas) / 2 * theta.square().sum(1)
        return losses(samples, theta) + decay

    def draw(purpose: str, k: int) -> Tensor:
        order = permutations(config.seed, f"hypergrad {purpose}", k, range(n), count)
        return order[:, :batch].to(rows.device)

    theta = _minimizer(inside.flatten(0, 1), config)
    zero = tuple(torch.zeros(n, 1).to(rows))
    x = theta.expand(n, -1).clone()
    return Problem(
        inner,
        lambda x, _: losses(outside, x),
        x,
        zero,
        draw if 0 < batch < count else None,
    )


def _minimizer(samples: Tensor, config: Config) -> Tensor:
    """Return the minimizer of the mean logistic loss, (d,), by Newton's method."""
    theta = torch.zeros_like(samples[0])
    for _ in range(NEWTON):
        wrong = torch.sigmoid(-samples @ theta)
        gradient = -(wrong[:, None] * samples).mean(0)
        if float(gradient.norm()) < 1e-13:
            return theta
        curved = (wrong * (1 - wrong))[:, None] * samples
        hessian = curved.T @ samples / len(samples)
        if float(torch.linalg.eigvalsh(hessian)[0]) < 1e-9:
            break
        theta = theta - torch.linalg.solve(hessian, gradient)
    if float(gradient.norm()) < 1e-10:
        return theta
    raise UserError(
        f"data={config.data.name}: the clients' logistic regression has no minimizer, as for "
        "classes that a plane separates; use another data.seed or more data.samples"
    )


def links_of(config: Config, how: HGP) -> Network:
    """Return the network of a run, checked for all the rounds that its pushes use."""
    pushes = (how.power_steps + how.depth) * how.pushes
    over = config.model_copy(update={"rounds": pushes})
    return network(over, bind("strategy", config.strategy)())


def estimate(
    overrides: Sequence[str], callbacks: Sequence[Callback], say: Any
) -> dict[str, Any]:
    """Estimate, record every step in a run directory, and return the summary.

    Parameters
    ----------
    overrides, callbacks, say
        As for a run that trains.

    Raises
    ------
    UserError
        If the settings, the data or the network do not do.
    """
    config, began = load(overrides), time.perf_counter()
    torch.set_num_threads(config.threads)
    how: HGP = bind("estimate", config.estimate)()
    problem = logistic(setting(tuple(overrides)))
    links = links_of(config, how)
    exact = torch.stack(closed_form(problem))
    with contextlib.closing(directory_of(config)) as directory:
        say(f"run directory: {directory.path}")
        loss = float(problem.outer(problem.x, problem.lambdas).mean())
        products = 1 if problem.draw is None or not how.independent else 2
        records: list[dict[str, Any]] = []
        last = [time.perf_counter(), 0.0, 0.0]

        def watch(m: int, found: Found) -> None:
            v, now = torch.stack(found.v), time.perf_counter()
            seconds, sent, messages = last
            last[:] = now, found.bytes, found.messages
            step = {
                "error": float((v - exact).norm() / exact.norm()),
                "norm": float(v.norm()),
                "messages": found.messages - messages,
            }
            record: dict[str, Any] = {
                "round": m,
                "hypergradient": step,
                "bytes": {"down": {}, "up": {"state": found.bytes - sent}},
                "strategy": {"link_bytes": found.bytes - sent},
                "seconds": {"round": now - seconds},
                # A product with second derivatives counts as two gradients; before the first step
                # stand those that check alpha, and the outer cost's gradient.
                "gradients": config.clients
                * (2 * products if m else 2 * how.power_steps + 1),
            }
            if not m:
                record["loss"] = (
                    loss  # of the minimizer, on what clients keep from training
                )
            records.append(record)
            directory.round(record)
            for callback in callbacks:
                callback(record)

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RuntimeWarning)
            hypergradients(problem, links, how, watch=watch)
        doubts = [str(w.message) for w in caught if w.category is RuntimeWarning]
        for doubt in doubts:
            say(f"warning: {doubt}")
        summary = {
            "status": "finished",
            "name": directory.path.name,
            **summarize(config, records),
            "hypergradient": {"warnings": doubts},
            "seconds": time.perf_counter() - began,
        }
        final = records[-1]["hypergradient"]
        say(directory.finish(summary, {"theta": problem.x[0]}))
        say(f"relative error of the hyper-gradients  {final['error']:.3g}")
        say(f"run directory: {directory.path}")
        return summary


def directory_of(config: Config) -> RunDir:
    """Make the directory of a run that estimates."""
    return new_directory(config, config.estimate.name, config.topology.name)
