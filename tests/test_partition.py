"""Partitions: what holds for every one of them, then what each one promises."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app import by_class, partition
from app.data import digits
from app.errors import UserError

COVERING = [
    partition.iid,
    by_class.dirichlet,
    by_class.dirichlet_balanced,
    partition.size,
    partition.natural,
]
ALL = [*COVERING, by_class.shards, by_class.k_labels]


@pytest.fixture(scope="module")
def labels():
    """2,000 labels of ten unequal classes."""
    rng = np.random.default_rng(0)
    return rng.choice(10, 2000, p=np.arange(1, 11) / 55)


@pytest.mark.parametrize("function", ALL)
@settings(max_examples=8)
@given(clients=st.integers(1, 12), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_a_partition_is_a_function_of_its_seed(function, clients, seed, data):
    rows = data.draw(st.integers(300, 600))
    labels = np.random.default_rng(rows).permutation(rows) % 5
    owners = np.arange(rows) % clients
    knobs = {"base": 2} if function is by_class.k_labels else {}
    if function in (by_class.dirichlet, by_class.dirichlet_balanced):
        knobs["alpha"] = data.draw(st.floats(0.5, 100))
    parts = function(labels, owners, clients, seed, **knobs)
    assert len(parts) == clients
    assert all(part.dtype == np.int64 and len(part) >= 1 for part in parts)
    assert all((np.diff(part) > 0).all() for part in parts)
    joined = np.concatenate(parts)
    assert len(np.unique(joined)) == len(joined)
    if function in COVERING or (function is by_class.shards and clients >= 5):
        assert len(joined) == rows
    again = function(labels, owners, clients, seed, **knobs)
    assert all(map(np.array_equal, parts, again))


@pytest.mark.parametrize("function", [f for f in ALL if f is not partition.natural])
def test_another_seed_divides_otherwise(function, labels):
    one, two = (function(labels, None, 5, seed) for seed in (1, 2))
    assert not all(map(np.array_equal, one, two))


@pytest.mark.parametrize("function", ALL)
def test_more_clients_than_samples_is_told(function):
    with pytest.raises(UserError) as caught:
        function(np.arange(6) % 3, np.arange(6) % 3, 7, 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("function", ALL)
def test_too_high_a_minimum_is_told(function, labels):
    with pytest.raises(UserError) as caught:
        function(labels, np.arange(2000) % 5, 5, 0, minimum=1500)
    assert "\n" not in str(caught.value)
    assert "minimum" in str(caught.value)


@pytest.mark.parametrize(
    "function",
    [
        by_class.dirichlet,
        by_class.dirichlet_balanced,
        by_class.shards,
        by_class.k_labels,
    ],
)
def test_real_targets_have_no_classes(function):
    with pytest.raises(UserError, match="real numbers"):
        function(np.linspace(0, 1, 50), None, 2, 0)


def test_iid_sizes_and_mix(labels):
    parts = partition.iid(labels, None, 7, 0)
    assert {len(part) for part in parts} == {285, 286}
    counts = by_class.label_counts(labels, parts, 10)
    assert counts.shape == (7, 10)
    np.testing.assert_array_equal(counts.sum(0), np.bincount(labels))
    assert np.abs(counts / 286 - np.arange(1, 11) / 55).max() < 0.08


@pytest.mark.parametrize("function", [by_class.dirichlet, by_class.dirichlet_balanced])
def test_a_small_alpha_concentrates_classes(function, labels):
    def top(alpha):
        parts = function(labels, None, 10, 0, alpha=alpha)
        counts = by_class.label_counts(labels, parts, 10)
        return float((counts.max(1) / counts.sum(1)).mean())

    assert top(0.1) > top(1.0) > top(1000.0)


def test_dirichlet_gives_up_in_one_line(labels):
    with pytest.raises(UserError, match="alpha") as caught:
        by_class.dirichlet(labels, None, 100, 0, alpha=0.01, minimum=10)
    assert "\n" not in str(caught.value)


def test_balanced_dirichlet_is_exact_and_follows_its_prior(labels):
    parts = by_class.dirichlet_balanced(labels, None, 10, 0, alpha=0.3)
    assert [len(part) for part in parts] == [200] * 10
    uneven = by_class.dirichlet_balanced(labels, None, 7, 0)
    assert {len(part) for part in uneven} == {285, 286}
    # With more than enough of every class, the mix is the one that was drawn.
    many = np.arange(40_000) % 4
    sizes = by_class.dirichlet_balanced(many, None, 4, 0, alpha=1000.0)
    shares = by_class.label_counts(many, sizes, 4) / 10_000
    assert np.abs(shares - 0.25).max() < 0.05


def test_balanced_dirichlet_survives_vanishing_priors(labels):
    parts = by_class.dirichlet_balanced(labels, None, 20, 0, alpha=1e-3)
    assert sum(map(len, parts)) == 2000
    skewed = by_class.dirichlet_balanced(labels, None, 10, 0, sigma=1.0)
    assert max(map(len, skewed)) > 3 * min(map(len, skewed))


def test_shards_have_so_many_classes(labels):
    for assignment in ("first-deterministic", "deterministic", "random"):
        parts = by_class.shards(labels, None, 15, 0, 3, assignment)
        counts = by_class.label_counts(labels, parts, 10)
        assert ((counts > 0).sum(1) == 3).all()
    with pytest.raises(UserError, match="classes_per_client"):
        by_class.shards(labels, None, 5, 0, 11)


def test_natural_clients_are_kept_in_order():
    owners = np.array([7, 3, 3, 9, 7, 3])
    parts = partition.natural(owners * 0, owners, 3, 0)
    assert [part.tolist() for part in parts] == [[1, 2, 5], [0, 4], [3]]
    largest = partition.natural(owners * 0, owners, 2, 0)
    assert [part.tolist() for part in largest] == [[1, 2, 5], [0, 4]]
    grouped = partition.natural(owners * 0, owners, 2, 0, "group")
    assert [part.tolist() for part in grouped] == [[1, 2, 5], [0, 3, 4]]
    with pytest.raises(UserError, match="have 3"):
        partition.natural(owners * 0, owners, 4, 0)
    with pytest.raises(UserError, match="no natural clients"):
        partition.natural(owners * 0, None, 2, 0)


def test_sizes_spread_with_sigma(labels):
    equal = partition.size(labels, None, 10, 0, sigma=0.0)
    assert {len(part) for part in equal} == {200}
    spread = partition.size(labels, None, 10, 0, sigma=2.0, minimum=20)
    assert min(map(len, spread)) >= 20
    assert max(map(len, spread)) > 600


def test_k_labels_are_consecutive_and_follow_the_power_law():
    labels = np.arange(60_000) % 10
    parts = by_class.k_labels(labels, None, 32, 0)
    counts = by_class.label_counts(labels, parts, 10)
    for client, row in enumerate(counts):
        owned = {(client + j) % 10 for j in range(3)}
        assert set(np.flatnonzero(row)) == owned
        assert all(row[label] == 10 or row[label] >= 220 for label in owned)
    sizes = counts.sum(1)
    assert sizes.max() > 3 * sizes.min()


def test_k_labels_that_cannot_be_are_told():
    y = digits().train.y.numpy()
    assert min(map(len, by_class.k_labels(y, None, 32, 0))) >= 30
    with pytest.raises(UserError, match="base=10 needs"):
        by_class.k_labels(y, None, 100, 0)
    with pytest.raises(UserError, match="labels_per_client=11"):
        by_class.k_labels(y, None, 5, 0, labels_per_client=11)
