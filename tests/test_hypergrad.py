"""Hyper-gradients over a network, held against closed forms, retraining and another route."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from app.derive import start
from app.errors import UserError
from app.estimation import logistic
from app.host import setting
from app.local_grid import LocalGrid
from app.run_config import to_run_config
from strategies import topology
from strategies.fad import Clients, broadcast, federated_map, federated_mean
from strategies.fad_site import Site, register
from strategies.fad_wire import InProcess
from strategies.hypergrad import HGP, Links, hypergradients, largest_eigenvalue
from strategies.hyperproblem import (
    Found,
    Lambdas,
    Problem,
    Products,
    closed_form,
    conjugate_gradients,
)
from strategies.network import Network
from strategies.topology import Arcs
from tests.conftest import Result

F64 = torch.float64
#: Three clients whose arcs make the uneven P of the golden numbers.
UNEVEN = Arcs(np.array([0, 1, 2, 2]), np.array([1, 2, 0, 1]))


def network(name: str, n: int, seed: int = 0) -> Network:
    if name == "uneven":
        return Network(n, seed, lambda t: UNEVEN)
    return Network(n, seed, getattr(topology, name)(n, seed))


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


class Quadratics:
    """f_i = 1/2 x'H_i x + x'J_i l_i - x'b_i,   F_i = 1/2 |x - a_i|^2 + c_i'l_i."""

    def __init__(
        self, n: int, seed: int = 0, scale: float = 0.3, ridge: float = 0.5
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=F64)

        half = normal(n, 3, 3)
        self.H = scale * half @ half.mT + ridge * torch.eye(3, dtype=F64)
        self.J, self.a = normal(n, 3, 2), normal(n, 3)
        self.b, self.c = normal(n, 3), normal(n, 2)
        self.lambdas = tuple(normal(n, 2))

    def minimizer(self, lambdas: Lambdas) -> Tensor:
        pull = self.b - torch.einsum("nip,np->ni", self.J, torch.stack(lambdas))
        return torch.linalg.solve(self.H.mean(0), pull.mean(0))

    def inner(self, x: Tensor, lambdas: Lambdas, batch: object) -> Tensor:
        linear = torch.einsum("nip,np->ni", self.J, torch.stack(lambdas)) - self.b
        return 0.5 * torch.einsum("ni,nij,nj->n", x, self.H, x) + (x * linear).sum(1)

    def outer(self, x: Tensor, lambdas: Lambdas) -> Tensor:
        return 0.5 * (x - self.a).square().sum(1) + (self.c * torch.stack(lambdas)).sum(
            1
        )

    def value(self, lambdas: Lambdas) -> float:
        """Return everybody's outer cost after training with some hyper-parameters."""
        x = self.minimizer(lambdas).expand(len(lambdas), -1)
        return float(self.outer(x, lambdas).mean())

    def problem(self) -> Problem:
        x = self.minimizer(self.lambdas).expand(len(self.lambdas), -1).clone()
        return Problem(self.inner, self.outer, x, self.lambdas)

    def exact(self) -> Tensor:
        """Return the closed form from the matrices themselves."""
        n, x = len(self.lambdas), self.minimizer(self.lambdas)
        y = torch.linalg.solve(self.H.mean(0), (x - self.a).mean(0))
        return (self.c - torch.einsum("nip,i->np", self.J, y)) / n


def differences(value: Callable[[Lambdas], float], lambdas: Lambdas) -> list[Tensor]:
    """Return central differences of a value by every client's hyper-parameters."""
    found, step = [], 1e-4
    for i, own in enumerate(lambdas):
        slopes = []
        for j in range(len(own)):
            ends = []
            for sign in (step, -step):
                moved = own.clone()
                moved[j] += sign
                ends.append(value((*lambdas[:i], moved, *lambdas[i + 1 :])))
            slopes.append((ends[0] - ends[1]) / (2 * step))
        found.append(numbers(*slopes))
    return found


def stacked(v: Lambdas) -> Tensor:
    return torch.stack(v)


# Against closed forms.


@pytest.mark.parametrize("n", [1, 3, 20])
def test_many_pushes_give_the_closed_form(n: int) -> None:
    task = Quadratics(n, scale=0.2, ridge=0.7)
    problem, exact = task.problem(), task.exact()
    torch.testing.assert_close(
        stacked(closed_form(problem)), exact, rtol=1e-12, atol=1e-14
    )
    found = hypergradients(problem, network("stochastic", n), HGP(50, 40, 0.55))
    torch.testing.assert_close(stacked(found.v), exact, rtol=1e-10, atol=1e-10)
    assert found.messages > 0 or n == 1
    assert found.bytes == found.messages * (3 * 8 + 8)


def test_golden_numbers_of_three_scalar_clients() -> None:
    H, J, c = numbers(1, 2, 3), numbers(1, -1, 2), numbers(1, 0, -4)
    problem = Problem(
        lambda x, lambdas, _: 0.5 * H * x[:, 0] ** 2 + J * x[:, 0] * torch.cat(lambdas),
        lambda x, _: c * x[:, 0],
        torch.zeros(3, 1, dtype=F64),
        tuple(torch.zeros(3, 1, dtype=F64)),
    )

    def found(name: str, depth: int, pushes: int) -> Tensor:
        settings = HGP(depth, pushes, 0.3)
        return torch.cat(hypergradients(problem, network(name, 3), settings).v)

    def same(left: Tensor, right: Tensor, places: float) -> None:
        torch.testing.assert_close(left, right, rtol=0, atol=places)

    limit = numbers(1 / 6, -1 / 6, 1 / 3)
    same(torch.cat(closed_form(problem)), limit, 1e-15)
    for depth, expected in {
        1: numbers(0.1, -0.1, 0.2),
        2: numbers(0.14, -0.14, 0.28),
        5: numbers(0.16496, -0.16496, 0.32992),
    }.items():
        same(found("complete", depth, 1), expected, 1e-15)
    for pushes, expected in {
        1: numbers(0.1862694744, -0.1369628488, 0.4018147577),
        2: numbers(0.1963513432, -0.1705563432, 0.3248697892),
        5: numbers(0.1660759406, -0.1666791829, 0.3332625602),
        20: limit,
    }.items():
        same(found("uneven", 200, pushes), expected, 1e-10)


@pytest.mark.parametrize("depth", [1, 2, 7, 40])
def test_a_server_gives_the_truncated_series_exactly(depth: int) -> None:
    task, alpha, n = Quadratics(4), 0.4, 4
    x, H = task.minimizer(task.lambdas), task.H.mean(0)
    left = torch.eye(3, dtype=F64) - torch.linalg.matrix_power(
        torch.eye(3, dtype=F64) - alpha * H, depth
    )
    y = left @ torch.linalg.solve(H, (x - task.a).mean(0))
    expected = (task.c - torch.einsum("nip,i->np", task.J, y)) / n
    found = hypergradients(task.problem(), network("complete", n), HGP(depth, 1, alpha))
    torch.testing.assert_close(stacked(found.v), expected, rtol=1e-13, atol=1e-14)


def test_conjugate_gradients_need_no_more_iterations_than_parameters() -> None:
    task = Quadratics(5)
    found = conjugate_gradients(task.problem(), steps=3, tolerance=0)
    torch.testing.assert_close(stacked(found.v), task.exact(), rtol=1e-11, atol=1e-12)
    assert found.exchanges == 4
    # Up g; in three iterations down p and up H_i p; down y.
    assert found.messages == 5 * (1 + 3 * 2 + 1)
    assert found.bytes == found.messages * 3 * 8
    steps = []
    settings = HGP(60, 1, 0.5, power_steps=0)
    hypergradients(
        task.problem(),
        network("complete", 5),
        settings,
        watch=lambda m, found: steps.append(
            float((stacked(found.v) - task.exact()).norm())
        ),
    )
    assert steps[4] > 1e-4  # the series is far away after as many averages
    assert steps[-1] < 1e-6


def test_conjugate_gradients_that_end_too_early_say_so() -> None:
    problem = Quadratics(5).problem()
    with pytest.warns(RuntimeWarning, match=r"after 2 iterations with a residual of"):
        found = conjugate_gradients(problem, steps=2)
    assert found.exchanges == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["H", "J", "a", "c"])
def test_conjugate_gradients_refuse_what_is_not_finite(where: str, bad: float) -> None:
    task = Quadratics(3)
    problem = task.problem()
    getattr(task, where)[1] = bad  # after the minimizer was found
    with pytest.raises(ValueError, match=r"not finite|p'Hp = nan"):
        conjugate_gradients(problem)


@register
def slope_of_mine(site: Site, x: Tensor, lambdas: Tensor) -> Tensor:
    """Return df_i/dx of the quadratics, whose matrices are the client's sample."""
    H, J, b = site.x[:, :3], site.x[:, 3:5], site.x[:, 5]
    return H @ x + J @ lambdas[site.id] - b


@register
def outer_of_mine(site: Site, x: Tensor, lambdas: Tensor) -> Tensor:
    """Return F_i of the quadratics."""
    linear = site.x[:2, 7] @ lambdas[site.id]
    return 0.5 * (x - site.x[:, 6]).square().sum() + linear


@pytest.mark.parametrize("depth", [1, 12])
def test_the_route_through_federated_differentiation_gives_the_same(depth: int) -> None:
    n, alpha, task = 3, 0.4, Quadratics(3)
    padded = torch.cat([task.c, torch.zeros(n, 1, dtype=F64)], 1)
    columns = [task.H, task.J, task.b[..., None], task.a[..., None], padded[..., None]]
    held = torch.cat(columns, 2)
    sites = [Site(i, held[i], torch.zeros(1)) for i in range(n)]
    clients = Clients(InProcess(sites))
    x = task.minimizer(task.lambdas).requires_grad_()
    lambdas = stacked(task.lambdas).requires_grad_()

    def mean(name: str) -> Tensor:
        given = broadcast(x, clients), broadcast(lambdas, clients)
        return federated_mean(federated_map(name, *given))

    # One exchange for the outer cost's derivatives, and one for each product with all H_i, J_i.
    u, v = torch.autograd.grad(mean("outer_of_mine"), (x, lambdas))
    for _ in range(depth):
        by_x, by_lambdas = torch.autograd.grad(mean("slope_of_mine"), (x, lambdas), u)
        u, v = u - alpha * by_x, v - alpha * by_lambdas
    found = hypergradients(task.problem(), network("complete", n), HGP(depth, 1, alpha))
    torch.testing.assert_close(stacked(found.v), v, rtol=1e-13, atol=1e-14)


# Against retraining.


def test_finite_differences_of_retraining() -> None:
    task = Quadratics(4, seed=3)
    found = hypergradients(task.problem(), network("complete", 4), HGP(200, 1, 0.4))
    expected = torch.stack(differences(task.value, task.lambdas))
    torch.testing.assert_close(stacked(found.v), expected, rtol=1e-7, atol=1e-8)


def test_descent_on_targets_moves_their_mean_to_the_best_one() -> None:
    # f_i = 1/2 (x - l_i)^2, F_i = 1/2 (x - a_i)^2: v_i = (mean l - mean a) / n.
    a, lambdas = numbers(3, -1, 4), tuple(numbers(0, 5, 1)[:, None])
    for _ in range(60):
        x = torch.cat(lambdas).mean().expand(3, 1).clone()
        problem = Problem(
            lambda x, lambdas, _: 0.5 * (x[:, 0] - torch.cat(lambdas)) ** 2,
            lambda x, _: 0.5 * (x[:, 0] - a) ** 2,
            x,
            lambdas,
        )
        found = hypergradients(problem, network("complete", 3), HGP(1, 1, 1.0))
        gap = (torch.cat(lambdas).mean() - a.mean()) / 3
        torch.testing.assert_close(torch.cat(found.v), gap.expand(3))
        lambdas = tuple(p - v for p, v in zip(lambdas, found.v, strict=True))
    assert float(torch.cat(lambdas).mean()) == pytest.approx(2.0, abs=1e-9)


def test_weights_of_a_least_squares_problem() -> None:
    # f_i = 1/2 e^l_i (x - c_i)^2: x* is the mean of c weighted by e^l.
    c, a, lambdas = numbers(1, -2, 4), numbers(0, 1, 1), numbers(0.3, -0.5, 0.1)

    def value(lambdas: Lambdas) -> float:
        weight = torch.cat(lambdas).exp()
        x = (weight * c).sum() / weight.sum()
        return float((0.5 * (x - a) ** 2).mean())

    rows = tuple(lambdas[:, None])
    x = (lambdas.exp() * c).sum() / lambdas.exp().sum()
    problem = Problem(
        lambda x, rows, _: 0.5 * torch.cat(rows).exp() * (x[:, 0] - c) ** 2,
        lambda x, _: 0.5 * (x[:, 0] - a) ** 2,
        x.expand(3, 1).clone(),
        rows,
    )
    expected = torch.cat(differences(value, rows))
    slope = lambdas.exp() * (c - x) / lambdas.exp().sum() * (x - a).mean()
    torch.testing.assert_close(expected, slope, rtol=1e-7, atol=1e-8)
    found = hypergradients(problem, network("uneven", 3), HGP(100, 40, 0.8))
    torch.testing.assert_close(torch.cat(found.v), slope, rtol=1e-10, atol=1e-11)


# What the network does to it.

#: Relative errors on random quadratics over the paper's network at alpha 0.3, where they stop.
PLATEAUS = {
    3: {1: 4.3e-1, 2: 3.0e-1, 5: 4.6e-3, 10: 1.2e-4},
    20: {1: 2.4e-1, 2: 3.8e-2, 5: 1.8e-4, 10: 3.6e-8},
}


@pytest.mark.parametrize(
    ("n", "pushes"), [(n, s) for n in PLATEAUS for s in PLATEAUS[n]]
)
def test_few_pushes_leave_a_plateau(n: int, pushes: int) -> None:
    errors: list[float] = []
    for seed in range(5):
        task = Quadratics(n, seed, scale=0.7, ridge=0.3)
        exact = task.exact()

        def watch(m: int, found: Found, exact: Tensor = exact) -> None:
            if m > 40:
                gap = (stacked(found.v) - exact).norm()
                errors.append(float(gap / exact.norm()))

        settings = HGP(80, pushes, 0.3, power_steps=0)
        hypergradients(
            task.problem(), network("stochastic", n, seed), settings, watch=watch
        )
    level = float(torch.tensor(errors).square().mean().sqrt())
    assert 1 / 3 < level / PLATEAUS[n][pushes] < 3


def test_a_hundred_pushes_reach_what_the_numbers_can_hold() -> None:
    task = Quadratics(3, scale=0.1, ridge=1.0)
    settings, net = HGP(30, 100, 0.8, power_steps=0), network("stochastic", 3)
    exact, problem = task.exact(), task.problem()
    found = stacked(hypergradients(problem, net, settings).v)
    assert float((found - exact).norm() / exact.norm()) < 1e-13


def test_without_arcs_nothing_is_sent_and_each_finds_its_own() -> None:
    task = Quadratics(4, ridge=1.0)
    n, x = 4, task.minimizer(task.lambdas)
    found = hypergradients(task.problem(), network("self_loop", n), HGP(400, 3, 0.25))
    assert (found.messages, found.bytes) == (0, 0)
    y = torch.linalg.solve(task.H, x - task.a)
    own = (task.c - torch.einsum("nip,ni->np", task.J, y)) / n
    torch.testing.assert_close(stacked(found.v), own, rtol=1e-9, atol=1e-10)
    assert float((own - task.exact()).norm()) > 0.1


def test_identical_clients_stay_identical() -> None:
    task, n = Quadratics(6), 6
    for name in ("H", "J", "a", "b", "c"):
        setattr(task, name, getattr(task, name)[:1].repeat_interleave(n, 0))
    task.lambdas = task.lambdas[:1] * n
    for pushes in (1, 3):
        v = hypergradients(
            task.problem(), network("one_peer_exponential", n), HGP(30, pushes, 0.3)
        ).v
        torch.testing.assert_close(
            stacked(v), v[0].expand(n, 2), rtol=1e-13, atol=1e-15
        )


def test_an_estimate_leaves_the_problem_as_it_was() -> None:
    problem = Quadratics(3).problem()
    given = problem.x, *problem.lambdas
    before = [vector.clone() for vector in given]
    hypergradients(problem, network("uneven", 3), HGP(20, 2, 0.3))
    assert all((a == b).all() for a, b in zip(given, before, strict=True))
    assert not any(vector.requires_grad for vector in given)


def test_rounds_of_the_network_follow_each_other() -> None:
    task, net = Quadratics(5), network("stochastic", 5)
    settings = HGP(6, 2, 0.3, power_steps=0)
    first, later = (
        stacked(hypergradients(task.problem(), net, settings, first=t).v)
        for t in (0, 7)
    )
    shifted = Network(5, 0, lambda t: net.edges(t + 7))
    again = stacked(hypergradients(task.problem(), shifted, settings).v)
    assert (later == again).all()
    assert (first != later).any()


# Batches.


def test_batches_leave_the_estimate_unbiased_unless_steps_share_them() -> None:
    # A batch multiplies the costs by 1/2 or 3/2. J of one step meets H of earlier steps alone, so
    # the mean over all draws is the estimate without batches, whether or not the two products of a
    # step share one. Steps that shared theirs would not be so: that is the wrong variant.
    task, depth = Quadratics(3), 3
    full = replace(
        task.problem(), inner=lambda x, lambdas, _: task.inner(x, lambdas, 0)
    )

    def mean(independent: bool, shared: bool = False) -> Tensor:
        places: dict[tuple[str, int], int] = {}
        factors = [1.0]

        def draw(purpose: str, k: int) -> float:
            key = (purpose, 0 if shared else k)
            return factors[places.setdefault(key, len(places))]

        problem = replace(
            full, inner=lambda x, lambdas, s: s * task.inner(x, lambdas, 0), draw=draw
        )
        settings = HGP(depth, 1, 0.3, independent=independent, power_steps=0)
        total = torch.zeros(3, 2, dtype=F64)
        count = (1 if shared else depth) * (2 if independent else 1)
        for outcome in itertools.product((0.5, 1.5), repeat=count):
            factors[:] = outcome
            found = hypergradients(problem, network("complete", 3), settings)
            total += stacked(found.v) / 2**count
        assert len(places) == count
        return total

    settings = HGP(depth, 1, 0.3, power_steps=0)
    without = stacked(hypergradients(full, network("complete", 3), settings).v)
    for independent in (True, False):
        found = mean(independent)
        torch.testing.assert_close(found, without, rtol=1e-12, atol=1e-14)
        assert float((mean(independent, shared=True) - without).norm()) > 1e-3


# The estimate as a run.


def test_a_run_records_every_step(run: Callable[..., Result]) -> None:
    given = ("experiment=hypergrad_error", "data.test_samples=5", "device=cpu")
    found = run("topology=complete", "rounds=60", quick=given)
    steps = [r["hypergradient"] for r in found.records]
    assert [r["round"] for r in found.records] == list(range(61))
    # A server: the error is that of the series, which falls at a steady rate.
    rates = [b["error"] / a["error"] for a, b in pairwise(steps[40:])]
    assert 0.5 < min(rates) <= max(rates) < 0.99
    assert max(rates) - min(rates) < 0.02
    assert steps[-1]["messages"] == 6  # three clients, each to two others
    assert found.records[-1]["strategy"]["link_bytes"] == 6 * (6 * 8 + 8)
    assert found.summary["loss"] == found.records[0]["loss"] < math.log(2)
    noisy = run("topology=complete", "rounds=60", "local.batch=20", quick=given)
    assert abs(noisy.records[-1]["hypergradient"]["error"] - steps[-1]["error"]) > 0.01
    # Of three clients: the outer cost's and twenty products for alpha, then those of a step.
    for result, passes in ((found, 1), (noisy, 2)):
        spent = [r["gradients"] for r in result.records]
        assert spent == [3 * (1 + 20 * 2)] + 60 * [3 * 2 * passes]
    again = run("topology=complete", "rounds=60", "local.batch=20", quick=given)
    assert [r["hypergradient"] for r in again.records] == [
        r["hypergradient"] for r in noisy.records
    ]


def test_a_run_keeps_what_speaks_against_its_alpha(run: Callable[..., Result]) -> None:
    given = ("experiment=hypergrad_error", "data.test_samples=5", "rounds=1")
    far = run("topology=complete", "estimate.alpha=1000", quick=given)
    (doubt,) = far.summary["hypergradient"]["warnings"]
    assert "alpha=1000 is too large" in doubt
    assert f"warning: {doubt}" in far.lines


def test_flower_is_told_that_it_runs_in_one_process() -> None:
    given = ("experiment=hypergrad_error", "rounds=1")
    with pytest.raises(
        UserError, match="estimate=hypergrad: is computed in one process"
    ):
        start(given, LocalGrid(to_run_config(given), 1))


def test_the_task_stands_at_its_minimizer() -> None:
    words = ("experiment=hypergrad_error", "data.test_samples=5", "device=cpu")
    problem = logistic(setting(words))
    x = problem.x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(problem.inner(x, problem.lambdas, None).sum(), x)
    assert float(slope.mean(0).norm()) < 1e-12
    assert float(slope.norm()) > 1e-3  # the clients' own minimizers lie elsewhere
    found = conjugate_gradients(problem, steps=20)
    torch.testing.assert_close(
        stacked(found.v), stacked(closed_form(problem)), rtol=1e-8, atol=1e-10
    )


# Alpha, and other mistakes.


def test_alpha_too_large_diverges_and_is_warned_of() -> None:
    task = Quadratics(4)
    problem, net = task.problem(), network("complete", 4)
    top = float(torch.linalg.eigvalsh(task.H.mean(0))[-1])
    found = largest_eigenvalue(Products(problem), Links(net, 1, 0), 60, seed=0)
    torch.testing.assert_close(
        found, torch.full((4,), top, dtype=F64), rtol=1e-6, atol=0
    )
    with pytest.warns(RuntimeWarning, match=r"alpha=.* too large.*2/lambda_max"):
        v = hypergradients(problem, net, HGP(300, 1, 2.2 / top)).v
    assert float(stacked(v).norm()) > 1e3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        v = hypergradients(problem, net, HGP(300, 1, 1.8 / top)).v
    assert float((stacked(v) - task.exact()).norm()) < 1e-3


def test_only_the_mean_hessian_has_to_be_positive() -> None:
    task = Quadratics(3)
    task.H = task.H.clone()
    task.H[0] -= 1.5 * torch.eye(3, dtype=F64)
    task.H[1] += 1.5 * torch.eye(3, dtype=F64)
    assert float(torch.linalg.eigvalsh(task.H[0])[0]) < 0
    found = hypergradients(task.problem(), network("complete", 3), HGP(200, 1, 0.4))
    torch.testing.assert_close(stacked(found.v), task.exact(), rtol=1e-8, atol=1e-9)
    task.H = -task.H
    with pytest.warns(RuntimeWarning, match="not at a minimum"):
        hypergradients(task.problem(), network("complete", 3), HGP(1, 1, 0.4))
    with pytest.raises(ValueError, match="not positive definite"):
        conjugate_gradients(task.problem())


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"depth": 0}, "depth=0: at least 1"),
        ({"pushes": 0}, "pushes=0: at least 1"),
        ({"power_steps": -1}, "power_steps=-1: at least 0"),
        ({"alpha": 0.0}, "alpha=0: a positive number"),
        ({"alpha": float("nan")}, "alpha=nan: a positive number"),
    ],
)
def test_settings_out_of_range(settings: dict[str, float], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        HGP(**settings)  # type: ignore[arg-type]


def test_what_does_not_fit_together() -> None:
    problem = Quadratics(3).problem()
    with pytest.raises(ValueError, match="network of 4 clients and a problem of 3"):
        hypergradients(problem, network("complete", 4), HGP())
    with pytest.raises(ValueError, match="a row and a vector for each client"):
        replace(problem, lambdas=problem.lambdas[:2])
    with pytest.raises(ValueError, match="take HGP for batches"):
        conjugate_gradients(replace(problem, draw=lambda purpose, k: None))
