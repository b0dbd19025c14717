"""Personalized runs: hyper-gradients through messages, and what clients make of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Result, grid_of
from flwr.app import ArrayRecord, Message
from torch import Tensor

from app import durable, hyper_node, hypers, outer, rounds
from app import run as app_run
from app.best import BEST
from app.errors import UserError
from app.exchange import exchange
from app.host import Samples
from app.hypers import own_of
from app.local_grid import LocalGrid
from app.rounds import Rounds
from app.run import Run
from strategies import hyper_products
from strategies.bilevel import Bilevel
from strategies.conjugate import solve
from strategies.families import Own
from strategies.hyper_client import Member
from strategies.hyper_wire import SCORES
from strategies.hypergrad import HGP, hypergradients
from strategies.hyperproblem import Lambdas, Problem, Products, conjugate_gradients
from strategies.network import Network
from strategies.personal_objective import PersonalObjective
from strategies.randomness import permutations
from strategies.relay import Relay
from strategies.topology import complete
from strategies.wire import WORST, decode, pack

Door = Callable[..., Result]
F64 = torch.float64
#: Six clients with mixed classes and a small network, in float64.
PLAIN = (
    "partition=dirichlet",
    "partition.alpha=1",
    "dtype=float64",
    "clients_per_round=6",
    "client_validation=0.25",
    "client_test=0.2",
    "processes=0",
)
GIVEN = (*PLAIN, "personal=hgp", "personal.every=1")
ALL = (
    "personal.families=[class_weights,sample_weights,logit_weights,mixture,weight_decay,"
    "interpolation,feature_scales]"
)
THREE = "personal.families=[sample_weights,class_weights,interpolation]"
SHARED = "personal.independent=false"
MIXED = "personal.families=[mixture]"
NETWORK = ("strategy=pushsum", "topology=stochastic_directed", "strategy.judge=own")


#: What a round of training carries: the model, and what a client's report is made of.
TRAINING = {
    *("theta", "delta", "busy", "engine", "evaluated", "gradients", "lost", "probe"),
    *("samples", "seconds", "steps", "train_loss", "trained"),
}
#: What of a record of an outer step counts messages.
COUNTED = ("messages", "bytes", "exchanges", "cost")


class Kept:
    """Makes the grid of a run, and reads afterwards what its clients remember."""

    def __call__(self, overrides: Sequence[str]) -> LocalGrid:
        self.grid = grid_of(overrides, 2)
        return self.grid

    def memory(self, k: int, kind: str = "hyper") -> dict[str, Tensor]:
        """Return the newest version of what client k keeps of a kind."""
        found: dict[int, ArrayRecord] = {}
        for context in self.grid._contexts.values():
            for key, record in context.state.items():
                name, client, version = key.split(".")
                if name == kind and client == str(k):
                    assert isinstance(record, ArrayRecord)
                    found[int(version)] = record
        newest = found[max(found)]
        return {
            n: torch.from_numpy(decode(a, len(a.numpy()))) for n, a in newest.items()
        }

    def all(self, name: str, count: int = 6) -> list[Tensor]:
        return [self.memory(k)[name] for k in range(count)]


class Seen:
    """Notes where the runs' estimates begin, and that they leave training's mass alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.models: list[Tensor] = []
        whole = Bilevel.estimate

        def estimate(level: Bilevel, round_: int, best: Any) -> Any:
            federation = level.federation
            if not isinstance(federation, Relay):
                self.models.append(federation.server["theta"].expand(6, -1).clone())
                return whole(level, round_, best)
            state = federation.carried["model"]
            x, w = state.x.copy(), state.w.copy()
            self.models.append(torch.from_numpy(state.z().copy()))
            told = whole(level, round_, best)
            assert (state.x == x).all()
            assert (state.w == w).all()
            return told

        monkeypatch.setattr(Bilevel, "estimate", estimate)


def watch(monkeypatch: pytest.MonkeyPatch, module: Any, names: set[str]) -> None:
    """Collect the names of what a module's messages carry: the vectors and the reports."""

    def watched(grid: Any, messages: Any, timeout: float) -> Any:
        messages = list(messages)
        replies = exchange(grid, messages, timeout)
        for message in (*messages, *replies):
            for key, part in message.content.items():
                names.update(part if isinstance(part, ArrayRecord) else ())
                names.update(part if key == "report" else ())
        return replies

    monkeypatch.setattr(module, "exchange", watched)


# Through messages as in one process.


@pytest.mark.parametrize(
    ("given", "batch"),
    [
        ((*NETWORK, "personal.pushes=2"), 0),
        ((*NETWORK, "topology=self_loop"), 0),
        ((*NETWORK, "topology=directed_ring", "personal.pushes=3"), 8),
        (("strategy=fedavg",), 0),
        (("strategy=feddyn", "strategy.weighting=samples"), 8),
        (("strategy=fedopt", "strategy.momentum=0.3"), 8),
        (("strategy=fedopt_hyper",), 8),
        (("strategy=fedavg", "strategy.weighting=uniform", SHARED, ALL), 8),
    ],
    ids=[
        "network",
        "alone",
        "ring, batches",
        "server",
        "feddyn",
        "fedopt",
        "fedopt_hyper",
        "shared batches",
    ],
)
def test_messages_give_the_estimate_of_one_process(
    run: Door, monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...], batch: int
) -> None:
    seen, kept, tasks = Seen(monkeypatch), Kept(), list[Run]()
    rest = ("rounds=2", "personal.depth=4", "personal.alpha=0.3", "local.batch=20")
    decay = f"personal.batch={batch}", "optimizer.weight_decay=0.01"
    crossed, trained = set[str](), set[str]()
    watch(monkeypatch, outer, crossed)
    watch(monkeypatch, rounds, trained)
    watch(monkeypatch, app_run, trained)
    result = run(*GIVEN, *given, *rest, *decay, grid=kept, edit=tasks.append)
    (task,), (x,), n = tasks, seen.models, 6
    level, goal, federation = task.outer, task.objective, task.federation
    assert level
    # Of a client's own only what it measures is told, and how many gradients its own model took.
    alone = {"alone"} if ALL in given else set()
    assert crossed == {"theta", "z", "u", "clients", "lost", "scored", *SCORES, *alone}
    own = {"gradient"} if "strategy=fedopt_hyper" in given else set()
    assert {n for n in trained if not n.startswith("eval_")} == TRAINING | own
    assert isinstance(goal, PersonalObjective)
    how = level.level.how
    models = [kept.memory(k, "alone")["theta"] if alone else None for k in range(n)]
    owns = [own_of(task.setting.samples(k), how, models[k]) for k in range(n)]
    weights = torch.tensor([len(own.y) for own in owns], dtype=F64)
    if "strategy.weighting=uniform" in given:
        weights = torch.ones(n, dtype=F64)

    def draw(purpose: str, m: int) -> list[Tensor]:
        address = f"hypergrad {purpose}", how.exchanges + m
        drawn = [permutations(0, *address, [k], len(owns[k].y))[0] for k in range(n)]
        return [rows[:batch] for rows in drawn]

    lambdas = tuple(goal.zeros(len(own.y)) for own in owns)
    whole = replace(goal.task, decay=0.01)
    plain = whole.problem(owns, x, lambdas, draw if batch else None)

    def inner(x: Tensor, lambdas: Lambdas, drawn: Any) -> Tensor:
        return weights / weights.mean() * plain.inner(x, lambdas, drawn)

    problem = Problem(inner, plain.outer, x, lambdas, plain.draw)
    links = Network(n, 0, complete(n, 0))
    if isinstance(federation, Relay):
        links = federation.network
    expected = hypergradients(problem, links, how, first=1)
    found = kept.all("v")
    for a, b in zip(found, expected.v, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    assert min(float(v.abs().max()) for v in found) > 1e-4
    told = result.records[1]["personal"]
    if isinstance(federation, Relay):
        assert told["link_messages"] == expected.messages
        assert told["link_bytes"] == expected.bytes
        assert (expected.messages == 0) == ("topology=self_loop" in given)
    # Adam's first step goes by its whole rate against the sign, but for what is not admitted.
    for lam, v, own in zip(kept.all("l"), found, owns, strict=True):
        large, there = v.abs() > 1e-5, whole.admitted(-0.1 * v.sign(), own)
        assert torch.allclose(lam[large], there[large], rtol=1e-2)


#: A convex problem, to be solved exactly; clients weigh as many as they have samples.
SOLVED = (
    *("strategy=fedavg", "strategy.weighting=samples", "model.hidden=[]"),
    *("personal.damping=0.05", "personal.depth=60", "personal.alpha=0.3", "rounds=2"),
)
CG = "personal.method=conjugate_gradients"


def damped(task: Run, x: Tensor) -> Problem:
    """Return what the six clients of a run solve at their models, weights and damping included."""
    goal, owns = task.objective, [task.setting.samples(k) for k in range(6)]
    assert isinstance(goal, PersonalObjective) and task.outer
    own = [own_of(samples, task.outer.level.how) for samples in owns]
    plain = goal.task.problem(own, x, (goal.zeros(0),) * 6)
    sizes = torch.tensor([len(samples.train) for samples in owns], dtype=F64)

    def inner(x: Tensor, lambdas: Lambdas, drawn: Any) -> Tensor:
        costs = plain.inner(x, lambdas, drawn) + 0.025 * x.square().sum(1)
        return sizes / sizes.mean() * costs

    return replace(plain, inner=inner)


@pytest.mark.parametrize("method", ["push", "conjugate_gradients"])
def test_a_damped_estimate_with_a_server_is_that_of_one_process(
    run: Door, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    seen, kept, tasks = Seen(monkeypatch), Kept(), list[Run]()
    given = (*GIVEN, *SOLVED, f"personal.method={method}")
    result = run(*given, grid=kept, edit=tasks.append)
    problem = damped(tasks[0], seen.models[0])
    if method == "push":
        series = HGP(depth=60, alpha=0.3)
        expected = hypergradients(problem, Network(6, 0, complete(6, 0)), series)
    else:
        expected = conjugate_gradients(problem, steps=60)
        told = result.records[1]["personal"]
        # Those, one to keep the best, and the step.
        assert told["exchanges"] == expected.exchanges + 2 < 40
        assert told["residual"] < 1e-10
    for found, v in zip(kept.all("v"), expected.v, strict=True):
        torch.testing.assert_close(found, v, rtol=0, atol=1e-10)
        assert float(found.abs().max()) > 1e-4


def test_conjugate_gradients_begin_anew_without_those_who_fall_silent(
    run: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, kept, tasks = Seen(monkeypatch), Kept(), list[Run]()
    monkeypatch.setattr(outer, "exchange", losing("1.curvature.3"))
    result = run(*GIVEN, *SOLVED, CG, grid=kept, edit=tasks.append)
    told = result.records[1]["personal"]
    assert told["moved"] == 3 and told["residual"] < 1e-10
    assert set(told["failed"].values()) == {"no reply before the deadline"}
    gone = [int(k) for k in told["failed"]]
    there = [k for k in range(6) if k not in gone]
    assert [k for k, lam in enumerate(kept.all("l")) if not lam.any()] == gone
    # The others' Hessians, and everybody's slope.
    work = Products(damped(tasks[0], seen.models[0]))
    slopes, by_l = work.outer()

    def product(p: Tensor) -> Tensor:
        return work.hessian(p.expand(6, -1).contiguous(), "", 0)[there].sum(0) / 6

    y = solve(product, slopes.mean(0), 60).y
    cross = work.cross(y.expand(6, -1).contiguous(), "", 0)
    for k in there:
        v = (by_l[k] - cross[k]) / 6
        torch.testing.assert_close(kept.memory(k)["v"], v, rtol=0, atol=1e-10)


def test_conjugate_gradients_take_no_step_where_the_hessian_is_not_positive(
    run: Door,
) -> None:
    kept = Kept()
    given = (*GIVEN, "strategy=fedavg", CG, "personal.depth=60", "rounds=2")
    told = run(*given, grid=kept).records[1]["personal"]
    assert told["moved"] == 0
    (why,) = told["warnings"]
    assert "no step, the mean Hessian is not positive definite" in why
    assert "raise personal.damping" in why
    assert not any(lam.any() for lam in kept.all("l"))


def test_too_few_iterations_are_told(run: Door) -> None:
    few = run(*GIVEN, *SOLVED, CG, "personal.depth=1").records[1]["personal"]
    assert few["moved"] == 6 and few["residual"] > 0.1
    (why,) = few["warnings"]
    assert "after 1 iterations" in why and "raise personal.depth" in why


def test_a_step_that_fails_leaves_the_best_to_return_to(
    run: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, calls = Kept(), list[int]()
    judged(monkeypatch, {1: 0.1, 2: 0.9, 3: 0.8, 4: 0.2}, 61)
    had = dict[int, list[Tensor]]()

    def some(product: Any, g: Tensor, steps: int) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("it is not positive")
        return solve(product, g, steps)

    def watch(record: dict[str, Any]) -> Any:
        had[record["round"]] = kept.all("l")
        return False, {}

    monkeypatch.setattr(hyper_products, "solve", some)
    result = run(*GIVEN, *SOLVED, CG, "rounds=4", grid=kept, callbacks=[watch])
    assert result.summary["personal"]["round"] == 2
    moved = [r["personal"]["moved"] for r in result.records[1:4]]
    assert moved == [6, 0, 6]
    for final, first, second in zip(kept.all("l"), had[1], had[3], strict=True):
        assert torch.equal(final, first)
        assert not torch.equal(final, second)


def test_an_estimate_after_a_step_sees_what_each_client_has(
    run: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, kept, tasks = Seen(monkeypatch), Kept(), list[Run]()
    had = dict[int, list[Tensor]]()

    def watch(record: dict[str, Any]) -> Any:
        had[record["round"]] = kept.all("l")
        return False, {}

    given = "strategy=fedavg", "strategy.weighting=uniform", "personal.depth=3", THREE
    short = "rounds=3", "local.batch=0", "personal.alone=3", "personal.power_steps=0"
    own = {"grid": kept, "edit": tasks.append, "callbacks": [watch]}
    records = run(*GIVEN, *given, *short, **own).records
    (task,) = tasks
    goal = task.objective
    assert task.outer
    assert isinstance(goal, PersonalObjective)
    how, owns, first = task.outer.level.how, [], goal.initial()[0]
    for k in range(6):
        batch, model = own_of(task.setting.samples(k), how, first), first

        def plain(theta: Tensor, own: Own = batch) -> Tensor:
            return goal.task.inner(theta, goal.zeros(len(own.y)), own)

        for _ in range(3):  # alone: as in a round of so many epochs
            model = model - 0.1 * torch.func.grad(plain)(model)
        found = kept.memory(k, "alone")["theta"]
        torch.testing.assert_close(found, model, rtol=0, atol=1e-12)
        owns.append(replace(batch, local=model))
    lambdas = tuple(had[1])
    assert len({len(lam) for lam in lambdas}) > 1
    assert min(float(lam.abs().max()) for lam in lambdas) > 0.05
    problem = goal.task.problem(owns, seen.models[1], lambdas)
    # So does the training between the two estimates, a step of all samples, and what they measure.
    start = seen.models[0].clone().requires_grad_()
    (slopes,) = torch.autograd.grad(problem.inner(start, lambdas, None).sum(), start)
    after = seen.models[0][0] - 0.1 * slopes.mean(0)
    torch.testing.assert_close(seen.models[1][0], after, rtol=0, atol=1e-12)
    told = records[2]["personal"]
    cost = float(problem.outer(problem.x, lambdas).mean())
    assert told["outer_cost_mean"] == pytest.approx(cost, rel=1e-12)
    expected = hypergradients(problem, Network(6, 0, complete(6, 0)), how)
    for a, b in zip(kept.all("v"), expected.v, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


# What personalization does to a run.


def unpersonalized(result: Result) -> list[dict[str, Any]]:
    """Return the records of a run without what only personalized runs have."""
    free = ("seconds", "personal", "bytes", "gradients", "callbacks")
    return [{k: v for k, v in r.items() if k not in free} for r in result.records]


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_nothing_of_its_own_is_the_plain_run_bit_for_bit(
    run: Door, engine: str
) -> None:
    families = ALL.replace("mixture,", "")
    own = "personal=hgp", families, "personal.every=0"
    both = *PLAIN, "strategy=feddyn", f"engine={engine}", "rounds=2"
    plain, personal = run(*both), run(*both, *own)
    assert torch.equal(plain.theta, personal.theta)
    assert unpersonalized(plain) == unpersonalized(personal)
    last = personal.records[-1]["personal"]
    assert last["moved"] == last["step"] == 0
    assert last["accuracy_mean"] == personal.summary["clients"]["accuracy_mean"]


def alike(task: Run) -> None:
    """Give all clients the samples of the first."""
    cut = task.setting._cut
    cut |= dict.fromkeys(range(6), task.setting.samples(0))


def opposed(task: Run) -> None:
    """Let half of the clients call small and large 0 and 1, and the others 2 and 3."""
    kept = [task.setting.samples(k) for k in range(6)]
    y = (kept[0].train.y > 4).long()
    for samples in kept[3:]:
        for part in (samples.train, samples.test, samples.validation):
            y[part.index] += 2
    for k, samples in enumerate(kept):
        parts = (samples.train, samples.test, samples.validation)
        task.setting._cut[k] = Samples(*(replace(part, y=y) for part in parts))


@pytest.mark.parametrize("strategy", [("strategy=fedavg",), NETWORK[:1]])
def test_identical_clients_stay_identical(run: Door, strategy: tuple[str, ...]) -> None:
    kept = Kept()
    network = ("topology=complete",) if strategy[0] == "strategy=pushsum" else ()
    given = [*GIVEN, *strategy, *network, "local.batch=0", "engine=loop", "seed=7"]
    run(*given, "rounds=4", "personal.depth=2", ALL, grid=kept, edit=alike)
    first, *others = kept.all("l")
    assert float(first.abs().max()) > 0.1
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=1e-9)


def test_two_opposed_groups_separate_and_gain(run: Door) -> None:
    kept = Kept()
    own = "personal=hgp", "personal.families=[logit_weights]", "personal.lr=0.2"
    depth = "personal.depth=2", "personal.power_steps=0", "model.hidden=[32]"
    rounds = "rounds=9", "partition.alpha=100", "evaluate_every=9", "local.batch=10"
    given = [*PLAIN, "strategy=fedavg", *rounds, *own, *depth]
    found = run(*given, "personal.every=2", grid=kept, edit=opposed)
    without = run(*given, "personal.every=0", edit=opposed)
    names = torch.stack([lam[:2].mean() - lam[2:4].mean() for lam in kept.all("l")])
    assert float(names[:3].min()) > 0.5
    assert float(names[3:].max()) < -0.5
    gain = [r.summary["personal"]["accuracy_mean"] for r in (found, without)]
    assert gain[0] > gain[1] + 0.3
    assert gain[0] > 0.75


def test_what_an_estimate_sends_counts_in_the_runs_total(run: Door) -> None:
    given = [*PLAIN, "strategy=fedavg", "rounds=4", "nodes=1"]
    plain = run(*given).summary
    own = ["personal=hgp", "personal.every=3", "personal.depth=4"]
    result = run(*given, *own, "personal.power_steps=0")
    vector = 8 * len(result.theta)
    record, last = result.records[3], result.records[4]
    cost = record["personal"]["cost"]
    assert cost["messages"] == 5 and "cost" not in last["personal"]
    sent = {k: sum(record["bytes"][k].values()) for k in ("down", "up")}
    mine = sum(record["bytes"][k]["hyper"] for k in ("down", "up"))
    assert cost["bytes"] == mine / (sum(sent.values()) - mine)
    # Down to the node go M + 1 models, M vectors z and a model to measure at the end; M sums of u
    # come up.
    for side, vectors in (("bytes_down", 10), ("bytes_up", 4)):
        more = result.summary[side] - plain[side]
        assert vectors * vector <= more < (vectors + 1) * vector


@pytest.mark.parametrize("start", ["warm", "cold"])
def test_a_resumed_run_equals_one_that_never_stopped(
    run: Door, tmp_path: Any, start: str
) -> None:
    strategy = (*NETWORK, THREE) if start == "cold" else ("strategy=feddyn",)
    given = [*PLAIN, *strategy, "personal=hgp", "personal.every=2", "rounds=7"]
    given += [f"personal.start={start}", "personal.depth=2", "checkpoint_every=2"]
    given += ["personal.alpha=1000"]  # of which both tell in the end
    straight = run(*given, "name=full")

    def die(record: Any) -> Any:
        if record["round"] == 5:
            raise RuntimeError("killed")
        return False, {}

    with pytest.raises(RuntimeError, match="killed"):
        run(*given, "name=half", callbacks=[die])
    resumed = run(*given, f"resume={tmp_path}/runs/half")
    assert torch.equal(resumed.theta, straight.theta)

    def told(result: Result) -> list[Any]:
        free = ("seconds", "callbacks")
        return [{k: v for k, v in r.items() if k not in free} for r in result.records]

    assert told(resumed) == told(straight)
    assert resumed.summary["personal"] == straight.summary["personal"]
    assert len(straight.summary["personal"]["warnings"]) == 1
    assert straight.records[-1]["personal"]["step"] == 3

    ours, theirs = held(resumed.path), held(straight.path)
    assert ours.keys() == theirs.keys() == set("012345")
    for k, memory in ours.items():
        for what, vector in memory.items():
            assert torch.equal(vector, theirs[k][what])


def judged(
    monkeypatch: pytest.MonkeyPatch, accuracy: dict[int, float], depth: int = 1
) -> None:
    """Let all clients have these validation accuracies after rounds."""
    whole = hyper_node._scores

    def scores(node: Any, client: Member, order: Any) -> dict[str, float]:
        found = whole(node, client, order)
        if found:
            found["choosing_accuracy"] = accuracy[order["at"] // (depth + 2)]
        return found

    monkeypatch.setattr(hyper_node, "_scores", scores)


def held(path: Path) -> dict[str, dict[str, Tensor]]:
    """Return the newest version of what each client of a run keeps."""
    files = (path / "clients" / "hyper").rglob("*.safetensors")
    newest = {f.parent.name: f for f in sorted(files)}
    return {k: durable.read(f)[0] for k, f in newest.items()}


@pytest.mark.parametrize(
    ("short", "best", "start", "saved"),
    [(4, 4, "warm", 2), (4, 2, "cold", 2), (3, 2, "warm", 1), (3, 2, "warm", 2)],
)
def test_a_run_that_goes_on_after_its_end_equals_the_longer_run(
    run: Door,
    monkeypatch: pytest.MonkeyPatch,
    short: int,
    best: int,
    start: str,
    saved: int,
) -> None:
    # The last round of the short run is its best, but for the second.
    judged(monkeypatch, {2: 0.3, 3: 0.9, 4: 0.5 if best == 4 else 0.1, 5: 0.2})
    given = [*PLAIN, "strategy=feddyn", "personal=hgp", "personal.every=2"]
    given += ["personal.depth=1", "personal.power_steps=0", f"personal.start={start}"]
    given += [f"checkpoint_every={saved}", "evaluate_clients=none", "nodes=1"]
    straight = run(*given, "rounds=5", "name=full")
    first = run(*given, f"rounds={short}", "name=half")
    told, there = first.summary["personal"], held(first.path)
    assert told["round"] == (best if short == 4 else 3)
    assert durable.read(first.path / BEST)[1] == {"round": told["round"]}
    longer = run(*given, "rounds=5", f"resume={first.path}")
    assert torch.equal(longer.theta, straight.theta)
    assert unpersonalized(longer) == unpersonalized(straight)
    for ours, theirs in zip(longer.records, straight.records, strict=True):
        if ours["round"] == short == 3:
            continue  # has still what was measured there, where the longer run measures nothing
        for what in ("personal", "bytes", "gradients"):
            assert ours.get(what) == theirs.get(what), (ours["round"], what)
    assert longer.summary["personal"] == straight.summary["personal"]
    assert straight.summary["personal"]["round"] == best
    files = [durable.read(r.path / BEST) for r in (longer, straight)]
    assert files[0][1] == files[1][1] == {"round": best}
    assert torch.equal(files[0][0]["theta"], files[1][0]["theta"])
    ours, theirs = held(longer.path), held(straight.path)
    for k, memory in ours.items():
        for what, vector in memory.items():
            assert torch.equal(vector, theirs[k][what])
        if short == best:  # what the short run ended with
            assert torch.equal(memory["l"], there[k]["l"])
            assert float(memory["l"].abs().max()) > 0.09


@pytest.mark.parametrize("every", [4, 5])
def test_the_best_model_is_the_one_that_the_checkpoint_knew(
    run: Door, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, every: int
) -> None:
    given = [*PLAIN, "strategy=fedavg", "personal=hgp", "personal.every=2", "nodes=1"]
    given += ["personal.depth=1", "personal.power_steps=0", "evaluate_clients=none"]
    given += ["rounds=7", f"checkpoint_every={every}"]

    def die(record: Any) -> Any:
        if record["round"] == 7:
            raise RuntimeError("killed")
        return False, {}

    judged(monkeypatch, {2: 0.3, 4: 0.1, 6: 0.5})
    with pytest.raises(RuntimeError, match="killed"):
        run(*given, "name=one", callbacks=[die])
    place = tmp_path / "runs" / "one"
    assert durable.read(place / BEST)[1] == {"round": 6}
    judged(monkeypatch, {2: 0.3, 4: 0.1, 6: 0.2, 7: 0.1})
    # Others tell now that round 6 is not so good: what was best at the checkpoint remains.
    result = run(*given, f"resume={place}")
    assert result.summary["personal"]["round"] == 2
    found, header = durable.read(place / BEST)
    assert header == {"round": 2}
    straight = run(*given, "name=straight")
    assert torch.equal(found["theta"], durable.read(straight.path / BEST)[0]["theta"])


def test_a_step_that_was_left_out_is_entered_once(run: Door) -> None:
    given = [*PLAIN, "strategy=fedavg", "personal=hgp", "personal.every=1", "nodes=1"]
    given += ["personal.depth=1", "personal.power_steps=0", "checkpoint_every=1"]
    first = run(*given, "rounds=2")

    def die(record: Any) -> Any:
        if record["round"] == 3:
            raise RuntimeError("killed")
        return False, {}

    again = [*given, "rounds=4", f"resume={first.path}"]
    with pytest.raises(RuntimeError, match="killed"):
        run(*again, callbacks=[die])
    records = run(*again).records
    assert [r["personal"]["step"] for r in records[1:]] == [1, 2, 3, 3]
    assert records[2]["gradients"] == records[3]["gradients"]


@pytest.mark.parametrize("inner", [("strategy=feddyn",), NETWORK])
def test_inner_training_that_begins_anew_repeats_itself(
    run: Door, inner: tuple[str, ...]
) -> None:
    # With a rate of almost nothing the second inner training is the first.
    given = [*PLAIN, *inner, "personal=hgp", "personal.start=cold"]
    few = "personal.every=2", "rounds=4", "personal.depth=1", "personal.lr=1e-300"
    still = () if inner[0] == "strategy=feddyn" else ("topology=complete",)
    records = run(*given, *few, *still).records
    # Nobody judges the model that the second begins with.
    told = ["accuracy_mean" in record["clients"] for record in records[1:]]
    assert told == [True, True, False, True]
    for first, second in pairwise([records[1:3], records[3:5]]):
        assert [r["loss"] for r in first] == [r["loss"] for r in second]


def test_engines_agree_on_what_clients_have_of_their_own(run: Door) -> None:
    given = [*GIVEN, "strategy=fedprox", ALL, "rounds=3", "personal.depth=2"]
    given += ["personal.power_steps=0", "evaluate_clients=none"]
    loop, vmap = (run(*given, f"engine={e}").theta for e in ("loop", "vmap"))
    assert float((loop - run(*given, "personal.every=0").theta).abs().max()) > 1e-3
    torch.testing.assert_close(vmap, loop, rtol=0, atol=1e-10)


# What goes wrong.


def test_an_alpha_that_is_too_large_is_told_and_training_samples_may_serve(
    run: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(
        hyper_products, "log", lambda _, text, *of: told.append(text % of)
    )
    given = "strategy=fedavg", "personal.outer=train", "client_validation=0"
    result = run(*GIVEN, *given, "personal.alpha=1000", "personal.depth=1", "rounds=2")
    first, last = (r["personal"] for r in result.records[1:])
    assert any("alpha=1000 is too large" in line for line in told)
    assert first["largest_eigenvalue"] > 0
    assert last["largest_eigenvalue"] is None  # looked for once
    assert first["moved"] == 6
    assert first["outer_cost_mean"] == pytest.approx(first["train_loss_mean"])
    assert not any("validation" in name for name in first)
    assert last["best"] == result.summary["personal"]["round"]
    (warning,) = first["warnings"]
    assert "alpha=1000 is too large" in warning
    assert last["warnings"] == []
    assert result.summary["personal"]["warnings"] == [warning]


def test_validation_samples_have_the_outer_cost_and_choose_the_step(
    run: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = hyper_node._scores

    def scores(node: Any, client: Member, order: Any) -> dict[str, float]:
        round_ = order["at"] // client.how.exchanges - 1
        seen = {"accuracy": (0.1, 0.2, 0.8, 0.9)[round_]}
        seen |= {"choosing_accuracy": (0.5, 0.7, 0.6, 0.4)[round_]}
        found = whole(node, client, order)
        return found and found | seen

    monkeypatch.setattr(hyper_node, "_scores", scores)
    given = "personal.depth=1", "personal.power_steps=0", "rounds=4"
    result = run(*GIVEN, "strategy=fedavg", *given)
    for told in (r["personal"] for r in result.records[1:]):
        cost = told["outer_cost_mean"]
        assert cost == pytest.approx(told["validation_loss_mean"], rel=1e-12)
        assert abs(cost - told["loss_mean"]) > 1e-3  # that of the test samples
    assert result.summary["personal"]["round"] == 2
    assert result.summary["personal"]["validation_accuracy_mean"] == pytest.approx(0.7)


def test_a_hyper_gradient_that_is_not_finite_leaves_its_client_as_it_was(
    run: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, whole = Kept(), Member.push

    def push(member: Member, z: Tensor, m: int) -> Any:
        u, memory = whole(member, z, m)
        bad = member.id == 2 and m == 2
        return (u * float("nan"), memory) if bad else (u, memory)

    monkeypatch.setattr(Member, "push", push)
    result = run(*GIVEN, "strategy=fedavg", "rounds=2", grid=kept)
    told = result.records[1]["personal"]
    assert told["moved"] == 5
    assert "not finite" in told["failed"]["2"]
    for k, lam in enumerate(kept.all("l")):
        assert float(lam.abs().max()) == (0 if k == 2 else pytest.approx(0.1, rel=0.01))
    assert result.records[2]["clients"]["failed"] == {}


def test_who_diverges_stays_in_the_means_as_the_worst(
    run: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, start = hyper_node.scored, Member.start

    def scored(trainer: Any, predict: Any, node: Any, k: int) -> dict[str, Any]:
        found = whole(trainer, predict, node, k)
        bad = {n: float("nan") for n in found if n not in ("samples", "held_out")}
        return found | bad if k == 2 else found

    def started(member: Member) -> Any:
        u, memory = start(member)
        return (u * float("nan"), memory) if member.id == 2 else (u, memory)

    monkeypatch.setattr(hyper_node, "scored", scored)
    monkeypatch.setattr(Member, "start", started)
    given = ("strategy=fedavg", "min_replies=5", "personal.depth=1", "rounds=2")
    first, last = (r["personal"] for r in run(*GIVEN, *given).records[1:])
    assert first["moved"] == 5
    assert "not finite" in first["failed"]["2"]
    assert last["failed"] == {}
    for told in (first, last):
        assert told["loss_mean"] == pytest.approx(WORST / 6)
        assert told["accuracy_mean"] < 5 / 6
        assert told["best"] is not None


def test_a_round_in_which_some_do_not_tell_is_not_the_best(
    run: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged(monkeypatch, {1: 0.1, 2: 0.5, 3: 0.9})
    monkeypatch.setattr(outer, "exchange", losing("1.start.0", "3.look.0"))
    given = (*GIVEN, "strategy=fedavg", "personal.depth=1", "personal.power_steps=0")
    result = run(*given, "rounds=3", "evaluate_clients=none")
    assert [r["personal"]["best"] for r in result.records[1:]] == [None, 2, 2]
    assert any("no round is the best yet" in line for line in result.lines)


def test_how_clients_return_to_the_best_is_told(
    run: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged(monkeypatch, {1: 0.9, 2: 0.1})
    kept, at = Kept(), outer.exchange
    given = (*GIVEN, "strategy=fedavg", "personal.depth=1", "personal.power_steps=0")
    given = (*given, "rounds=2", "evaluate_clients=none")
    monkeypatch.setattr(outer, "exchange", losing("2.settle.2"))
    result = run(*given, grid=kept)
    told = result.summary["personal"]
    assert told["round"] == 1
    settled = told["settled"]
    why = "no reply before the deadline"
    assert settled["failed"] == dict.fromkeys("135", why)
    assert f"client 3 did not return to round 1: {why}" in result.lines
    assert settled["messages"] == 3  # two nodes, one answer
    for side in ("down", "up"):
        sent = [sum(r["bytes"][side].values()) for r in result.records[1:]]
        assert settled["bytes"][side] > 0
        assert result.summary[f"bytes_{side}"] == sum(sent) + settled["bytes"][side]

    def forget(record: dict[str, Any]) -> Any:
        for context in kept.grid._contexts.values():
            for key in [k for k in context.state if k.startswith("hyper.1.")]:
                if record["round"] == 2:
                    del context.state[key]
        return False, {}

    monkeypatch.setattr(outer, "exchange", at)
    with pytest.raises(UserError, match=r"client 1: Lost.*lost_state=reset"):
        run(*given, "lost_state=fail", grid=kept, callbacks=[forget])


def test_a_clients_decay_stays_where_its_training_has_an_end(run: Door) -> None:
    kept = Kept()
    given = [*GIVEN, "strategy=fedavg", "personal.families=[weight_decay]"]
    given += ["optimizer.weight_decay=0.01", "personal.depth=1", "rounds=3"]
    # A model that knows which class is right wants to grow.
    given += ["partition.alpha=100", "local.batch=10", "personal.outer=train"]
    given += ["local.epochs=3", "optimizer.lr=0.3"]
    run(*given, "personal.power_steps=0", "evaluate_clients=none", grid=kept)
    found = torch.cat(kept.all("l"))
    assert float(found.min()) == -0.01


def test_stopped_after_its_best_step_it_returns_to_what_validation_saw(
    run: Door,
) -> None:
    kept, steps = Kept(), list[list[Tensor]]()

    def stop(record: dict[str, Any]) -> Any:
        steps.append(kept.all("best"))
        return record["round"] == 2, {}

    given = ("strategy=fedavg", "personal.depth=2", "rounds=9")
    result = run(*GIVEN, *given, grid=kept, callbacks=[stop])
    assert result.summary["personal"]["round"] == 2, "else this shows nothing"
    for after, best in zip(kept.all("l"), steps[-1], strict=True):
        assert torch.equal(after, best)


@pytest.mark.parametrize("inner", [("strategy=feddyn",), NETWORK])
@pytest.mark.parametrize(("start", "at"), [("cold", 4), ("cold", 3), ("warm", 5)])
def test_a_run_that_stops_early_keeps_what_it_has_trained(
    run: Door, inner: tuple[str, ...], start: str, at: int
) -> None:
    given = (*PLAIN, *inner, "personal=hgp", "personal.every=2", "personal.depth=1")
    given = (*given, "personal.power_steps=0", f"personal.start={start}")
    stopped = run(*given, "rounds=9", callbacks=[lambda r: (r["round"] == at, {})])
    short = run(*given, f"rounds={at}")
    assert torch.equal(stopped.theta, short.theta)
    assert "personal" in stopped.records[-1]
    for name in ("accuracy_mean", "choosing_accuracy_mean", "round"):
        ours, theirs = (r.summary["personal"].get(name) for r in (stopped, short))
        assert ours == theirs, name
    # Between two steps it ends as the shorter run does.
    if at % 2:
        assert stopped.summary["personal"] == short.summary["personal"]
        assert stopped.summary["clients"] == short.summary["clients"]


def test_no_training_sample_has_a_negative_weight(
    run: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged(monkeypatch, {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4}, depth=2)
    kept = Kept()
    given = [*GIVEN, "strategy=fedavg", "personal.families=[sample_weights]"]
    given += ["personal.lr=0.9", "personal.depth=2", "personal.power_steps=0"]
    run(*given, "rounds=4", "evaluate_clients=none", grid=kept)
    assert float(torch.cat(kept.all("l")).min()) == -1


@pytest.mark.parametrize(
    ("numbers", "why"), [(float("nan"), "NaN or infinity"), (None, "wrong keys")]
)
def test_a_bad_reply_is_refused_and_the_others_go_on(
    run: Door, monkeypatch: pytest.MonkeyPatch, numbers: float | None, why: str
) -> None:
    def spoiled(grid: Any, messages: Any, timeout: float) -> Any:
        replies = exchange(grid, messages, timeout)
        for reply in replies:
            of_one = 1 in reply.content["report"]["clients"]
            if of_one and reply.metadata.group_id == "1.push.1":
                u = torch.full((1,), numbers) if numbers else torch.zeros(0)
                size = len(reply.content["up"]["u"].numpy())
                reply.content["up"] = pack({"u": u.expand(size) if numbers else u})
        return replies

    monkeypatch.setattr(outer, "exchange", spoiled)
    kept = Kept()
    result = run(*GIVEN, "strategy=fedavg", "rounds=2", grid=kept)
    told = result.records[1]["personal"]
    assert told["moved"] == 3
    assert set(told["failed"]) == {"1", "3", "5"}
    assert all(why in line for line in told["failed"].values())
    still = [float(lam.abs().max()) == 0 for lam in kept.all("l")]
    assert still == [False, True] * 3


def test_scores_that_cannot_be_are_refused(
    run: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would decide which round is the best."""

    def spoiled(grid: Any, messages: Any, timeout: float) -> Any:
        replies = exchange(grid, messages, timeout)
        for reply in replies:
            report = reply.content.metric_records["report"]
            if "choosing_accuracy" in report and 1 in report["clients"]:  # type: ignore[operator]
                report["choosing_accuracy"] = [5.0] * 3
        return replies

    monkeypatch.setattr(outer, "exchange", spoiled)
    told = run(*GIVEN, "strategy=fedavg", "rounds=2").records[1]["personal"]
    assert set(told["failed"]) == {"1", "3", "5"}
    assert all("choosing_accuracy is imp" in line for line in told["failed"].values())
    assert told["validation_accuracy_mean"] <= 1


def losing(*turns: str) -> Callable[..., list[Message]]:
    """Return an exchange that loses the replies of odd clients in these, once for each mention."""
    left = list(turns)

    def exchanged(grid: Any, messages: list[Message], timeout: float) -> list[Message]:
        replies = exchange(grid, messages, timeout)
        (name,) = {m.metadata.group_id for m in messages}
        if name not in left:
            return replies
        left.remove(name)
        return [r for r in replies if 1 not in r.content["report"]["clients"]]

    return exchanged


@pytest.mark.parametrize("inner", [("strategy=fedavg",), NETWORK])
def test_an_exchange_below_the_minimum_is_taken_again_without_a_trace(
    run: Door, monkeypatch: pytest.MonkeyPatch, inner: tuple[str, ...]
) -> None:
    given = (*GIVEN, *inner, "personal.depth=3", "rounds=2")
    judged(monkeypatch, {1: 0.9, 2: 0.1}, 3)  # clients return to the first
    kept, undisturbed = Kept(), Kept()
    plain = run(*given, grid=undisturbed)
    turns = ["1.curvature.4", "1.start.0", "1.push.2", "1.push.2", "1.step.3"]
    monkeypatch.setattr(outer, "exchange", losing(*turns, "2.look.0", "2.settle.4"))
    result = run(*given, "min_replies=6", grid=kept)
    assert torch.equal(result.theta, plain.theta)
    for name in ("l", "best", "first", "second"):
        for ours, theirs in zip(kept.all(name), undisturbed.all(name), strict=True):
            assert torch.equal(ours, theirs), name
    for ours, theirs in zip(result.records[1:], plain.records[1:], strict=True):
        told = {k: v for k, v in ours["personal"].items() if k not in COUNTED}
        assert told == {k: theirs["personal"][k] for k in told}
        assert ours["personal"]["messages"] > theirs["personal"]["messages"]
    assert sum("too few replies, outer step" in line for line in result.lines) == 7
    # Without a minimum they are left out instead.
    monkeypatch.setattr(outer, "exchange", losing("1.push.2"))
    told = run(*given).records[1]["personal"]
    assert told["moved"] == 3
    assert set(told["failed"].values()) == {"no reply before the deadline"}
    # But not those who only missed the check of alpha.
    monkeypatch.setattr(outer, "exchange", losing("1.curvature.4"))
    spared = Kept()
    one, two = (r["personal"] for r in run(*given, grid=spared).records[1:])
    assert (one["moved"], one["failed"]) == (6, {})
    # Nor is alpha held against the others' curvature alone.
    assert one["largest_eigenvalue"] is two["largest_eigenvalue"] is None
    monkeypatch.setattr(outer, "exchange", losing("1.curvature.4"))
    later = run(*given, "rounds=3").records[2]["personal"]
    assert later["largest_eigenvalue"] > 0
    for ours, theirs in zip(spared.all("l"), undisturbed.all("l"), strict=True):
        assert torch.equal(ours, theirs)


def test_an_exchange_that_nobody_answers_ends_the_run(
    run: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outer, "exchange", losing(*["1.start.0"] * 2))
    with pytest.raises(
        UserError, match="outer step: fewer than min_replies=6 replies in 2"
    ):
        run(*GIVEN, "strategy=fedavg", "min_replies=6", "attempts=2", "rounds=2")


def test_a_node_that_goes_before_a_step_is_waited_for(
    run: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, take = Kept(), Rounds.take

    def taken(rounds: Rounds, grid: Any, round_: int) -> Any:
        found = take(rounds, grid, round_)
        if round_ == 1:
            grid.remove_node(list(grid.get_node_ids())[1])
        return found

    monkeypatch.setattr(Rounds, "take", taken)
    given = (*GIVEN, "attempts=2", "rounds=2", "deadline=0.2")
    with pytest.raises(
        UserError, match="outer step: fewer than min_replies=6 replies in 2"
    ):
        run(*given, "strategy=fedavg", "min_replies=6", grid=kept)
    # Over a network alpha is not held against the curvature of those who are there.
    told = run(*given, *NETWORK, grid=kept).records[1]["personal"]
    assert told["moved"] == 3
    assert told["largest_eigenvalue"] is None


def test_what_is_lost_begins_anew(run: Door) -> None:
    kept = Kept()

    def forget(record: dict[str, Any]) -> Any:
        for context in kept.grid._contexts.values():
            for key in [k for k in context.state if k.startswith("hyper.1.")]:
                if record["round"] == 3:
                    del context.state[key]
        return False, {}

    given = "strategy=fedavg", "personal=hgp", "personal.every=2", "rounds=7"
    result = run(*PLAIN, *given, grid=kept, callbacks=[forget])
    assert "is lost" in result.records[4]["clients"]["failed"]["1"]
    told = result.records[4]["personal"]
    assert told["moved"] == 5
    assert "is lost" in told["failed"]["1"]
    assert result.records[6]["personal"]["moved"] == 6
    assert all(r["clients"]["failed"] == {} for r in result.records[5:])


def test_one_that_is_lost_does_not_cost_the_others_their_scores(run: Door) -> None:
    kept = Kept()

    def forget(record: dict[str, Any]) -> Any:
        for context in kept.grid._contexts.values():
            for key in [k for k in context.state if k.startswith("hyper.1.")]:
                del context.state[key]
        return False, {}

    given = "strategy=fedavg", "personal=hgp", "personal.every=2", "rounds=4"
    skip = "lost_state=skip", "clients_per_round=6", "nodes=1"
    result = run(*PLAIN, *given, *skip, grid=kept, callbacks=[forget])
    assert "is lost" in result.records[4]["clients"]["failed"]["1"]
    assert result.records[4]["clients"]["accuracy_mean"] > 0


@pytest.mark.parametrize(
    ("words", "learners", "passes", "rest"),
    [
        # Every push has two products; beside them one gradient, and the last step's product.
        (("personal.every=2",), 1, (1, 1), 1 + 2),
        # With more than 150 samples each product has a batch of its own.
        (("personal.batch=150", "personal.power_steps=4"), 1, (1, 2), 4 * 2 + 1 + 2),
        (("personal.batch=8", SHARED, MIXED, "engine=loop"), 3, (1, 1), 1 + 2),
        (("personal.every=0", MIXED, "engine=vmap"), 3, (0, 0), 0),
    ],
)
def test_gradients_count_what_was_computed(
    run: Door, words: tuple[str, ...], learners: int, passes: tuple[int, int], rest: int
) -> None:
    tasks = list[Run]()
    own = "personal=hgp", "personal.every=2", "personal.depth=3"
    given = *PLAIN, "strategy=fedavg", "rounds=3", *own, "personal.power_steps=0"
    found = run(*given, *words, edit=tasks.append).summary["gradients"]
    sizes = [len(tasks[0].setting.samples(k).train) for k in range(6)]
    assert min(sizes) < 150 < max(sizes), "else this shows nothing"
    training = sum(3 * -(-size // 60) for size in sizes)
    pushes = sum(2 * 2 * passes[size > 150] for size in sizes)
    assert found == learners * (training + pushes + 6 * rest)


def test_a_model_trained_alone_that_is_lost_is_trained_again(run: Door) -> None:
    kept, undisturbed = Kept(), Kept()

    def forget(record: dict[str, Any]) -> Any:
        for context in kept.grid._contexts.values():
            for key in [k for k in context.state if k.startswith("alone.")]:
                del context.state[key]
        return False, {}

    given = *GIVEN, "strategy=fedavg", THREE, "rounds=3", "personal.depth=1"
    result = run(*given, grid=kept, callbacks=[forget])
    plain = run(*given, grid=undisturbed)
    assert torch.equal(result.theta, plain.theta)
    for one, other in zip(kept.all("l"), undisturbed.all("l"), strict=True):
        assert torch.equal(one, other)
    ours, theirs = ([r["gradients"] for r in of.records[1:]] for of in (result, plain))
    assert ours == theirs


def test_who_diverges_alone_keeps_the_shared_model(
    run: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, whole = Kept(), hypers.loop

    def diverged(trainer: Any, down: Any, job: Any, round_: int) -> Any:
        found = whole(trainer, down, job, round_)
        if job.client.id == 2:
            found.up["delta"] += float("inf")
        return found

    monkeypatch.setattr(hypers, "loop", diverged)
    given = "strategy=fedavg", "personal.families=[interpolation]", "personal.depth=1"
    result = run(*GIVEN, *given, "rounds=2", grid=kept)
    told = result.records[1]["personal"]
    assert told["moved"] == 5
    assert "own: delta is not finite (training diverged)" in told["failed"]["2"]
    assert told["best"] == 1  # it is judged with the shared model
    assert result.records[2]["clients"]["failed"] == {}


def test_training_alone_counts_once(run: Door) -> None:
    given = *PLAIN, "strategy=fedavg", "personal=hgp", "personal.every=1", "rounds=3"
    few = "personal.depth=1", "personal.power_steps=0", "local.batch=0"
    with_it = ("personal.families=[interpolation]", "personal.alone=7")
    ours, theirs = (run(*given, *few, *of).records[1:] for of in (with_it, ()))
    more = [a["gradients"] - b["gradients"] for a, b in zip(ours, theirs, strict=True)]
    assert more == [6 * 7, 0, 0]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (("personal.alpha=0",), "personal.alpha=0.*greater than 0"),
        (("personal.depth=0",), "personal.depth=0.*greater than or equal to 1"),
        (("personal.pushes=0",), "personal.pushes=0.*greater than or equal to 1"),
        (
            (*NETWORK, "personal.method=conjugate_gradients"),
            "method=conjugate_gradients: needs exact averages",
        ),
        (
            ("personal.method=conjugate_gradients", "personal.batch=8"),
            "needs all samples in every product; use personal.batch=0",
        ),
        (
            ("personal.start=cold", "stop.patience=3"),
            "stop.patience: with personal.start=cold",
        ),
        (("personal.learners=3",), "learners=3 without the family mixture"),
        (
            ("personal.families=[mixture]", "personal.learners=1"),
            "learners=1: at least 2",
        ),
        (("personal.families=[]",), r"families=\[\]: name one of class_weights"),
        (
            ("personal.families=[class_weights,class_weights]",),
            "class_weights is there twice",
        ),
        (("personal.families=[classweights]",), "personal.families=.*classweights"),
        (("personal.lr={mixture:1.0}",), "lr: mixture is none of the families"),
        (("personal.alone=3",), "alone=3 without the family interpolation"),
        ((THREE, "personal.alone=0"), "personal.alone=0.*greater than or equal to 1"),
        (("strategy=done", THREE), "optimizer=richardson trains no model alone"),
        (("client_validation=0",), "client_validation=0.2, or personal.outer=train"),
        (("optimizer=sophia",), "optimizer=sophia estimates the curvature"),
        (("privacy=local", "strategy=fedavg"), "privacy=none"),
        (("strategy=fedrep",), "strategy=fedrep gives clients models in its own way"),
        (
            ("strategy=learned_weights",),
            "strategy=learned_weights weighs clients in its",
        ),
        (("personal.every=2",), "rounds=2 and personal.every=2 no outer step is taken"),
        ((*NETWORK, "faults.crash={1: 2}"), "faults.crash: an estimate needs all"),
        (("model.dropout=0.2",), "model=mlp: .* without dropout"),
    ],
)
def test_mistakes_are_told_in_a_line(
    run: Door, given: tuple[str, ...], line: str
) -> None:
    quick = ("clients=6", "clients_per_round=6", "rounds=2", "processes=0", "nodes=2")
    with pytest.raises(UserError, match=line) as told:
        run(*GIVEN, *given, quick=quick)
    assert "\n" not in str(told.value)


def test_text_is_refused_in_a_line(run: Door, tmp_path: Path) -> None:
    file = tmp_path / "play.txt"
    file.write_text("".join(f"ROLE{k}:\n{'but soft, ' * 30}\n\n" for k in range(6)))
    text = ("data=text", f"data.path={file}", "data.minimum=50", "data.length=8")
    model = ("partition=natural", "model=char_lstm")
    with pytest.raises(UserError, match="data=text: personal=hgp is about inputs of"):
        run(
            "personal=hgp",
            "personal.every=0",
            "client_validation=0.2",
            *text,
            *model,
            quick=("rounds=1", "clients=6"),
        )
