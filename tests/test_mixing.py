"""Push-Sum over directed networks that change: what must hold on every one of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from strategies import pushsum, topology
from strategies.base_graph import base_rounds
from strategies.faults import Faults
from strategies.network import (
    Links,
    Network,
    Window,
    check_shares,
    contraction,
    delivered,
)
from strategies.pushsum import State, average, mix

SIZES = (1, 2, 3, 7, 16, 100)
TOPOLOGIES = {
    "complete": topology.complete,
    "ring": lambda n, seed: topology.ring(n, seed, directed=True),
    "exponential": topology.exponential,
    "one_peer": topology.one_peer_exponential,
    "base": topology.base,
    "base_3": lambda n, seed: topology.base(n, seed, peers=3),
    "er_fixed": topology.erdos_renyi,
    "er_undirected": lambda n, seed: topology.erdos_renyi(n, seed, directed=False),
    "er_fresh": lambda n, seed: topology.erdos_renyi(n, seed, fresh=True),
    "k_out": lambda n, seed: topology.k_out(n, seed, k=min(2, max(n - 1, 1))),
    "geometric": topology.geometric,
    "stochastic": topology.stochastic,
    "undirected": lambda n, seed: topology.stochastic(n, seed, directed=False),
}
FAULTS = {
    "none": Faults(),
    "keep": Faults(loss=0.2),
    "renorm": Faults(loss=0.2, policy="renorm"),
    "running": Faults(loss=0.2, policy="running"),
    "sleep": Faults(loss=0.2, sleep=0.2),
}
GRID = list(itertools.product(TOPOLOGIES, FAULTS, SIZES))

#: Seven clients of very different degrees: in it the Perron vector is far from uniform.
IRREGULAR = topology.Arcs(
    np.array([0, 1, 2, 3, 4, 5, 6, 0, 0, 0, 1, 2, 6]),
    np.array([1, 2, 3, 4, 5, 6, 0, 2, 3, 4, 0, 0, 3]),
)


def network(name: str, n: int, faults: Faults | None = None, seed: int = 0) -> Network:
    return Network(n, seed, TOPOLOGIES[name](n, seed), faults=faults or Faults())


def values(n: int, d: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d))


def push(net: Network, state: State, rounds: int, first: int = 0) -> State:
    for t in range(first, first + rounds):
        mix(net.at(t), state, net.faults.policy)
    return state


@pytest.mark.parametrize(("name", "faults", "n"), GRID)
def test_mass_is_kept_and_values_stay_between_the_first_ones(
    name: str, faults: str, n: int
) -> None:
    net, x = network(name, n, FAULTS[faults]), values(n)
    state = State.of(x.copy())
    for t in range(12):
        links = net.at(t)
        check_shares(links.P, name)
        degree = np.diff(links.P.tocsc().indptr)
        off = np.abs(links.P.sum(axis=0) - 1)
        assert (off <= 4 * np.finfo(float).eps * degree).all()
        asleep = np.flatnonzero(~links.awake)
        assert (links.P.diagonal()[asleep] == 1).all()
        mix(links, state, net.faults.policy)
        total, weight = state.total()
        np.testing.assert_allclose(total, x.sum(0), rtol=1e-12, atol=1e-12 * n)
        assert weight == pytest.approx(n, rel=1e-12)
        assert (state.w > 0).all()
        z = state.z()
        assert (z >= x.min(0) - 1e-12).all()
        assert (z <= x.max(0) + 1e-12).all()


def window(network: Network, rounds: int) -> int | None:
    """Return the longest stretch of so many rounds in which the links connect all to all."""
    watch = Window(network.n)
    for t in range(rounds):
        watch.see(network.at(t), network.faults.present(t, network.n))
    return watch.longest


@pytest.mark.parametrize(("name", "faults", "n"), [g for g in GRID if g[2] in (3, 7)])
def test_everybody_agrees_on_the_mean_in_the_end(
    name: str, faults: str, n: int
) -> None:
    net, x = network(name, n, FAULTS[faults]), values(n)
    longest = window(net, 40)
    assert longest is not None
    state = State.of(x.copy())
    spread = [np.ptp(state.z(), axis=0).max()]
    for start in range(0, 2000, 50):
        push(net, state, 50, start)
        spread.append(np.ptp(state.z(), axis=0).max())
        if spread[-1] < 1e-7:
            break
        assert spread[-1] < spread[-2] or longest > 50
    np.testing.assert_allclose(state.z(), np.tile(x.mean(0), (n, 1)), atol=1e-6)


def test_golden_numbers_of_three_clients() -> None:
    P = csr_array(
        np.array([[1 / 2, 0, 1 / 3], [1 / 2, 1 / 2, 1 / 3], [0, 1 / 2, 1 / 3]])
    )
    links = Links(P, csr_array((3, 3)), np.ones(3, dtype=bool))
    state = State.of(np.array([[1.0], [2.0], [6.0]]))
    mix(links, state)
    np.testing.assert_allclose(state.x[:, 0], [2.5, 3.5, 3.0])
    np.testing.assert_allclose(state.w, [5 / 6, 4 / 3, 5 / 6])
    np.testing.assert_allclose(state.z()[:, 0], [3.0, 2.625, 3.6])
    mix(links, state)
    second = [3.24, 2.9387755102, 2.9117647059]
    np.testing.assert_allclose(state.z()[:, 0], second, atol=1e-10)
    for _ in range(3):
        mix(links, state)
    fifth = [2.9953641105, 3.0020262447, 3.0003852575]
    np.testing.assert_allclose(state.z()[:, 0], fifth, atol=1e-10)
    for _ in range(100):
        mix(links, state)
    np.testing.assert_allclose(state.z()[:, 0], 3.0, rtol=1e-12)
    np.testing.assert_allclose(state.w, [2 / 3, 4 / 3, 1], rtol=1e-12)


@pytest.mark.parametrize("rule", ["difference", "overwrite", "reset"])
def test_an_irregular_network_tells_the_right_rule_from_the_wrong_ones(
    rule: str,
) -> None:
    """Quadratics 1/2 |x - a_i|^2: the optimum is the mean of a, not the Perron-weighted one."""
    n = 7
    net, a = Network(n, 0, lambda t: IRREGULAR), values(n)
    links, state = net.at(0), State.of(np.zeros_like(a))
    for t in range(6000):
        eta = 0.5 / (1 + 0.05 * t)
        z = state.z()
        after = z - eta * (z - a)
        if rule == "difference":
            state.x += after - z
        elif rule == "overwrite":
            state.x = state.w[:, None] * after
        else:
            state = State.of(after)
        mix(links, state)
    error = np.abs(state.z().mean(0) - a.mean(0)).max()
    assert error < 0.02 if rule == "difference" else error > 0.1


@pytest.mark.parametrize("peers", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [*range(1, 34), 100])
def test_base_graphs_average_exactly_at_every_n(n: int, peers: int) -> None:
    net, x = Network(n, 0, topology.base(n, 0, peers)), values(n)
    period = len(base_rounds(n, peers))
    state = push(net, State.of(x.copy()), period)
    np.testing.assert_allclose(state.z(), np.tile(x.mean(0), (n, 1)), atol=1e-12)
    np.testing.assert_allclose(state.w, 1.0, rtol=1e-14)
    degrees = [np.bincount(net.edges(t).src, minlength=n).max() for t in range(period)]
    assert max(degrees) <= peers


def test_base_graphs_have_the_published_lengths() -> None:
    lengths = {
        1: {6: 4, 7: 5, 10: 6, 20: 7, 25: 9, 31: 9, 50: 10, 64: 6, 100: 11, 127: 13},
        2: {10: 4, 25: 6, 100: 8},
        3: {100: 6},
        4: {5: 1, 25: 2, 100: 3, 127: 7},
    }
    found = {k: {n: len(base_rounds(n, k)) for n in ns} for k, ns in lengths.items()}
    assert found == lengths


@pytest.mark.parametrize("n", [2, 4, 8, 64])
def test_one_peer_at_powers_of_two_is_exact_and_keeps_every_weight_at_one(
    n: int,
) -> None:
    net, x = network("one_peer", n), values(n)
    state = push(net, State.of(x.copy()), (n - 1).bit_length())
    np.testing.assert_allclose(state.z(), np.tile(x.mean(0), (n, 1)), atol=1e-12)
    assert (state.w == 1.0).all()


def test_offsets_reach_every_power_without_floating_logarithms() -> None:
    for power in range(1, 20):
        n = 2**power
        assert topology._doublings(n) == power
        assert topology._doublings(n + 1) == power + 1


@settings(max_examples=15)
@given(st.integers(0, 2**30), st.integers(2, 12))
def test_relabelling_scaling_and_shifting_commute_with_mixing(
    seed: int, n: int
) -> None:
    net, x = network("er_fresh", n, Faults(loss=0.3), seed % 1000), values(n, 2, seed)
    order = np.random.default_rng(seed).permutation(n)
    plain, moved = State.of(x.copy()), State.of(x[order].copy())
    scaled = State.of(3.0 * x + 2.0)
    for t in range(8):
        links = net.at(t)
        relabelled = Links(
            links.P[order][:, order], links.lost[order][:, order], links.awake[order]
        )
        mix(links, plain)
        mix(relabelled, moved)
        mix(links, scaled)
    np.testing.assert_allclose(moved.z(), plain.z()[order], atol=1e-12)
    np.testing.assert_allclose(scaled.z(), 3.0 * plain.z() + 2.0, atol=1e-11)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_a_round_is_a_pure_function_of_seed_and_round(name: str) -> None:
    faults = Faults(loss=0.3, sleep=0.2, straggle=0.2)
    one, other = network(name, 16, faults), network(name, 16, faults)
    for t in range(9):
        one.at(t)
    np.random.seed(5)  # nobody may draw from a shared generator
    there, here = one.at(9), other.at(9)
    assert (there.P - here.P).nnz == 0
    assert (there.lost - here.lost).nnz == 0
    assert (there.awake == here.awake).all()
    if name in ("er_fixed", "er_fresh", "k_out", "geometric", "stochastic"):
        assert (network(name, 16, seed=1).at(0).P - network(name, 16).at(0).P).nnz


def test_the_fate_of_a_link_does_not_depend_on_the_other_links() -> None:
    faults, n = Faults(loss=0.5), 20
    full = topology.complete(n, 0)(0)
    some = topology.ring(n, 0)(0)
    fate = dict(
        zip(
            zip(full.src, full.dst, strict=True),
            faults.lost(3, 7, full.src, full.dst),
            strict=True,
        )
    )
    alone = faults.lost(3, 7, some.src, some.dst)
    assert [fate[a] for a in zip(some.src, some.dst, strict=True)] == list(alone)
    assert 0.4 < np.mean(list(fate.values())) < 0.6


def test_vanishing_mass_ends_at_a_wrong_value_and_is_accounted_for() -> None:
    n, x = 32, values(32)
    net = network("exponential", n, Faults(loss=0.2, policy="vanish"))
    state = push(net, State.of(x.copy()), 60)
    assert state.w.sum() < 0.1 * n
    assert state.w.sum() + state.lost_w == pytest.approx(n)
    np.testing.assert_allclose(state.x.sum(0) + state.lost_x, x.sum(0), atol=1e-10)
    assert (
        np.ptp(state.z(), axis=0).max() < 1e-2 * np.abs(state.z()[0] - x.mean(0)).max()
    )


@pytest.mark.parametrize("loss", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("policy", ["keep", "renorm", "running"])
def test_lost_messages_cost_time_and_no_mass(policy: str, loss: float) -> None:
    n, x = 16, values(16)
    net = network("exponential", n, Faults(loss=loss, policy=policy))  # type: ignore[arg-type]
    state = push(net, State.of(x.copy()), 300)
    assert state.total()[1] == pytest.approx(n)
    np.testing.assert_allclose(state.z(), np.tile(x.mean(0), (n, 1)), atol=1e-7)


def test_running_sums_equal_those_written_out_link_by_link() -> None:
    n, rounds = 6, 30
    net = network("er_fresh", n, Faults(loss=0.4, policy="running"))
    x, w = values(n), np.ones(n)
    state = State.of(x.copy())
    sent = {(j, i): np.zeros(4) for j in range(n) for i in range(n)}
    taken = {link: np.zeros(4) for link in sent}
    mass = np.c_[x, w]
    for t in range(rounds):
        links = net.at(t)
        P, lost = links.P.toarray(), links.lost.toarray()
        after = np.diag(P)[:, None] * mass
        for j, i in sent:
            if i != j and P[i, j]:
                sent[j, i] = sent[j, i] + P[i, j] * mass[j]
                if not lost[i, j]:
                    after[i] += sent[j, i] - taken[j, i]
                    taken[j, i] = sent[j, i]
        mass = after
        mix(links, state, "running")
    np.testing.assert_allclose(np.c_[state.x, state.w], mass, atol=1e-12)
    waiting = sum(sent[a][3] - taken[a][3] for a in sent)
    assert state.flight.w.sum() == pytest.approx(waiting)
    assert waiting > 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_blocks_threads_and_dense_products_change_nothing(
    dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, x = 24, values(24, 700).astype(dtype)
    results = []
    for block, small, sparse in ((2**23, 2**20, 8), (2**12, 10, 0.5), (2**12, 10, 1e9)):
        monkeypatch.setattr(pushsum, "BLOCK", block)
        monkeypatch.setattr(pushsum, "SMALL", small)
        monkeypatch.setattr(pushsum, "SPARSE", sparse)
        state = push(network("er_fresh", n), State.of(x.copy()), 5)
        assert state.x.dtype == dtype
        assert state.w.dtype == np.float64
        results.append(state.z())
    tolerance = 1e-5 if dtype == np.float32 else 1e-13
    np.testing.assert_allclose(results[1], results[0], atol=tolerance)
    np.testing.assert_allclose(results[2], results[0], atol=tolerance)


def test_float32_keeps_its_mass_for_a_long_time() -> None:
    n, x = 16, values(16).astype(np.float32) + 5
    net = network("er_fresh", n)
    rounds = [net.at(t) for t in range(50)]
    state = State.of(x.copy())
    for t in range(1500):
        mix(rounds[t % 50], state)
    np.testing.assert_allclose(state.total()[0], x.sum(0, dtype=float), rtol=2e-6)
    assert state.w.sum() == pytest.approx(n, rel=1e-11)


def test_two_quantities_have_weights_of_their_own() -> None:
    n, net = 9, network("er_fresh", 9, Faults(loss=0.2))
    training = push(net, State.of(values(n)), 5)
    w, x = training.w.copy(), values(n, seed=4)
    found, sent = average(net, x.copy(), 5, 80)
    np.testing.assert_allclose(found, np.tile(x.mean(0), (n, 1)), atol=1e-9)
    assert (training.w == w).all()
    assert sent == sum(len(net.edges(t)) for t in range(5, 85))


def test_contraction_is_the_spectral_one_and_exact_averaging_leaves_nothing() -> None:
    n = 64
    exact = [network("one_peer", n).at(t).P for t in range(6)]
    assert contraction(exact) == 0.0
    assert contraction([network("complete", n).at(0).P]) == 0.0
    ring = network("exponential", n).at(0).P
    sigma = np.linalg.svd(ring.toarray())[1][1]
    assert contraction([ring] * 3) == pytest.approx(sigma, rel=1e-9)
    large = [network("er_fresh", 300).at(t).P for t in range(4)]
    scale = np.linalg.multi_dot([P.toarray() for P in large[::-1]])
    R = scale / scale.sum(1)[:, None]
    J = np.eye(300) - 1 / 300
    assert contraction(large) ** 4 == pytest.approx(
        np.linalg.norm(J @ R @ J, 2), rel=0.02
    )


@pytest.mark.parametrize(
    ("name", "n", "law"),
    [
        ("k_out", 256, 1 / np.sqrt(3)),
        ("exponential", 64, 1 - 2 / (1 + 6)),
        ("stochastic", 64, np.sqrt(0.4 / (0.6 * 64))),
    ],
)
def test_networks_mix_as_fast_as_their_laws_say(name: str, n: int, law: float) -> None:
    net, x = network(name, n), values(n)
    state = State.of(x.copy())
    rounds = 12 if name == "stochastic" else 40
    errors = []
    for t in range(rounds):
        mix(net.at(t), state)
        errors.append(np.log(np.linalg.norm(state.z() - x.mean(0))))
    slope = np.polyfit(range(rounds // 3, rounds), errors[rounds // 3 :], 1)[0]
    assert np.exp(slope) == pytest.approx(law, rel=0.12)


def test_windows_of_a_network_that_is_connected_only_over_time() -> None:
    assert window(network("one_peer", 16), 20) == 4  # the ring comes once in 4
    halves = [topology.Arcs(np.array([0, 1]), np.array([1, 2])),
              topology.Arcs(np.array([2]), np.array([0]))]  # fmt: skip
    assert window(Network(3, 0, lambda t: halves[t % 2]), 10) == 2
    assert window(Network(3, 0, lambda t: halves[0]), 10) is None
    assert window(Network(3, 0, topology.self_loop(3, 0)), 10) is None


def test_metropolis_weights_are_doubly_stochastic_and_need_both_directions() -> None:
    edges = topology.stochastic(12, 0, directed=False)
    P = Network(12, 0, edges, "metropolis").at(3).P
    check_shares(P, "metropolis")
    np.testing.assert_allclose(P.sum(axis=1), 1)
    with pytest.raises(ValueError, match="reverse"):
        Network(12, 0, topology.ring(12, 0, directed=True), "metropolis").at(0)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([[0.5, 0.0], [0.4, 1.0]], "client 0 sum to 0.9"),
        ([[1.5, 0.0], [-0.5, 1.0]], "client 0 has a negative share"),
        ([[1.0, 1.0], [0.0, 0.0]], "client 1 keeps nothing"),
    ],
)
def test_wrong_shares_are_named(matrix: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_shares(csr_array(np.array(matrix)), "given")


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_topologies_have_no_self_loops_and_no_arc_twice(name: str) -> None:
    for n, t in itertools.product(SIZES, range(5)):
        arcs = TOPOLOGIES[name](n, 1)(t)
        assert (arcs.src != arcs.dst).all()
        assert len(np.unique(arcs.src * n + arcs.dst)) == len(arcs)
        assert len(arcs) == 0 or max(arcs.src.max(), arcs.dst.max()) < n


def test_k_out_draws_distinct_targets_uniformly() -> None:
    edges = topology.k_out(6, 0, k=3)
    counts = np.zeros((6, 6))
    for t in range(500):
        arcs = edges(t)
        assert (np.bincount(arcs.src) == 3).all()
        counts[arcs.dst, arcs.src] += 1
    off = counts[~np.eye(6, dtype=bool)]
    assert np.abs(off / 500 - 3 / 5).max() < 0.1


def test_stochastic_networks_keep_arcs_with_their_own_probabilities() -> None:
    edges = topology.stochastic(5, 0)
    kept = np.zeros((5, 5))
    for t in range(600):
        kept += Network(5, 0, edges).at(t).P.toarray() > 0
    off = kept[~np.eye(5, dtype=bool)] / 600
    assert off.min() > 0.32
    assert off.max() < 0.88
    assert off.std() > 0.05
    for edges in (
        topology.stochastic(5, 0, directed=False),
        topology.erdos_renyi(20, 0, p=0.5, directed=False),
    ):
        one = edges(0)
        pairs = set(zip(one.src, one.dst, strict=True))
        assert pairs == {(b, a) for a, b in pairs}


def test_networks_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="strongly connected"):
        topology.erdos_renyi(50, 0, p=0.001)
    with pytest.raises(ValueError, match="one network is drawn"):
        topology.erdos_renyi(5, 0, fresh=True, directed=False)
    with pytest.raises(ValueError, match="at most 4 others"):
        topology.k_out(5, 0, k=5)
    with pytest.raises(ValueError, match="all pairs"):
        topology.complete(20_000, 0)
    with pytest.raises(ValueError, match="client 9"):
        Network(4, 0, topology.ring(4, 0), faults=Faults(crash={9: 2}))
    with pytest.raises(ValueError, match="without any client"):
        Network(2, 0, topology.ring(2, 0), faults=Faults(crash={0: 2, 1: 3}))
    with pytest.raises(ValueError, match="both crash and leave"):
        Faults(crash={1: 2}, leave={1: 3})
    with pytest.raises(ValueError, match="before it joins"):
        Faults(crash={1: 2}, join={1: 3})


def test_delivered_matrices_stay_column_stochastic() -> None:
    links = network("er_fresh", 12, Faults(loss=0.5)).at(0)
    assert links.lost.nnz
    for policy in ("keep", "renorm"):
        check_shares(delivered(links, policy), policy)
    assert (delivered(links, "vanish").sum(axis=0) < 1 - 1e-9).any()
