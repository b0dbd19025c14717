"""Differentiated programs over a Grid: the printed gradient is the centralized one."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUICK, grid_of
from flwr.app import ConfigRecord, Message, RecordDict
from torch import Tensor

from app.client_app import app
from app.config import load
from app.derive import derive
from app.errors import UserError
from app.exchange import exchange
from app.experiment import main_once
from app.host import objective, setting, trainer
from app.programs import two_rounds
from strategies import fad
from strategies.fad_client import Answer, BadPlan, Call, Plan, Question
from strategies.fad_site import FUNCTIONS, Site
from strategies.fad_wire import (
    DERIVE,
    OverGrid,
    pack_answer,
    pack_question,
    unpack_answer,
    unpack_question,
)
from strategies.objective import Objective
from strategies.roster import Roster
from strategies.wire import Refused

ROOT = Path(__file__).resolve().parent.parent
GIVEN = (*QUICK, "dtype=float64", "program=two_rounds", "clients_per_round=4")


def places(overrides: tuple[str, ...]) -> tuple[list[Site], Tensor]:
    """Return the cohort of round 1 as sites in this process, and theta^0."""
    config = load(overrides)
    goal = objective(config, setting(overrides).dataset)
    roster = Roster(config.clients, 0, config.seed)
    roster.hosts = dict.fromkeys(range(config.clients), 0)
    found = []
    for k in roster.draw(1, config.clients_per_round):
        part = setting(overrides).samples(k).train
        x, y = part.x[part.index], part.y[part.index]
        found.append(Site(k, x, y, config.seed, trainer=trainer(config, goal)))
    return found, goal.initial()[0]


def centralized(overrides: tuple[str, ...]) -> tuple[float, float]:
    """Return loss and derivative of two_rounds in one graph."""
    sites, theta = places(overrides)
    lr = torch.tensor(0.1, dtype=theta.dtype, requires_grad=True)
    for _ in range(2):
        models = [two_rounds.descend(s, theta, lr) * len(s.y) for s in sites]
        theta = torch.stack(models).sum(0) / sum(len(s.y) for s in sites)
    loss = torch.stack([s.loss(theta) for s in sites]).mean()
    (slope,) = torch.autograd.grad(loss, lr)
    return float(loss.detach()), float(slope)


def printed(text: str) -> tuple[float, float]:
    """Return the two numbers that the program printed."""
    found = re.search(r"loss (\S+), its derivative by lr (\S+)", text)
    assert found, text
    return float(found[1]), float(found[2])


@pytest.mark.parametrize("nodes", [1, 6])
def test_the_printed_gradient_is_the_centralized_one(
    nodes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[str] = []
    derive(GIVEN, grid_of(GIVEN, nodes), lines.append)
    assert printed(capsys.readouterr().out) == pytest.approx(
        centralized(GIVEN), abs=2e-12
    )
    assert any(n.startswith("3 exchanges, 3 more for derivatives") for n in lines)
    assert any("single client" in n for n in lines) == (nodes == 6)


def test_the_page_tells_the_truth() -> None:
    """The code and the numbers of docs/derivatives.md are the program's own."""
    page = (ROOT / "docs" / "derivatives.md").read_text()
    code = inspect.getsource(two_rounds).partition("@register")[2].strip()
    assert code in page
    words = page.partition("python -m app.experiment ")[2].partition("\n\n")[0]
    given = tuple(words.replace("\\", " ").split())
    assert "program=two_rounds" in given
    told = printed(page.partition("Both print")[2])
    assert told == pytest.approx(centralized(given), abs=1e-10)


def test_the_command_line_runs_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main_once(list(GIVEN)) is None
    assert printed(capsys.readouterr().out) == pytest.approx(
        centralized(GIVEN), abs=2e-12
    )


@pytest.mark.parametrize("dropout", ["0.0", "0.5"])
def test_the_runs_own_training_is_differentiable(dropout: str) -> None:
    """`train` and `gradient` in both modes, over a Grid, with the noise drawn again."""
    given = (*QUICK, "dtype=float64", "local.clip=2", "optimizer.lr=0.3")
    given += (f"model.dropout={dropout}",) if dropout != "0.0" else ()
    sites, theta = places(given)
    roster = Roster(6, 0, 0)
    grid = grid_of(given, 2)
    cohort = tuple(s.id for s in sites)
    roster.call(grid)
    over = fad.Clients(OverGrid(grid, roster, grid.send_and_receive), cohort)

    def program(lr: Tensor) -> Tensor:
        start = fad.broadcast(theta, over)
        models = fad.federated_map("train", start, fad.broadcast(lr, over), round=3)
        return fad.federated_mean(fad.federated_map("loss", models))

    lr = torch.tensor(0.3, dtype=theta.dtype, requires_grad=True)
    value = program(lr)
    (slope,) = torch.autograd.grad(value, lr)
    pushed = torch.func.jvp(program, (lr.detach(),), (torch.ones_like(lr),))[1]
    at = [replace(s, round=3) for s in sites]
    models = [FUNCTIONS["train"](s, theta, lr) for s in at]
    twin = torch.stack([s.loss(m) for s, m in zip(sites, models, strict=True)]).mean()
    (truth,) = torch.autograd.grad(twin, lr)
    assert abs(float(truth)) > 1e-4
    torch.testing.assert_close(value, twin, rtol=0, atol=1e-12)
    torch.testing.assert_close(slope, truth, rtol=0, atol=1e-10)
    torch.testing.assert_close(pushed, truth, rtol=0, atol=1e-10)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_train_is_what_a_round_of_fedavg_does(
    run: Callable[..., object], decay: float
) -> None:
    given = (*QUICK, "dtype=float64", "strategy=fedavg", "rounds=1")
    given += (f"optimizer.weight_decay={decay}",)
    sites, theta = places(given)
    lr = torch.tensor(0.1, dtype=theta.dtype)
    models = [FUNCTIONS["train"](s, theta, lr) * len(s.y) for s in sites]
    mean = torch.stack(models).sum(0) / sum(len(s.y) for s in sites)
    kept: list[Tensor] = []

    def look(record: dict[str, object]) -> tuple[bool, dict[str, float]]:
        return False, {}

    def edit(task: object) -> None:
        kept.append(task)  # type: ignore[arg-type]

    run(*given, callbacks=[look], edit=edit)
    ours = kept[0].federation.server["theta"]  # type: ignore[attr-defined]
    torch.testing.assert_close(ours, mean, rtol=0, atol=1e-12)


def test_train_takes_plain_steps_only() -> None:
    sites, theta = places((*QUICK, "strategy=fedavg", "optimizer.momentum=0.9"))
    with pytest.raises(ValueError, match="optimizer=sgd"):
        FUNCTIONS["train"](sites[0], theta, torch.tensor(0.1))


def test_numbers_have_the_models_dtype_whatever_the_samples_have() -> None:
    sites, theta = places((*QUICK, "strategy=fedavg"))
    words = replace(sites[0], x=torch.zeros(3, 8, dtype=torch.int64))
    for name in ("one", "samples"):
        assert FUNCTIONS[name](words).dtype == theta.dtype


def test_mistakes_are_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no program is called 'tworounds'; did you"):
        load(("program=tworounds",))
    normed = torch.nn.Sequential(torch.nn.Linear(64, 10), torch.nn.BatchNorm1d(10))
    goal = Objective(normed, "cross_entropy", {})
    monkeypatch.setattr("app.derive.objective", lambda *_: goal)
    with pytest.raises(UserError, match=r"program=two_rounds: .*BatchNorm"):
        derive(GIVEN, grid_of(GIVEN, 1))


def test_a_client_that_leaves_before_the_derivative_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count = 0

    def lossy(*given: Any) -> list[Message]:
        nonlocal count
        count += 1
        return exchange(*given)[: 1 if count > 3 else None]

    monkeypatch.setattr("app.derive.exchange", lossy)
    with pytest.raises(UserError, match=r"program=two_rounds: clients .* derivative"):
        derive(GIVEN, grid_of(GIVEN, 6))
    assert count == 4


# What travels.

PLAN = Plan(2, (Call("times", 1, (0, 1)),), (2, 0))
LEAVES = (torch.tensor(2.0), torch.tensor([1.0, 2.0]))
TANGENTS = {1: torch.ones(3, 2)}
QUESTION = Question(PLAN, (1, 4), LEAVES, TANGENTS, columns=(0,))
SUMS = {
    "y0": torch.ones(2),
    "y1": torch.tensor(1.0),
    "t0": torch.ones(3, 2),
    "t1": torch.ones(3),
    "j0.0": torch.ones(1, 2),
    "j1.0": torch.ones(1),
}


def same(a: Question, b: Question) -> None:
    assert (a.plan, a.clients, a.columns, a.wanted) == (
        b.plan,
        b.clients,
        b.columns,
        b.wanted,
    )
    torch.testing.assert_close(a.leaves, b.leaves, rtol=0, atol=0)
    torch.testing.assert_close(dict(a.tangents), dict(b.tangents))
    torch.testing.assert_close(dict(a.cotangents), dict(b.cotangents))


def test_a_question_travels() -> None:
    same(unpack_question(pack_question(QUESTION)), QUESTION)
    back = Question(
        PLAN, (1, 4), LEAVES, cotangents={1: torch.tensor(1.0)}, wanted=(0, 1)
    )
    same(unpack_question(pack_question(back)), back)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (replace(QUESTION, leaves=LEAVES[:1]), "take|missing|there yet"),
        (replace(QUESTION, columns=(7,)), "missing"),
        (replace(QUESTION, tangents={1: torch.ones(3, 5)}), "another shape"),
        (replace(QUESTION, cotangents={9: torch.ones(2)}), "no output"),
        (
            replace(QUESTION, tangents={0: torch.ones(2), 1: torch.ones(3, 2)}),
            "numbers of directions",
        ),
    ],
)
def test_a_bad_question_is_refused(wrong: Question, why: str) -> None:
    with pytest.raises(BadPlan, match=why):
        unpack_question(pack_question(wrong))


def reply(found: Answer) -> Message:
    asked = Message(RecordDict(), 7, DERIVE)
    return Message(pack_answer(found), reply_to=asked)


def test_an_answer_travels() -> None:
    found = unpack_answer(reply(Answer((1,), {4: "no battery"}, SUMS)), QUESTION)
    assert (found.clients, found.faults) == ((1,), {4: "no battery"})
    torch.testing.assert_close(found.sums, SUMS)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (Answer((1,), {}, SUMS), "answers for clients"),
        (Answer((1, 4, 5), {}, SUMS), "answers for clients"),
        (Answer((1, 1), {}, SUMS), "answers for clients"),
        (Answer((1, 4), {}, {**SUMS, "y0": torch.tensor([1, torch.inf])}), "infinity"),
        (Answer((1, 4), {}, {**SUMS, "t0": torch.ones(2, 2)}), "t0 has shape"),
        (Answer((1, 4), {}, {"y0": torch.ones(2)}), "expected"),
        (Answer((1, 4), {}, {**SUMS, "x": torch.ones(2)}), "expected"),
        (Answer((1, 4), {}, {}), "expected"),
    ],
)
def test_a_bad_answer_is_refused(wrong: Answer, why: str) -> None:
    with pytest.raises(Refused, match=why):
        unpack_answer(reply(wrong), QUESTION)


def test_a_node_refuses_what_is_not_registered() -> None:
    grid = grid_of(GIVEN, 1)
    (node,) = grid.get_node_ids()
    content = pack_question(QUESTION)
    order = dict(content.config_records["order"])
    content["order"] = ConfigRecord({**order, "calls": ["system@1 0 1"]})
    (answered,) = grid.send_and_receive([Message(content, node, DERIVE)])
    assert "no function is registered as 'system'" in answered.error.reason
    assert app is not None
