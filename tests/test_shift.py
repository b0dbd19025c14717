"""Feature shift: whole clients, all of their parts alike, and nobody else's samples."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import QUICK, Result

from app.config import load
from app.data import Dataset, Split
from app.errors import UserError
from app.host import Setting, setting
from app.shift import Normalization, Rotation, Shift, groups_of, shifted

PARTS = ("train", "test", "validation")
KEPT = ("client_test=0.2", "client_validation=0.3")


def of(*overrides: str) -> Setting:
    return setting((*QUICK, *KEPT, *overrides))


def test_a_client_has_three_parts_that_share_nothing() -> None:
    plain = of()
    for k in range(6):
        samples, whole = plain.samples(k), set(plain.parts[k].tolist())
        rows = [set(getattr(samples, name).index.tolist()) for name in PARTS]
        assert set.union(*rows) == whole and sum(map(len, rows)) == len(whole)
        assert len(rows[1]) == round(0.2 * len(whole))
        assert len(rows[2]) == round(0.3 * len(whole))


def test_the_test_part_does_not_depend_on_the_validation_part() -> None:
    alone = setting((*QUICK, "client_test=0.2"))
    for k in range(6):
        assert torch.equal(alone.samples(k).test.index, of().samples(k).test.index)


@pytest.mark.parametrize("shift", ["rotation", "normalization"])
def test_all_samples_of_a_client_are_shifted_alike(shift: str) -> None:
    plain, moved = of(), of(f"shift={shift}", "shift.groups=3")
    kind = {"rotation": Rotation(3), "normalization": Normalization(3)}[shift]
    groups = groups_of(6, 3, seed=0)
    for k, group in enumerate(groups):
        for name in PARTS:
            before, after = (getattr(s.samples(k), name) for s in (plain, moved))
            assert torch.equal(before.index, after.index)
            x, seen = before.x[before.index], after.x[after.index]
            assert torch.equal(kind.moved(x, group, 0), seen)
            assert torch.equal(before.y, after.y)
            assert torch.equal(x, seen) == (shift == "rotation" and group == 0)
    assert torch.equal(plain.dataset.test.x, moved.dataset.test.x)


def test_groups_are_of_equal_size_and_drawn_from_the_seed() -> None:
    groups = groups_of(100, 3, seed=4)
    assert sorted(Counter(groups).values()) == [33, 33, 34]
    assert groups == groups_of(100, 3, seed=4) != groups_of(100, 3, seed=5)


def test_normalization_draws_bounded_numbers_for_each_group() -> None:
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    slopes, offsets = set(), set()
    for group in range(50):
        low, high = Normalization(50, 0.1).moved(ends, group, 7)[:, 0].tolist()
        slopes.add(high - low)
        offsets.add(-low / (high - low))
    assert len(slopes) == len(offsets) == 50
    assert min(slopes) >= 1 and max(slopes) <= 10
    assert min(offsets) >= 0 and max(offsets) <= 1


def test_no_shift_leaves_the_data_themselves() -> None:
    none = Split(torch.zeros(2, 3), torch.zeros(2))
    data = Dataset(none, none, 0, "squared", None, [])
    parts = [np.array([0]), np.array([1])]
    assert shifted(data, parts, Shift(), 0) is data
    with pytest.raises(UserError, match="shape"):
        shifted(data, parts, Rotation(2), 0)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["client_test=0.6", "client_validation=0.4"], "nothing to train on"),
        (["shift=rotation", "shift.groups=5"], "shift.groups"),
        (["shift=normalization", "shift.least=0"], "shift.least"),
    ],
)
def test_mistakes_are_told_in_a_line(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load((*QUICK, *overrides))


def test_a_client_too_small_for_three_parts_is_named() -> None:
    small = ("clients=300", "clients_per_round=1", "client_test=0.2")
    with pytest.raises(UserError, match=r"client_validation=0.05: client \d+ has \d "):
        setting((*QUICK, *small, "client_validation=0.05"))


def test_validation_decides_and_test_is_told(run: Callable[..., Result]) -> None:
    result = run(*KEPT, "rounds=6", "strategy=fedavg", "clients_per_round=6")
    blocks = [r["clients"] for r in result.records if "clients" in r]
    blocks.append(result.summary["clients"])
    seen = [b["validation_accuracy_mean"] for b in blocks]
    best = seen.index(max(seen))
    chosen = result.summary["clients"]["chosen"]
    assert chosen["round"] == best + 1
    for name in ("accuracy_mean", "accuracy_decile", "validation_loss_mean"):
        assert chosen[name] == blocks[best][name]
    # What is known in a round depends on earlier rounds alone.
    for i, block in enumerate(blocks):
        until = seen[: i + 1]
        assert block["chosen"]["round"] == until.index(max(until)) + 1
