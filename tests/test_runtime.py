"""One run, however it is spread, interrupted, watched or hosted: the same numbers."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import QUICK, Result, grid_of
from flwr.app import Context, Message, RecordDict

from app import server_app
from app.callbacks import Patience
from app.compose import CONF
from app.config import load
from app.errors import UserError
from app.experiment import run_local
from app.host import objective, setting
from app.local_grid import LocalGrid
from app.node_config import hosted
from app.run_config import to_run_config
from app.store import ContextStore, DirectoryStore

Door = Callable[..., Result]
CLIENT_LR = (
    "strategy=fedopt_hyper",
    "strategy.client_lr=true",
    "optimizer=tuned_sgd",
)
ALGORITHMS = (
    *("fedavg", "feddyn", "scaffold", "fedprox", "fedsophia", "done"),
    *("fedopt", "fedopt_hyper", "learned_weights"),
)


def close(a: Result, b: Result) -> None:
    """Assert that two models agree but for the order of sums."""
    torch.testing.assert_close(a.theta, b.theta, rtol=1e-4, atol=1e-6)


def equal(a: Result, b: Result) -> None:
    """Assert that two models are equal bit for bit, and so are the records' numbers."""
    assert torch.equal(a.theta, b.theta)
    for ours, theirs in zip(a.records, b.records, strict=True):
        for key in ours.keys() - {"seconds"}:
            assert ours[key] == theirs[key], (ours["round"], key)


def rows(result: Result) -> list[dict[str, str]]:
    """Return the lines of clients.csv."""
    with open(result.path / "clients.csv", newline="") as file:
        return list(csv.DictReader(file))


def cohorts(result: Result) -> list[list[int]]:
    """Return who took part, round by round."""
    return [r["clients"]["cohort"] for r in result.records if "clients" in r]


# The same numbers.


@pytest.mark.parametrize("strategy", ALGORITHMS)
def test_the_number_of_nodes_does_not_matter(run: Door, strategy: str) -> None:
    one, five, each = (run(f"strategy={strategy}", f"nodes={n}") for n in (1, 5, 6))
    start = run(f"strategy={strategy}", "rounds=0")
    assert not torch.equal(one.theta, start.theta)
    close(one, five)
    close(one, each)
    assert cohorts(one) == cohorts(five) == cohorts(each)


def trained_on(result: Result) -> list[list[str]]:
    """Return the nodes that trained a client, for each round."""
    trained = [row for row in rows(result) if row["train_loss"]]
    rounds = sorted({int(row["round"]) for row in trained})
    return [[r["node"] for r in trained if int(r["round"]) == t] for t in rounds]


def test_nodes_share_a_cohort_evenly_unless_clients_remember(run: Door) -> None:
    given = ("nodes=3", "clients=12", "clients_per_round=6", "rounds=6")
    for nodes in trained_on(run("strategy=fedavg", *given)):
        assert sorted(nodes.count(node) for node in set(nodes)) == [2, 2, 2]
    # Client k lives on node k mod 3, with its memory.
    bound = [set(nodes) for nodes in trained_on(run("strategy=feddyn", *given))]
    hosts = [{k % 3 for k in cohort} for cohort in cohorts(run("rounds=6", *given))]
    assert [len(nodes) for nodes in bound] == [len(nodes) for nodes in hosts]
    assert any(len(nodes) < 3 for nodes in bound)


def test_double_precision_agrees_much_closer(run: Door) -> None:
    one, each = (run("dtype=float64", f"nodes={n}") for n in (1, 6))
    assert one.theta.dtype == torch.float64
    torch.testing.assert_close(one.theta, each.theta, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("strategy", ["feddyn", "scaffold", "fedsophia"])
def test_worker_processes_give_the_same_bits(run: Door, strategy: str) -> None:
    given = (f"strategy={strategy}", "nodes=3", "holdout_clients=2")
    equal(run(*given), run(*given, "processes=2"))


def test_a_grid_that_was_made_later_leaves_a_run_its_settings(run: Door) -> None:
    """Grids share their worker processes."""

    def make(overrides: Sequence[str]) -> LocalGrid:
        grid = LocalGrid(to_run_config(overrides), 2, 1)
        LocalGrid(to_run_config([*overrides, "optimizer.lr=0.5"]), 2, 1)
        return grid

    equal(run("strategy=fedavg"), run("strategy=fedavg", grid=make))


def test_a_second_run_gives_the_same_bits(run: Door) -> None:
    first, second = run(), run()
    assert first.path != second.path
    equal(first, second)
    text = [(r.path / "model.safetensors").read_bytes() for r in (first, second)]
    assert text[0] == text[1]


def test_seeds_differ_in_cohorts_and_weights(run: Door) -> None:
    zero, one = run("seed=0"), run("seed=1")
    assert cohorts(zero) != cohorts(one)
    start, other = run("seed=0", "rounds=0"), run("seed=1", "rounds=0")
    assert not torch.equal(start.theta, other.theta)


def test_each_round_draws_anew(run: Door) -> None:
    drawn = cohorts(run("rounds=8"))
    assert all(len(set(c)) == 3 and c == sorted(c) for c in drawn)
    assert len({tuple(c) for c in drawn}) > 3
    assert set().union(*drawn) == set(range(6))


# Who hosts whom.


def named(*nodes: Mapping[str, Any]) -> Callable[[Sequence[str]], LocalGrid]:
    """Return what makes a grid of nodes with these configs."""

    def make(overrides: Sequence[str]) -> LocalGrid:
        grid = grid_of(overrides, 0)
        for config in nodes:
            grid.add_node(config)
        return grid

    return make


TWELVE = ("clients=12", "clients_per_round=5", "rounds=4")


def test_nodes_that_name_their_clients(run: Door) -> None:
    nodes = named({"clients": "0,3,8-11"}, {"clients": "1 , 2,4-7"})
    hosts = run(*TWELVE, grid=nodes)
    close(hosts, run(*TWELVE))
    assert {(r["node"], r["client"]) for r in rows(hosts)} == {
        *(("1000", str(k)) for k in (0, 3, 8, 9, 10, 11)),
        *(("1001", str(k)) for k in (1, 2, 4, 5, 6, 7)),
    }


def test_the_order_of_nodes_does_not_matter(run: Door) -> None:
    parts = [{"clients": c} for c in ("0-3", "4-7", "8-11")]
    equal_but_nodes = [run(*TWELVE, grid=named(*p)) for p in (parts, parts[::-1])]
    close(*equal_but_nodes)


@pytest.mark.parametrize(
    "text", ["a", "1;2", "3-", "-3", "5-x", "", "1,,2", "12", "0-12", "9-8"]
)
def test_clients_that_a_node_cannot_host(text: str) -> None:
    with pytest.raises(UserError, match="node config"):
        hosted({"clients": text}, 12)


def test_a_node_config_that_says_nothing() -> None:
    with pytest.raises(UserError, match="partition-id"):
        hosted({}, 12)
    assert hosted({"partition-id": 1, "num-partitions": 5}, 12) == [1, 6, 11]


def test_a_wrong_node_config_ends_the_run_in_one_line(run: Door) -> None:
    with pytest.raises(UserError, match="99 is not below 12"):
        run(*TWELVE, grid=named({"clients": "0-10"}, {"clients": "99"}))


def test_too_few_clients_are_waited_for(run: Door) -> None:
    with pytest.raises(UserError, match="11 of 12 clients joined"):
        run(*TWELVE, "join_timeout=0.3", grid=named({"clients": "0-10"}))


class Scene:
    """Change the nodes of a grid before certain rounds."""

    def __init__(self, *first: Mapping[str, Any]) -> None:
        self.first = first
        self.grid: LocalGrid | None = None
        self.acts: dict[int, Callable[[LocalGrid], object]] = {}

    def __call__(self, overrides: Sequence[str]) -> LocalGrid:
        """Make the grid."""
        self.grid = named(*self.first)(overrides)
        return self.grid

    def watch(self, record: Mapping[str, Any]) -> tuple[bool, dict[str, float]]:
        """Act after a round, that is before the next."""
        if (act := self.acts.get(record["round"] + 1)) and self.grid:
            act(self.grid)
        return False, {}


ALL = ("clients=6", "clients_per_round=6", "rounds=8")


def test_a_node_that_joins_takes_part_from_then_on(run: Door) -> None:
    scene = Scene({"clients": "0-3"})
    scene.acts[5] = lambda grid: grid.add_node({"clients": "4-5"})
    result = run(*ALL, "min_clients=4", grid=scene, callbacks=[scene.watch])
    assert cohorts(result) == [[0, 1, 2, 3]] * 4 + [[0, 1, 2, 3, 4, 5]] * 4
    assert result.summary["failures"] == 0
    assert max(r["checks"]["memory_gap"] for r in result.records[1:]) < 1e-5


def test_a_late_node_leaves_the_other_rounds_alone(run: Door) -> None:
    scene = Scene({"clients": "0-3"})
    scene.acts[5] = lambda grid: grid.add_node({"clients": "4-5"})
    late = run(*ALL, "min_clients=4", grid=scene, callbacks=[scene.watch])
    never = run(*ALL, "min_clients=4", grid=named({"clients": "0-3"}))
    for a, b in zip(late.records[:5], never.records[:5], strict=True):
        assert a.get("loss") == b.get("loss")
    assert late.records[5]["loss"] != never.records[5]["loss"]


def test_a_node_that_leaves_is_no_longer_asked(run: Door) -> None:
    scene = Scene({"clients": "0-3"}, {"clients": "4-5"})
    scene.acts[3] = lambda grid: grid.remove_node(1001)
    result = run(*ALL, grid=scene, callbacks=[scene.watch])
    assert cohorts(result) == [[0, 1, 2, 3, 4, 5]] * 2 + [[0, 1, 2, 3]] * 6
    assert result.summary["failures"] == 0


def test_a_node_that_comes_back_under_another_id(run: Door, tmp_path: Path) -> None:
    # With its memory in a directory, a node that restarts is as if nothing had happened.
    node = {"clients": "4-5", "state-dir": str(tmp_path / "memory")}
    scene = Scene({"clients": "0-3"}, node)

    def restart(grid: LocalGrid) -> None:
        grid.remove_node(1001)
        grid.add_node(node)

    scene.acts[3] = restart
    restarted = run(*ALL, grid=scene, callbacks=[scene.watch])
    steady = run(*ALL, grid=named({"clients": "0-3"}, {"clients": "4-5"}))
    assert torch.equal(restarted.theta, steady.theta)


def test_a_node_that_comes_back_before_its_old_self_is_gone(run: Door) -> None:
    # Flower takes a while to see that a node is away: until then two claim the same clients.
    scene = Scene({"clients": "0-3"}, {"clients": "4-5"})
    scene.acts[3] = lambda grid: grid.add_node({"clients": "4-5"})
    scene.acts[5] = lambda grid: grid.remove_node(1001)
    result = run("strategy=fedavg", *ALL, grid=scene, callbacks=[scene.watch])
    assert cohorts(result) == [[0, 1, 2, 3, 4, 5]] * 8


def test_ids_of_nodes_are_never_used_twice() -> None:
    grid = grid_of(QUICK, 3)
    before = set(grid.get_node_ids())
    for node in before:
        grid.remove_node(node)
    assert grid.add_node({"clients": "0"}) not in before


def test_a_missing_client_does_not_change_who_else_is_drawn(run: Door) -> None:
    given = ("clients=12", "clients_per_round=4", "rounds=6", "min_clients=11")
    whole = run(*given, grid=named({"clients": "0-11"}))
    part = run(*given, grid=named({"clients": "0-10"}))
    for a, b in zip(cohorts(whole), cohorts(part), strict=True):
        assert set(a) - {11} <= set(b)


# Whom it evaluates, and when.


def test_held_out_clients_are_evaluated_and_never_trained(run: Door) -> None:
    result = run("holdout_clients=3", "rounds=6")
    assert all(k < 6 for cohort in cohorts(result) for k in cohort)
    apart = [r for r in rows(result) if r["role"] == "holdout"]
    assert {r["client"] for r in apart} == {"6", "7", "8"}
    assert all(r["accuracy"] and not r["steps"] for r in apart)
    assert len(apart) == 3 * 7  # each round's received model, and the last
    assert all("holdout_accuracy_mean" in r["clients"] for r in result.records[1:])
    assert "holdout_accuracy_mean" in result.summary["clients"]


def test_held_out_clients_do_not_change_their_own_number_of_training_rounds(
    run: Door,
) -> None:
    silent = run("holdout_clients=3", "evaluate_clients=none")
    heard = run("holdout_clients=3", "evaluate_clients=all")
    assert torch.equal(silent.theta, heard.theta)
    assert not any(r["accuracy"] for r in rows(silent))


def test_evaluate_every(run: Door) -> None:
    result = run("evaluate_every=3", "rounds=7")
    assert [r["round"] for r in result.records if "accuracy" in r] == [0, 3, 6, 7]
    # Clients evaluate what they receive: the model after rounds 0, 3 and 6, and the last.
    asked = {int(r["round"]) for r in rows(result) if r["accuracy"]}
    assert asked == {1, 4, 7, 8}
    assert torch.equal(result.theta, run("rounds=7").theta)


def test_evaluate_only_at_the_end(run: Door) -> None:
    result = run("evaluate_every=0")
    assert [r["round"] for r in result.records if "accuracy" in r] == [0, 3]
    assert {r["round"] for r in rows(result) if r["accuracy"]} == {"4"}


def test_the_cohort_alone_evaluates(run: Door) -> None:
    result = run("evaluate_clients=cohort")
    judged = [r for r in rows(result) if r["accuracy"]]
    for record in result.records[1:]:
        here = [int(r["client"]) for r in judged if r["round"] == str(record["round"])]
        assert here == record["clients"]["cohort"]


def test_what_clients_measured_is_summed_up(run: Door) -> None:
    result = run("rounds=2")
    for record in result.records[1:]:
        here = [r for r in rows(result) if r["round"] == str(record["round"])]
        told, accuracy = record["clients"], [float(r["accuracy"]) for r in here]
        assert told["accuracy_mean"] == pytest.approx(np.mean(accuracy), abs=1e-5)
        decile = np.quantile(accuracy, 0.1)
        assert told["accuracy_decile"] == pytest.approx(decile, abs=1e-5)
        trained = [r for r in here if r["train_loss"]]
        losses, samples = (
            [float(r[key]) for r in trained] for key in ("train_loss", "samples")
        )
        mean = np.average(losses, weights=samples)
        assert told["train_loss"] == pytest.approx(mean, abs=1e-5)


def test_clients_keep_some_samples_for_their_own_test(run: Door) -> None:
    result = run("client_test=0.25")
    sizes = [len(part) for part in setting(QUICK).parts]
    kept = [round(0.25 * n) for n in sizes]
    judged = [r for r in rows(result) if r["round"] == "1"]
    assert [int(r["client"]) for r in judged] == list(range(6))
    for row in judged:
        k = int(row["client"])
        assert row["split"] == "test"
        assert int(float(row["samples"])) == sizes[k] - kept[k]
        hits = float(row["accuracy"]) * kept[k]
        assert hits == pytest.approx(round(hits), abs=1e-4)
    # What is kept is not trained on.
    whole = run("client_test=0")
    assert result.records[1]["gradients"] < whole.records[1]["gradients"]
    assert {r["split"] for r in rows(whole) if r["round"] == "1"} == {"train"}


# Callbacks.


def test_a_target_ends_the_run(run: Door) -> None:
    given = ("stop.accuracy=0.3", "optimizer.lr=0.3", "targets=[0.3,1]")
    result = run("rounds=50", *given)
    assert result.summary["status"] == "target"
    told = [r["accuracy"] for r in result.records[1:]]
    assert told[-1] >= 0.3 > max(told[:-1], default=0.0)
    assert result.summary["rounds"] == len(told) < 50
    assert result.summary["best_accuracy"] == max(told) == told[-1]
    assert result.summary["best_round"] == len(told)
    assert result.summary["rounds_to"] == {"0.3": len(told), "1": None}


def test_patience_ends_the_run(run: Door) -> None:
    result = run("rounds=50", "stop.patience=2", "stop.least=0.9")
    assert result.summary["status"] == "stopped"
    # The first is a gain over nothing; two more are not.
    assert result.summary["rounds"] == 3
    assert result.records[3]["callbacks"] == {"evaluations_without_gain": 2}


def test_patience_of_a_resumed_run_is_that_of_an_undisturbed_one(
    run: Door, tmp_path: Path
) -> None:
    given = ("rounds=50", "stop.patience=2", "stop.least=0.9", "checkpoint_every=1")
    with pytest.raises(Killed):
        run(*given, "name=half", callbacks=[die(2)])
    resumed = run(*given, f"resume={tmp_path}/runs/half")
    assert resumed.summary["rounds"] == 3


def test_a_run_of_an_earlier_version_had_the_defaults_of_what_has_come_since(
    run: Door, tmp_path: Path
) -> None:
    given = ("rounds=3", "checkpoint_every=1")
    with pytest.raises(Killed):
        run(*given, "name=half", callbacks=[die(2)])
    file = tmp_path / "runs" / "half" / "config.yaml"
    told = yaml.safe_load(file.read_text())
    del told["holdout_clients"], told["strategy"]["weighting"], told["shift"]
    file.write_text(yaml.safe_dump(told))
    again = (*given, f"resume={file.parent}")
    with pytest.raises(UserError, match="holdout_clients is 0 there and 1 here"):
        run(*again, "holdout_clients=1")
    with pytest.raises(UserError, match="weighting is uniform there and samples here"):
        run(*again, "strategy.weighting=samples")
    with pytest.raises(UserError, match=r"shift\.name is none there and rotation here"):
        run(*again, "shift=rotation")
    assert run(*again).summary["rounds"] == 3


def test_memories_that_end_with_the_process_are_no_checkpoint(run: Door) -> None:
    given = ("client_memory=context", "checkpoint_every=1")
    with pytest.raises(UserError, match=r"client_memory=context: .*directory or auto"):
        run(*given)
    run(*given, "strategy=fedavg")  # whose clients remember nothing


def test_a_run_in_which_no_training_counted_says_so(run: Door) -> None:
    given = ("strategy=fedavg", "local.clip=0", "optimizer.lr=1e30", "rounds=2")
    result = run(*given)
    assert result.summary["failures"] == 6
    assert any("no client's training counted" in text for text in result.lines)


def test_a_run_that_had_stopped_when_it_died_does_not_go_on(run: Door) -> None:
    given = ("rounds=50", "stop.patience=2", "stop.least=0.9", "checkpoint_every=1")
    done = run(*given)
    (done.path / "summary.json").unlink()  # what it writes last
    resumed = run(*given, f"resume={done.path}")
    equal(resumed, done)
    assert resumed.summary["status"] == "stopped"


def test_what_nobody_judges_ends_no_run(run: Door) -> None:
    nowhere = ("data=described", "data.shape=[1,8,8]", "data.classes=10")
    with pytest.raises(UserError, match=r"stop\.patience: .*no samples to judge"):
        run(*nowhere, "stop.patience=3", grid=named())
    regression = (
        "data=quadratics",
        "partition=natural",
        "model=linear",
        "clients=4",
        "clients_per_round=4",
    )
    with pytest.raises(UserError, match=r"stop\.accuracy: .*regression"):
        run(*regression, "stop.accuracy=0.5", quick=("rounds=1",))


def test_patience_reads_a_loss_that_was_not_finite() -> None:
    """As it is read back from a run that is resumed."""
    waiting = Patience(3)
    told = [waiting({"loss": loss})[0] for loss in (None, 2.0, None, float("nan"), 2.0)]
    assert told == [False, False, False, False, True]
    assert waiting({"round": 7}) == (False, {})


def test_patience_counts_evaluations_only(run: Door) -> None:
    result = run("rounds=50", "stop.patience=2", "stop.least=0.9", "evaluate_every=2")
    assert result.summary["rounds"] == 6


def test_a_callback_stops_and_adds_metrics(run: Door) -> None:
    def second(record: Mapping[str, Any]) -> tuple[bool, dict[str, float]]:
        return record["round"] == 2, {"seen": float(record["round"])}

    result = run("rounds=9", callbacks=[second])
    assert result.summary["status"] == "stopped"
    assert [r["callbacks"] for r in result.records[1:]] == [
        {"seen": 1.0},
        {"seen": 2.0},
    ]


# Interrupted.


class Killed(Exception):
    """The process dies here."""


def die(after: int) -> Callable[[Mapping[str, Any]], tuple[bool, dict[str, float]]]:
    """Return a callback that dies in a round, before the round is written."""

    def callback(record: Mapping[str, Any]) -> tuple[bool, dict[str, float]]:
        if record["round"] == after:
            raise Killed
        return False, {}

    return callback


RESUMED = [
    ("strategy=feddyn",),
    ("strategy=feddyn", "strategy.mean_of_all=true", "strategy.weighting=samples"),
    ("strategy=scaffold", "optimizer.momentum=0.5"),
    ("strategy=feddyn", "client_memory=directory", "stop.patience=40"),
    ("strategy=fedavg", "optimizer.lr_decay=0.9"),
    (*CLIENT_LR, "strategy.momentum=0.5", "strategy.optimizer=adam"),
    ("strategy=fedopt_hyper", "strategy.independent=true"),
    ("strategy=learned_weights", "clients_per_round=5"),
    ("strategy=fedsophia", "optimizer.tau=3", "strategy.average_moments=true"),
]


@pytest.mark.parametrize(
    ("given", "died"),
    # After a round that no checkpoint has, and once right after a checkpoint.
    [*((given, 6) for given in RESUMED), (RESUMED[0], 5)],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_a_resumed_run_equals_one_that_never_stopped(
    run: Door, tmp_path: Path, given: tuple[str, ...], died: int
) -> None:
    given = (*given, "rounds=9", "checkpoint_every=2")
    with pytest.raises(Killed):
        run(*given, "name=half", callbacks=[die(died)])
    half = tmp_path / "runs" / "half"
    assert not (half / "summary.json").exists()
    resumed = run(*given, f"resume={half}")
    assert resumed.path == half
    straight = run(*given, "name=full", callbacks=[die(0)])
    equal(resumed, straight)
    plain = [{k: v for k, v in r.items() if k != "seconds"} for r in rows(resumed)]
    assert plain == [
        {k: v for k, v in r.items() if k != "seconds"} for r in rows(straight)
    ]


def test_resume_auto_finds_the_unfinished_run(run: Door, tmp_path: Path) -> None:
    given = ("rounds=4", "checkpoint_every=1")
    done = run(*given, "name=full", callbacks=[die(0)])
    with pytest.raises(Killed):
        run(*given, "name=half", callbacks=[die(3)])
    resumed = run(*given, "resume=auto")
    assert resumed.path == tmp_path / "runs" / "half"
    equal(resumed, done)
    with pytest.raises(UserError, match="no unfinished run"):
        run(*given, "resume=auto")


def test_a_torn_checkpoint_is_passed_over(run: Door, tmp_path: Path) -> None:
    given = ("rounds=6", "checkpoint_every=1")
    with pytest.raises(Killed):
        run(*given, "name=half", callbacks=[die(5)])
    last = max((tmp_path / "runs" / "half" / "checkpoints").iterdir())
    last.write_bytes(last.read_bytes()[:100])
    resumed = run(*given, "resume=auto")
    assert resumed.summary["failures"] == 0
    equal(resumed, run(*given, "name=full", callbacks=[die(0)]))


def test_a_finished_run_can_be_made_longer(run: Door) -> None:
    short = run("rounds=3", "checkpoint_every=3")
    longer = run("rounds=6", "checkpoint_every=3", f"resume={short.path}")
    assert torch.equal(longer.theta, run("rounds=6").theta)
    assert yaml.safe_load((short.path / "config.yaml").read_text())["rounds"] == 6


def test_what_the_program_advises_to_change_may_change(
    run: Door, tmp_path: Path
) -> None:
    given = ("rounds=4", "checkpoint_every=1", "lost_state=fail")
    with pytest.raises(Killed):
        run(*given, "name=half", callbacks=[die(3)])
    # A later one of the same settings, which died before its first checkpoint.
    (tmp_path / "runs" / "later").mkdir()
    config = (tmp_path / "runs" / "half" / "config.yaml").read_text()
    (tmp_path / "runs" / "later" / "config.yaml").write_text(config)
    other = ("lost_state=skip", "min_replies=1", "min_clients=2", "threads=2")
    resumed = run("rounds=4", "checkpoint_every=1", *other, "resume=auto")
    assert resumed.path == tmp_path / "runs" / "half"
    equal(resumed, run("rounds=4", "name=full", callbacks=[die(0)]))


def test_other_settings_cannot_be_resumed(run: Door, tmp_path: Path) -> None:
    given = ("rounds=4", "checkpoint_every=1")
    with pytest.raises(Killed):
        run(*given, "name=half", callbacks=[die(3)])
    before = sorted(p.name for p in (tmp_path / "runs").rglob("*"))
    for other, told in (
        ("seed=1", "seed is 0 there and 1 here"),
        ("strategy.alpha=0.5", r"strategy.alpha is 0.1 there and 0.5 here \(only"),
        ("optimizer.lr=0.2", "optimizer.lr is 0.1 there and 0.2 here"),
        ("strategy=fedavg", "strategy.name is feddyn there and fedavg here"),
    ):
        with pytest.raises(UserError, match=f"other settings: .*{told}"):
            run(*given, f"resume={tmp_path}/runs/half", other)
    with pytest.raises(UserError, match="has come to round 2, beyond rounds=1"):
        run("checkpoint_every=1", "rounds=1", f"resume={tmp_path}/runs/half")
    assert sorted(p.name for p in (tmp_path / "runs").rglob("*")) == before


def test_what_is_left_out_of_a_mapping_is_another_setting(
    run: Door, tmp_path: Path
) -> None:
    given = ("strategy=pushsum", "topology=complete", "clients_per_round=6")
    given = (*given, "rounds=4", "checkpoint_every=1")
    with pytest.raises(Killed):
        run(*given, "name=half", "faults.crash={3: 2, 5: 4}", callbacks=[die(2)])
    with pytest.raises(UserError, match="other settings"):
        run(*given, f"resume={tmp_path}/runs/half", "faults.crash={3: 2}")


def test_other_samples_cannot_be_resumed(run: Door, tmp_path: Path) -> None:
    """Settings name a file; what is in it decides."""
    y = np.arange(60) % 3
    for name, level in (("one", 0.0), ("two", 1.0)):
        np.savez(tmp_path / f"{name}.npz", x=np.full((60, 4), level, np.float32), y=y)
    given = ("data=npz", "rounds=3", "checkpoint_every=1")
    with pytest.raises(Killed):
        run(*given, f"data.path={tmp_path}/one.npz", "name=half", callbacks=[die(2)])
    (tmp_path / "one.npz").rename(tmp_path / "moved.npz")
    other = (*given, f"data.path={tmp_path}/two.npz")
    with pytest.raises(UserError, match="other samples than data=npz has now"):
        run(*other, f"resume={tmp_path}/runs/half")
    with pytest.raises(UserError, match="no unfinished run of these settings"):
        run(*other, "resume=auto")
    moved = run(*given, f"data.path={tmp_path}/moved.npz", "resume=auto")
    assert moved.path == tmp_path / "runs" / "half"


def test_without_a_checkpoint_there_is_nothing_to_resume(
    run: Door, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        run("name=half", callbacks=[die(2)])
    with pytest.raises(UserError, match="checkpoint_every"):
        run("name=again", f"resume={tmp_path}/runs/half")


# What a client keeps.


def test_memories_are_pruned(run: Door) -> None:
    grids: list[LocalGrid] = []

    def make(overrides: Sequence[str]) -> LocalGrid:
        grids.append(grid_of(overrides, 2))
        return grids[-1]

    run("rounds=8", "clients_per_round=6", grid=make)
    for i, context in enumerate(grids[0]._contexts.values()):
        store = ContextStore(context.state)
        for k in range(i, 6, 2):
            assert len(store.versions(k)) <= 2, store.versions(k)
            assert max(store.versions(k)) == 8


def test_memories_since_the_last_checkpoint_are_kept(run: Door) -> None:
    result = run("rounds=7", "clients_per_round=6", "checkpoint_every=3")
    store = DirectoryStore(result.path / "clients")
    for k in range(6):
        assert 6 in store.versions(k) and 7 in store.versions(k)
        assert min(store.versions(k)) >= 3


# A node's own data.


def test_a_node_with_data_of_its_own(run: Door, tmp_path: Path) -> None:
    whole = setting(QUICK).dataset.train
    parts = setting(QUICK).parts
    for k in (0, 1):
        index = torch.from_numpy(parts[k])
        x, y = whole.x[index].numpy(), whole.y[index].numpy()
        np.savez(tmp_path / f"{k}.npz", x=x, target=y, x_test=x[:5], target_test=y[:5])
    own = [
        {"clients": str(k), "data-path": str(tmp_path / f"{k}.npz"), "label": "target"}
        for k in (0, 1)
    ]
    result = run(grid=named(*own, {"clients": "2-5"}), edit=None)
    assert torch.equal(
        run(grid=named({"clients": "0"}, {"clients": "1"}, {"clients": "2-5"})).theta,
        result.theta,
    )
    smaller = tmp_path / "0.npz"
    index = torch.from_numpy(parts[0][:40])
    x, y = whole.x[index].numpy(), whole.y[index].numpy()
    np.savez(smaller, x=x, target=y, x_test=x[:5], target_test=y[:5])
    other = {**own[0], "data-path": str(tmp_path / ".." / tmp_path.name / "0.npz")}
    fewer = run("clients_per_round=6", grid=named(other, own[1], {"clients": "2-5"}))
    trained = [r for r in rows(fewer) if r["client"] == "0" and r["steps"]]
    assert {float(r["samples"]) for r in trained} == {40.0}


def test_only_the_nodes_have_data(run: Door, tmp_path: Path) -> None:
    whole, parts = setting(QUICK).dataset.train, setting(QUICK).parts
    nodes = []
    for k in range(6):
        index = torch.from_numpy(parts[k])
        x, y = whole.x[index].numpy(), whole.y[index].numpy()
        np.savez(tmp_path / f"{k}.npz", x=x, y=y, x_test=x[:5], y_test=y[:5])
        nodes.append({"clients": str(k), "data-path": str(tmp_path / f"{k}.npz")})
    nowhere = ("data=described", "data.shape=[1,8,8]", "data.classes=10")
    result = run(*nowhere, grid=named(*nodes))
    everywhere = run(grid=named(*({"clients": str(k)} for k in range(6))))
    assert torch.equal(result.theta, everywhere.theta)
    assert result.summary["accuracy"] is None
    assert result.summary["clients"]["accuracy_mean"] > 0
    asked = run(*nowhere, "evaluate_clients=cohort", grid=named(*nodes))
    assert asked.summary["clients"] == result.summary["clients"]
    with pytest.raises(UserError, match="data-path"):
        run(*nowhere, grid=named({"clients": "0-5"}))
    wrong = ("data=described", "data.shape=[1,9,9]", "data.classes=10")
    with pytest.raises(UserError, match=r"\(1, 8, 8\); the run's have \(1, 9, 9\)"):
        run(*wrong, grid=named(*nodes))


def test_a_server_app_tells_a_mistake_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    context = Context(1, 0, {}, RecordDict(), {"strategy": "fedyn"})
    with pytest.raises(SystemExit) as ended:
        server_app.main(grid_of(QUICK, 2), context)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().out.splitlines()
    told = "error: no strategy is called 'fedyn'; did you mean 'feddyn'?"
    assert line.startswith(told)


#: What a ClientApp does between its start and training.
START = """
import sys
import app.client_app
from app.node import Node
from flwr.app import Context, RecordDict
given = {"overrides": "data=described data.shape=[1,8,8] data.classes=10"}
mine = {"clients": "0", "data-path": sys.argv[1]}
node = Node(Context(1, 1, mine, RecordDict(), given))
assert len(node.samples(0).train) and node.binds_clients()
print(*sys.modules)
"""


def test_a_node_starts_without_what_it_does_not_need(tmp_path: Path) -> None:
    """A node starts a process for every message: what is imported there is paid each time."""
    x, y = np.zeros((30, 1, 8, 8), np.float32), np.arange(30) % 10
    np.savez(tmp_path / "own.npz", x=x, y=y)
    command = [sys.executable, "-c", START, str(tmp_path / "own.npz")]
    told = subprocess.run(command, capture_output=True, text=True, cwd=CONF.parent)
    assert told.returncode == 0, told.stderr
    loaded = {name.split(".")[0] for name in told.stdout.split()}
    heavy = {"datasets", "matplotlib", "networkx", "pandas", "ray", "scipy", "sklearn"}
    assert not loaded & heavy


def test_data_of_its_own_is_one_clients(run: Door, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name one client"):
        run(grid=named({"clients": "0-5", "data-path": str(tmp_path)}))
    with pytest.raises(UserError, match=r"none\.npz"):
        run(grid=named({"clients": "0", "data-path": "none.npz"}, {"clients": "1-5"}))


# What is told and written.


def test_the_run_says_where_its_directory_is_first_and_last(run: Door) -> None:
    result = run("name=mine")
    assert result.path.name == "mine"
    assert result.lines[0] == result.lines[-1] == f"run directory: {result.path}"
    told = [line for line in result.lines if line.startswith("round ")]
    assert [line.split()[1] for line in told] == ["1/3", "2/3", "3/3"]
    for line, record in zip(told, result.records[1:], strict=True):
        assert f"accuracy {record['accuracy']:.4f}" in line
        assert line.endswith("left")


def test_the_model_has_the_modules_names(run: Door) -> None:
    result = run()
    config = load(QUICK)
    goal = objective(config, setting(QUICK).dataset)
    assert {n: t.shape for n, t in result.model.items()} == {
        n: p.shape for n, p in goal.module.named_parameters()
    }
    goal.module.load_state_dict(result.model, strict=False)
    test = setting(QUICK).dataset.test
    goal.module.eval()
    with torch.no_grad():
        hits = (goal.module(test.x).argmax(-1) == test.y).double().mean()
    assert float(hits) == pytest.approx(
        result.records[-1]["models"]["server"]["accuracy"]
    )


def test_the_composed_settings_are_kept(run: Door) -> None:
    result = run("strategy.alpha=0.7")
    kept = yaml.safe_load((result.path / "config.yaml").read_text())
    assert kept["strategy"]["name"] == "feddyn" and kept["strategy"]["alpha"] == 0.7
    assert kept["rounds"] == 3 and kept["local"]["batch"] == 60


@pytest.mark.parametrize(
    ("given", "model", "state"),
    [
        (("strategy=fedavg",), 1, 0),
        (("strategy=feddyn",), 1, 0),
        (("strategy=scaffold",), 1, 1),
        (("strategy=fedprox",), 1, 0),
        (("strategy=fedopt",), 1, 0),
        (("strategy=fedsophia",), 1, 0),
    ],
    ids=lambda v: v[0] if isinstance(v, tuple) else "",
)
def test_bytes_are_counted(
    run: Door, given: tuple[str, ...], model: int, state: int
) -> None:
    result = run(*given, "nodes=6", "evaluate_clients=none", "clients_per_round=4")
    d = 64 * 8 + 8 + 8 * 10 + 10
    header = 128  # of a numpy array
    for record in result.records[1:]:
        for side, key in (("down", "theta"), ("up", "delta")):
            told = record["bytes"][side]
            assert told["model"] == 4 * model * (4 * d + header + len(key))
            assert told["state"] == 4 * state * (4 * d + header + len("control"))
            assert 0 < told["metrics"] < 4 * 600
    total = sum(sum(r["bytes"]["up"].values()) for r in result.records[1:])
    assert result.summary["bytes_up"] == total


def test_one_message_for_a_node_whatever_it_hosts(run: Door) -> None:
    one, six = (
        run("nodes=1", "clients_per_round=6"),
        run("nodes=6", "clients_per_round=6"),
    )
    for a, b in zip(one.records[1:], six.records[1:], strict=True):
        assert 6 * a["bytes"]["up"]["model"] == b["bytes"]["up"]["model"]
    assert one.records[1]["gradients"] == six.records[1]["gradients"] > 0


def test_zero_rounds_leave_the_initial_model(run: Door) -> None:
    result = run("rounds=0")
    assert [r["round"] for r in result.records] == [0]
    theta, _ = objective(load(QUICK), setting(QUICK).dataset).initial()
    layout = objective(load(QUICK), setting(QUICK).dataset).layout
    for name, tensor in layout.unflatten(theta).items():
        assert torch.equal(result.model[name], tensor)


def test_what_comes_too_late_is_forgotten(tmp_path: Path) -> None:
    grid = LocalGrid(to_run_config([*QUICK, f"output_dir={tmp_path}"]), 2, 1)
    nodes = list(grid.get_node_ids())

    def asked() -> list[Message]:
        return [Message(RecordDict(), n, "query.roll_call") for n in nodes]

    assert list(grid.send_and_receive(asked(), timeout=0)) == []
    (worker,) = grid._workers
    assert worker.busy is not None and not worker.waiting  # the second is never begun
    # One process works in turn, so the late reply came before these.
    assert len(list(grid.send_and_receive(asked(), timeout=60))) == 2
    assert grid._late == set() and grid._replies == {}


def test_a_dead_worker_costs_a_round_and_no_more(tmp_path: Path) -> None:
    given = [
        *QUICK,
        "processes=2",
        "rounds=4",
        f"output_dir={tmp_path}",
        "client_memory=directory",
    ]
    seen: list[Mapping[str, Any]] = []

    def kill(record: Mapping[str, Any]) -> tuple[bool, dict[str, float]]:
        from app import local_grid

        seen.append(record)
        if record["round"] == 1:
            local_grid._WORKERS[0].process.kill()
            local_grid._WORKERS[0].process.join()
        return False, {}

    summary = run_local(given, [kill], lambda _: None)
    assert summary["rounds"] == 4
    assert "died" in " ".join(seen[1]["clients"]["failed"].values())
    assert seen[2]["clients"]["failed"] == seen[3]["clients"]["failed"] == {}
