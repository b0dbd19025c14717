"""FedOpt, its hyper-gradients, and learned weights: each derivative against autograd's own."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from test_algorithms import ALL, OPTIMUM, A, B, Federation, close, descent, vector
from torch import Tensor, nn

from app.config import load
from app.errors import UserError
from app.run import Run
from strategies.algorithm import Client, Cohort, Vectors
from strategies.engine import train
from strategies.fad_site import FUNCTIONS, Site
from strategies.fedavg import FedAvg
from strategies.fedopt import FedOpt
from strategies.fedopt_hyper import FedOptHyper
from strategies.learned_weights import LEARNED, LearnedWeights
from strategies.local import Job, Local, Part, Trainer
from strategies.objective import Objective
from strategies.sgd import SGD
from strategies.tuned_sgd import TunedSGD

COHORT = Cohort(4, 4, 0)
SOLVE = descent(3, SGD(lr=0.05))


def mean_gradient(theta: Tensor) -> Tensor:
    return (A @ theta - B).mean(0)


def mean_loss(theta: Tensor) -> Tensor:
    return torch.stack([0.5 * theta @ A[k] @ theta - B[k] @ theta for k in ALL]).mean()


# FedOpt.


@pytest.mark.parametrize("kind", ["sgd", "adam", "yogi"])
def test_fedopt_by_hand(kind: Any) -> None:
    """Two steps in plain numbers, coordinate by coordinate."""
    algorithm = FedOpt(optimizer=kind, server_lr=0.5, momentum=0.8, second=0.9, tau=0.1)
    server, deltas = algorithm.start(vector(1, -1)), [(0.3, -2.0), (0.1, 0.5)]
    x, m, v = [1.0, -1.0], [0.0, 0.0], [0.01, 0.01]
    for delta in deltas:
        server = algorithm.update(server, {"delta": vector(*delta)}, COHORT)
        for j, d in enumerate(delta):
            if kind == "sgd":
                m[j] = 0.8 * m[j] + d
                x[j] += 0.5 * m[j]
                continue
            m[j] = 0.8 * m[j] + 0.2 * d
            if kind == "adam":
                v[j] = 0.9 * v[j] + 0.1 * d * d
            else:
                v[j] -= 0.1 * d * d * (1 if v[j] > d * d else -1)
            x[j] += 0.5 * m[j] / (v[j] ** 0.5 + 0.1)
    close(server["theta"], vector(*x), 1e-14)


def test_fedopt_without_momentum_is_fedavg() -> None:
    ours = Federation(FedOpt(momentum=0.0, server_lr=0.7), SOLVE).run([ALL] * 9)
    assert torch.equal(ours, Federation(FedAvg(server_lr=0.7), SOLVE).run([ALL] * 9))


def test_fedopt_keeps_no_vector_that_it_does_not_use() -> None:
    assert FedOpt(momentum=0.0).start(vector(1)).keys() == {"theta"}
    assert FedOpt().start(vector(1)).keys() == {"theta", "momentum"}


# Hyper-gradients by the server's settings.


@pytest.mark.parametrize("kind", ["sgd", "adam", "yogi"])
def test_the_derivative_of_the_next_loss(kind: Any) -> None:
    """What the server holds, times the next gradient, is dF/dphi of the step that it took."""
    algorithm = FedOptHyper(
        optimizer=kind, momentum=0.6, server_lr=0.3, tau=0.1, hyper_lr=0.05
    )
    federation = Federation(algorithm, SOLVE)
    federation.run([ALL] * 3)
    before = dict(federation.server)
    federation.round(ALL)
    after = federation.server
    models = [federation.last[k] - before["theta"] for k in ALL]
    delta = torch.stack(models).mean(0)
    phi = torch.stack([after["server_lr"].log(), after["server_momentum"].logit()])
    phi = phi.squeeze(1).requires_grad_()
    moments = before["momentum"], before.get("second")
    theta, _ = algorithm.step(
        before["theta"], moments, delta, phi[0].exp(), phi[1].sigmoid()
    )
    close(theta.detach(), after["theta"], 1e-14)
    (truth,) = torch.autograd.grad(mean_loss(theta), phi)
    gradient = mean_gradient(after["theta"])
    found = [gradient @ after["d_server_lr"], gradient @ after["d_server_momentum"]]
    assert float(truth.abs().min()) > 1e-4
    close(torch.stack(found), truth, 1e-13)


@pytest.mark.parametrize("normalized", [True, False])
def test_settings_follow_their_hyper_gradients(normalized: bool) -> None:
    algorithm = FedOptHyper(momentum=0.6, hyper_lr=0.2, normalized=normalized)
    federation = Federation(algorithm, SOLVE)
    federation.run([ALL] * 2)
    before = dict(federation.server)
    federation.round(ALL)
    gradient = mean_gradient(before["theta"])
    for name, there, back in (
        ("server_lr", torch.log, torch.exp),
        ("server_momentum", torch.logit, torch.sigmoid),
    ):
        slope = before[f"d_{name}"]
        along = gradient @ slope
        if normalized:
            along = along / gradient.norm() / slope.norm()
        expected = back(there(before[name]) - 0.2 * along)
        close(federation.server[name], expected, 1e-13)
        assert float((expected - before[name]).abs()) > 1e-5


def test_the_first_round_changes_no_setting() -> None:
    federation = Federation(FedOptHyper(momentum=0.6), SOLVE)
    federation.round(ALL)
    assert float(federation.server["server_lr"]) == 1.0
    assert float(federation.server["server_momentum"]) == pytest.approx(0.6, abs=1e-15)


@pytest.mark.parametrize("normalized", [True, False])
def test_the_best_step_of_a_frozen_difference(normalized: bool) -> None:
    """F(theta + s Delta) of a quadratic is least at s* = -<grad F, Delta> / <Delta, A Delta>."""
    start, delta = vector(0.3, -0.2), vector(-0.4, 0.5)
    best = -(mean_gradient(start) @ delta) / (delta @ A.mean(0) @ delta)
    algorithm = FedOptHyper(
        server_lr=0.05, momentum=0.0, normalized=normalized, hyper_lr=0.2
    )
    server = algorithm.start(start)
    for t in range(1000):
        # A cosine turns steeply where the gradient is small: steps of one size would circle.
        step = replace(algorithm, hyper_lr=0.2 / (1 + t / 20) if normalized else 0.2)
        mean = {"delta": delta, "gradient": mean_gradient(server["theta"])}
        server = step.update({**server, "theta": start}, mean, COHORT)
    close(server["server_lr"], best[None], 1e-9)


@pytest.mark.parametrize("start", [0.1, 0.3, 3.0])
def test_it_goes_to_the_optimum_from_any_rate(start: float) -> None:
    """With one local step FedAvg's direction is the gradient: any good rate reaches the optimum."""
    solve = descent(1, SGD(lr=0.05))
    tuned = FedOptHyper(server_lr=start, momentum=0.0, hyper_lr=0.1)
    fixed = FedAvg(server_lr=start)
    ours = Federation(tuned, solve).run([ALL] * 60)
    theirs = Federation(fixed, solve).run([ALL] * 60)
    assert (ours - OPTIMUM).norm() < 0.5 * (theirs - OPTIMUM).norm()


class Uphill(FedOptHyper):
    """The wrong sign."""

    def _follow(self, name: str, server: Vectors, gradient: Tensor) -> Tensor:
        return super()._follow(name, server, -gradient)


def test_the_wrong_sign_is_worse_than_no_tuning() -> None:
    solve = descent(1, SGD(lr=0.05))
    distance = {
        kind: float((Federation(algorithm, solve).run([ALL] * 60) - OPTIMUM).norm())
        for kind, algorithm in {
            "right": FedOptHyper(server_lr=0.3, momentum=0.0),
            "fixed": FedAvg(server_lr=0.3),
            "wrong": Uphill(server_lr=0.3, momentum=0.0),
        }.items()
    }
    assert distance["right"] < distance["fixed"] < distance["wrong"]


def test_an_independent_cohort_splits_the_round() -> None:
    algorithm = FedOptHyper(independent=True, momentum=0.0)
    server = algorithm.start(vector(0, 0))
    sides: dict[int, list[int]] = {0: [], 1: []}
    for k in range(200):
        state = algorithm.begin(algorithm.down(server), {}, Client(k, 1, 1.0))
        state = algorithm.witness(state, vector(1, 2), vector(0)[0])
        up, _ = algorithm.finish(vector(3, 4), vector(0, 0), state, vector(1)[0])
        side = int(up["share"][0])
        sides[side].append(k)
        assert bool(up["delta"].any()) == (side == 1)
        assert bool(up["gradient"].any()) == (side == 0)
        assert float(up["share"].sum()) == 1
    assert 70 < len(sides[0]) < 130
    federation = Federation(algorithm, SOLVE)
    federation.round(ALL)
    down = {"theta": vector(0, 0), "round": vector(1)}
    steps = [bool(algorithm.begin(down, {}, Client(k, 1, 1.0))["steps"]) for k in ALL]
    assert 0 < sum(steps) < 4
    mine = torch.stack([federation.last[k] for k in ALL if steps[k]]).mean(0)
    close(federation.server["theta"], mine, 1e-13)


def test_an_independent_cohorts_coins_depend_on_the_seed() -> None:
    down = {"theta": vector(0, 0), "round": vector(1)}

    def steps(seed: int) -> list[float]:
        tossing = FedOptHyper(independent=True, seed=seed)
        tossed = (tossing.begin(down, {}, Client(k, 1, 1.0)) for k in range(64))
        return [float(t["steps"]) for t in tossed]

    assert steps(0) == steps(0) != steps(1)
    assert load(["strategy=fedopt_hyper", "seed=7"]).strategy.options["seed"] == 7


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_nobody_who_steps_means_no_step(optimizer: str) -> None:
    algorithm = FedOptHyper(
        independent=True, optimizer=optimizer, momentum=0.9, server_lr=0.1
    )
    both = {"delta": vector(1, 2), "gradient": vector(-1, 1), "share": vector(0.5, 0.5)}
    server = algorithm.update(algorithm.start(vector(0, 0)), both, Cohort(4, 4, 0))
    none = {"delta": vector(0, 0), "gradient": vector(-2, 2), "share": vector(0, 1)}
    after = algorithm.update(server, none, Cohort(4, 4, 0))
    judged = {f"d_{name}" for name in algorithm.tuned}
    same = server.keys() - {"round", *algorithm.tuned, *judged}
    assert all(torch.equal(after[name], server[name]) for name in same)
    assert not torch.equal(after["server_lr"], server["server_lr"])  # it is judged
    assert float(after["round"]) == float(server["round"]) + 1
    # Once: another round without a step says no more of the last one.
    again = algorithm.update(after, none, Cohort(4, 4, 0))
    assert all(torch.equal(again[n], after[n]) for n in algorithm.tuned)


def test_a_coordinate_that_never_moves_has_a_derivative() -> None:
    """As the weights of a pixel that is always black."""
    algorithm = FedOptHyper(optimizer="adam", client_lr=True, second=0.0)
    mean = {"delta": vector(0, 2), "gradient": vector(0, 1), "slope": vector(0, 1)}
    after = algorithm.update(algorithm.start(vector(0, 0)), mean, Cohort(4, 4, 0))
    assert all(bool(torch.isfinite(v).all()) for v in after.values())


# The clients' learning rate.


def trainer(local: Local, algorithm: Any, optimizer: Any) -> tuple[Trainer, Part]:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(9, 5, generator=random, dtype=torch.float64)
    y = torch.randint(0, 3, (9,), generator=random)
    module = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=random))
    goal = Objective(module.to(torch.float64), "cross_entropy", {})
    run = Trainer(algorithm, optimizer, local, goal, 0)
    return run, Part(x, y, torch.arange(9))


@pytest.mark.parametrize("engine", ["loop", "vmap"])
@pytest.mark.parametrize("largest", [0.0, 0.5])
def test_the_tangent_is_the_derivative_of_local_training(
    engine: str, largest: float
) -> None:
    """Against autograd through all local steps, clipped or not, by pace and so by lr."""
    local = Local(epochs=3, batch=4, clip=largest)
    algorithm = FedOptHyper(client_lr=True)
    run, part = trainer(local, algorithm, TunedSGD(lr=0.2))
    theta, buffers = run.objective.initial()
    down = {"theta": theta, "pace": vector(1.5), "buffers": buffers}
    job = Job(Client(2, 9, 1.0), part, {})
    (found,) = list(train(run, down, [job], 4, engine))
    lr = torch.tensor(0.3, dtype=torch.float64)
    site = Site(2, part.x, part.y, 0, 4, run)
    model, slope = torch.func.jvp(
        lambda rate: FUNCTIONS["train"](site, theta, rate), (lr,), (lr,)
    )
    close(found.up["delta"][0], model - theta, 1e-12)
    close(found.up["slope"][0], slope, 1e-11)
    assert float(slope.norm()) > 1e-2
    assert found.gradients == [3 * 9]


def test_one_local_step_has_a_closed_form() -> None:
    """dF/d lr = -server_lr <g, mean first gradient>, for one step."""
    algorithm = FedOptHyper(client_lr=True, server_lr=0.7, momentum=0.0)
    start, lr = vector(0.4, 0.1), 0.05
    server = algorithm.start(start)
    first = mean_gradient(start)
    mean = {"delta": -lr * first, "gradient": first, "slope": -lr * first}
    server = algorithm.update(server, mean, COHORT)
    g = mean_gradient(server["theta"])
    close(g @ server["d_pace"] / lr, -0.7 * g @ first, 1e-14)


def test_weight_decay_has_its_part_in_the_tangent() -> None:
    optimizer = TunedSGD(lr=0.1, weight_decay=0.5)

    def after(log_pace: Tensor) -> Tensor:
        theta = vector(1, -2)
        state = optimizer.init(theta, {"pace": log_pace.exp()})
        for _ in range(3):
            product = A[1] @ state["slope"]
            gradient = A[1] @ theta - B[1]
            step = state | {"product": product}
            theta, state = optimizer.step(theta, gradient, step, 1)
        return torch.stack([theta, state["slope"]])

    at = vector(0.2).requires_grad_()
    truth = torch.func.jacfwd(lambda p: after(p)[0])(at)[:, 0]
    close(after(at.detach())[1], truth.detach(), 1e-13)


# Learned weights.


@dataclass
class Twin:
    """Learned weights of all clients in one graph: what each client does, written plainly."""

    algorithm: LearnedWeights
    rounds: list[dict[str, Any]] = field(default_factory=list)
    theta: Tensor = field(default_factory=lambda: vector(0, 0))
    phi: Tensor = field(default_factory=lambda: vector(0, 0, 0))
    logits: Tensor = field(default_factory=lambda: vector(0, 0, 0, 0))
    shares: tuple[float, ...] = (0.4, 0.8, 1.2, 1.6)

    def round(self) -> None:
        a = torch.tensor([int(10 * s) for s in self.shares], dtype=torch.float64)
        if (
            len(self.rounds) >= 2
        ):  # judge the round before last, at the model that it made
            past, at = self.rounds[-2], self.rounds[-1]["anchor"]
            phi = past["phi"].clone().requires_grad_()
            logits = past["logits"].clone().requires_grad_()
            made = self.step(past, phi, logits)
            close(made.detach(), at, 1e-12)
            loss = sum(a[k] * self.local_loss(made, k) for k in ALL) / a.sum()
            by_phi, by_logits = torch.autograd.grad(loss, (phi, logits))
            g = sum(a[k] * (A[k] @ at - B[k]) for k in ALL) / a.sum()
            weights = a * torch.exp(past["features"] @ past["phi"] + past["logits"])
            scale = g.norm() * (weights @ past["deltas"].norm(dim=1)) / weights.sum()
            assert abs(float(by_logits.sum())) < 1e-12
            count = a.sum() / a.mean()
            logits_now = (
                self.logits - self.algorithm.logit_lr * by_logits * count / scale
            )
            phi_now = self.phi - self.algorithm.hyper_lr * by_phi / scale
        else:
            phi_now, logits_now = self.phi, self.logits
        models = []
        for k in ALL:
            point = self.theta
            for _ in range(3):
                point = point - 0.05 * (A[k] @ point - B[k])
            models.append(point - self.theta)
        losses = torch.stack([self.local_loss(self.theta, k) for k in ALL])
        losses = losses.sign() * losses.abs().log1p()
        features = torch.stack(
            [torch.tensor(self.shares, dtype=torch.float64).log(), losses, 0 * losses],
            1,
        )
        here = {
            "anchor": self.theta,
            "deltas": torch.stack(models),
            "features": features,
            "phi": self.phi,
            "logits": logits_now,
            "a": a,
        }
        self.rounds.append(here)
        self.theta = self.step(here, self.phi, logits_now)
        self.phi, self.logits = phi_now, logits_now

    def step(self, at: dict[str, Any], phi: Tensor, logits: Tensor) -> Tensor:
        weights = at["a"] * torch.exp(at["features"] @ phi + logits)
        mean = weights @ at["deltas"] / weights.sum()
        return at["anchor"] + self.algorithm.server_lr * mean  # type: ignore[no-any-return]

    def local_loss(self, theta: Tensor, k: int) -> Tensor:
        return 0.5 * theta @ A[k] @ theta - B[k] @ theta


def test_learned_weights_follow_the_derivative_of_the_next_loss() -> None:
    """Eight rounds of everything, against autograd through the weighted mean."""
    algorithm = LearnedWeights(hyper_lr=0.3, logit_lr=0.2, server_lr=0.9)
    twin = Twin(algorithm)
    federation = Federation(algorithm, SOLVE, shares=twin.shares)
    for _ in range(8):
        federation.round(ALL)
        twin.round()
        close(federation.server["theta"], twin.theta, 1e-10)
        learned = torch.cat([federation.server[n] for n in LEARNED])
        close(learned, twin.phi, 1e-10)
        logits = torch.cat([federation.memories[k]["logit"] for k in ALL])
        close(logits, twin.logits, 1e-10)
    assert float(twin.phi[:2].abs().min()) > 1e-2
    assert float(twin.logits.abs().min()) > 1e-3
    # The entropy of every client is 0 here: nothing can be learned by it.
    assert float(twin.phi[2]) == 0


def test_learned_weights_beat_plain_ones_on_the_mean_loss() -> None:
    """FedAvg stops at a biased point; weights that see the loss move it towards the optimum."""
    solve = descent(10, SGD(lr=0.05))
    plain = Federation(FedAvg("uniform"), solve).run([ALL] * 300)
    ours = Federation(LearnedWeights("uniform"), solve).run([ALL] * 300)
    excess = [float(mean_loss(t) - mean_loss(OPTIMUM)) for t in (ours, plain)]
    assert 0 <= excess[0] < 0.05 * excess[1]


def test_without_learning_they_are_fedavgs() -> None:
    still = LearnedWeights(hyper_lr=0.0, logit_lr=0.0)
    cohorts = [[0, 1], ALL, [2, 3], [1, 3], ALL]
    ours = Federation(still, SOLVE, (0.4, 0.8, 1.2, 1.6)).run(cohorts)
    theirs = Federation(FedAvg(), SOLVE, (0.4, 0.8, 1.2, 1.6)).run(cohorts)
    close(ours, theirs, 1e-14)


def test_who_was_not_there_two_rounds_ago_has_nothing_to_add() -> None:
    federation = Federation(LearnedWeights(), SOLVE)
    federation.run([[0, 1], [2, 3], [2, 3]])
    assert float(federation.memories[2]["logit"]) == 0
    assert float(federation.server["by_loss"]) == 0
    federation.run([[0, 1], [2, 3]])
    assert float(federation.memories[2]["logit"]) != 0
    assert float(federation.memories[0]["logit"]) == 0
    assert float(federation.server["by_loss"]) != 0


# In a run.


def test_the_record_tells_the_learning_rate(run: Any) -> None:
    result = run("strategy=fedopt_hyper", "strategy.server_lr=0.3", "rounds=4")
    path = [r["strategy"]["server_lr"] for r in result.records[1:]]
    assert path[0] == pytest.approx(0.3) and path[3] > 0.3
    assert "server_lr_norm" not in result.records[1]["strategy"]


def test_a_round_costs_a_gradient_more(run: Any) -> None:
    """Relative to FedAvg: the same rounds and messages, twice the bytes up, the same down."""
    few = ("rounds=2", "evaluate_clients=none")
    plain = run("strategy=fedavg", *few).summary
    tuned = run("strategy=fedopt_hyper", *few).summary
    assert tuned["bytes_down"] == plain["bytes_down"]
    assert 1.9 < tuned["bytes_up"] / plain["bytes_up"] <= 2.0
    assert tuned["gradients"] == plain["gradients"]


def test_label_entropy_arrives(run: Any) -> None:
    result = run("strategy=learned_weights", "rounds=4", "clients_per_round=6")
    assert result.records[4]["strategy"]["by_entropy"] != 0


def test_mistakes_are_told_in_one_line(tmp_path: Any) -> None:
    place = f"output_dir={tmp_path}"
    with pytest.raises(UserError, match="needs pace and slope in the state"):
        Run(["strategy=fedopt_hyper", "strategy.client_lr=true", place])
    both = ("strategy.client_lr=true", "strategy.independent=true")
    with pytest.raises(UserError, match="choose one"):
        load(("strategy=fedopt_hyper", *both))
