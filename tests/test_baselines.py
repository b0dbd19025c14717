"""Baselines of personalization: golden numbers, known optima, wrong variants, and whole runs."""

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUICK, Result
from quadratics import (
    ALL,
    ONE,
    A,
    B,
    Federation,
    close,
    descent,
    gradient,
    vector,
)
from torch import Tensor, nn

from app import judging, safely
from app.config import load
from app.errors import UserError
from app.host import objective, setting, trainer
from app.run import Run
from strategies.algorithm import Client, Cohort, Vectors
from strategies.clustered import Clustered
from strategies.ditto import Ditto
from strategies.engine import train
from strategies.fedavg import FedAvg
from strategies.fedem import FedEM
from strategies.fedrep import FedRep
from strategies.individual import Seen
from strategies.local import Job, Local, Part, Trainer
from strategies.objective import Objective
from strategies.sgd import SGD
from strategies.step import step

EYE = torch.eye(2, dtype=torch.float64)
EXACT = torch.linalg.solve(A, B[..., None])[..., 0]  # each client's own minimizer


# Ditto.


def settled(algorithm: Ditto, rounds: int = 110) -> Federation:
    federation = Federation(algorithm, descent(5, SGD(lr=0.1)))
    federation.run([ALL] * rounds)
    return federation


@pytest.mark.parametrize("lam", [0.0, 0.3, 2.0])
def test_ditto_settles_where_its_leash_holds(lam: float) -> None:
    federation = settled(Ditto("uniform", lam=lam))
    plain = Federation(FedAvg("uniform"), descent(5, SGD(lr=0.1)))
    shared = plain.run([ALL] * 110)
    close(federation.server["theta"], shared, 1e-10)
    for k in ALL:
        expected = torch.linalg.solve(A[k] + lam * EYE, B[k] + lam * shared)
        close(federation.personal(k), expected, 1e-9)
    if not lam:
        close(federation.personal(1), EXACT[1], 1e-9)


def test_ditto_golden_round() -> None:
    """One step of 0.1 from theta = (0, 0), then one from there: by hand for client 0."""
    federation = Federation(Ditto("uniform", lam=0.5), descent(1, SGD(lr=0.1)))
    federation.run([ALL])
    # Gradients at 0 are -b: theta and all v_k move by 0.1 b, theta by the mean (-0.25, 1).
    close(federation.server["theta"], vector(-0.025, 0.1), 1e-15)
    close(federation.personal(0), vector(0.1, -0.2), 1e-15)
    federation.run([ALL])
    # A v - b = (-0.9, 1.2), leash 0.5 (0.125, -0.3): v - 0.1 (-0.8375, 1.05).
    close(federation.personal(0), vector(0.18375, -0.305), 1e-15)


@dataclass(frozen=True)
class LeashToItself(Ditto):
    """The quadratic term around the client's own last model."""

    def direction(
        self, gradient: Tensor, theta: Tensor, anchor: Tensor, state: Vectors
    ) -> Tensor:
        shared, own = anchor.chunk(2)
        pull = self.lam * (theta.chunk(2)[1] - own)
        return gradient + torch.cat([torch.zeros_like(shared), pull])


@dataclass(frozen=True)
class LeashOnBoth(Ditto):
    """The quadratic term pulls the shared model, too."""

    def direction(
        self, gradient: Tensor, theta: Tensor, anchor: Tensor, state: Vectors
    ) -> Tensor:
        shared = anchor.chunk(2)[0]
        return gradient + self.lam * (theta - torch.cat([shared, shared]))


def test_wrong_leashes_settle_elsewhere() -> None:
    right = settled(Ditto("uniform", lam=2.0), 50)
    to_itself = settled(LeashToItself("uniform", lam=2.0), 90)
    close(to_itself.personal(0), EXACT[0], 1e-8)
    assert float((right.personal(0) - EXACT[0]).norm()) > 0.1
    both = settled(LeashOnBoth("uniform", lam=2.0), 50)
    assert float((both.server["theta"] - right.server["theta"]).norm()) > 1e-2


# FedRep.


class Split(nn.Module):
    """A linear model whose body is two weights and whose head is one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Parameter(torch.tensor([0.5, -0.5], dtype=torch.float64))
        self.head = nn.Parameter(torch.tensor([0.25], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :2] @ self.body + x[:, 2:] @ self.head


def regressions() -> list[Part]:
    random = torch.Generator().manual_seed(3)
    x = torch.randn(40, 3, generator=random, dtype=torch.float64)
    heads = torch.tensor([-2.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    noise = torch.randn(40, generator=random, dtype=torch.float64)
    y = x[:, 0] - x[:, 1] + heads.repeat_interleave(10) * x[:, 2] + 0.3 * noise
    rows = torch.arange(40)
    return [Part(x, y, rows[10 * k : 10 * k + 10]) for k in ALL]


def represented(algorithm: FedRep, steps: int, rounds: int) -> tuple[Tensor, Tensor]:
    """Return the server's body and the clients' heads (4,) after some rounds."""
    goal = Objective(Split(), "squared", {})
    algorithm = algorithm.tailored(goal.layout)
    local = Local(batch=0, steps=steps)
    run = Trainer(algorithm, SGD(lr=0.1), local, goal, seed=0)
    theta, buffers = goal.initial()
    server = algorithm.start(theta)
    memories = [algorithm.fresh(theta)] * 4
    for round_ in range(1, rounds + 1):
        down = {**algorithm.down(server), "buffers": buffers}
        jobs = [
            Job(Client(k, 10, 1.0), part, memories[k])
            for k, part in enumerate(regressions())
        ]
        deltas = []
        for k, trained in enumerate(train(run, down, jobs, round_)):
            memories[k] = {n: v[0] for n, v in trained.memory.items()}
            deltas.append(trained.up["delta"][0])
        server = algorithm.update(
            server, {"delta": torch.stack(deltas).mean(0)}, Cohort(4, 4, 0)
        )
    assert torch.equal(server["theta"][2:], theta[2:]), "the server's head stays"
    return server["theta"][:2], torch.cat([m["head"] for m in memories])


def optimum() -> tuple[Tensor, Tensor]:
    """Return the body and the heads that minimize the sum of all clients' costs."""
    total, pull = torch.zeros(6, 6, dtype=torch.float64), vector(*[0] * 6)
    for k, part in enumerate(regressions()):
        x, y = part.x[part.index], part.y[part.index]
        lift = torch.zeros(3, 6, dtype=torch.float64)
        lift[0, 0] = lift[1, 1] = lift[2, 2 + k] = 1
        total += lift.T @ x.T @ x @ lift
        pull += lift.T @ x.T @ y
    found = torch.linalg.solve(total, pull)
    return found[:2], found[2:]


@pytest.mark.parametrize("joint", [False, True])
def test_fedrep_reaches_the_common_body_and_each_head(joint: bool) -> None:
    """One step of the body in a round, or of both at once, descends on the sum of all costs."""
    algorithm = FedRep("uniform", head=1, joint=joint)
    body, heads = represented(
        algorithm, steps=1 if joint else 5, rounds=280 if joint else 160
    )
    best_body, best_heads = optimum()
    close(body, best_body, 1e-6)
    close(heads, best_heads, 1e-6)


def test_fedrep_moves_the_head_first_and_then_the_body() -> None:
    algorithm = FedRep("uniform", head=1, head_share=0.8)
    body, heads = represented(algorithm, steps=4, rounds=1)
    # Of four steps, at 1/8, 3/8, 5/8 and 7/8, one is beyond 0.8.
    goal, moved = Split(), []
    for part in regressions():
        x, y = part.x[part.index], part.y[part.index]
        theta = torch.cat([goal.body.detach(), goal.head.detach()])
        for mask in [vector(0, 0, 1)] * 3 + [vector(1, 1, 0)]:
            theta = theta - 0.1 * mask * (x.T @ (x @ theta - y)) / len(y)
        moved.append(theta)
    close(body, torch.stack(moved).mean(0)[:2], 1e-13)
    close(heads, torch.stack(moved)[:, 2], 1e-13)


def test_what_fedrep_does_not_move_keeps_its_momentum() -> None:
    """Weight decay alone would fill the body's velocity while the head moves."""
    goal = Objective(Split(), "squared", {})
    optimizer = SGD(lr=0.1, momentum=0.9, weight_decay=0.5)
    algorithm = FedRep(head=1).tailored(goal.layout)
    run = Trainer(algorithm, optimizer, Local(steps=4), goal, 0)
    assert run.phased is not None
    theta, moved = vector(1, 2, 3), {}
    for progress, still in ((0.1, [0, 1]), (0.9, [2])):
        moving = optimizer.init(theta, {})
        constant = {"head": theta[2:], "progress": vector(progress)[0]}
        after, (_, moved) = step(
            run, theta.clone(), theta, (constant, moving), vector(1, 1, 1), 1
        )
        assert torch.equal(after[still], theta[still])
        (velocity,) = (v for v in moved.values() if v.shape == theta.shape)
        assert not velocity[still].any() and velocity.any()


def test_averaged_heads_are_not_fedrep() -> None:
    goal = Objective(Split(), "squared", {})
    run = Trainer(FedAvg("uniform"), SGD(lr=0.1), Local(batch=0, steps=5), goal, 0)
    theta, buffers = goal.initial()
    for round_ in range(1, 80):
        down = {"theta": theta, "buffers": buffers}
        jobs = [Job(Client(k, 10, 1.0), p, {}) for k, p in enumerate(regressions())]
        found = [t.up["delta"][0] for t in train(run, down, jobs, round_)]
        theta = theta + torch.stack(found).mean(0)
    assert float((theta[:2] - optimum()[0]).norm()) > 1e-2


def test_fixed_means_fixed_with_momentum_and_weight_decay() -> None:
    goal = Objective(Split(), "squared", {})
    algorithm = FedRep(head=1, head_share=0.9).tailored(goal.layout)
    optimizer = SGD(lr=0.1, momentum=0.9, weight_decay=0.1)
    run = Trainer(algorithm, optimizer, Local(batch=0, steps=3), goal, 0)
    theta, buffers = goal.initial()
    for engine in ("loop", "vmap"):
        down = {"theta": theta, "buffers": buffers}
        jobs = [
            Job(Client(k, 10, 1.0), p, algorithm.fresh(theta))
            for k, p in enumerate(regressions())
        ]
        for trained in train(run, down, jobs, 1, engine):
            assert not trained.up["delta"].any(), "all three steps move the head"
            assert (trained.memory["head"] != theta[2:]).all()


# Clustered models.

#: Two opposed groups: the sign of the minimizer.
START = vector(1, -1, -1, 1)


def test_ifca_finds_the_groups_and_their_means() -> None:
    federation = Federation(Clustered("uniform", learners=2), descent(3, SGD(lr=0.1)))
    federation.start = START
    federation.__post_init__()
    federation.run([ALL] * 100)
    choices = [int(federation.begun(k)[0]["choice"].argmax()) for k in ALL]
    assert set(choices) == {0, 1}
    plain = FedAvg("uniform")
    for j in (0, 1):
        mine = [k for k in ALL if choices[k] == j]
        alone = Federation(plain, descent(3, SGD(lr=0.1))).run([mine] * 140)
        close(federation.server["theta"].view(2, 2)[j], alone, 1e-9)
        for k in mine:
            close(federation.personal(k), alone, 1e-9)


def test_ifca_golden_round_and_a_cluster_that_nobody_chooses() -> None:
    algorithm = Clustered("uniform", learners=2)
    server = algorithm.start(vector(1, 2, 3, 4))
    mean = {"delta": vector(0, 0, 0.5, 1), "votes": vector(0, 0.25)}
    after = algorithm.update(server, mean, Cohort(4, 8, 0))
    close(after["theta"], vector(1, 2, 5, 8), 1e-15)
    assert float(after["votes_1"]) == 0.25 and not float(after["votes_0"])
    losses = torch.tensor([[1.0, 5.0], [2.0, 3.0]], dtype=torch.float64)
    memory = algorithm.survey({}, losses)
    close(memory["choice"], vector(0, 1), 0)
    close(algorithm.origin(server, memory), vector(3, 4), 0)
    up, kept = algorithm.finish(vector(4, 4), vector(3, 4), memory, ONE[0])
    close(up["delta"], vector(0, 0, 1, 0), 0)
    assert not kept


class MeanOverAll(Clustered):
    """Each cluster's change divided by the whole cohort."""

    def update(self, server: Vectors, mean: Vectors, cohort: Cohort) -> Vectors:
        votes = torch.ones_like(mean["votes"])
        return super().update(server, {**mean, "votes": votes}, cohort)


def test_dividing_by_the_cohort_is_not_the_mean_of_a_cluster() -> None:
    found = []
    for kind in (Clustered, MeanOverAll):
        federation = Federation(kind("uniform", learners=2), descent(3, SGD(lr=0.1)))
        federation.start = START
        federation.__post_init__()
        found.append(federation.run([ALL] * 2))
    assert float((found[0] - found[1]).norm()) > 1e-2


# FedEM.


def test_fedem_takes_the_papers_steps() -> None:
    """q, pi and the first gradient by hand, for two learners and three samples."""
    algorithm = FedEM(learners=2)
    losses = torch.tensor([[0.0, 1.0, 2.0], [1.0, 1.0, 0.0]], dtype=torch.float64)
    memory = algorithm.survey({"pi": vector(0.25, 0.75)}, losses)
    weights = [(0.25, 0.75 / math.e), (0.25, 0.75), (0.25 * math.exp(-2), 0.75)]
    q = [a / (a + b) for a, b in weights]
    close(memory["pi"], vector(sum(q) / 3, 1 - sum(q) / 3), 1e-14)
    # L_k of two quadratics, at theta = [theta_1, theta_2].
    theta = vector(1, 0, 0, 1)
    state = algorithm.begin({}, {**memory, "prior": vector(0.5, 0.5)}, Client(0, 1, 1))
    at = [0.5 * m @ A[0] @ m - B[0] @ m for m in theta.split(2)]
    q1 = float(torch.stack([-at[0], -at[1]]).softmax(0)[0])
    expected = [
        w * (A[0] @ m - B[0]) for w, m in zip((q1, 1 - q1), theta.split(2), strict=True)
    ]
    close(gradient(algorithm, state, 0, theta), torch.cat(expected), 1e-14)
    up, kept = algorithm.finish(theta + 1, theta, state, ONE[0])
    close(kept["pi"], memory["pi"], 0)
    close(up["delta"], torch.ones_like(theta), 0)


def mixtures(learners: int = 2) -> tuple[Trainer, list[Job], Vectors]:
    """Return four clients of two opposed kinds, with samples of logistic regressions."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(160, 4, generator=random, dtype=torch.float64)
    sign = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat_interleave(40)
    y = (sign * x[:, 0] > 0).long()
    modules = []
    for _ in range(learners):
        module = nn.Linear(4, 2).to(torch.float64)
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(0.1 * torch.randn(p.shape, generator=random))
        modules.append(module)
    goal = Objective(modules[0], "cross_entropy", {}, modules[1:])
    run = Trainer(
        FedEM(learners=learners), SGD(lr=1.0), Local(batch=0, steps=1), goal, 0
    )
    theta, buffers = goal.initial()
    rows = torch.arange(160)
    jobs = [
        Job(
            Client(k, 40, 1.0), Part(x, y, rows[40 * k : 40 * k + 40]), run.fresh(theta)
        )
        for k in range(4)
    ]
    return run, jobs, {"theta": theta, "buffers": buffers}


def test_fedem_separates_opposed_groups_and_its_likelihood_rises() -> None:
    run, jobs, down = mixtures()
    costs = []
    for round_ in range(1, 61):
        found = list(train(run, down, jobs, round_))
        deltas = torch.stack([t.up["delta"][0] for t in found])
        jobs = [
            replace(job, memory={"pi": t.memory["pi"][0]})
            for job, t in zip(jobs, found, strict=True)
        ]
        costs.append(float(torch.stack([t.losses[0] for t in found]).mean()))
        down = {**down, "theta": down["theta"] + deltas.mean(0)}
    assert all(b <= a + 1e-9 for a, b in pairwise(costs))
    pi = torch.stack([job.memory["pi"] for job in jobs])
    close(pi.sum(1), torch.ones(4, dtype=torch.float64), 1e-12)
    strong = pi.argmax(1).tolist()
    assert strong[0] == strong[1] != strong[2] == strong[3]
    assert float(pi.max(1).values.min()) > 0.95
    net = run.objective.net(down["buffers"])
    for job in jobs:
        part = job.part
        predict = functools.partial(FedEM(learners=2).predict, net, down, job.memory)
        logs = predict(part.x[part.index])
        close(logs.exp().sum(1), torch.ones(40, dtype=torch.float64), 1e-12)
        _, hits = run.objective.judge(predict, part.x, part.y, part.index)
        assert float(hits.double().mean()) > 0.9


def test_one_model_cannot_serve_opposed_groups() -> None:
    run, jobs, down = mixtures(1 + 1)
    alone = replace(run, algorithm=FedAvg())
    size = run.objective.layout.size
    down["theta"] = down["theta"][:size]
    for round_ in range(1, 61):
        plain = [replace(job, memory={}) for job in jobs]
        found = list(train(alone, down, plain, round_))
        change = torch.stack([t.up["delta"][0] for t in found]).mean(0)
        down = {**down, "theta": down["theta"] + change}
    part = jobs[0].part
    _, hits = run.objective.scores(down["theta"], down["buffers"], part.x, part.y)
    assert float(hits.double().mean()) < 0.75


def test_equal_learners_stay_equal_and_undecided() -> None:
    run, jobs, down = mixtures()
    half = down["theta"][: run.objective.layout.size]
    down["theta"] = torch.cat([half, half])
    for trained in train(run, down, jobs, 1):
        close(trained.memory["pi"][0], vector(0.5, 0.5), 1e-15)
        first, second = trained.up["delta"][0].chunk(2)
        close(first, second, 1e-15)


def test_clients_alike_stay_alike() -> None:
    run, jobs, down = mixtures()
    twins = [replace(jobs[0], client=Client(k, 40, 1.0)) for k in range(3)]
    first, *others = [t.memory["pi"][0] for t in train(run, down, twins, 1)]
    assert all(torch.allclose(first, other, rtol=0, atol=1e-14) for other in others)


def test_a_learner_that_has_lost_all_weight_may_come_back() -> None:
    algorithm = FedEM(learners=2)
    losses = torch.tensor([[0.0], [2000.0]], dtype=torch.float64)
    memory = algorithm.survey({"pi": vector(0.5, 0.5)}, losses)
    assert float(memory["pi"][1]) == 0.0
    again = algorithm.survey({"pi": memory["pi"]}, losses.flip(0))
    assert float(again["pi"][1]) == 1.0
    seen = Seen(lambda model: model, lambda model: model[:1], ONE)
    state = {"prior": memory["pi"], "pi": memory["pi"]}
    assert math.isfinite(float(algorithm.cost(seen, vector(1, 0, 2, 0), state)))


# Runs.

SETTING = (
    "partition=dirichlet",
    "partition.alpha=0.5",
    "partition.minimum=10",
    "client_test=0.2",
    "client_validation=0.2",
    "local.batch=20",
)
STRATEGIES = [
    ["strategy=finetune"],
    ["strategy=ditto"],
    ["strategy=fedrep"],
    ["strategy=fedrep", "strategy.joint=true"],
    ["strategy=clustered"],
    ["strategy=fedem"],
]


def scores(result: Result) -> list[tuple[str, ...]]:
    """Return what the clients measured, in all rounds and at the end."""
    lines = (result.path / "clients.csv").read_text().splitlines()
    head, *rows = [line.split(",") for line in lines]
    names = ("round", "client", "loss", "accuracy", "validation_loss")
    at = [head.index(name) for name in names]
    return [tuple(row[i] for i in at) for row in rows]


@pytest.mark.parametrize(
    ("given", "module", "name"),
    [
        (["strategy=finetune", "strategy.epochs=3"], safely, "train"),
        (["strategy=fedem"], judging, "surveyed"),
        (["strategy=clustered"], judging, "surveyed"),
    ],
)
def test_a_client_that_cannot_be_judged_costs_no_other_its_scores(
    run: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    given: list[str],
    module: Any,
    name: str,
) -> None:
    """It fails in what its own model is made of, and with it those that go along with it."""
    whole = getattr(module, name)

    def failing(trainer: Trainer, down: Any, jobs: Any, *more: Any) -> Any:
        for_scores = name != "train" or trainer.local.epochs == 3
        if for_scores and 2 in [job.client.id for job in jobs]:
            raise ArithmeticError("not enough memory")
        return whole(trainer, down, jobs, *more)

    monkeypatch.setattr(module, name, failing)
    result = run(*SETTING, *given, "nodes=1", "clients_per_round=6", "rounds=1")
    heard = {client for r, client, loss, *_ in scores(result) if loss}
    assert heard == {"0", "1", "3", "4", "5"}
    assert result.summary["failures"] == 0


@pytest.mark.parametrize("given", STRATEGIES, ids=lambda g: g[-1])
def test_who_hosts_whom_changes_no_clients_score(
    run: Callable[..., Result], given: list[str]
) -> None:
    one, three = (run(*SETTING, *given, f"nodes={n}") for n in (1, 3))
    torch.testing.assert_close(one.theta, three.theta, rtol=0, atol=1e-5)
    pairs = zip(scores(one), scores(three), strict=True)
    for a, b in pairs:
        assert a[:2] == b[:2]
        for x, y in zip(a[2:], b[2:], strict=True):
            assert float(x) == pytest.approx(float(y), abs=1e-4)


def test_a_resumed_run_judges_as_one_that_never_stopped(
    run: Callable[..., Result],
) -> None:
    given = (*SETTING, "strategy=ditto", "checkpoint_every=1", "rounds=4")
    whole = run(*given)

    class Stop(Exception):
        pass

    def stop(record: dict[str, object]) -> tuple[bool, dict[str, float]]:
        if record["round"] == 3:  # after two checkpoints
            raise Stop
        return False, {}

    with pytest.raises(Stop):
        run(*given, "name=cut", callbacks=[stop])
    cut = whole.path.parent / "cut"
    again = run(*given, f"resume={cut}")
    assert scores(again) == scores(whole)
    assert again.summary["clients"] == whole.summary["clients"]


def by_hand(overrides: tuple[str, ...]) -> Callable[[Tensor, int], dict[str, float]]:
    """Return a judge of a vector on a client's test samples."""
    config, place = load(overrides), setting(overrides)
    goal = objective(config, place.dataset)

    def judge(theta: Tensor, k: int) -> dict[str, float]:
        part = place.samples(k).test
        x, y = part.x[part.index], part.y[part.index]
        return goal.evaluate(theta, goal.initial()[1], x, y)

    return judge


def ends(result: Result) -> dict[int, float]:
    """Return each client's accuracy at the end."""
    last = max(int(row[0]) for row in scores(result))
    return {int(r[1]): float(r[3]) for r in scores(result) if int(r[0]) == last}


def flat(result: Result, overrides: tuple[str, ...]) -> Tensor:
    goal = objective(load(overrides), setting(overrides).dataset)
    return torch.cat([result.model[name].flatten() for name in goal.layout.names])


@pytest.mark.parametrize("strategy", ["fedem", "clustered"])
def test_moments_persist_where_clients_look_at_their_samples_first(
    run: Callable[..., Result], strategy: str
) -> None:
    given = (*SETTING, f"strategy={strategy}", "optimizer.momentum=0.9", "rounds=3")
    given = (*given, "clients_per_round=6")
    kept, fresh = (
        run(*given, f"optimizer.moments={how}").theta for how in ("persist", "reset")
    )
    assert float((kept - fresh).norm()) > 1e-3


def test_finetuned_models_are_what_training_from_the_servers_gives(
    run: Callable[..., Result],
) -> None:
    given = (*SETTING, "strategy=finetune", "strategy.epochs=2", "engine=loop")
    result, overrides = run(*given), (*QUICK, *given)
    theta, judge = flat(result, overrides), by_hand(overrides)
    built = trainer(
        load(overrides), objective(load(overrides), setting(overrides).dataset)
    )
    down = {"theta": theta, "buffers": torch.zeros(0)}
    jobs = [
        Job(Client(k, len(p), 1.0), p, {})
        for k, p in ((k, setting(overrides).samples(k).train) for k in range(6))
    ]
    found = ends(result)
    plain = {k: judge(theta, k)["accuracy"] for k in range(6)}
    for trained in train(replace(built, local=Local(2, 20)), down, jobs, 4):
        k = trained.clients[0].id
        tuned = judge(theta + trained.up["delta"][0], k)["accuracy"]
        assert found[k] == pytest.approx(tuned, abs=1e-9)
    assert found != plain


def test_no_epochs_of_adaptation_are_fedavg(run: Callable[..., Result]) -> None:
    tuned = run(*SETTING, "strategy=finetune", "strategy.epochs=0")
    plain = run(*SETTING, "strategy=fedavg")
    assert torch.equal(tuned.theta, plain.theta)
    assert ends(tuned) == pytest.approx(ends(plain), abs=1e-9)


def test_ditto_without_a_leash_is_local_training(run: Callable[..., Result]) -> None:
    everyone = ("clients_per_round=6", "optimizer.lr=0.05")
    own = run(*SETTING, *everyone, "strategy=ditto", "strategy.lam=0")
    alone = run(*SETTING, *everyone, "strategy=local")
    assert ends(own) == pytest.approx(ends(alone), abs=1e-9)
    shared = run(*SETTING, *everyone, "strategy=fedavg")
    torch.testing.assert_close(own.theta, shared.theta, rtol=0, atol=1e-6)
    assert ends(shared) != ends(alone)


def test_local_training_sends_nothing_over_links(run: Callable[..., Result]) -> None:
    result = run(*SETTING, "strategy=local", "clients_per_round=6")
    overrides = (*QUICK, *SETTING, "strategy=fedavg", "engine=loop")
    config, place = load(overrides), setting(overrides)
    built = trainer(config, objective(config, place.dataset))
    judge, found = by_hand(overrides), ends(result)
    for k in range(6):
        theta, buffers = built.objective.initial()
        part = place.samples(k).train
        for round_ in (1, 2, 3):
            job = Job(Client(k, len(part), 1.0), part, {})
            down = {"theta": theta, "buffers": buffers}
            (trained,) = train(built, down, [job], round_)
            theta = theta + trained.up["delta"][0]
        assert found[k] == pytest.approx(judge(theta, k)["accuracy"], abs=1e-9)
    assert all(not r["strategy"]["link_bytes"] for r in result.records[1:])


@pytest.mark.parametrize("solver", ["finetune", "ditto", "fedrep", "fedem"])
def test_personal_models_on_a_complete_network_are_those_of_a_server(
    run: Callable[..., Result], solver: str
) -> None:
    """After a round of complete mixing all carry the mean, which is what a server sends."""
    everyone = ("clients_per_round=6", "dtype=float64")
    star = run(*SETTING, *everyone, f"strategy={solver}")
    network = run(
        *SETTING,
        *everyone,
        "strategy=pushsum",
        "strategy.judge=own",
        f"strategy@strategy.solver={solver}",
        "topology=complete",
    )
    torch.testing.assert_close(star.theta, network.theta, rtol=0, atol=1e-10)
    pairs = zip(scores(star), scores(network), strict=True)
    for a, b in pairs:
        assert a[:2] == b[:2]
        assert [float(v) for v in a[2:]] == pytest.approx(
            [float(v) for v in b[2:]], abs=1e-8
        )


def test_a_mixture_is_judged_on_the_test_set_too(run: Callable[..., Result]) -> None:
    """By the mean of its learners' probabilities, as the server's model is."""
    given = ("strategy=pushsum", "strategy@strategy.solver=fedem", "topology=complete")
    given = (*given, "clients_per_round=6", "dtype=float64", "client_validation=0")
    result = run(*SETTING, *given, "strategy.judge_samples=9999")
    told = result.summary["clients"]["accuracy_mean"]
    assert told == pytest.approx(result.summary["accuracy"], abs=1e-9)


@pytest.mark.parametrize("strategy", ["fedavg", "fedrep", "ditto", "fedem"])
def test_an_optimizer_whose_answer_nobody_asks_for_is_refused(strategy: str) -> None:
    with pytest.raises(UserError, match="optimizer=richardson: answers with a direc"):
        load([f"strategy={strategy}", "optimizer=richardson"])


def test_who_diverged_stays_in_the_mean(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = judging.scored

    def scored(run: Any, predict: Any, node: Any, k: int) -> dict[str, Any]:
        row = real(run, predict, node, k)
        return row | {"loss": float("nan")} if k == 1 else row

    monkeypatch.setattr(judging, "scored", scored)
    result = run(*SETTING, "strategy=finetune", "clients_per_round=6", "rounds=1")
    told = {int(r[1]): float(r[3]) for r in scores(result)}
    assert told.keys() == set(range(6)) and told[1] == 0.0
    assert result.summary["clients"]["loss_mean"] == pytest.approx(1e30 / 6)


def test_a_client_is_judged_by_the_memory_that_the_server_accepted(
    run: Callable[..., Result],
) -> None:
    """A reply that is lost leaves the client's own model where it was."""
    given = (*SETTING, "strategy=ditto", "clients_per_round=6", "nodes=6", "rounds=3")
    seen: list[dict[int, float]] = []

    def lose(task: Run) -> None:
        accepted = task.federation._accepted

        def some(replies: object) -> object:
            kept = [
                r
                for r in replies  # type: ignore[attr-defined]
                if task.federation.round.number != 2
                or task.federation._asked[r.metadata.src_node_id][0] != [3]
            ]
            return accepted(kept)

        task.federation._accepted = some  # type: ignore[assignment,method-assign]

    result = run(*given, edit=lose)
    whole = run(*given)
    for found in (result, whole):
        rows = [r for r in scores(found) if r[0] == "3" and r[3]]
        seen.append({int(r[1]): float(r[2]) for r in rows})
    before = {int(r[1]): float(r[2]) for r in scores(whole) if r[0] == "2" and r[3]}
    assert seen[0][3] == before[3] != seen[1][3]


def test_the_servers_accuracy_of_learners_is_that_of_their_mean(
    run: Callable[..., Result],
) -> None:
    result = run(*SETTING, "strategy=fedem", "strategy.learners=2")
    overrides = (*QUICK, *SETTING, "strategy=fedem", "strategy.learners=2")
    config, place = load(overrides), setting(overrides)
    goal = objective(config, place.dataset)
    net, test = goal.net(goal.initial()[1]), place.test()
    models = [
        torch.cat(
            [result.model[f"learner_{k}.{n}"].flatten() for n in goal.layout.names]
        )
        for k in range(2)
    ]
    mean = torch.stack([net(m, test.x).softmax(-1) for m in models]).mean(0)
    accuracy = float((mean.argmax(-1) == test.y).double().mean())
    assert result.summary["accuracy"] == pytest.approx(accuracy, abs=1e-9)
    assert not torch.equal(*models)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["strategy=fedrep", "strategy.head=4"], "no body would be shared"),
        (["strategy=ditto", "optimizer=sophia"], "optimizer=sgd"),
        (["strategy=fedem", "strategy.learners=1"], "strategy.learners"),
        (["strategy=ditto", "privacy=local", "evaluate_clients=none"], "noise"),
        (["strategy=pushsum", "strategy@strategy.solver=clustered"], "votes_0"),
    ],
)
def test_mistakes_are_told_in_a_line(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Run((*QUICK, *overrides), say=lambda _: None)


def test_the_chosen_round_is_in_the_summary_file(run: Callable[..., Result]) -> None:
    result = run(*SETTING, "strategy=ditto")
    told = json.loads((Path(result.path) / "summary.json").read_text())
    chosen = told["clients"]["chosen"]
    assert chosen["round"] in (1, 2, 3, 4)
    (line,) = [x for x in "\n".join(result.lines).splitlines() if x[:6] == "chosen"]
    assert f"{chosen['accuracy_mean']:.4f} in the mean" in line
    assert f"round {chosen['round']}" in line
