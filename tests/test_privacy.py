"""Differential privacy: what is clipped, how much noise, who may be combined with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from conftest import Result
from flwr.app import Message

from app.errors import UserError
from app.local_grid import LocalGrid
from app.run import Run
from app.run_config import to_run_config
from strategies.algorithm import Cohort
from strategies.fedavg import FedAvg
from strategies.feddyn import FedDyn
from strategies.privacy import Central, Local, Unprotected

Door = Callable[..., Result]
UNIFORM = "strategy.weighting=uniform"
ALL = ("clients_per_round=6", "partition=dirichlet", "evaluate_clients=none")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed numpy's global state, where Flower draws its noise, and let messages be made."""
    np.random.seed(0)
    LocalGrid({}, 0)


@pytest.mark.parametrize("length", [0.0, 0.3, 1.0, 50.0])
def test_a_difference_is_clipped_to_the_norm(length: float) -> None:
    direction = torch.randn(200)
    difference = length * direction / direction.norm()
    shown = Central(clipping_norm=0.5).release(difference)
    torch.testing.assert_close(shown, difference * min(1, 0.5 / max(length, 1e-9)))


@pytest.mark.parametrize(("clients", "z", "norm"), [(1, 1.0, 0.5), (20, 2.0, 3.0)])
def test_central_noise_is_that_of_the_clients_that_counted(
    clients: int, z: float, norm: float
) -> None:
    mean = torch.linspace(-1e-3, 1e-3, 40_000)
    noise = Central(norm, z).publish({"delta": mean}, clients)["delta"] - mean
    expected = z * norm / clients
    assert float(noise.std()) == pytest.approx(expected, rel=0.02)
    assert abs(float(noise.mean())) < 4 * expected / math.sqrt(len(noise))


def test_each_worker_draws_noise_of_its_own(run: Door) -> None:
    """Two clients on two processes: were the noise the same, its mean would be as large as each."""
    given = ("strategy=fedavg", "clients=2", "clients_per_round=2", "processes=2")
    local = ("privacy=local", "optimizer.lr=1e-9")
    given = (*given, UNIFORM, "evaluate_clients=none")
    noisy = run(*given, *local, "rounds=1").theta
    noise = noisy - run(*given, "rounds=0").theta
    one = 2 * math.sqrt(2 * math.log(1.25 / 1e-5))
    assert float(noise.std()) == pytest.approx(one / math.sqrt(2), rel=0.1)


def test_local_noise_is_that_of_the_gaussian_mechanism() -> None:
    privacy = Local(clipping_norm=0.5, epsilon=0.8, delta=1e-5)
    for difference in (torch.zeros(40_000), torch.full((40_000,), 1e-4)):
        noise = privacy.release(difference) - difference
        expected = 2 * 0.5 * math.sqrt(2 * math.log(1.25 / 1e-5)) / 0.8
        assert float(noise.std()) == pytest.approx(expected, rel=0.02)


def test_without_protection_nothing_changes() -> None:
    difference = torch.randn(5)
    assert Unprotected().release(difference) is difference


LOCAL = ("privacy=local", "evaluate_clients=none")
REFUSED = {
    "h would drift": (("privacy=central", "strategy=feddyn"), "pile up"),
    "c would drift": (("privacy=central", "strategy=scaffold"), "pile up"),
    "weights": (("privacy=central", "strategy=fedavg"), "weighting=uniform"),
    "a second vector": (
        (*LOCAL, "strategy=scaffold"),
        "also sends control",
    ),
    "the mean of all": (
        (*LOCAL, "strategy=feddyn", "strategy.mean_of_all=true"),
        "also sends drift",
    ),
    "moments": (
        (*LOCAL, "strategy=fedsophia", "strategy.average_moments=true"),
        "also sends h, m",
    ),
    "DONE": ((*LOCAL, "strategy=done"), "also sends answer"),
    "a derivative": (
        ("privacy=central", "strategy=fedopt_hyper"),
        "also sends gradient",
    ),
    "features": ((*LOCAL, "strategy=learned_weights"), "also sends gradient, terms"),
    "several models": (("privacy=central", "strategy=clustered"), "train more than"),
    "a network": (
        (*LOCAL, "strategy=pushsum", "topology=complete"),
        "relay of a network",
    ),
    "evaluation": (("privacy=local", "strategy=feddyn"), "evaluate_clients=none"),
    "a large epsilon": (
        ("privacy=local", "privacy.epsilon=8"),
        "less than or equal to 1",
    ),
    "no noise": (("privacy=central", "privacy.noise_multiplier=0"), "greater than 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_sound_is_refused_with_a_reason(run: Door, name: str) -> None:
    given, why = REFUSED[name]
    with pytest.raises(UserError, match=why):
        run(*given)


def test_buffers_would_travel_unprotected() -> None:

    assert "BatchNorm" in Central().unfit(FedAvg("uniform"), 3, False)
    assert "BatchNorm" in Local().unfit(FedAvg(), 3, False)
    assert Central().unfit(FedAvg("uniform"), 0, True) == ""


SOUND = [
    ("privacy=central", "strategy=fedavg", UNIFORM),
    ("privacy=central", "strategy=fedprox", UNIFORM),
    ("privacy=central", "strategy=fedsophia", "optimizer=sophia", UNIFORM),
    ("privacy=local", "strategy=fedavg"),
    ("privacy=local", "strategy=feddyn"),
    ("privacy=local", "strategy=fedprox"),
    ("privacy=local", "strategy=fedsophia", "optimizer=sophia"),
]


@pytest.mark.parametrize("given", SOUND, ids=[" ".join(g[:2]) for g in SOUND])
def test_a_run_with_little_noise_learns(run: Door, given: tuple[str, ...]) -> None:
    little = ["privacy.clipping_norm=5"]
    if given[0] == "privacy=central":
        little.append("privacy.noise_multiplier=0.001")
    else:  # so small a norm that epsilon <= 1 leaves something
        little = ["privacy.clipping_norm=1e-3", "privacy.epsilon=1"]
    result = run(*given, *little, *ALL, "rounds=4")
    assert result.summary["failures"] == 0
    first, last = (result.records[i]["loss"] for i in (0, -1))
    # Noise that epsilon <= 1 asks for leaves no direction, but a step.
    assert last < first if given[0] == "privacy=central" else last != first


def test_local_noise_is_in_the_memory_so_h_stays_the_mean(run: Door) -> None:
    result = run("privacy=local", "strategy=feddyn", *ALL, "rounds=4", "dtype=float64")
    assert all(r["checks"]["memory_gap"] < 1e-9 for r in result.records[1:])
    assert result.summary["failures"] == 0
    text = (result.path / "clients.csv").read_text().splitlines()
    column = text[0].split(",").index("train_loss")
    assert {line.split(",")[column] for line in text[1:]} == {""}


class Seen(LocalGrid):
    """A grid that notes the norms of what comes up."""

    norms: list[float]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Pass all, noting."""
        for reply in super().send_and_receive(messages, timeout=timeout):
            if "up" in reply.content.array_records:
                delta = reply.content.array_records["up"]["delta"].numpy()
                self.norms.append(float(np.linalg.norm(delta)))
            yield reply


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_each_client_of_a_node_is_clipped_alone(run: Door, engine: str) -> None:
    """With several clients on a node the same noiseless mean comes out as with one each."""
    given = (
        "privacy=central",
        "privacy.clipping_norm=0.05",
        "strategy=fedavg",
        UNIFORM,
    )
    given = (
        *given,
        *ALL,
        "privacy.noise_multiplier=1e-9",
        "rounds=2",
        f"engine={engine}",
    )
    norms: list[float] = []

    def make(overrides: list[str]) -> LocalGrid:
        grid = Seen(to_run_config(overrides), 6)
        grid.norms = norms
        return grid

    each = run(*given, "nodes=6", grid=make)
    assert max(norms) == pytest.approx(0.05, rel=1e-4), "one client: its clipped norm"
    together = run(*given, "nodes=1")
    torch.testing.assert_close(each.theta, together.theta, rtol=1e-4, atol=1e-6)


def test_a_node_that_does_not_clip_is_refused(
    run: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (
        "privacy=central",
        "strategy=fedavg",
        UNIFORM,
        "privacy.clipping_norm=0.05",
    )

    def cheat(task: Run) -> None:
        monkeypatch.setattr(Central, "release", lambda _, difference: difference)

    result = run(*given, *ALL, edit=cheat)
    assert result.summary["failures"] == 18
    reasons = set(result.records[1]["clients"]["failed"].values())
    assert all("more than clipping_norm=0.05" in why for why in reasons)
    assert torch.equal(result.theta, run(*given, *ALL, "rounds=0").theta)


def test_central_noise_in_h_would_move_the_optimum() -> None:
    """Why FedDyn refuses central noise: at rest the mean gradient equals the noise in h."""
    alpha, m, b = (
        0.5,
        4,
        torch.tensor([[1.0], [2.0], [3.0], [10.0]], dtype=torch.float64),
    )
    algorithm = FedDyn(alpha=alpha)
    for noise in (0.0, 0.7):
        server = algorithm.start(torch.zeros(1, dtype=torch.float64))
        g = torch.zeros(m, 1, dtype=torch.float64)
        for t in range(600):
            theta = server["theta"]
            local = (b + g + alpha * theta) / (
                1 + alpha
            )  # argmin of L_k(x) = (x - b_k)^2 / 2
            delta = local - theta
            g = g - alpha * delta

            mean = delta.mean(0) + (noise if t == 0 else 0.0)
            server = algorithm.update(server, {"delta": mean}, Cohort(m, m, 0, t + 1))
        bias = float(server["theta"] - b.mean(0))
        assert bias == pytest.approx(alpha * noise, abs=1e-6)
