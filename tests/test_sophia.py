"""Sophia and its estimators: golden numbers, laws by enumeration, and what a user sees."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from app.errors import UserError
from strategies.adamw import AdamW
from strategies.algorithm import Client
from strategies.curvature import GaussNewtonBartlett, Hutchinson, Place, sample, shares
from strategies.engine import train
from strategies.fedavg import FedAvg
from strategies.fedsophia import FedSophia, Sophia
from strategies.local import Job, Local, Part, Trained, Trainer
from strategies.losses import IGNORED
from strategies.objective import Batch, Objective
from strategies.randomness import normals, signs
from strategies.sgd import SGD

NONE = torch.zeros(0, dtype=torch.float64)
X = torch.tensor([[1, -2], [0.5, 3]], dtype=torch.float64)
W = torch.tensor([[0.2, -0.1], [0.4, 0.3], [-0.5, 0.1]], dtype=torch.float64)
GAUSS_NEWTON = torch.tensor(
    [[0.14197558, 1.12693579], [0.13285523, 1.47727684], [0.09394886, 1.05244892]],
    dtype=torch.float64,
)
EMPIRICAL = torch.tensor(
    [[0.0739486, 1.03830085], [0.17989935, 0.80101484], [0.02316804, 3.6632613]],
    dtype=torch.float64,
)


def close(actual: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def softmax_linear() -> Objective:
    """Return the linear classifier of the golden numbers: 3 classes, 2 inputs."""
    module = nn.Linear(2, 3, bias=False).to(torch.float64)
    with torch.no_grad():
        module.weight.copy_(W)
    return Objective(module, "cross_entropy", {})


def uniform_for(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return uniform numbers that draw given labels."""
    ends = probabilities.cumsum(-1)
    starts = ends - probabilities
    middle = (starts + ends) / 2
    return middle.gather(-1, labels[..., None]).squeeze(-1)


def expectation(objective: Objective, batch: Batch) -> Tensor:
    """Return the mean of the estimator over all label vectors, by their probabilities."""
    theta, buffers = objective.initial()
    logits, _ = objective.outputs(theta, buffers, batch)
    p, total = logits.detach().softmax(-1), torch.zeros_like(theta)
    places = batch.y.numel()
    for labels in itertools.product(range(p.shape[-1]), repeat=places):
        chosen = torch.tensor(labels).view(batch.y.shape)
        weight = p.gather(-1, chosen[..., None]).prod()
        drawn = uniform_for(p, chosen)
        assert torch.equal(sample(logits, drawn), chosen)
        total += weight * GaussNewtonBartlett().estimate(
            objective, theta, buffers, batch, drawn
        )
    return total


# The Gauss-Newton-Bartlett estimator.


def test_gnb_is_unbiased_for_the_golden_gauss_newton_diagonal() -> None:
    batch = Batch(X, torch.tensor([0, 2]), {})
    close(expectation(softmax_linear(), batch), GAUSS_NEWTON.flatten(), 1e-8)


def test_gnb_is_unbiased_for_the_hessian_of_a_linear_classifier() -> None:
    objective = softmax_linear()
    theta, buffers = objective.initial()
    batch = Batch(X, torch.tensor([0, 2]), {})
    columns = [
        objective.product(theta, buffers, batch, e)[0]
        for e in torch.eye(6, dtype=torch.float64)
    ]
    diagonal = torch.stack(columns).diagonal()
    close(expectation(objective, batch), diagonal, 1e-14)


def test_the_empirical_fisher_is_something_else() -> None:
    objective, labels = softmax_linear(), torch.tensor([0, 2])
    theta, buffers = objective.initial()
    gradient, *_ = objective.gradient(theta, buffers, Batch(X, labels, {}))
    close(2 * gradient.square(), EMPIRICAL.flatten(), 1e-7)
    p = (X @ W.T).softmax(-1)
    told = GaussNewtonBartlett().estimate(
        objective, theta, buffers, Batch(X, labels, {}), uniform_for(p, labels)
    )
    close(told, EMPIRICAL.flatten(), 1e-7)  # with the true labels drawn, it is that
    assert float((EMPIRICAL - GAUSS_NEWTON).abs().max()) > 1


def test_a_forgotten_batch_size_is_seen() -> None:
    """The mean gradient squared, without B, is B times too small."""
    objective = softmax_linear()
    theta, buffers = objective.initial()
    p, total = (X @ W.T).softmax(-1), torch.zeros(6, dtype=torch.float64)
    for labels in itertools.product(range(3), repeat=2):
        y = torch.tensor(labels)
        gradient, *_ = objective.gradient(theta, buffers, Batch(X, y, {}))
        total += p.gather(-1, y[:, None]).prod() * gradient.square()
    close(2 * total, GAUSS_NEWTON.flatten(), 1e-8)


def test_padding_draws_no_labels() -> None:
    objective = softmax_linear()
    theta, buffers = objective.initial()
    y = torch.tensor([0, 2])
    alone = Batch(X, y, {})
    random = torch.tensor([0.3, 0.9], dtype=torch.float64)
    padded = Batch(
        torch.cat([X, 7 * X]),
        torch.cat([y, y]),
        {},
        torch.tensor([0.5, 0.5, 0, 0], dtype=torch.float64),
    )
    estimate = GaussNewtonBartlett().estimate
    close(
        estimate(objective, theta, buffers, padded, random.repeat(2)),
        estimate(objective, theta, buffers, alone, random),
        1e-15,
    )
    close(expectation(objective, padded), GAUSS_NEWTON.flatten(), 1e-8)


class PerPlace(nn.Module):
    """Logits for each place of a sequence: (B, T, 2) to (B, T, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 3, bias=False).double()
        with torch.no_grad():
            self.head.weight.copy_(W)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def test_a_sequence_counts_its_labels() -> None:
    """B is the number of labels, not of sequences; ignored places draw none."""
    objective = Objective(PerPlace(), "cross_entropy", {})
    theta, buffers = objective.initial()
    whole = Batch(X[None], torch.tensor([[0, 2]]), {})
    close(expectation(objective, whole), GAUSS_NEWTON.flatten(), 1e-8)
    longer = torch.cat([X, 9 * X[:1]])[None]
    cut = Batch(longer, torch.tensor([[0, 2, IGNORED]]), {})
    close(shares(cut, torch.float64).sum(), torch.tensor(1.0).double(), 1e-15)
    random = torch.tensor([[0.3, 0.9, 0.5]], dtype=torch.float64)
    estimate = GaussNewtonBartlett().estimate
    close(
        estimate(objective, theta, buffers, cut, random),
        estimate(objective, theta, buffers, whole, random[:, :2]),
        1e-15,
    )
    # The loss itself leaves the place out as well.
    close(
        objective.loss(theta, buffers, cut)[0],
        objective.loss(theta, buffers, whole)[0],
        1e-15,
    )


# Hutchinson's estimator.

HESSIAN = torch.tensor([[2, 1, -0.5], [1, 3, 0.2], [-0.5, 0.2, -1]]).double()


class Quadratic(Objective):
    """1/2 theta'H theta, whatever the batch."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 1, bias=False).double(), "squared", {})

    def loss(
        self, theta: Tensor, buffers: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """Return the quadratic."""
        return 0.5 * theta @ HESSIAN @ theta, buffers


def test_hutchinson_over_all_sign_vectors() -> None:
    batch, theta = Batch(NONE, NONE, {}), torch.randn(3).double()
    estimates = torch.stack(
        [
            Hutchinson().estimate(
                Quadratic(), theta, NONE, batch, torch.tensor(u, dtype=torch.float64)
            )
            for u in itertools.product((-1, 1), repeat=3)
        ]
    )
    close(estimates.mean(0), HESSIAN.diagonal(), 1e-14)
    variances = torch.tensor([1.25, 1.04, 0.29], dtype=torch.float64)
    close(estimates.var(0, correction=0), variances, 1e-6)
    assert float(estimates.min()) < 0, "negative estimates are to be expected"


def test_hutchinson_with_normal_vectors() -> None:
    u = normals(0, "curvature probe", 1, [0], 0, 3 * 200_000)[0].view(-1, 3)
    estimates = u * (u @ HESSIAN)
    diagonal = HESSIAN.diagonal()
    rest = HESSIAN.square().sum(1) - diagonal.square()
    variances = 2 * diagonal.square() + rest
    error = (variances / len(u)).sqrt()
    assert bool(((estimates.mean(0) - diagonal).abs() < 4 * error).all())
    torch.testing.assert_close(estimates.var(0), variances, rtol=0.03, atol=0)


@pytest.mark.parametrize("law", [signs, normals])
def test_probes_belong_to_their_address(law: Callable[..., Tensor]) -> None:
    both = law(3, "p", 2, [7, 8], 0, 50)
    assert torch.equal(both[1], law(3, "p", 2, [8], 0, 50)[0])
    assert torch.equal(both[:, 20:], law(3, "p", 2, [7, 8], 20, 30))
    assert not torch.equal(both[0], both[1])
    assert set(signs(0, "p", 0, [0], 0, 100).unique().tolist()) == {-1.0, 1.0}


# The step.


def test_the_golden_step() -> None:
    """Form (C) of the authors' PyTorch code: rho .04, bs 10, h without the factor bs."""
    theta = torch.tensor([1, -2, 0.5], dtype=torch.float64)
    g = torch.tensor([0.3, -0.4, 0.1], dtype=torch.float64)
    optimizer = Sophia(lr=0.1, beta1=0.965, gamma=0.04, weight_decay=0.2)
    state = optimizer.init(theta, {})
    state["h"] = 10 * torch.tensor([0, 0.02, 2], dtype=torch.float64)
    after, moved = optimizer.step(theta.clone(), g, state, 1)
    expected = torch.tensor([0.88, -1.86, 0.4895625], dtype=torch.float64)
    close(after, expected, 1e-12)
    close(moved["won"], torch.tensor(1 / 3).double(), 1e-7)
    close(moved["m"], 0.035 * g, 1e-15)


def states(seed: int = 0) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    theta, g, m, h = torch.randn(4, 200, generator=random, dtype=torch.float64)
    state = Sophia().init(theta, {"m": m, "h": h})
    return theta, g, state


def test_no_entry_moves_by_more_than_the_learning_rate() -> None:
    theta, g, state = states()
    optimizer = Sophia(lr=0.1, gamma=0.5, weight_decay=0.2)
    after, moved = optimizer.step(theta.clone(), g, state, 1)
    moves = after - (1 - 0.1 * 0.2) * theta
    assert float(moves.abs().max()) <= 0.1 + 1e-15
    saturated = moved["m"].abs() >= (0.5 * state["h"]).clamp(min=optimizer.eps)
    assert 10 < int(saturated.sum()) < 190
    close(moves[saturated], -0.1 * moved["m"][saturated].sign(), 1e-15)
    negative = state["h"] < 0
    assert bool(saturated[negative].all()), "a negative h gives the sign of m"


def test_without_curvature_the_step_is_the_sign() -> None:
    theta, g, state = states()
    state["h"] = torch.zeros_like(theta)
    after, moved = Sophia(lr=0.1, weight_decay=0).step(theta.clone(), g, state, 1)
    close(after - theta, -0.1 * moved["m"].sign(), 1e-15)
    assert float(moved["won"]) == 0


def test_both_written_forms_are_one() -> None:
    """clip(m / max(h, eps), rho) at the rate lr' is form (P) with gamma = rho, lr = rho lr'."""
    theta, g, state = states()
    rho, rate = 0.04, 0.7
    after, moved = Sophia(lr=rho * rate, gamma=rho, weight_decay=0, eps=1e-12).step(
        theta.clone(), g, state, 1
    )
    ratio = moved["m"] / state["h"].clamp(min=1e-12 / rho)
    close(after, theta - rate * ratio.clamp(-rho, rho), 1e-14)


def test_an_unclipped_step_does_not_see_the_scale_of_the_loss() -> None:
    theta, g, state = states()
    optimizer = Sophia(lr=0.1, gamma=100.0, beta2=0.0, weight_decay=0)
    steps = []
    for scale in (1.0, 50.0):
        fresh = optimizer.init(theta, {})
        fresh = optimizer.refresh(fresh, scale * state["h"].abs().clamp(min=0.1))
        after, moved = optimizer.step(theta.clone(), scale * g, fresh, 1)
        assert float(moved["won"]) == 1
        steps.append(after)
    close(steps[0], steps[1], 1e-13)


def test_the_average_of_a_constant_estimate() -> None:
    theta, _, _ = states()
    optimizer = Sophia(beta2=0.9)
    state, h = optimizer.init(theta, {}), torch.ones_like(theta)
    for _ in range(7):
        state = optimizer.refresh(state, h)
    close(state["h"], (1 - 0.9**7) * h, 1e-14)
    assert float(optimizer.told({**state, "taken": h[0]})["refreshes"]) == 7


def test_adamw_is_torchs() -> None:
    theta, g, _ = states()
    optimizer = AdamW(lr=0.02, weight_decay=0.3)
    leaf = theta.clone().requires_grad_()
    known = torch.optim.AdamW([leaf], lr=0.02, weight_decay=0.3)
    state = optimizer.init(theta, {})
    for scale in (1.0, -3.0, 0.2, 5.0):
        leaf.grad = scale * g
        known.step()
        theta, state = optimizer.step(theta.clone(), scale * g, state, 1)
    close(theta, leaf.detach(), 1e-13)
    remembered = optimizer.init(theta, {n: state[n] for n in optimizer.kept})
    close(remembered["age"], torch.full((1,), 4.0).double(), 0)
    assert AdamW(moments="reset").fresh(theta) == {}


@pytest.mark.parametrize(
    ("optimizer", "age", "expected"),
    [
        (Sophia(tau=3), 0, [0, 3, 6]),
        (Sophia(tau=3), 4, [2, 5]),
        (Sophia(tau=1), 7, [0, 1, 2, 3, 4, 5, 6]),
        (Sophia(tau=20), 13, []),
        (Sophia(tau=2, tau_unit="rounds"), 5, [0, 1, 2, 3, 4, 5, 6]),
        (Sophia(tau=3, tau_unit="rounds"), 5, []),
    ],
)
def test_when_the_curvature_is_estimated(
    optimizer: Sophia, age: int, expected: list[int]
) -> None:
    """Seven local steps in round 3, after so many of the client's own."""
    memory = {"age": torch.tensor([float(age)])}
    assert list(optimizer.refreshes(memory, 3, 7)) == expected


# Training.


def network(dtype: torch.dtype = torch.float64) -> Objective:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    return Objective(module, "cross_entropy", {})


def part(size: int, seed: int = 0) -> Part:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 5, generator=random, dtype=torch.float64)
    y = torch.randint(0, 3, (size,), generator=random)
    return Part(x, y, torch.arange(size))


def once(
    trainer: Trainer, theta: Tensor, jobs: list[Job], round_: int
) -> list[Trained]:
    down = {"theta": theta, "buffers": NONE}
    return list(train(trainer, down, jobs, round_))


@pytest.mark.parametrize("estimator", ["gnb", "hutchinson"])
def test_one_client_with_one_step_a_round_is_centralized_sophia(
    estimator: str,
) -> None:
    """The plain algorithm, written here again, with its own derivatives."""
    objective, samples, tau = network(), part(9), 3
    optimizer = Sophia(lr=0.05, tau=tau, gamma=0.3, estimator=estimator)  # type: ignore[arg-type]
    trainer = Trainer(FedAvg(), optimizer, Local(batch=0, steps=1), objective, seed=4)
    theta, _ = objective.initial()
    here = theta.clone()
    memory = trainer.fresh(theta)
    m, h = torch.zeros_like(here), torch.zeros_like(here)
    for t in range(8):
        job = Job(Client(0, 9, 1.0), samples, memory)
        (trained,) = once(trainer, theta, [job], t + 1)
        theta = theta + trained.up["delta"][0]
        memory = {n: v[0] for n, v in trained.memory.items()}
        assert trained.gradients == [1 + (t % tau == 0) * (1 + (estimator != "gnb"))]

        def loss(point: Tensor, y: Tensor) -> Tensor:
            return objective.loss(point, NONE, Batch(samples.x, y, {}))[0]

        if t % tau == 0:
            place = Place(4, t + 1, 0, 0, 0)
            order = _order(trainer, t + 1)
            if estimator == "gnb":
                drawn = GaussNewtonBartlett().draw(place, torch.Size([9]), len(here))
                logits, _ = objective.outputs(
                    here, NONE, Batch(samples.x[order], samples.y[order], {})
                )
                y = torch.empty_like(samples.y)
                y[order] = sample(logits, drawn)
                g = torch.func.grad(loss)(here, y)
                estimate = 9 * g * g
            else:
                u = Hutchinson().draw(place, torch.Size([9]), len(here))
                hessian = torch.func.hessian(loss)(here, samples.y)
                estimate = u * (hessian @ u)
            h = 0.95 * h + 0.05 * estimate
        m = 0.965 * m + 0.035 * torch.func.grad(loss)(here, samples.y)
        ratio = m / torch.clamp(0.3 * h, min=1e-12)
        here = here - 0.05 * 0.02 * here - 0.05 * ratio.clamp(-1, 1)
        close(theta, here, 1e-12)
    close(memory["h"], h, 1e-12)


def _order(trainer: Trainer, round_: int) -> Tensor:
    from strategies.local import orders

    return orders(trainer.local, trainer.seed, round_, [0], 9)[0][0]


def test_moments_persist_or_start_afresh() -> None:
    objective, samples = network(), part(9)
    theta, _ = objective.initial()
    for optimizer in (Sophia(), AdamW(), SGD(momentum=0.9, moments="persist")):
        seen = []
        for kept in (optimizer, replace(optimizer, moments="reset")):
            trainer = Trainer(FedAvg(), kept, Local(batch=4, steps=3), objective, 0)
            memory = trainer.fresh(theta)
            for round_ in (1, 2):
                job = Job(Client(0, 9, 1.0), samples, memory)
                (trained,) = once(trainer, theta, [job], round_)
                memory = {n: v[0] for n, v in trained.memory.items()}
            assert memory.keys() == set(kept.kept)
            seen.append(trained.up["delta"])
        assert not torch.allclose(seen[0], seen[1])
        assert memory == {}


def test_averaged_moments_are_what_a_client_starts_from() -> None:
    objective, samples = network(), part(9)
    theta, buffers = objective.initial()
    averaging = FedSophia(average_moments=True)
    trainer = Trainer(averaging, Sophia(), Local(batch=0, steps=1), objective, 0)
    ones = torch.ones_like(theta)
    down = {"theta": theta, "buffers": buffers, "m": ones, "h": ones}
    job = Job(Client(0, 9, 1.0), samples, trainer.fresh(theta))
    (trained,) = train(trainer, down, [job], 1)
    whole = Batch(samples.x, samples.y, {})
    gradient, *_ = objective.gradient(theta, buffers, whole)
    close(trained.up["m"][0], 0.965 + 0.035 * gradient, 1e-12)
    assert float((trained.up["h"][0] - 0.95).min()) > -1e-12


def test_batchnorm_models_are_trained_too() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    objective = Objective(module.double(), "cross_entropy", {})
    theta, buffers = objective.initial()
    for estimator in ("gnb", "hutchinson"):
        optimizer = Sophia(tau=1, estimator=estimator)  # type: ignore[arg-type]
        trainer = Trainer(FedAvg(), optimizer, Local(1, 4), objective, seed=0)
        job = Job(Client(0, 9, 1.0), part(8), trainer.fresh(theta))
        down = {"theta": theta, "buffers": buffers}
        (trained,) = train(trainer, down, [job], 1)
        assert not trained.faults() and float(trained.told["h_norm"]) > 0


# What a user sees.

SOPHIA = ("strategy=fedsophia", "optimizer.lr=0.01")


def test_the_record_tells_how_the_optimizer_fares(run: Callable[..., Any]) -> None:
    result = run(*SOPHIA, "optimizer.tau=2", "local.steps=5")
    for record in result.records[1:]:
        told = record["training"]
        assert 0 < told["win_rate"] < 1 and told["h_norm"] > 0
        # Of five steps of a newcomer 0, 2 and 4 are due; then the count goes on.
        assert 2 <= told["refreshes"] <= 3
        extra = told["refreshes"] * 3
        assert record["gradients"] == 15 + round(extra)
        assert record["bytes"]["up"]["state"] == 0
    text = (result.path / "clients.csv").read_text()
    assert "win_rate=" in text and "refreshes=3" in text


def test_averaged_moments_travel(run: Callable[..., Any]) -> None:
    plain = run(*SOPHIA)
    averaged = run(*SOPHIA, "strategy.average_moments=true")
    for result, factor in ((plain, 0), (averaged, 2)):
        for record in result.records[1:]:
            for side in ("down", "up"):
                spent = record["bytes"][side]
                names = 8 if factor else 0
                assert abs(spent["state"] - factor * spent["model"]) <= 100 + names
    last = averaged.records[-1]["strategy"]
    assert last["m_norm"] > 0 and last["h_norm"] > 0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer.gamma=0"], ["optimizer.gamma=0", "greater than 0"]),
        (["optimizer.gamma=-1"], ["optimizer.gamma=-1"]),
        (["optimizer.tau=0"], ["optimizer.tau=0"]),
        (["optimizer.estimator=fisher"], ["optimizer.estimator", "gnb"]),
        (["optimizer=sgd"], ["fedsophia", "sgd", "optimizer=sophia"]),
        (["strategy=scaffold", "optimizer=adamw"], ["scaffold", "optimizer=sgd"]),
        (
            [
                *("data=quadratics", "partition=natural", "clients=4"),
                *("model=linear", "clients_per_round=4"),
            ],
            ["optimizer=sophia", "logits", "optimizer.estimator=hutchinson"],
        ),
    ],
)
def test_what_cannot_work_is_told_before_the_run(
    run: Callable[..., Any], overrides: list[str], words: list[str]
) -> None:
    with pytest.raises(UserError) as told:
        run("strategy=fedsophia", *overrides, quick=("rounds=1", "processes=0"))
    line = str(told.value)
    assert "\n" not in line
    for word in words:
        assert word in line, line


def test_hutchinson_serves_a_regression(run: Callable[..., Any]) -> None:
    result = run(
        *("strategy=fedsophia", "data=quadratics", "partition=natural", "model=linear"),
        *("clients=4", "clients_per_round=4", "rounds=3", "local.batch=0"),
        *("optimizer.estimator=hutchinson", "nodes=1", "processes=0", "device=cpu"),
        quick=(),
    )
    assert result.records[-1]["training"]["h_norm"] > 0


def test_sophia_works_below_other_algorithms() -> None:
    """Its memory lies beside the algorithm's own, under other names."""
    from strategies.feddyn import FedDyn

    objective = network()
    theta, _ = objective.initial()
    trainer = Trainer(FedDyn(alpha=0.1), Sophia(), Local(1, 4), objective, seed=0)
    memory = trainer.fresh(theta)
    assert memory.keys() == {"gradient", "m", "h", "age"}
    (trained,) = once(trainer, theta, [Job(Client(0, 9, 1.0), part(9), memory)], 1)
    change = trained.memory["gradient"] + 0.1 * trained.up["delta"]
    close(change, torch.zeros_like(change), 1e-15)
    for algorithm in (FedAvg(), FedDyn(mean_of_all=True), FedSophia(), FedSophia()):
        for optimizer in (Sophia(), AdamW(), SGD(momentum=0.5, moments="persist")):
            assert not algorithm.fresh(theta).keys() & set(optimizer.kept)
