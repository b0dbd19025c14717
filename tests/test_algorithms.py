"""The algorithms' mathematics: golden numbers, invariants, known optima, wrong variants.

The golden numbers belong to the four quadratics of `quadratics.py`; they were derived
independently.
"""

from dataclasses import replace

import pytest
import torch
from quadratics import (
    ALL,
    OPTIMUM,
    A,
    B,
    Federation,
    close,
    descent,
    exact,
    pairs,
    vector,
)
from torch import Tensor

from strategies.algorithm import (
    Algorithm,
    Client,
    Cohort,
    Vectors,
    Witness,
)
from strategies.clustered import Clustered
from strategies.ditto import Ditto
from strategies.fedavg import FedAvg
from strategies.feddyn import FedDyn
from strategies.fedem import FedEM
from strategies.fedopt import FedOpt
from strategies.fedopt_hyper import FedOptHyper
from strategies.fedprox import FedProx
from strategies.fedrep import FedRep
from strategies.fedsophia import FedSophia
from strategies.finetune import FineTune
from strategies.individual import Plural, first, sizes
from strategies.learned_weights import LearnedWeights
from strategies.scaffold import Scaffold
from strategies.sgd import SGD

# FedDyn.

SCHEDULE = [ALL, [0, 2], [1, 3], ALL]
GOLDEN = [
    (vector(-0.8534997866, 0.7926376440), vector(0.4267498933, -0.3963188220)),
    (vector(-1.2259789799, 0.3636347631), vector(0.4086596600, -0.1212115877)),
    (vector(-0.0934545407, 0.8747279442), vector(-0.1050683731, -0.2511721188)),
    (vector(-0.3089908214, 0.4226062041), vector(0.0552339538, 0.1004748106)),
]


def test_feddyn_golden_rounds() -> None:
    federation = Federation(FedDyn(alpha=1.0))
    for cohort, (theta, h) in zip(SCHEDULE, GOLDEN, strict=True):
        federation.round(cohort)
        close(federation.server["theta"], theta)
        close(federation.server["h"], h)


def test_feddyn_equals_the_lambda_form() -> None:
    """The authors' code keeps lambda_k = -g_k/alpha and a cloud model instead of h."""
    federation, alpha = Federation(FedDyn(alpha=1.0)), 1.0
    lambdas, cloud = torch.zeros(4, 2, dtype=torch.float64), vector(0, 0)
    eye = torch.eye(2, dtype=torch.float64)
    for cohort in SCHEDULE:
        models = []
        for k in cohort:
            pull = B[k] + alpha * (cloud - lambdas[k])
            models.append(torch.linalg.solve(A[k] + alpha * eye, pull))
            lambdas[k] += models[-1] - cloud
        cloud = torch.stack(models).mean(0) + lambdas.mean(0)
        federation.round(cohort)
        close(federation.server["theta"], cloud, 1e-13)
        close(federation.server["h"], -alpha * lambdas.mean(0), 1e-13)


@pytest.mark.parametrize(
    ("alpha", "rounds", "error"),
    [
        (0.1, 10, 4.17e-1),
        (0.1, 100, 1.27e-3),
        (0.1, 400, 6.66e-6),
        (1.0, 10, 1.00e-3),
        (1.0, 50, 1.62e-6),
        (5.0, 10, 4.16e-3),
        (5.0, 50, 2.97e-8),
    ],
)
def test_feddyn_error_by_round(alpha: float, rounds: int, error: float) -> None:
    theta = Federation(FedDyn(alpha=alpha)).run([ALL] * rounds)
    assert float(torch.linalg.vector_norm(theta - OPTIMUM)) == pytest.approx(
        error, rel=5e-3
    )


@pytest.mark.parametrize("alpha", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("steps", [0, 5], ids=["exact", "five steps"])
@pytest.mark.parametrize("partial", [False, True])
def test_feddyn_reaches_the_minimizer(alpha: float, steps: int, partial: bool) -> None:
    solve = descent(steps, SGD(lr=0.1)) if steps else exact
    rounds = 2500 if alpha == 0.1 else 800
    cohorts = pairs(rounds) if partial else [ALL] * (rounds // 2)
    theta = Federation(FedDyn(alpha=alpha), solve).run(cohorts)
    close(OPTIMUM, vector(-0.18006431, 0.34083601), 1e-8)
    close(theta, OPTIMUM, 1e-10)


def test_feddyn_weighted_by_samples_reaches_the_weighted_minimizer() -> None:
    shares = (0.4, 0.8, 1.2, 1.6)
    federation = Federation(FedDyn(alpha=1.0, weighting="samples"), shares=shares)
    weights = torch.tensor(shares, dtype=torch.float64)
    best = torch.linalg.solve(
        (weights[:, None, None] * A).sum(0), (weights[:, None] * B).sum(0)
    )
    close(best, vector(-0.18181818, 0.48387097), 1e-8)
    close(federation.run([ALL] * 600), best, 1e-8)
    close(federation.mean_memory("gradient"), federation.server["h"], 1e-12)


def test_feddyn_uniform_does_not_see_sizes() -> None:
    small = Federation(FedDyn(alpha=1.0)).run(SCHEDULE)
    large = Federation(FedDyn(alpha=1.0), shares=(0.1, 3, 0.5, 0.4)).run(SCHEDULE)
    assert torch.equal(small, large)


def test_feddyn_state_is_the_local_gradient_after_an_exact_solve() -> None:
    federation = Federation(FedDyn(alpha=1.0))
    for cohort in SCHEDULE:
        federation.round(cohort)
        for k in cohort:
            gradient = A[k] @ federation.last[k] - B[k]
            close(federation.memories[k]["gradient"], gradient, 1e-12)


def test_feddyn_fixed_point() -> None:
    federation = Federation(FedDyn(alpha=1.0))
    federation.run([ALL] * 300)
    close(federation.server["h"], vector(0, 0), 1e-10)
    for k in ALL:
        close(federation.last[k], OPTIMUM, 1e-9)
        close(federation.memories[k]["gradient"], A[k] @ OPTIMUM - B[k], 1e-9)


def test_feddyn_with_one_client_is_the_proximal_point_method() -> None:
    algorithm, alpha = FedDyn(alpha=0.7), 0.7
    server, memory = algorithm.start(vector(0, 0)), algorithm.fresh(vector(0, 0))
    point, eye = vector(0, 0), torch.eye(2, dtype=torch.float64)
    for _ in range(10):
        state = algorithm.begin(server, memory, Client(0, 1, 1.0))
        theta, effort = exact(algorithm, state, 1, server["theta"])
        up, memory = algorithm.finish(theta, server["theta"], state, effort)
        server = algorithm.update(server, up, Cohort(1, 1, 0))
        point = torch.linalg.solve(A[1] + alpha * eye, B[1] + alpha * point)
        close(theta, point, 1e-13)
        close(server["theta"], theta - memory["gradient"] / alpha, 1e-13)


def test_feddyn_mean_of_all_models() -> None:
    federation = Federation(FedDyn(alpha=1.0, mean_of_all=True))
    for cohort in [[0, 2], [1, 2], [0, 1], ALL]:
        federation.round(cohort)
        lasts = [federation.last.get(k, vector(0, 0)) for k in ALL]
        close(federation.server["all"], torch.stack(lasts).mean(0), 1e-12)
        active = torch.stack([federation.last[k] for k in cohort]).mean(0)
        close(federation.server["active"], active, 1e-12)


def test_feddyn_mean_of_all_starts_at_the_initial_model() -> None:
    algorithm = FedDyn(mean_of_all=True)
    start = vector(3, -1)
    server, memory = algorithm.start(start), algorithm.fresh(start)
    state = algorithm.begin(server, memory, Client(0, 1, 1.0))
    up, _ = algorithm.finish(vector(5, 1), start, state, vector(1)[0])
    server = algorithm.update(server, up, Cohort(1, 4, 1))
    close(server["all"], (vector(5, 1) + 3 * start) / 4, 1e-12)


@pytest.mark.parametrize("distance", [0.3, 3.0])
def test_feddyn_direction_is_the_papers(distance: float) -> None:
    """Catches a detached, an unsquared and a missing quadratic term at two distances."""
    algorithm, anchor = FedDyn(alpha=0.3), vector(1, 2)
    theta = anchor + distance * vector(0.6, 0.8)
    memory = {"gradient": vector(0.5, -0.25)}
    state = algorithm.begin({"theta": anchor}, memory, Client(0, 1, 1.0))
    leaf = theta.clone().requires_grad_()
    loss = 0.5 * leaf @ A[0] @ leaf - B[0] @ leaf
    penalty = 0.15 * (leaf - anchor).square().sum() - memory["gradient"] @ leaf
    (expected,) = torch.autograd.grad(loss + penalty, leaf)
    gradient = A[0] @ theta - B[0]
    close(algorithm.direction(gradient, theta, anchor, state), expected, 1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_feddyn_invariant_with_any_local_optimizer(
    momentum: float, decay: float
) -> None:
    optimizer = SGD(lr=0.02, momentum=momentum, weight_decay=decay)
    federation = Federation(FedDyn(alpha=0.5), descent(4, optimizer))
    for cohort in [[1], [0, 3], ALL, [2, 3], [0, 1, 2]]:
        federation.round(cohort)
        close(federation.mean_memory("gradient"), federation.server["h"], 1e-12)
        assert float(torch.linalg.vector_norm(federation.server["h"])) > 1e-3


def test_feddyn_server_step_changes_and_shares_nothing() -> None:
    federation = Federation(FedDyn(alpha=1.0))
    before = {n: v.clone() for n, v in federation.server.items()}
    held = dict(federation.server)
    federation.round([0, 1])
    for name, vector_before in before.items():
        assert torch.equal(held[name], vector_before), f"{name} was written in place"
        assert not torch.equal(federation.server[name], vector_before)
    pointers = {v.data_ptr() for v in federation.server.values()}
    assert len(pointers) == len(federation.server)


class LiteralH(FedDyn):
    """The printed Algorithm 1: the sum does not cover theta^{t-1}."""

    def update(self, server: Vectors, mean: Vectors, cohort: Cohort) -> Vectors:
        active = server["theta"] + mean["delta"]
        total = cohort.size * active - server["theta"]
        h = server["h"] - self.alpha / cohort.total * total
        return {"theta": active - h / self.alpha, "h": h, "active": active}


class NoQuadratic(FedDyn):
    """The linear term alone: the local objective is unbounded below."""

    def direction(
        self, gradient: Tensor, theta: Tensor, anchor: Tensor, state: Vectors
    ) -> Tensor:
        return gradient - state["gradient"]


class Unsquared(FedDyn):
    """The norm of the difference instead of its square."""

    def direction(
        self, gradient: Tensor, theta: Tensor, anchor: Tensor, state: Vectors
    ) -> Tensor:
        away = theta - anchor
        unit = away / torch.linalg.vector_norm(away).clamp(min=1e-12)
        return gradient - state["gradient"] + self.alpha / 2 * unit


class CohortInsteadOfAll(FedDyn):
    """h divided by |P| instead of m."""

    def update(self, server: Vectors, mean: Vectors, cohort: Cohort) -> Vectors:
        return super().update(server, mean, replace(cohort, total=cohort.size))


def test_the_literal_reading_of_h_diverges() -> None:
    theta = Federation(LiteralH(alpha=1.0)).run([ALL] * 200)
    assert float(torch.linalg.vector_norm(theta)) > 1e30


@pytest.mark.parametrize("wrong", [LiteralH, NoQuadratic, Unsquared])
def test_wrong_variants_miss_the_minimizer(wrong: type[FedDyn]) -> None:
    right = Federation(FedDyn(alpha=5.0)).run([ALL] * 60)
    solve = descent(200, SGD(lr=0.05)) if wrong is Unsquared else exact
    theta = Federation(wrong(alpha=5.0), solve).run([ALL] * 60)
    close(right, OPTIMUM, 1e-8)
    assert not float(torch.linalg.vector_norm(theta - OPTIMUM)) < 1e-2


@pytest.mark.parametrize("wrong", [LiteralH, NoQuadratic, CohortInsteadOfAll])
def test_wrong_variants_miss_the_golden_rounds(wrong: type[FedDyn]) -> None:
    theta = Federation(wrong(alpha=1.0)).run(SCHEDULE[:2])
    assert float(torch.linalg.vector_norm(theta - GOLDEN[1][0])) > 1e-2


def test_wrong_share_breaks_the_invariant() -> None:
    federation = Federation(CohortInsteadOfAll(alpha=1.0))
    federation.run([[0, 1]])
    gap = federation.mean_memory("gradient") - federation.server["h"]
    assert float(torch.linalg.vector_norm(gap)) > 1e-2


# FedAvg, FedProx, SCAFFOLD.


def test_fedavg_golden_limits() -> None:
    theta = Federation(FedAvg("uniform"), exact).run([ALL])
    close(theta, vector(-1.61794872, 0.70320513), 1e-8)
    theta = Federation(FedAvg("uniform"), descent(5, SGD(lr=0.1))).run([ALL] * 500)
    close(theta, vector(-0.43654876, 0.50153504), 1e-8)


@pytest.mark.parametrize(("steps", "lr"), [(1, 0.1), (2, 0.05), (5, 0.1), (20, 0.2)])
def test_fedavg_stops_at_its_closed_form(steps: int, lr: float) -> None:
    eye = torch.eye(2, dtype=torch.float64)
    p = torch.stack([eye - torch.linalg.matrix_power(eye - lr * a, steps) for a in A])
    pull = sum(p[k] @ torch.linalg.solve(A[k], B[k]) for k in ALL)
    limit = torch.linalg.solve(p.sum(0), pull)
    theta = Federation(FedAvg("uniform"), descent(steps, SGD(lr=lr))).run([ALL] * 600)
    close(theta, limit, 1e-10)
    distance = float(torch.linalg.vector_norm(limit - OPTIMUM))
    assert distance < 1e-10 if steps == 1 else distance > 1e-3


@pytest.mark.parametrize("server_lr", [0.5, 1.0])
def test_fedavg_weighs_by_samples(server_lr: float) -> None:
    federation = Federation(FedAvg("samples", server_lr), shares=(0.4, 0.8, 1.2, 1.6))
    weights = torch.tensor([4.0, 8, 12, 16], dtype=torch.float64) / 40
    minimizers = torch.stack([torch.linalg.solve(A[k], B[k]) for k in ALL])
    close(federation.run([ALL]), server_lr * weights @ minimizers, 1e-12)


@pytest.mark.parametrize("mu", [0.1, 1.0])
def test_fedprox_stops_at_its_own_fixed_point(mu: float) -> None:
    eye = torch.eye(2, dtype=torch.float64)
    inverse = torch.stack([torch.linalg.inv(a + mu * eye) for a in A])
    limit = torch.linalg.solve(
        (inverse @ A).sum(0), (inverse @ B[..., None]).sum(0)[:, 0]
    )
    close(Federation(FedProx("uniform", mu=mu)).run([ALL] * 600), limit, 1e-9)
    assert float(torch.linalg.vector_norm(limit - OPTIMUM)) > 1e-2


def test_fedprox_without_a_leash_is_fedavg() -> None:
    solve = descent(5, SGD(lr=0.1))
    leashed = Federation(FedProx("uniform", mu=0.0), solve).run([ALL] * 20)
    assert torch.equal(leashed, Federation(FedAvg("uniform"), solve).run([ALL] * 20))


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_scaffold_reaches_the_minimizer(partial: bool, momentum: float) -> None:
    solve = descent(5, SGD(lr=0.03, momentum=momentum))
    cohorts = pairs(1500) if partial else [ALL] * 800
    federation = Federation(Scaffold(), solve)
    close(federation.run(cohorts), OPTIMUM, 1e-9)
    for k in ALL:
        control = A[k] @ OPTIMUM - B[k]
        close(federation.memories[k]["control"], control, 1e-7)


def test_scaffold_control_is_the_mean_gradient_on_the_way() -> None:
    anchor, seen = vector(1, -1), []
    algorithm, optimizer = Scaffold(), SGD(lr=0.05)
    memory = {"control": vector(0.3, 0.1)}
    down = {"theta": anchor, "control": vector(-0.2, 0.4)}
    state = algorithm.begin(down, memory, Client(0, 1, 1.0))
    theta, moving = anchor.clone(), optimizer.init(anchor, {})
    for _ in range(4):
        seen.append(A[1] @ theta - B[1])
        along = algorithm.direction(seen[-1], theta, anchor, state)
        close(along, seen[-1] - memory["control"] + down["control"], 1e-12)
        theta, moving = optimizer.step(theta, along, moving, 1)
    up, after = algorithm.finish(theta, anchor, state, moving["effort"])
    close(after["control"], torch.stack(seen).mean(0), 1e-12)
    close(up["control"], after["control"] - memory["control"], 1e-12)


def test_scaffold_invariant() -> None:
    federation = Federation(Scaffold(server_lr=0.8), descent(3, SGD(lr=0.05)))
    for cohort in [[1], [0, 3], ALL, [2, 3], [0, 1, 2]]:
        federation.round(cohort)
        close(federation.mean_memory("control"), federation.server["control"], 1e-12)
        assert float(torch.linalg.vector_norm(federation.server["control"])) > 1e-3


@pytest.mark.parametrize(
    "algorithm",
    [
        FedAvg(),
        FedProx(),
        Scaffold(),
        FedDyn(),
        FedDyn(mean_of_all=True),
        FedSophia(),
        FedOpt(),
        FedOpt(optimizer="yogi"),
        FedOptHyper(),
        FedOptHyper(optimizer="adam", independent=True),
        LearnedWeights(),
        FineTune(),
        Ditto(),
        FedRep(width=1),
        FedRep(width=1, joint=True),
        Clustered(learners=2),
        FedEM(learners=2),
    ],
)
def test_every_algorithm_keeps_its_promises(algorithm: Algorithm) -> None:
    """One row for each algorithm: names agree, and cohorts do not depend on their order."""
    many = algorithm.learners if isinstance(algorithm, Plural) else 1
    theta = torch.arange(2.0 * many, dtype=torch.float64)
    server = algorithm.start(theta)
    held, start = first(algorithm, theta)
    mine = {**algorithm.down(server), "theta": start}
    state = algorithm.begin(mine, held, Client(0, 3, 1.0))
    if isinstance(algorithm, Witness):
        state = algorithm.witness(state, theta + 2, theta.new_ones(()))
    up, memory = algorithm.finish(start + 1, start, state, theta.new_ones(()))
    assert sizes(algorithm, theta) == {n: len(v) for n, v in up.items()}
    assert tuple(up) == algorithm.up
    assert memory.keys() == algorithm.fresh(theta).keys()
    assert server.keys() == algorithm.update(server, up, Cohort(1, 4, 1)).keys()
    assert "server" in algorithm.models(server)
    if algorithm.mirror:
        assert algorithm.mirror[0] in memory and algorithm.mirror[1] in server
    solve = descent(2, SGD(lr=0.1))
    forward = Federation(algorithm, solve, start=theta).run([[0, 1, 2]] * 3)
    backward = Federation(algorithm, solve, start=theta).run([[2, 1, 0]] * 3)
    close(forward, backward, 1e-14)
