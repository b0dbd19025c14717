"""Families of hyper-parameters: nothing at zero, and one algorithm for all of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from strategies import topology
from strategies.algorithm import Client, Vectors
from strategies.engine import train as trained_by
from strategies.families import (
    ClassWeights,
    Family,
    FeatureScales,
    Interpolation,
    LogitWeights,
    Mixture,
    Own,
    SampleWeights,
    WeightDecay,
)
from strategies.fedavg import FedAvg
from strategies.hypergrad import HGP, hypergradients
from strategies.hyperproblem import Lambdas
from strategies.local import Job, Local, Part, Trainer, orders
from strategies.network import Network
from strategies.personal_objective import PersonalObjective
from strategies.personalization import Personal
from strategies.personalize import Personalize
from strategies.randomness import generator
from strategies.sgd import SGD

F64 = torch.float64
FEATURES, CLASSES = 2, 3
SIZE = CLASSES * (FEATURES + 1)
FAMILIES: tuple[Family, ...] = (
    ClassWeights(),
    LogitWeights(),
    SampleWeights(),
    Interpolation(),
    WeightDecay(),
    FeatureScales(),
)


def net(theta: Tensor, x: Tensor) -> Tensor:
    """Return the logits of a linear classifier of C classes."""
    table = theta.view(-1, FEATURES + 1)
    return x @ table[:, :-1].T + table[:, -1]


def client(seed: int, samples: int = 12) -> Own:
    """Return a client with classes of its own liking and noisy labels."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * samples, FEATURES, generator=g, dtype=F64)
    truth = torch.randn(SIZE, generator=g, dtype=F64)
    noise = torch.randn(2 * samples, CLASSES, generator=g, dtype=F64)
    y = (net(truth, x) + noise).argmax(1)
    local = torch.randn(SIZE, generator=g, dtype=F64)
    return Own(x[:samples], y[:samples], x[samples:], y[samples:], local)


CLIENTS = [client(seed) for seed in range(3)]


def personal(*families: Family, learners: int = 1) -> Personal:
    return Personal(net, SIZE, CLASSES, families, learners, decay=0.3)


def train(
    task: Personal, clients: list[Own], lambdas: Lambdas, start: Tensor
) -> Tensor:
    """Return the minimizer of the clients' training costs, by Newton's method."""

    def cost(theta: Tensor) -> Tensor:
        given = zip(clients, lambdas, strict=True)
        return torch.stack([task.inner(theta, v, own) for own, v in given]).mean()

    theta = start
    for _ in range(30):
        slope = torch.func.grad(cost)(theta)
        if float(slope.norm()) < 1e-13:
            break
        theta = theta - torch.linalg.solve(torch.func.hessian(cost)(theta), slope)
    assert float(slope.norm()) < 1e-11
    return theta


def value(task: Personal, clients: list[Own], lambdas: Lambdas, theta: Tensor) -> float:
    given = zip(clients, lambdas, strict=True)
    return float(torch.stack([task.outer(theta, v, own) for own, v in given]).mean())


def complete(n: int) -> Network:
    return Network(n, 0, topology.complete(n, 0))


# Zero is the unpersonalized model.


@pytest.mark.parametrize(
    "families", [(f,) for f in FAMILIES] + [FAMILIES], ids=lambda f: f[0].name
)
def test_zero_is_the_plain_model_bit_for_bit(families: tuple[Family, ...]) -> None:
    own, task, plain = CLIENTS[0], personal(*families), personal()
    theta = torch.randn(SIZE, generator=torch.Generator().manual_seed(1), dtype=F64)
    zero, none = task.zeros(own), torch.zeros(0, dtype=F64)
    assert torch.equal(
        task.predict(theta, zero, own, own.outer_x), net(theta, own.outer_x)
    )
    for rows in (torch.arange(12), torch.tensor([3, 0, 7])):
        logits, y = net(theta, own.x[rows]), own.y[rows]
        cost = F.cross_entropy(logits, y, reduction="none").mean()
        cost = cost + 0.15 * theta.square().sum()
        assert torch.equal(task.inner(theta, zero, own, rows), cost)
    assert torch.equal(task.inner(theta, zero, own), plain.inner(theta, none, own))
    assert torch.equal(task.outer(theta, zero, own), plain.outer(theta, none, own))
    moved = task.inner(theta, zero + 0.1 * torch.arange(len(zero)) + 0.1, own)
    assert float(moved - plain.inner(theta, none, own)) != 0


def test_a_mixture_at_zero_is_the_mean_of_its_learners() -> None:
    own, task = CLIENTS[0], personal(Mixture(learners=3), learners=3)
    theta = torch.randn(3 * SIZE, generator=torch.Generator().manual_seed(1), dtype=F64)
    logits = [net(part, own.outer_x) for part in theta.split(SIZE)]
    found = task.predict(theta, task.zeros(own), own, own.outer_x)
    expected = torch.stack([one.softmax(1) for one in logits]).mean(0)
    torch.testing.assert_close(found.exp(), expected, rtol=1e-13, atol=1e-15)
    same = theta[:SIZE].repeat(3)
    any_weights = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    torch.testing.assert_close(
        task.outer(same, any_weights, own),
        personal().outer(theta[:SIZE], any_weights[:0], own),
        rtol=1e-12,
        atol=0,
    )


def test_what_each_family_does() -> None:
    own = CLIENTS[0]
    theta = torch.randn(SIZE, generator=torch.Generator().manual_seed(2), dtype=F64)
    plain = F.cross_entropy(net(theta, own.x), own.y, reduction="none")
    decay = 0.15 * theta.square().sum()

    def cost(family: Family, *numbers: float) -> Tensor:
        lam = torch.tensor(numbers, dtype=F64)
        return personal(family).inner(theta, lam, own) - decay

    weights = 3 * torch.tensor([0.5, -1.0, 0.2], dtype=F64).softmax(0)
    torch.testing.assert_close(
        cost(ClassWeights(), 0.5, -1.0, 0.2), (weights[own.y] * plain).mean()
    )
    torch.testing.assert_close(
        cost(LogitWeights(), 0.5, -1.0, 0.2),
        F.cross_entropy(weights * net(theta, own.x), own.y),
    )
    # A sample whose l is -1 is not there.
    torch.testing.assert_close(
        cost(SampleWeights(), -1.0, *[0.0] * 11), plain[1:].sum() / 12
    )
    assert own.local is not None
    torch.testing.assert_close(
        cost(Interpolation(), 1.0), F.cross_entropy(net(own.local, own.x), own.y)
    )
    torch.testing.assert_close(
        cost(WeightDecay(), 0.4), plain.mean() + 0.2 * theta.square().sum()
    )
    torch.testing.assert_close(
        cost(FeatureScales(), 0.3, -0.7),
        F.cross_entropy(
            net(theta, own.x * torch.tensor([0.3, -0.7], dtype=F64).exp()), own.y
        ),
    )
    # Class weights, sample weights and decay are for training; predictions ignore them.
    for family in (ClassWeights(), SampleWeights(), WeightDecay()):
        task = personal(family)
        lam = task.zeros(own) + 0.7
        assert torch.equal(
            task.outer(theta, lam, own), personal().outer(theta, lam[:0], own)
        )
        regular = personal(replace(family, gamma=0.5))
        torch.testing.assert_close(
            regular.outer(theta, lam, own),
            task.outer(theta, lam, own) + 0.25 * lam.square().sum(),
        )


def test_the_outer_step_is_adams_with_a_rate_for_each_family() -> None:
    how = Personalize(
        families=("class_weights", "logit_weights"),
        lr={"class_weights": 0.1, "logit_weights": 0.02},
    )
    own, task = CLIENTS[0], personal(*how.built())
    memory = how.fresh(task.zeros(own))
    rates, half = how.rates(task, memory["l"], own), len(memory["l"]) // 2
    parts = [torch.zeros(half, dtype=F64, requires_grad=True) for _ in range(2)]
    groups = zip(parts, (0.1, 0.02), strict=True)
    theirs = torch.optim.Adam([{"params": [part], "lr": lr} for part, lr in groups])
    for v in torch.randn(5, 2 * half, dtype=F64, generator=generator(0, "v")):
        memory = how.step(memory | {"v": v}, rates)
        for part, slope in zip(parts, v.split(half), strict=True):
            part.grad = slope.clone()
        theirs.step()
        found = torch.cat(parts).detach()
        torch.testing.assert_close(memory["l"], found, rtol=0, atol=1e-12)


def test_what_is_admitted_leaves_zero_as_it_is() -> None:
    own, task = CLIENTS[0], personal(ClassWeights(), WeightDecay(), FeatureScales())
    far = task.zeros(own) - 2
    found = task.admitted(far, own)  # everybody's decay is 0.3
    assert torch.equal(found, torch.where(torch.arange(len(far)) == 3, -0.3, far))
    assert torch.equal(task.admitted(task.zeros(own), own), task.zeros(own))
    bare = replace(task, decay=0.0)
    assert torch.equal(bare.admitted(task.zeros(own), own), task.zeros(own))


# One algorithm for any combination.


@pytest.mark.parametrize(
    ("families", "step"),
    [
        ((ClassWeights(gamma=0.1), LogitWeights(), FeatureScales()), 1.0),
        # A small step: more negative a decay than everybody's, and there is no minimum.
        ((SampleWeights(), WeightDecay(gamma=0.1), Interpolation(gamma=0.2)), 0.2),
        ((ClassWeights(), Mixture(learners=2), WeightDecay(gamma=0.1)), 0.2),
    ],
    ids=["class_logit_feature", "sample_decay_interpolation", "class_mixture_decay"],
)
def test_three_together_agree_with_retraining_and_are_optimized(
    families: tuple[Family, ...], step: float
) -> None:
    learners = 2 if any(isinstance(f, Mixture) for f in families) else 1
    task = personal(*families, learners=learners)
    g = torch.Generator().manual_seed(5)
    start = torch.zeros(learners * SIZE, dtype=F64)
    lambdas = tuple(
        0.1 * torch.randn(len(task.zeros(own)), generator=g, dtype=F64)
        for own in CLIENTS
    )

    start = train(task, CLIENTS, lambdas, start)  # a step or two from all below

    def after(lambdas: Lambdas) -> float:
        theta = train(task, CLIENTS, lambdas, start)
        return value(task, CLIENTS, lambdas, theta)

    def slopes(lambdas: Lambdas, depth: int) -> Lambdas:
        theta = train(task, CLIENTS, lambdas, start)
        x = theta.expand(3, -1).clone()
        settings = HGP(depth, 1, 0.7)
        problem = task.problem(CLIENTS, x, lambdas)
        return hypergradients(problem, complete(3), settings).v

    found = slopes(lambdas, 150)
    # All of one client's numbers, so that no family is left out, and one of another's.
    for i, j in ((0, 0), *((1, j) for j in range(len(lambdas[1])))):
        ends = []
        for small in (1e-4, -1e-4):
            moved = [v.clone() for v in lambdas]
            moved[i][j] += small
            ends.append(after(tuple(moved)))
        slope = (ends[0] - ends[1]) / 2e-4
        assert float(found[i][j]) == pytest.approx(slope, rel=1e-5, abs=1e-8)
    costs = [after(lambdas)]
    for _ in range(6):
        v = slopes(lambdas, 15)
        lambdas = tuple(a - step * b for a, b in zip(lambdas, v, strict=True))
        costs.append(after(lambdas))
    assert all(b < a for a, b in pairwise(costs))
    assert costs[-1] < costs[0] - 0.005


def halves(g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return forty points and on which side of a plane they lie."""
    x = torch.randn(40, FEATURES, generator=g, dtype=F64)
    return x, (x[:, 0] > 0).long()


def test_two_opposed_groups_choose_different_learners() -> None:
    g = torch.Generator().manual_seed(3)
    clients = []
    for i in range(4):
        x, y = halves(g)
        y = y if i < 2 else 1 - y  # the second group calls everything by the other name
        clients.append(Own(x[:20], y[:20], x[20:], y[20:]))
    size = 2 * (FEATURES + 1)
    task = Personal(net, size, 2, (Mixture(learners=2),), 2, decay=0.05)
    start = 0.3 * torch.randn(2 * size, generator=g, dtype=F64)
    lambdas: Lambdas = tuple(task.zeros(own) for own in clients)
    for _ in range(8):
        theta = start.clone()
        for _ in range(80):

            def cost(point: Tensor, given: Lambdas = lambdas) -> Tensor:
                both = zip(clients, given, strict=True)
                return torch.stack([task.inner(point, v, o) for o, v in both]).mean()

            theta = theta - 0.8 * torch.func.grad(cost)(theta)
        problem = task.problem(clients, theta.expand(4, -1).clone(), lambdas)
        settings = HGP(10, 1, 0.5, power_steps=0)
        v = hypergradients(problem, complete(4), settings).v
        lambdas = tuple(a - 8 * b for a, b in zip(lambdas, v, strict=True))
    leaning = torch.stack([v[0] - v[1] for v in lambdas])
    assert leaning[:2].sign().eq(leaning[0].sign()).all()
    assert leaning[2:].sign().eq(-leaning[0].sign()).all()
    assert float(leaning.abs().min()) > 1
    hits = [
        (task.predict(theta, v, own, own.outer_x).argmax(1) == own.outer_y)
        for own, v in zip(clients, lambdas, strict=True)
    ]
    assert float(torch.cat(hits).to(F64).mean()) > 0.9


def test_training_against_what_all_are_judged_by_loses_its_weight() -> None:
    """Sample weights have no part in predictions: only the way through training moves them."""
    g = torch.Generator().manual_seed(3)
    clients = []
    for i in range(4):
        x, y = halves(g)
        taught = 1 - y[:20] if i == 3 else y[:20]
        clients.append(Own(x[:20], taught, x[20:], y[20:]))
    size = 2 * (FEATURES + 1)
    task = Personal(net, size, 2, (SampleWeights(),), decay=0.1)
    lambdas: Lambdas = tuple(task.zeros(own) for own in clients)
    theta = torch.zeros(size, dtype=F64)
    for _ in range(5):
        theta = train(task, clients, lambdas, theta)
        problem = task.problem(clients, theta.expand(4, -1).clone(), lambdas)
        v = hypergradients(problem, complete(4), HGP(100, 1, 1.0, power_steps=0)).v
        steps = zip(lambdas, v, strict=True)
        lambdas = tuple((a - 20 * b).clamp(min=-1) for a, b in steps)
    means = [float(lam.mean()) for lam in lambdas]
    assert means[3] < -0.1
    assert min(means[:3]) > 0.1


def test_batches_are_rows_of_each_client() -> None:
    task = personal(SampleWeights(), LogitWeights())
    g = torch.Generator().manual_seed(4)
    x = torch.randn(3, SIZE, generator=g, dtype=F64)
    lambdas = tuple(
        0.5 * torch.randn(len(task.zeros(own)), generator=g, dtype=F64)
        for own in CLIENTS
    )
    drawn = [torch.tensor(rows) for rows in ([3, 0, 7], [11, 2, 5], [1, 10, 4])]
    problem = task.problem(CLIENTS, x, lambdas, lambda purpose, k: drawn)
    assert problem.draw is not None
    found = problem.inner(x, lambdas, problem.draw("cross", 1))
    for theta, lam, own, rows, cost in zip(
        x, lambdas, CLIENTS, drawn, found, strict=True
    ):
        logits = net(theta, own.x[rows]) * CLASSES * lam[12:].softmax(0)
        losses = -logits.log_softmax(1)[range(3), own.y[rows]]
        expected = ((1 + lam[rows]) * losses).mean() + 0.15 * theta.square().sum()
        torch.testing.assert_close(cost, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("batch", [0, 4])
@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_engines_train_on_what_each_client_has(engine: str, batch: int) -> None:
    g = torch.Generator().manual_seed(8)
    families = SampleWeights(), ClassWeights(), Interpolation()
    linear = nn.Linear(FEATURES, CLASSES, dtype=F64)
    goal = PersonalObjective([linear], families, CLASSES, CLIENTS[0].x[:1])
    x, y = (torch.cat([getattr(own, name) for own in CLIENTS]) for name in "xy")
    order, sizes = torch.randperm(36, generator=g), (13, 7, 10)

    def normal(count: int) -> Tensor:
        return torch.randn(count, generator=g, dtype=F64)

    owned: list[Vectors] = [
        {"l": 0.3 * normal(CLASSES + 1 + size), "local": normal(SIZE)} for size in sizes
    ]
    parts = [Part(x, y, rows) for rows in torch.split(order[: sum(sizes)], sizes)]
    jobs = [
        Job(Client(k, sizes[k], 1.0), parts[k], {}, hyper=owned[k]) for k in range(3)
    ]
    local = Local(epochs=2, batch=batch)
    trainer = Trainer(FedAvg(), SGD(lr=0.5), local, goal, seed=4)
    start, buffers = goal.initial()
    down = {"theta": start, "buffers": buffers}
    found = {
        client.id: up
        for chunk in trained_by(trainer, down, jobs, 1, engine)
        for client, up in zip(chunk.clients, chunk.up["delta"], strict=True)
    }
    for k, (part, has) in enumerate(zip(parts, owned, strict=True)):
        mine = x[part.index], y[part.index]
        own, theta = Own(*mine, *mine, has["local"]), start

        def cost(
            theta: Tensor, rows: Tensor, own: Own = own, lam: Tensor = has["l"]
        ) -> Tensor:
            return goal.task.inner(theta, lam, own, rows)

        for drawn in orders(local, 4, 1, [k], sizes[k]):
            theta = theta - 0.5 * torch.func.grad(cost)(theta, drawn[0])
        torch.testing.assert_close(found[k], theta - start, rtol=0, atol=1e-12)


# What does not fit.


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (
            lambda: personal(Mixture(learners=3)).zeros(CLIENTS[0]),
            "Mixture mixes 3 learners, and the model has 1",
        ),
        (lambda: personal(learners=3), "3 learners needs the family Mixture"),
        (lambda: Mixture(learners=1), "learners=1: at least 2"),
        (
            lambda: personal(WeightDecay(), WeightDecay(1.0)),
            "WeightDecay is there twice",
        ),
        (lambda: WeightDecay(gamma=-1), "gamma=-1: at least 0"),
        (
            lambda: personal(Interpolation()).zeros(replace(CLIENTS[0], local=None)),
            "Interpolation needs each client's local model",
        ),
        (
            lambda: personal().outer(torch.zeros(4), torch.zeros(0), CLIENTS[0]),
            "4 numbers where 1 learners of 9 are needed",
        ),
        (
            lambda: personal(WeightDecay()).outer(
                torch.zeros(SIZE), torch.zeros(2), CLIENTS[0]
            ),
            "2 hyper-parameters where 1 are needed",
        ),
        (lambda: Personal(net, 3, 1), "about classes"),
    ],
)
def test_what_does_not_fit(make, line) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=line):
        make()
