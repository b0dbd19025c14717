"""Influence of training samples, held against retraining without them."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import r2_score
from torch import Tensor

from app import influence, influence_plots
from app.errors import UserError
from app.experiment import run_local
from app.influence_report import (
    Look,
    agreement,
    as_csv,
    disagreement,
    listed,
    unsettled,
)
from strategies import topology
from strategies.families import Own, SampleWeights
from strategies.hyperproblem import conjugate_gradients
from strategies.influence import Influence, left_out, predict
from strategies.network import Network
from strategies.personalization import Personal
from strategies.sgd import SGD
from strategies.weighted import Task, descend, minimize
from tests.conftest import Result

F64 = torch.float64
N, FEATURES, SAMPLES = 3, 2, 20
SIZE = 2 * (FEATURES + 1)
#: Steps that leave nothing of the series.
DEEP = Influence(depth=400, alpha=1.0, check=0, power_steps=0)


def net(theta: Tensor, x: Tensor) -> Tensor:
    """Return the logits of a linear classifier of two classes."""
    table = theta.view(2, FEATURES + 1)
    return x @ table[:, :-1].T + table[:, -1]


def client(seed: int) -> Own:
    """Return a client whose labels follow a rule of its own, noisily, shared in part."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * SAMPLES, FEATURES, generator=g, dtype=F64) + 0.4 * seed
    rule = torch.tensor([1.0, -1.0], dtype=F64) + torch.randn(
        FEATURES, generator=g, dtype=F64
    )
    noise = 1.5 * torch.randn(2 * SAMPLES, generator=g, dtype=F64)
    y = (x @ rule + noise > 0).long()
    return Own(x[:SAMPLES], y[:SAMPLES], x[SAMPLES:], y[SAMPLES:])


@cache
def task(batch: int = 0) -> Task:
    personal = Personal(net, SIZE, 2, (SampleWeights(),), decay=0.05)
    return Task(personal, tuple(client(k) for k in range(N)), batch)


@cache
def trained() -> Tensor:
    return minimize(task(), torch.zeros(SIZE, dtype=F64), task().ones())


@cache
def actual() -> np.ndarray:
    """Return what leaving out each sample does, by retraining to the minimizer."""
    retrain = partial(minimize, task(), trained())
    return np.array(list(left_out(task(), range(N * SAMPLES), retrain, trained())))


def network(name: str) -> Network:
    return Network(N, 0, getattr(topology, name)(N, 0))


def predicted(settings: Influence, over: str = "complete") -> np.ndarray:
    found = predict(task(), trained(), network(over), settings)
    return -torch.cat(found.v).numpy()


# Against retraining.


def test_predictions_explain_what_leaving_samples_out_does() -> None:
    found = predicted(DEEP)
    assert r2_score(actual(), found) > 0.95
    # Wrong variants: of the other sign; without messages; for a sum of costs, not their mean.
    assert r2_score(actual(), -found) < 0
    assert r2_score(actual(), predicted(DEEP, "self_loop")) < 0.8
    assert r2_score(actual(), N * found) < 0.5


def test_they_are_the_derivatives_of_retraining() -> None:
    found, step = predicted(DEEP), 1e-4
    for sample in (0, 25, 59):
        ends = []
        for sign in (-1, 1):
            weights = task().ones()
            weights[sample] -= sign * step
            ends.append(task().judged(minimize(task(), trained(), weights))[0])
        slope = (ends[1] - ends[0]) / (2 * step)
        assert found[sample] == pytest.approx(slope, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("depth", [1, 7])
def test_a_short_series_predicts_a_short_training(depth: int) -> None:
    # M steps of the series are the derivative of M gradient steps of size alpha from the minimizer.
    short = predicted(Influence(depth=depth, alpha=0.3, power_steps=0))
    step, sample = 1e-4, 11
    ends = []
    for sign in (-1, 1):
        weights = task().ones()
        weights[sample] -= sign * step
        rate = SGD(lr=0.3, weight_decay=task().personal.decay)
        theta = descend(task(), trained(), weights, rate, depth)
        ends.append(task().judged(theta)[0])
    slope = (ends[1] - ends[0]) / (2 * step)
    assert short[sample] == pytest.approx(slope, rel=1e-5)
    assert abs(short[sample] / predicted(DEEP)[sample] - 1) > 0.1


def test_damping_is_added_to_the_eigenvalues() -> None:
    damped = predicted(Influence(depth=300, alpha=0.8, damping=0.3, power_steps=0))
    theta, own = trained().requires_grad_(), task().clients
    hessian = torch.func.hessian(lambda t: task().cost(t, task().ones()))(theta)
    hessian = hessian + (0.05 + 0.3) * torch.eye(SIZE, dtype=F64)
    loss = torch.nn.functional.cross_entropy
    outer = torch.stack([loss(net(theta, o.outer_x), o.outer_y) for o in own]).mean()
    y = torch.linalg.solve(hessian, torch.autograd.grad(outer, theta)[0])
    weights = task().ones().requires_grad_()
    by_theta = torch.autograd.grad(
        task().cost(theta, weights), theta, create_graph=True
    )
    expected = torch.autograd.grad(by_theta, weights, (y,))[0]
    torch.testing.assert_close(torch.tensor(damped), expected, rtol=1e-9, atol=1e-12)
    assert np.abs(damped - predicted(DEEP)).max() > 1e-3


# Routes to the same.


def test_many_pushes_over_a_network_are_a_server() -> None:
    over = predicted(Influence(depth=400, pushes=40, alpha=1.0), "ring")
    np.testing.assert_allclose(over, predicted(DEEP), rtol=1e-9, atol=1e-12)
    few = predicted(Influence(depth=400, pushes=1, alpha=1.0), "stochastic")
    assert np.abs(few - predicted(DEEP)).max() > 1e-4


def test_conjugate_gradients_give_the_same() -> None:
    fast = predicted(Influence(method="conjugate_gradients", depth=20))
    np.testing.assert_allclose(fast, predicted(DEEP), rtol=1e-8, atol=1e-12)


def test_conjugate_gradients_in_single_precision_leave_flat_directions_alone() -> None:
    half = tuple(
        Own(own.x.float(), own.y, own.outer_x.float(), own.outer_y)
        for own in task().clients
    )
    # Without decay the cost does not know a number added to both logits.
    whole, rough = (
        Task(Personal(net, SIZE, 2, (SampleWeights(),)), own)
        for own in (task().clients, half)
    )
    theta = minimize(whole, torch.zeros(SIZE, dtype=F64), whole.ones())
    found = torch.cat(conjugate_gradients(rough.problem(theta.float())).v)
    expected = torch.cat(conjugate_gradients(whole.problem(theta)).v)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_gradient_descent_goes_to_the_minimizer() -> None:
    rate = SGD(lr=0.5, momentum=0.5, weight_decay=task().personal.decay)
    start = torch.zeros(SIZE, dtype=F64)
    theta = descend(task(), start, task().ones(), rate, 400)
    torch.testing.assert_close(theta, trained(), rtol=1e-8, atol=1e-10)


def test_single_precision_goes_as_far_as_it_can() -> None:
    half = tuple(
        Own(own.x.float(), own.y, own.outer_x.float(), own.outer_y)
        for own in task().clients
    )
    personal = Personal(net, SIZE, 2, (SampleWeights(),), decay=0.05)
    rough = Task(personal, half)
    theta = minimize(rough, torch.zeros(SIZE), rough.ones())
    torch.testing.assert_close(theta.double(), trained(), rtol=1e-4, atol=1e-4)
    change = next(left_out(rough, [25], partial(minimize, rough, theta), theta))
    assert change == pytest.approx(actual()[25], abs=2e-6)


def test_a_sample_that_is_left_out_leaves_its_place_in_the_batch_empty() -> None:
    part = task(6)
    drawn = part.draw("training", 1)
    sample = int(drawn[1][2]) + SAMPLES
    whole = part.cost(trained(), part.ones(), 1)
    loss = torch.nn.functional.cross_entropy
    own = part.clients[1]
    theirs = loss(net(trained(), own.x), own.y, reduction="none")[sample - SAMPLES]
    gap = whole - part.cost(trained(), part.without(sample), 1)
    torch.testing.assert_close(gap, theirs / (N * 6))
    elsewhere = next(j for j in range(SAMPLES) if j not in drawn[0].tolist())
    assert part.cost(trained(), part.without(elsewhere), 1) == whole


def test_a_minimizer_is_found_without_decay_too() -> None:
    # The cost does not know a number added to both logits: its Hessian is singular.
    free = Task(Personal(net, SIZE, 2, (SampleWeights(),)), task().clients)
    g = torch.Generator().manual_seed(1)
    theta = minimize(free, torch.randn(SIZE, generator=g, dtype=F64), free.ones())
    for sample in range(0, N * SAMPLES, 4):
        weights = free.without(sample)
        again = minimize(free, theta, weights)
        assert float(free.slope(again, weights).abs().max()) < 1e-11
        assert float((again - theta).abs().max()) < 3


def test_classes_that_a_plane_separates_have_no_minimizer() -> None:
    x = torch.tensor([[-2.0, 0], [-1, 1], [1, 0], [2, 1]], dtype=F64)
    own = Own(x, (x[:, 0] > 0).long(), x, (x[:, 0] > 0).long())
    apart = Task(Personal(net, SIZE, 2, (SampleWeights(),)), (own,))
    with pytest.raises(ValueError, match=r"no minimizer.*weight_decay"):
        minimize(apart, torch.zeros(SIZE, dtype=F64), apart.ones())


# Runs.

TOY = (
    "experiment=influence",
    *("topology=complete", "estimate.pushes=1", "rounds=150"),
    *("estimate.check=8", "data.test_samples=5", "device=cpu"),
)
IMAGES = (
    "experiment=influence_digits",
    *("model=mlp", "model.hidden=[8]", "estimate.samples=30", "clients=3"),
    *("clients_per_round=3", "rounds=4", "estimate.alpha=0.2", "optimizer.lr=0.2"),
    *("estimate.train_steps=60", "estimate.retrain_steps=4", "estimate.check=6"),
    *("topology=complete", "estimate.pushes=1", "device=cpu"),
)


CG = "estimate.method=conjugate_gradients"


def table(path: Path, name: str = "influence.csv") -> list[dict[str, str]]:
    with open(path / name, newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_lists_every_sample_of_every_client(run: Callable[..., Result]) -> None:
    found = run(quick=TOY)
    told = found.summary["influence"]
    assert told["r2"] > 0.9 and told["kendall"] > 0.8 and told["warnings"] == []
    last = found.records[-1]
    assert last["round"] == 150 and last["influence"]["r2"] == told["r2"]
    assert last["influence"]["messages"] == 12  # two steps, each client to two others
    assert found.records[5]["influence"]["r2"] < told["r2"]
    # The outer cost's gradient, products that check alpha, and those of the series.
    assert found.summary["gradients"] == 3 * (1 + 20 * 2 + 150 * 2)
    rows = table(found.path)
    assert list(rows[0]) == ["client", "sample", "label", "predicted", "actual"]
    assert [r["client"] for r in rows] == ["0"] * 100 + ["1"] * 100 + ["2"] * 100
    assert len({r["sample"] for r in rows}) == 300
    for k in range(3):
        mine = [float(r["predicted"]) for r in rows if r["client"] == str(k)]
        assert mine == sorted(mine) and mine[0] < 0 < mine[-1]
        own = table(found.path, f"influence/client-{k}.csv")
        assert own == [r for r in rows if r["client"] == str(k)]
    assert len(list((found.path / "influence").iterdir())) == 3
    known = [r for r in rows if r["actual"]]
    largest = sorted(rows, key=lambda r: -abs(float(r["predicted"])))[:8]
    assert {r["sample"] for r in known} == {r["sample"] for r in largest}
    pairs = [(float(r["actual"]), float(r["predicted"])) for r in known]
    assert r2_score(*zip(*pairs, strict=True)) == pytest.approx(told["r2"])
    assert (found.path / "influence.png").stat().st_size > 10_000
    assert not (found.path / "samples.png").exists()
    assert any("R2" in line for line in found.lines)


def test_what_is_known_is_kept_while_retraining(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def two(*_: Any) -> Iterator[float]:
        yield from (0.5, -0.5)
        raise UserError("this one has no minimizer")

    monkeypatch.setattr(influence, "left_out", two)
    with pytest.raises(UserError, match="no minimizer"):
        run("name=half", quick=TOY)
    rows = table(tmp_path / "runs" / "half")
    assert len(rows) == 300 and all(r["predicted"] for r in rows)
    assert sorted(float(r["actual"]) for r in rows if r["actual"]) == [-0.5, 0.5]


def test_the_minimizer_and_the_server_in_a_run(run: Callable[..., Result]) -> None:
    found = run(CG, "estimate.select=random", quick=TOY)
    assert found.summary["influence"]["slope"] < 1e-10
    assert found.summary["influence"]["r2"] > 0.9
    assert len(found.records) == 2
    # One exchange has no product, and the last product no exchange.
    exchanges = found.records[1]["round"]
    assert found.records[1]["gradients"] == 3 * (1 + 2 * exchanges)
    again = run(CG, "estimate.select=random", quick=TOY)
    assert table(again.path) == table(found.path)
    assert found.summary["influence"]["warnings"] == []
    early = run(CG, "rounds=2", "estimate.check=0", quick=TOY)
    (doubt,) = early.summary["influence"]["warnings"]
    assert "ended after 2 iterations" in doubt
    other = run(CG, "estimate.select=random", "estimate.check=0", quick=TOY)
    assert not (other.path / "influence.png").exists()
    assert not any(r["actual"] for r in table(other.path))
    predicted = [r["predicted"] for r in table(found.path)]
    assert [r["predicted"] for r in table(other.path)] == predicted


def test_images_come_as_a_contact_sheet(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(influence_plots, "SHEETS", 2)
    found = run(quick=IMAGES)
    own = sorted(file.name for file in (found.path / "influence").glob("*.png"))
    assert own == ["client-0.png", "client-1.png"]
    assert "pictures of the first 2 clients; the lists are of all" in found.lines
    with Image.open(found.path / "influence" / own[1]) as sheet:
        assert sheet.size[0] > 1000 and sheet.size[1] > 200
    with Image.open(found.path / "samples.png") as sheet:
        assert sheet.size[0] > 1000 and sheet.size[1] > 400
        assert len(sheet.convert("RGB").getcolors(2**20) or ()) > 50
    told = found.summary["influence"]
    assert told["samples"] == len(table(found.path)) == 3 * 22
    # Four steps of the series, and four of training of the same size.
    assert told["r2"] > 0.9
    batches = run("local.batch=8", quick=IMAGES)
    assert batches.summary["influence"]["r2"] != told["r2"]
    # Of each client: a pass for each product of a step, and one for each that checks alpha.
    assert batches.summary["gradients"] == 3 * (1 + 20 * 2 + 4 * 2 * 2)


def test_what_cannot_be_trusted_says_so(run: Callable[..., Result]) -> None:
    found = run("estimate.alpha=40", "estimate.power_steps=20", quick=IMAGES)
    doubts = " ".join(found.summary["influence"]["warnings"])
    assert "alpha=40 is too large" in doubts
    assert "do not act on these lists" in doubts
    assert "has not settled" in doubts or "diverged" in doubts
    assert any(line.startswith("warning: ") for line in found.lines)


def test_agreement_is_undefined_where_there_is_nothing_to_agree_with() -> None:
    rising, falling = np.array([1.0, 2.0, 4.0]), np.array([3.0, 2.0, 1.0])
    nothing = {"r2": None, "kendall": None, "correlation": None}
    assert agreement(rising, np.full(3, 0.5)) == nothing
    assert agreement(np.array([1.0, np.nan, 2.0]), rising) == nothing
    assert agreement(rising[:1], rising[:1]) == nothing
    flat = agreement(np.zeros(3), rising)
    assert flat["kendall"] is None and flat["r2"] == pytest.approx(1 - 21 / (14 / 3))
    assert agreement(10 * rising, rising)["kendall"] == pytest.approx(1)
    assert agreement(10 * rising, rising)["r2"] < 0  # type: ignore[operator]
    assert agreement(falling, rising)["kendall"] == pytest.approx(-1)
    assert "do not act" in disagreement(nothing)[0]
    assert disagreement({**nothing, "r2": 0.9}) == []


def test_a_series_that_diverged_is_told_and_leaves_empty_cells() -> None:
    looks = [
        Look(m, torch.tensor([v, 1.0]), 0, 0, 0.0) for m, v in ((1, 1.0), (2, np.inf))
    ]
    assert "diverged" in unsettled(looks)[0]
    assert "changed the estimate by 100%" in unsettled(looks[:1])[0]
    rows = listed([np.array([7, 3])], [0] * 8, np.array([np.inf, -0.5]), {1: 0.25})
    assert as_csv(rows) == (
        "client,sample,label,predicted,actual\n0,3,0,-0.5,0.25\n0,7,0,,\n"
    )


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["client_validation=0"], "client_validation=0.25"),
        (["strategy=fedavg", "topology=none"], "strategy=pushsum"),
        (["estimate.pushes=0"], r"estimate.pushes=0"),
        (["estimate.method=newton"], r"estimate.method='newton'.*push"),
        (["estimate.damping=-1"], r"estimate.damping=-1"),
        (["estimate.check=10000"], "only 66 training samples"),
        (["optimizer=adamw"], r"optimizer=adamw.*use optimizer=sgd"),
        ([CG, "topology=ring"], r"exact averages; use topology=complete"),
        ([CG, "local.batch=5"], r"all samples in every product; use local.batch=0"),
        (["model.dropout=0.5"], r"model=mlp: .* needs model.dropout=0"),
        (["optimizer.lr=1e30"], r"optimizer.lr=1e\+30.*take a smaller one"),
        (["estimate.samples=2"], "too few to keep some"),
        (["program=two_rounds"], "one of the two"),
    ],
)
def test_mistakes_are_one_line(words: list[str], line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=line) as caught:
        run_local([*IMAGES, *words, f"output_dir={tmp_path}"], [], lambda _: None)
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())
