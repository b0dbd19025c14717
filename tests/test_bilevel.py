"""Personalized runs: hyper-gradients through messages, and what clients make of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import Result, grid_of
from flwr.app import ArrayRecord
from torch import Tensor

from app.hypers import own_of
from app.local_grid import LocalGrid
from app.run import Run
from strategies.bilevel import Bilevel
from strategies.hypergrad import hypergradients
from strategies.hyperproblem import Lambdas, Problem
from strategies.network import Network
from strategies.personal_objective import PersonalObjective
from strategies.randomness import permutations
from strategies.relay import Relay
from strategies.topology import complete
from strategies.wire import decode

Door = Callable[..., Result]
F64 = torch.float64
#: Six clients with mixed classes and a logistic regression, in float64.
PLAIN = (
    "partition=dirichlet",
    "partition.alpha=1",
    "dtype=float64",
    "clients_per_round=6",
    "client_validation=0.25",
    "client_test=0.2",
    "processes=0",
)
GIVEN = (*PLAIN, "personal=hgp", "personal.every=1")
ALL = "personal.families=[class_weights,logit_weights,mixture,weight_decay,feature_scales]"
SHARED = "personal.independent=false"
NETWORK = ("strategy=pushsum", "topology=stochastic_directed", "strategy.judge=own")


class Kept:
    """Makes the grid of a run, and reads afterwards what its clients remember."""

    def __call__(self, overrides: Sequence[str]) -> LocalGrid:
        self.grid = grid_of(overrides, 2)
        return self.grid

    def memory(self, k: int) -> dict[str, Tensor]:
        """Return the newest version of client k's memory."""
        found: dict[int, ArrayRecord] = {}
        for context in self.grid._contexts.values():
            for key, record in context.state.items():
                kind, client, version = key.split(".")
                if kind == "hyper" and client == str(k):
                    assert isinstance(record, ArrayRecord)
                    found[int(version)] = record
        newest = found[max(found)]
        return {
            n: torch.from_numpy(decode(a, len(a.numpy()))) for n, a in newest.items()
        }

    def all(self, name: str, count: int = 6) -> list[Tensor]:
        return [self.memory(k)[name] for k in range(count)]


class Seen:
    """Notes where the runs' estimates begin, and that they leave training's mass alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.models: list[Tensor] = []
        whole = Bilevel.estimate

        def estimate(level: Bilevel, round_: int, best: Any, ask: Any) -> Any:
            federation = level.federation
            if not isinstance(federation, Relay):
                self.models.append(federation.server["theta"].expand(6, -1).clone())
                return whole(level, round_, best, ask)
            state = federation.carried["model"]
            x, w = state.x.copy(), state.w.copy()
            self.models.append(torch.from_numpy(state.z().copy()))
            told = whole(level, round_, best, ask)
            assert (state.x == x).all()
            assert (state.w == w).all()
            return told

        monkeypatch.setattr(Bilevel, "estimate", estimate)


# Through messages as in one process.


@pytest.mark.parametrize(
    ("given", "batch"),
    [
        (NETWORK, 0),
        ((*NETWORK, "topology=self_loop"), 0),
        ((*NETWORK, "topology=directed_ring", "personal.pushes=3"), 8),
        (("strategy=fedavg",), 0),
        (("strategy=feddyn", "strategy.weighting=samples"), 8),
        (("strategy=fedavg", "strategy.weighting=uniform", SHARED, ALL), 8),
    ],
    ids=["network", "alone", "ring, batches", "server", "feddyn", "shared batches"],
)
def test_messages_give_the_estimate_of_one_process(
    run: Door, monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...], batch: int
) -> None:
    seen, kept, tasks = Seen(monkeypatch), Kept(), list[Run]()
    rest = ("rounds=2", "personal.depth=4", "personal.alpha=0.3", "local.batch=20")
    decay = f"personal.batch={batch}", "optimizer.weight_decay=0.01"
    result = run(*GIVEN, *given, *rest, *decay, grid=kept, edit=tasks.append)
    (task,), (x,), n = tasks, seen.models, 6
    outer, goal, federation = task.outer, task.objective, task.federation
    assert outer
    assert isinstance(goal, PersonalObjective)
    how = outer.level.how
    owns = [own_of(task.setting.samples(k), how) for k in range(n)]
    weights = torch.tensor([len(own.y) for own in owns], dtype=F64)
    if "strategy.weighting=uniform" in given:
        weights = torch.ones(n, dtype=F64)

    def draw(purpose: str, m: int) -> list[Tensor]:
        address = f"hypergrad {purpose}", how.exchanges + m
        drawn = [permutations(0, *address, [k], len(owns[k].y))[0] for k in range(n)]
        return [rows[:batch] for rows in drawn]

    lambdas = tuple(goal.zero for _ in owns)
    whole = replace(goal.task, decay=0.01)
    plain = whole.problem(owns, x, lambdas, draw if batch else None)

    def inner(x: Tensor, lambdas: Lambdas, drawn: Any) -> Tensor:
        return weights / weights.mean() * plain.inner(x, lambdas, drawn)

    problem = Problem(inner, plain.outer, x, lambdas, plain.draw)
    links = Network(n, 0, complete(n, 0))
    if isinstance(federation, Relay):
        links = federation.network
    expected = hypergradients(problem, links, how, first=1)
    found = kept.all("v")
    for a, b in zip(found, expected.v, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    assert min(float(v.abs().max()) for v in found) > 1e-4
    told = result.records[1]["personal"]
    if isinstance(federation, Relay):
        assert told["link_messages"] == expected.messages
        assert told["link_bytes"] == expected.bytes
        assert (expected.messages == 0) == ("topology=self_loop" in given)
    # Adam's first step goes by its whole rate against the sign.
    for lam, v in zip(kept.all("l"), found, strict=True):
        large = v.abs() > 1e-5
        assert torch.allclose(lam[large], -0.1 * v[large].sign(), rtol=1e-2)
