"""The vectorized engine gives the loop's numbers, for every algorithm, ragged or not."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

from app.layers import Dropout, noise_shapes, probe
from strategies.adamw import AdamW
from strategies.algorithm import Algorithm, Client
from strategies.clustered import Clustered
from strategies.ditto import Ditto
from strategies.done import Done, Richardson
from strategies.engine import choose, train
from strategies.fedavg import FedAvg
from strategies.feddyn import FedDyn
from strategies.fedem import FedEM
from strategies.fedopt_hyper import FedOptHyper
from strategies.fedprox import FedProx
from strategies.fedrep import FedRep
from strategies.fedsophia import FedSophia, Sophia
from strategies.individual import Plural, Tailored
from strategies.learned_weights import LearnedWeights
from strategies.local import Job, Local, Part, Trained, Trainer, orders
from strategies.mean import Mean
from strategies.objective import Batch, Objective
from strategies.optimizer import Optimizer
from strategies.randomness import address, permutations, uniforms, words
from strategies.scaffold import Scaffold
from strategies.sgd import SGD

SIZES = [13, 4, 20, 13, 1, 7]
ALGORITHMS = [
    FedAvg(),
    FedProx(mu=0.3),
    Scaffold(),
    FedDyn(alpha=0.2),
    FedDyn(alpha=0.2, weighting="samples", mean_of_all=True),
    FedOptHyper(independent=True),
    LearnedWeights(),
    Ditto(lam=0.5),
    FedRep(),
    FedRep(joint=True),
    Clustered(learners=2),
    FedEM(learners=2),
]


def model(dropout: float, dtype: torch.dtype, learners: int = 1) -> Objective:
    """Return a small network, or so many of them with different weights."""
    first, *more = [_network(dropout, k) for k in range(1, learners + 1)]
    others = [module.to(dtype) for module in more]
    return Objective(first.to(dtype), "cross_entropy", noise_shapes(first), others)


def _network(dropout: float, seed: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(6, 8)]
    if dropout:
        layers.append(Dropout(dropout))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = nn.Sequential(*layers, nn.Tanh(), nn.Linear(8, 3)).to(torch.float32)
        for layer in module:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight)
    probe(module, (6,))
    return module


def jobs(trainer: Trainer, sizes: Sequence[int]) -> list[Job]:
    random = torch.Generator().manual_seed(0)
    dtype, total = trainer.objective.dtype, sum(sizes)
    x = torch.randn(total, 6, generator=random, dtype=torch.float64).to(dtype)
    y = torch.randint(0, 3, (total,), generator=random)
    rows = torch.randperm(total, generator=random)
    theta, _ = trainer.objective.initial()
    found = []
    for k, index in enumerate(torch.split(rows, list(sizes))):
        memory = {
            name: torch.randn(len(vector), generator=random, dtype=torch.float64).to(
                dtype
            )
            for name, vector in trainer.fresh(theta).items()
        }
        if "pi" in memory:  # proportions
            memory["pi"] = memory["pi"].softmax(0)
        if "age" in memory:  # a count of steps, which differs from client to client
            memory["age"] = torch.full((1,), float(3 * k), dtype=dtype)
            memory |= {n: memory[n].square() for n in ("v", "h") if n in memory}
        found.append(
            Job(Client(k, len(index), len(index) / 5), Part(x, y, index), memory)
        )
    return found


def both(
    trainer: Trainer, sizes: Sequence[int], round_: int = 3
) -> tuple[list[Trained], list[Trained]]:
    theta, buffers = trainer.objective.initial()
    server = trainer.algorithm.start(theta)
    down = {n: v + 0.1 for n, v in trainer.algorithm.down(server).items()}
    down["buffers"] = buffers
    work = jobs(trainer, sizes)
    loop, vmap = (list(train(trainer, down, work, round_, e)) for e in ("loop", "vmap"))
    return loop, vmap


def compare(loop: list[Trained], vmap: list[Trained], atol: float) -> None:
    by_client = {t.clients[0].id: t for t in loop}
    seen = set()
    for chunk in vmap:
        for row, client in enumerate(chunk.clients):
            seen.add(client.id)
            alone = by_client[client.id]
            assert chunk.steps[row] == alone.steps[0]
            assert chunk.gradients[row] == alone.gradients[0] >= alone.steps[0]
            for name in ("up", "memory"):
                expected, actual = getattr(alone, name), getattr(chunk, name)
                assert expected.keys() == actual.keys()
                for key, vectors in expected.items():
                    torch.testing.assert_close(
                        actual[key][row], vectors[0], rtol=0, atol=atol
                    )
            for key, numbers in alone.told.items():
                torch.testing.assert_close(
                    chunk.told[key][row], numbers[0], rtol=0, atol=atol
                )
            torch.testing.assert_close(
                chunk.losses[row], alone.losses[0], rtol=0, atol=atol
            )
    assert seen == by_client.keys()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(
    ("optimizer", "local"),
    [
        (SGD(lr=0.1), Local(epochs=2, batch=4)),
        (
            SGD(lr=0.05, momentum=0.9, weight_decay=0.1),
            Local(epochs=1, batch=5, clip=0.2),
        ),
        (SGD(lr=0.1, lr_decay=0.5), Local(batch=0, steps=3)),
    ],
    ids=["plain", "momentum", "full batch"],
)
def test_engines_agree(
    algorithm: Algorithm, dropout: float, optimizer: SGD, local: Local
) -> None:
    many = algorithm.learners if isinstance(algorithm, Plural) else 1
    objective = model(dropout, torch.float64, many)
    if isinstance(algorithm, Tailored):
        algorithm = algorithm.tailored(objective.layout)
    trainer = Trainer(algorithm, optimizer, local, objective, seed=5)
    loop, vmap = both(trainer, SIZES)
    compare(loop, vmap, atol=1e-12)
    models = {Ditto: 2, FedEM: 2}.get(type(algorithm), 1)  # each has its gradient
    assert all(t.gradients[0] == models * t.steps[0] for t in loop)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(
    "optimizer",
    [
        AdamW(),
        SGD(lr=0.1, momentum=0.9, moments="persist"),
        Sophia(lr=0.01, tau=2),
        Sophia(lr=0.01, tau=2, tau_unit="rounds", moments="reset"),
        Sophia(lr=0.01, tau=3, estimator="hutchinson"),
        Sophia(lr=0.01, estimator="hutchinson", law="gaussian", lr_decay=0.9),
    ],
    ids=["adamw", "momentum", "gnb", "rounds", "rademacher", "gaussian"],
)
def test_engines_agree_on_optimizers_that_remember(
    optimizer: Optimizer, dropout: float
) -> None:
    """Clients refresh at different steps, as their counts of steps differ."""
    objective = model(dropout, torch.float64)
    trainer = Trainer(FedAvg(), optimizer, Local(2, 4), objective, seed=5)
    loop, vmap = both(trainer, SIZES)
    compare(loop, vmap, atol=1e-12)
    assert loop[0].memory.keys() == set(optimizer.kept)
    if isinstance(optimizer, Sophia):
        assert len({t.gradients[0] - t.steps[0] for t in loop}) > 1


def test_engines_agree_on_averaged_moments() -> None:
    objective = model(0.2, torch.float64)
    algorithm, optimizer = FedSophia(average_moments=True), Sophia(tau=2)
    trainer = Trainer(algorithm, optimizer, Local(2, 4), objective, seed=5)
    compare(*both(trainer, SIZES), atol=1e-12)


@pytest.mark.parametrize("round_", [3, 4], ids=["gradient", "direction"])
@pytest.mark.parametrize("batch", [0, 4])
def test_engines_agree_on_richardson_iterations(round_: int, batch: int) -> None:
    objective = model(0.2, torch.float64)
    local = Local(batch=batch, steps=5)
    trainer = Trainer(Done(), Richardson(lr=0.05), local, objective, seed=5)
    loop, vmap = both(trainer, SIZES, round_)
    compare(loop, vmap, atol=1e-12)
    assert loop[0].steps == [1 if round_ == 3 else 5]
    assert loop[0].gradients == [1 if round_ == 3 else 10]


def test_engines_agree_in_float32() -> None:
    objective = model(0.3, torch.float32)
    trainer = Trainer(Scaffold(), SGD(0.1), Local(3, 4), objective, seed=5)
    compare(*both(trainer, SIZES), atol=1e-5)


def test_engines_agree_when_a_cohort_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("strategies.engine.ROOM", {"cpu": 1})
    objective = model(0.0, torch.float64)
    trainer = Trainer(FedDyn(), SGD(0.1), Local(2, 4), objective, seed=5)
    loop, vmap = both(trainer, SIZES)
    assert [len(t.clients) for t in vmap] == [2, 2, 2]
    compare(loop, vmap, atol=1e-12)


def test_training_depends_on_what_it_should() -> None:
    """The comparison above could not fail if training did nothing."""
    objective = model(0.0, torch.float64)

    def deltas(round_: int, seed: int, optimizer: SGD) -> torch.Tensor:
        trainer = Trainer(FedAvg(), optimizer, Local(1, 4), objective, seed)
        theta, buffers = objective.initial()
        down = {"theta": theta, "buffers": buffers}
        return torch.cat(
            [t.up["delta"] for t in train(trainer, down, jobs(trainer, SIZES), round_)]
        )

    base = deltas(1, 0, SGD(0.1))
    assert torch.equal(base, deltas(1, 0, SGD(0.1)))
    changed: list[Callable[[], torch.Tensor]] = [
        lambda: deltas(2, 0, SGD(0.1)),
        lambda: deltas(1, 1, SGD(0.1)),
        lambda: deltas(1, 0, SGD(0.2)),
    ]
    for other in changed:
        assert not torch.allclose(base, other())


def test_the_choice_is_a_rule() -> None:
    small, cpu = model(0.0, torch.float32), torch.device("cpu")
    assert choose("auto", small, 10, cpu) == "vmap"
    assert choose("auto", small, 1, cpu) == "loop"
    assert choose("loop", small, 10, cpu) == "loop"
    large = Objective(nn.Linear(784, 1000), "cross_entropy", {})
    assert choose("auto", large, 10, cpu) == "loop"
    assert choose("auto", large, 10, torch.device("cuda")) == "vmap"
    normed = Objective(
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "cross_entropy", {}
    )
    assert choose("auto", normed, 10, cpu) == "loop"


@pytest.mark.parametrize(
    ("epochs", "batch", "steps"), [(2, 4, 0), (1, 0, 0), (1, 4, 7)]
)
def test_every_epoch_takes_every_sample_once(
    epochs: int, batch: int, steps: int
) -> None:
    local = Local(epochs, batch, steps)
    drawn = orders(local, 0, 1, [3, 9], 10)
    assert len(drawn) == local.steps_of(10) == (steps or epochs * (3 if batch else 1))
    per_epoch = 3 if batch else 1
    for row in range(2):
        first = torch.cat([d[row] for d in drawn[:per_epoch]])
        assert sorted(first.tolist()) == list(range(10))
    if len(drawn) > per_epoch:
        assert not torch.equal(drawn[0], drawn[per_epoch])


def test_draws_belong_to_their_address() -> None:
    both_clients = permutations(1, "batches", 4, [7, 8], 30)
    alone = permutations(1, "batches", 4, [8], 30)
    assert torch.equal(both_clients[1], alone[0])
    assert not torch.equal(both_clients[0], alone[0])
    assert torch.equal(
        uniforms(1, "noise", 2, [5], 10, 20),
        uniforms(1, "noise", 2, [5], 0, 30)[:, 10:],
    )
    keys = {
        address(s, p, r, k)
        for s in (0, 1)
        for p in "ab"
        for r in (0, 1)
        for k in (0, 1)
    }
    assert len(keys) == 16


def test_draws_are_uniform() -> None:
    numbers = uniforms(0, "noise", 1, range(50), 0, 4000).double()
    assert float(numbers.min()) >= 0 and float(numbers.max()) < 1
    # Standard errors: 0.29/sqrt(200000) for the mean, 1/sqrt(200000) for a correlation.
    assert abs(float(numbers.mean()) - 0.5) < 4 * 0.29 / 200_000**0.5
    centered = numbers - 0.5
    neighbours = float((centered[:, 1:] * centered[:, :-1]).mean()) * 12
    across = float((centered[1:] * centered[:-1]).mean()) * 12
    assert abs(neighbours) < 4 / 200_000**0.5 and abs(across) < 4 / 200_000**0.5
    bits = words(0, "bits", 1, [0], 0, 4096)[0]
    ones = sum(int(b).bit_count() for b in bits)
    assert abs(ones - 4096 * 32) < 4 * (4096 * 64) ** 0.5 / 2


def test_batchnorm_statistics_travel_apart_from_the_model() -> None:
    """Running statistics are averaged and returned; no algorithm's vector covers them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    objective = Objective(module.to(torch.float64), "cross_entropy", {})
    parameters = sum(p.numel() for p in module.parameters())
    assert objective.layout.size == parameters and objective.buffer_layout.size == 10
    trainer = Trainer(FedDyn(alpha=0.5), SGD(0.1), Local(1, 4), objective, seed=0)
    theta, buffers = objective.initial()
    down = {"theta": theta, "buffers": buffers}
    before = {n: b.clone() for n, b in module.named_buffers() if b.is_floating_point()}
    results = list(train(trainer, down, jobs(trainer, [12, 8]), 1))
    for trained in results:
        assert trained.up["delta"].shape == (1, parameters)
        assert trained.memory["gradient"].shape == (1, parameters)
        assert trained.up["buffers"].shape == (1, 10)
        assert not torch.allclose(trained.up["buffers"][0], buffers)
    mean = Mean()
    for trained in results:
        mean.add({n: m[0] for n, m in trained.up.items()}, 1.0)
    values = mean.value(torch.float64)
    expected = (results[0].up["buffers"] + results[1].up["buffers"])[0] / 2
    torch.testing.assert_close(values["buffers"], expected, rtol=0, atol=1e-15)
    for name, buffer in module.named_buffers():
        if name in before:
            assert torch.equal(buffer, before[name]), "training wrote into the module"


class Tied(nn.Module):
    """A weight that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("module", [Tied(), nn.Sequential(nn.Linear(6, 4))])
def test_the_gradient_is_autograds(module: nn.Module) -> None:
    objective = Objective(module.to(torch.float64), "cross_entropy", {})
    start, buffers = objective.initial()
    random = torch.Generator().manual_seed(0)
    x = torch.randn(9, 6, generator=random, dtype=torch.float64)
    batch = Batch(x, torch.randint(0, 4, (9,), generator=random), {})
    for _ in range(2):
        theta = torch.randn(len(start), generator=random, dtype=torch.float64)
        leaf = theta.clone().requires_grad_()
        loss, _ = objective.loss(leaf, buffers, batch)
        (expected,) = torch.autograd.grad(loss, leaf)
        gradient, value, _ = objective.gradient(theta, buffers, batch)
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-14)
        torch.testing.assert_close(value, loss.detach(), rtol=0, atol=1e-14)
        assert torch.equal(objective.initial()[0], start), "training moved theta^0"
