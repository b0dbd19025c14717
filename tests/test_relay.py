"""Training without a server, through the public door: what the relay must and must not do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Result, grid_of
from flwr.app import Message

from app import network_plots
from app.errors import UserError
from app.graph_file import graph_file
from app.local_grid import LocalGrid
from app.run import Run
from app.synthetic import QUADRATICS_A, QUADRATICS_B
from strategies import relay
from strategies.faults import Faults
from strategies.fedavg import FedAvg
from strategies.gossip import Gossip
from strategies.network import Network
from strategies.push_diging import PushDIGing
from strategies.pushsum import State, hand_over, mix
from strategies.sgp import SGP
from strategies.topology import Edges, complete, exponential

Door = Callable[..., Result]
ALL = ("strategy=pushsum", "clients_per_round=6", "dtype=float64")
QUADRATICS = (
    "data=quadratics",
    "partition=natural",
    "model=linear",
    "model.bias=false",
    "clients=4",
    "clients_per_round=4",
    "dtype=float64",
    "local.epochs=1",
    "local.batch=0",
    "local.clip=0",
    "evaluate_clients=none",
    "evaluate_every=0",
)


def last(result: Result) -> dict[str, Any]:
    told: dict[str, Any] = result.records[-1]["strategy"]
    return told


def minimizer() -> np.ndarray:
    return np.linalg.solve(QUADRATICS_A.sum(axis=0), QUADRATICS_B.sum(axis=0))


@pytest.fixture
def quadratics(run: Door) -> Callable[..., Result]:
    """Give a function that trains the four quadratics."""
    place = ("device=cpu", "nodes=2", "processes=0")

    def quadratics(*given: str, edit: Callable[[Run], None] | None = None) -> Result:
        return run(*QUADRATICS, *given, edit=edit, quick=place)

    return quadratics


def held(into: list[Any]) -> Callable[[Run], None]:
    """Keep the run's strategy for a look at it afterwards."""
    return lambda task: into.append(task.federation)


# What it equals.


@pytest.mark.parametrize("solver", ["fedavg", "fedprox"])
@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_the_complete_network_is_the_algorithm_with_a_server(
    run: Door, solver: str, weighting: str
) -> None:
    given = ["partition=dirichlet", "clients_per_round=6", "dtype=float64"]
    own = f"strategy.solver.weighting={weighting}"
    network = run(
        "strategy=pushsum",
        "topology=complete",
        f"strategy@strategy.solver={solver}",
        own,
        "strategy.solver.server_lr=0.7",
        *given,
    )
    served = run(
        f"strategy={solver}",
        f"strategy.weighting={weighting}",
        "strategy.server_lr=0.7",
        *given,
    )
    torch.testing.assert_close(network.theta, served.theta, rtol=1e-10, atol=1e-12)
    assert last(network)["consensus_distance"] < 1e-12


def test_without_links_nothing_is_sent(run: Door) -> None:
    alone = run(*ALL, "topology=self_loop", "partition=dirichlet", "nodes=1")
    assert last(alone)["links"] == 0
    assert any("worst decile, on the test set" in line for line in alone.lines)
    assert alone.summary["clients"]["judge"] == "test"
    assert last(alone)["window"] is None


def test_one_client_is_plain_local_training(run: Door) -> None:
    given = ("clients=1", "clients_per_round=1", "dtype=float64", "nodes=1")
    network = run("strategy=pushsum", "topology=complete", *given)
    served = run("strategy=fedavg", *given)
    torch.testing.assert_close(network.theta, served.theta, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("strategy", ["pushsum", "push_diging"])
def test_engines_and_numbers_of_nodes_give_the_same_models(
    run: Door, strategy: str
) -> None:
    states = []
    for more in (["engine=loop"], ["engine=vmap"], ["engine=loop", "nodes=3"]):
        kept: list[Any] = []
        given = [f"strategy={strategy}", "topology=erdos_renyi", "faults.loss=0.2"]
        run(*ALL[1:], *given, "partition=dirichlet", *more, edit=held(kept))
        states.append(kept[0].carried["model"].x)
    np.testing.assert_allclose(states[1], states[0], atol=1e-11)
    np.testing.assert_allclose(states[2], states[0], atol=1e-13)


@pytest.mark.parametrize(
    ("topology", "loss"), [("stochastic_directed", 0.3), ("self_loop", 0)]
)
def test_the_relay_equals_push_sum_written_out(
    quadratics: Door, topology: str, loss: float
) -> None:
    """Full-batch steps on quadratics: P (x + dz) with a dense matrix, client by client."""
    given = ("strategy=pushsum", f"topology={topology}", "rounds=5")
    kept: list[Any] = []
    quadratics(*given, "optimizer.lr=0.05", f"faults.loss={loss}", edit=held(kept))
    network = Network(4, 0, kept[0].network.edges, faults=Faults(loss=loss))
    x, w = np.tile(kept[0].carried["model"].mean() * 0, (4, 1)), np.ones(4)
    x += first_model(quadratics)
    for t in range(5):
        z = x / w[:, None]
        gradient = np.einsum("kij,kj->ki", QUADRATICS_A, z) - QUADRATICS_B
        x = x - 0.05 * gradient
        links = network.at(t)
        P = (links.P - links.lost).toarray() + np.diag(links.lost.sum(axis=0))
        x, w = P @ x, P @ w
    np.testing.assert_allclose(kept[0].carried["model"].x, x, atol=1e-12)
    np.testing.assert_allclose(kept[0].carried["model"].w, w, atol=1e-14)


def first_model(quadratics: Door) -> np.ndarray:
    """Return the model that every client starts from."""
    kept: list[Any] = []
    quadratics("strategy=pushsum", "rounds=0", edit=held(kept))
    theta: np.ndarray = kept[0].server["theta"].numpy()
    return theta


# Where it goes.


def irregular(folder: Path) -> str:
    """Write a network of four clients with very different degrees."""
    file = folder / "irregular.txt"
    file.write_text("0 1\n1 2\n2 3\n3 0\n0 2  # a hub\n0 3\n1 0\n")
    return str(file)


def settled(
    algorithm: Gossip, edges: Edges, rounds: int, decay: float = 1.0
) -> np.ndarray:
    """Return the clients' models of the quadratics after so many full-batch steps."""
    network = Network(4, 0, edges)
    carried, kept = algorithm.start(State.of(np.zeros((4, 2))))
    for t in range(rounds):
        z, eta = carried["model"].z(), 0.1 * decay**t
        gradient = np.einsum("kij,kj->ki", QUADRATICS_A, z) - QUADRATICS_B
        algorithm.take(carried, kept, np.arange(4), -eta * gradient)
        for state in carried.values():
            mix(network.at(t), state)
        assert all(gap < 1e-10 for gap in algorithm.audit(carried, kept).values())
    z = carried["model"].z()
    return z


def test_tracking_reaches_the_minimizer_where_push_sum_keeps_a_distance(
    tmp_path: Path,
) -> None:
    edges = graph_file(4, 0, irregular(tmp_path))
    solver = FedAvg(weighting="uniform")
    errors = {
        kind: np.abs(settled(kind(solver), edges, 3000) - minimizer()).max()
        for kind in (SGP, PushDIGing)
    }
    assert errors[PushDIGing] < 1e-11
    assert errors[SGP] > 1e-3


def test_push_sum_goes_to_the_minimizer_and_not_to_the_networks_own(
    tmp_path: Path,
) -> None:
    """With a falling rate; models overwritten or sent without weight settle elsewhere."""
    edges = graph_file(4, 0, irregular(tmp_path))
    solver = FedAvg(weighting="uniform")
    found = settled(SGP(solver), edges, 3000, decay=0.998)
    assert np.abs(found - minimizer()).max() < 0.01
    P = Network(4, 0, edges).at(0).P.toarray()
    perron = np.linalg.matrix_power(P, 500).mean(axis=1)
    biased = np.linalg.solve(
        np.einsum("k,kij->ij", perron, QUADRATICS_A), perron @ QUADRATICS_B
    )
    assert np.abs(biased - minimizer()).max() > 0.1


def test_mixing_first_is_mixing_last_but_for_the_ends(quadratics: Door) -> None:
    def models(order: str, rounds: int) -> State:
        kept: list[Any] = []
        given = ["strategy=pushsum", f"strategy.order={order}", f"rounds={rounds}"]
        quadratics(*given, "topology=exponential", edit=held(kept))
        state: State = kept[0].carried["model"]
        return state

    first, last_ = models("mix_first", 6), models("step_first", 6)
    mix(Network(4, 0, exponential(4, 0)).at(6), first)
    # All start equal, so the first mixing changes nothing, and one more makes the orders one.
    np.testing.assert_allclose(first.x, last_.x, atol=1e-12)


def test_after_training_ends_the_clients_agree_on_the_mean_of_their_models(
    run: Door,
) -> None:
    kept: list[Any] = []
    result = run(
        *ALL, "strategy.train_rounds=1", "rounds=25", "faults.loss=0.2", edit=held(kept)
    )
    told = [r["strategy"]["consensus_distance"] for r in result.records[1:]]
    assert told[0] > 1e-4
    assert told[-1] < 1e-3 * told[0]
    assert [r["gradients"] for r in result.records[2:]] == [0] * 24


# Faults.


def test_a_client_that_is_late_moves_nothing_and_is_mixed(run: Door) -> None:
    result = run(*ALL, "faults.straggle=0.5", "rounds=6")
    failed = [r["clients"]["failed"] for r in result.records[1:]]
    assert any(failed)
    for record in result.records[1:]:
        assert record["strategy"]["mass"]["w"] == pytest.approx(6)
        late = {*map(int, record["clients"]["failed"])}
        assert {*record["clients"]["cohort"]} == set(range(6)) - late
    kept: list[Any] = []
    apart = (*ALL, "topology=self_loop", "faults.straggle=0.5")
    run(*apart, "rounds=0", edit=held(kept))
    own = run(*apart, "rounds=1", edit=held(kept))
    first, models = (federation.carried["model"].z() for federation in kept)
    gone = np.abs(models - first).max(axis=1)
    still = {str(k) for k in range(6) if gone[k] < 1e-12}
    assert still == own.records[1]["clients"]["failed"].keys()


class Deaf(LocalGrid):
    """A grid whose second node does not answer from some round on."""

    def __init__(self, base: LocalGrid, after: int) -> None:
        super().__init__(base.run_config, 2)
        self.after = after

    def send_and_receive(
        self, messages: Any, *, timeout: float | None = None
    ) -> list[Message]:
        messages = list(messages)
        silent = max(self.get_node_ids())
        kept = [
            m
            for m in messages
            if int(m.metadata.group_id or 0) <= self.after
            or m.metadata.dst_node_id != silent
        ]
        return list(super().send_and_receive(kept, timeout=timeout))

    def push_messages(self, messages: Any) -> list[str]:
        messages = list(messages)
        silent = max(self.get_node_ids())
        ids = list(super().push_messages(messages))
        for message, name in zip(messages, ids, strict=True):
            group = message.metadata.group_id
            late = bool(group) and int(group) > self.after
            if late and message.metadata.dst_node_id == silent:
                self._replies.pop(name, None)
        return ids


def test_a_node_that_dies_costs_its_clients_training_and_no_mass(run: Door) -> None:
    result = run(
        *ALL,
        "topology=exponential",
        "rounds=4",
        "deadline=0.5",
        grid=lambda o: Deaf(grid_of(o, 0), 2),
    )
    assert not result.records[2]["clients"]["failed"]
    for record in result.records[3:]:
        assert len(record["clients"]["failed"]) == 3
        assert record["strategy"]["mass"]["w"] == pytest.approx(6, rel=1e-12)
    assert result.summary["status"] == "finished"


def test_crashes_lose_mass_leaving_hands_it_on_and_joining_begins_without(
    run: Door,
) -> None:
    kept: list[Any] = []
    result = run(
        *ALL,
        "topology=complete",
        "faults.crash={0:3}",
        "faults.leave={1:4}",
        "faults.join={5:2}",
        "rounds=5",
        edit=held(kept),
    )
    mass = [r["strategy"]["mass"] for r in result.records[1:]]
    assert mass[0]["w"] == pytest.approx(5)  # client 5 is not there yet
    assert result.records[1]["clients"]["cohort"] == [0, 1, 2, 3, 4]
    assert result.records[2]["clients"]["cohort"] == [0, 1, 2, 3, 4]  # 5 has no model
    assert result.records[5]["clients"]["cohort"] == [2, 3, 4, 5]
    assert mass[1]["w"] == pytest.approx(5)
    assert mass[2]["w"] + mass[2]["w_lost"] == pytest.approx(5)
    assert mass[2]["w_lost"] > 0
    assert mass[4]["w_lost"] == mass[2]["w_lost"]  # leaving has lost nothing
    model = kept[0].carried["model"]
    assert model.w[0] == model.w[1] == 0
    np.testing.assert_allclose(model.z([2, 3, 4, 5]), np.tile(model.mean(), (4, 1)))


@pytest.mark.parametrize(
    ("fault", "stay"), [("join={3:3}", range(4)), ("leave={3:40}", range(3))]
)
def test_tracking_reaches_the_minimizer_of_those_who_stay(
    quadratics: Door, fault: str, stay: range
) -> None:
    """One who joins counts as the others do; one who has left pulls no more."""
    kept: list[Any] = []
    rounds = ("rounds=400", "optimizer.lr=0.1", "strategy.tau=3")
    given = ("strategy=push_diging", "topology=complete", *rounds)
    result = quadratics(*given, f"faults.{fault}", edit=held(kept))
    mine = np.linalg.solve(
        QUADRATICS_A[list(stay)].sum(0), QUADRATICS_B[list(stay)].sum(0)
    )
    models = kept[0].carried["model"].z(list(stay))
    np.testing.assert_allclose(models, np.tile(mine, (len(models), 1)), atol=1e-9)
    assert last(result)["tracking"] < 1e-9
    # Of those who are there; one who is not would be as far from the others for ever.
    assert last(result)["contraction"] < 1e-6


def test_leaving_keeps_both_sums_and_a_crash_says_what_it_took() -> None:
    x = np.random.default_rng(0).standard_normal((6, 3))
    faults = Faults(loss=0.6, policy="running")
    network = Network(6, 0, complete(6, 0), faults=faults)
    state = State.of(x.copy())
    for t in range(4):
        mix(network.at(t), state, "running")
    assert len(state.flight.links)
    before = state.total()
    hand_over(state, 2, 4)
    np.testing.assert_allclose(state.total()[0], before[0])
    assert state.total()[1] == pytest.approx(before[1])
    hand_over(state, 3, None)
    np.testing.assert_allclose(state.total()[0] + state.lost_x, before[0])
    assert state.total()[1] + state.lost_w == pytest.approx(before[1])
    assert 0 < state.lost_w < 6


def test_mass_that_does_not_balance_ends_the_run(
    run: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = relay.mix

    def leaky(links: Any, state: State, policy: Any) -> State:
        honest(links, state, policy)
        state.w[0] *= 1.01
        return state

    monkeypatch.setattr(relay, "mix", leaky)
    with pytest.raises(UserError, match="round 1: model: mass is not balanced"):
        run(*ALL)


def test_mass_that_vanishes_is_counted_and_ends_the_run_at_the_least_weight(
    run: Door,
) -> None:
    lossy = ["faults.loss=0.3", "faults.policy=vanish", "rounds=8"]
    # Thirds, which float32 does not hold.
    single = run(*ALL, "topology=k_out", "topology.k=2", *lossy, "dtype=float32")
    assert last(single)["mass"]["w_gap"] < 1e-12
    result = run(*ALL, "topology=exponential", *lossy)
    mass = last(result)["mass"]
    assert mass["w"] + mass["w_lost"] == pytest.approx(6)
    assert mass["w_lost"] > 3
    assert mass["mean_error"] > 1e-3
    for policy in ("keep", "renorm", "running"):
        kept = run(*ALL, "topology=exponential", *lossy, f"faults.policy={policy}")
        assert last(kept)["mass"]["mean_error"] < 1e-12  # float64
    with pytest.raises(UserError, match=r"client \d has a weight of .*min_weight=0.5"):
        run(*ALL, "topology=exponential", *lossy, "strategy.min_weight=0.5")


# Resuming.


@pytest.mark.parametrize(
    "given",
    [
        ["strategy=pushsum", "topology=k_out", "faults=drowsy"],
        ["strategy=pushsum", "faults=running_sums", "faults.loss=0.5"],
        ["strategy=push_diging", "topology=erdos_renyi_fresh", "faults.crash={1:2}"],
        ["strategy=pushsum", "strategy.order=mix_first", "optimizer=sophia"],
    ],
)
def test_a_resumed_run_equals_one_that_never_stopped(
    run: Door, tmp_path: Path, given: list[str]
) -> None:
    both = [*given, "clients_per_round=4", "checkpoint_every=2", "rounds=5"]
    straight = run(*both, "name=full")

    def die(record: Any) -> Any:
        if record["round"] == 3:
            raise RuntimeError("killed")
        return False, {}

    with pytest.raises(RuntimeError, match="killed"):
        run(*both, "name=half", callbacks=[die])
    resumed = run(*both, f"resume={tmp_path}/runs/half")
    torch.testing.assert_close(resumed.theta, straight.theta, rtol=0, atol=0)

    def told(result: Result) -> list[Any]:
        free = ("seconds", "callbacks")
        return [{k: v for k, v in r.items() if k not in free} for r in result.records]

    assert told(resumed) == told(straight)


def test_resumed_after_its_last_round_it_tells_the_trained_model(
    run: Door, tmp_path: Path
) -> None:
    given = [*ALL, "topology=exponential", "checkpoint_every=1", "rounds=2"]
    whole = run(*given, "name=whole")
    (whole.path / "summary.json").unlink()
    (whole.path / "model.safetensors").unlink()
    again = run(*given, f"resume={whole.path}")
    assert torch.equal(again.theta, whole.theta)


# Size and measure.


def test_a_thousand_clients_on_two_nodes(run: Door) -> None:
    result = run(
        "strategy=pushsum",
        "clients=1000",
        "clients_per_round=1000",
        "rounds=2",
        "evaluate_clients=none",
    )
    assert len(result.records[-1]["clients"]["cohort"]) == 1000
    assert last(result)["mass"]["w"] == pytest.approx(1000)
    assert result.records[-1]["engine"] == "vmap"


def test_clients_judge_their_own_models_on_the_test_set_or_their_own_samples(
    run: Door,
) -> None:
    common = run(*ALL, "topology=complete", "partition=dirichlet")
    rows = [r["clients"] for r in common.records[1:]]
    # After a round of the complete network all have one model: mean and worst agree.
    assert rows[1]["accuracy_mean"] == pytest.approx(rows[1]["accuracy_decile"])
    assert common.records[1]["accuracy"] == pytest.approx(rows[1]["accuracy_mean"])
    own = run(*ALL, "topology=complete", "partition=dirichlet", "strategy.judge=own")
    rows = [r["clients"] for r in own.records[1:]]
    assert rows[1]["accuracy_mean"] != pytest.approx(rows[1]["accuracy_decile"])


def test_the_record_says_how_the_network_stands(run: Door) -> None:
    result = run(*ALL, "topology=exponential", "faults.loss=0.3", "rounds=4")
    told, size = last(result), len(result.theta)
    assert told["links"] == 6 * 3
    assert told["bytes_per_link"] == 8 * size + 8
    assert told["link_bytes"] == told["links"] * told["bytes_per_link"]
    assert 0 < told["links_lost"] < told["links"]
    assert 0 < told["contraction"] < 1
    assert told["window"] >= 1
    assert 0 < told["min_weight"] <= 1
    mass = told["mass"]
    assert mass["x_gap"] < 1e-12
    assert mass["w_gap"] < 1e-12


# Mistakes.


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["strategy=fedavg", "topology=ring"], "has a server"),
        (["strategy=fedavg", "faults.loss=0.1"], "has a server"),
        (["strategy=pushsum", "topology=none"], "no server: choose a network"),
        (["strategy=pushsum", "topology=rign"], "did you mean 'ring'"),
        (["strategy=pushsum", "holdout_clients=2"], "holdout_clients=2"),
        (["strategy=pushsum", "faults.loss=1.5"], "less than 1"),
        (["strategy=pushsum", "faults.crash={77:2}"], "clients 0 to 5"),
        (["strategy=pushsum", "strategy@strategy.solver=scaffold"], "keeps control"),
        (
            [
                "strategy=pushsum",
                "topology=directed_ring",
                "strategy.weights=metropolis",
            ],
            "has its reverse",
        ),
        (["strategy=pushsum", "topology=k_out", "topology.k=9"], "at most 5 others"),
        (
            ["strategy=pushsum", "topology=erdos_renyi", "topology.p=0.01"],
            "strongly connected",
        ),
        (
            ["strategy=pushsum", "topology=geometric", "topology.radius=0.01"],
            "strongly connected",
        ),
    ],
)
def test_a_mistake_is_told_in_one_line(
    run: Door, given: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run(*given, "clients_per_round=6")
    assert "\n" not in str(caught.value)


def test_who_joins_must_be_reached_too(run: Door, tmp_path: Path) -> None:
    (tmp_path / "net.txt").write_text("0 1\n1 2\n2 3\n3 4\n4 0\n")
    given = ("topology=file", f"topology.path={tmp_path}/net.txt", "rounds=6")
    with pytest.raises(UserError, match="do not lead from every client"):
        run(*ALL, *given, "faults.join={5: 3}")
    # One who joins after the last round is not there.
    run(*ALL, *given, "faults.join={5: 9}")


def test_test_samples_that_nobody_looks_at_are_said(run: Door) -> None:
    given = ("strategy=pushsum", "topology=complete", "clients_per_round=6", "rounds=1")
    common, own = (
        run(*given, "client_test=0.2", f"strategy.judge={whose}").lines
        for whose in ("test", "own")
    )
    assert common[0].startswith(
        "client_test=0.2: kept from training, and not looked at"
    )
    assert not any("client_test" in line for line in own)


def test_more_in_flight_than_memory_should_hold_is_told_in_one_line(
    run: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("strategies.pushsum.IN_FLIGHT", 1)
    given = ("strategy=pushsum", "topology=complete", "clients_per_round=6")
    with pytest.raises(
        UserError, match=r"round 1: faults\.policy=running keeps a model"
    ):
        run(*given, "faults.loss=0.5", "faults.policy=running")


@pytest.mark.parametrize("strategy", ["feddyn", "pushsum", "push_diging"])
def test_a_node_that_is_gone_lowers_no_minimum(run: Door, strategy: str) -> None:
    grids: list[LocalGrid] = []

    def make(overrides: Any) -> LocalGrid:
        grids.append(grid_of(overrides, 2))
        return grids[-1]

    def leave(record: dict[str, Any]) -> tuple[bool, dict[str, float]]:
        if record["round"] == 1:
            grids[0].remove_node(list(grids[0].get_node_ids())[1])
        return False, {}

    given = [f"strategy={strategy}", "clients_per_round=6", "attempts=2"]
    given += [] if strategy == "feddyn" else ["topology=complete"]
    with pytest.raises(UserError, match="round 2: fewer than min_replies=6"):
        run(*given, "min_replies=6", "deadline=0.2", grid=make, callbacks=[leave])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 1\n1 0\n", "do not lead from every client to every other"),
        ("0 1\n1 7\n", "line 2: there are clients 0 to 5"),
        ("0 1 -0.5\n", "line 1: a share lies between 0 and 1, not -0.5"),
        ("0 1 0.5\n1 2\n", "for every arc or for none"),
        ("0 1 0.5\n0 0 0.4\n", "client 0 sum to 0.9, not 1"),
        ("0 1 0.7\n0 2 0.7\n", "client 0 has a negative share"),
        ("0 1\n0 1\n", "there twice"),
        ("0 to 1\n", "line 1: write 'sender receiver'"),
        ("0 1 2 3\n", "line 1: write 'sender receiver'"),
    ],
)
def test_a_wrong_network_file_is_told_in_one_line(
    run: Door, tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "net.txt"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        run(*ALL, "topology=file", f"topology.path={file}")


def test_network_files_in_both_forms_say_the_same(tmp_path: Path) -> None:
    import networkx as nx

    graph = nx.DiGraph()
    arcs = [(0, 1, 0.25), (0, 2, 0.25), (1, 2, 0.5), (2, 0, 0.125)]
    graph.add_weighted_edges_from(arcs)
    nx.write_graphml(graph, tmp_path / "net.graphml")
    lines = "# sender receiver share\n" + "\n".join(
        f"{j}, {i}, {share}" for j, i, share in arcs
    )
    (tmp_path / "net.csv").write_text(lines)
    matrices = []
    for name in ("net.graphml", "net.csv"):
        network = Network(3, 0, graph_file(3, 0, str(tmp_path / name)))
        matrices.append(network.at(0).P.toarray())
    expected = np.array([[0.5, 0, 0.125], [0.25, 0.5, 0], [0.25, 0.5, 0.875]])
    for matrix in matrices:
        np.testing.assert_allclose(matrix, expected)
    plain = nx.Graph([(0, 1), (1, 2)])
    nx.write_graphml(plain, tmp_path / "plain.graphml")
    both = graph_file(3, 0, str(tmp_path / "plain.graphml"))(0)
    pairs = set(zip(both.src.tolist(), both.dst.tolist(), strict=True))
    assert pairs == {(0, 1), (1, 0), (1, 2), (2, 1)}
    (tmp_path / "bad.graphml").write_text("<graphml><oops></graphml>")
    with pytest.raises(UserError, match="no GraphML"):
        graph_file(3, 0, str(tmp_path / "bad.graphml"))


@pytest.mark.parametrize("n", [1, 5, 300])
def test_a_network_is_drawn_at_any_size(tmp_path: Path, n: int) -> None:
    network = Network(n, 0, exponential(n, 0), faults=Faults(loss=0.2))
    told = {"consensus_distance": 0.1, "min_weight": 0.5, "contraction": 0.7}
    records = [
        {"round": 0},
        {"round": 1, "strategy": {**told, "mass": {"w_lost": 0.0}}},
    ]
    network_plots.draw(network, records, tmp_path / "network.png")
    assert (tmp_path / "network.png").read_bytes().startswith(b"\x89PNG")
