"""DONE: its direction in closed form, the minimizer that it reaches, and lost rounds."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from flwr.app import Message

from app.errors import UserError
from app.local_grid import LocalGrid
from app.run_config import to_run_config
from app.synthetic import QUADRATICS_A, QUADRATICS_B
from strategies.algorithm import Client, Cohort
from strategies.done import Done

A, B = torch.from_numpy(QUADRATICS_A), torch.from_numpy(QUADRATICS_B)
OPTIMUM = torch.linalg.solve(A.sum(0), B.sum(0))
EYE = torch.eye(2, dtype=torch.float64)
TASK = (
    *("strategy=done", "data=quadratics", "partition=natural", "model=linear"),
    *("model.bias=false", "model.zero=true", "clients=4", "clients_per_round=4"),
    *("local.batch=0", "local.clip=0", "dtype=float64", "device=cpu"),
    *("evaluate_clients=none", "nodes=1", "processes=0"),
)


def close(actual: torch.Tensor, expected: torch.Tensor, atol: float) -> None:
    torch.testing.assert_close(actual.flatten(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_an_iteration_in_closed_form(
    run: Callable[..., Any], steps: int, engine: str
) -> None:
    """d_k = -lr sum_r (I - lr A_k)^r g: a truncated Neumann series of the inverse."""
    lr, theta = 0.2, torch.zeros(2, dtype=torch.float64)
    for _ in range(2):
        g = (A @ theta - B).mean(0)
        directions = []
        for a in A:
            power = EYE - lr * a
            series = sum(torch.linalg.matrix_power(power, r) for r in range(steps))
            directions.append(-lr * series @ g)
        theta = theta + torch.stack(directions).mean(0)
    result = run(
        *TASK,
        *("rounds=4", f"local.steps={steps}", f"optimizer.lr={lr}"),
        f"engine={engine}",
        quick=(),
    )
    close(result.theta, theta, 1e-14)
    spent = [record["gradients"] for record in result.records[1:]]
    assert spent == [4, 8 * steps, 4, 8 * steps], "a product counts as two gradients"


def test_the_global_minimizer_is_reached(run: Callable[..., Any]) -> None:
    """With averages of the clients' own Newton steps it would stop at their mean minimizer."""
    steps = ("rounds=80", "local.steps=15", "optimizer.lr=0.3")
    result = run(*TASK, *steps, quick=())
    close(result.theta, OPTIMUM, 1e-9)
    own = torch.stack([torch.linalg.solve(a, b) for a, b in zip(A, B, strict=True)])
    assert float((own.mean(0) - OPTIMUM).norm()) > 1


def test_one_client_takes_newtons_step() -> None:
    """On one quadratic an exact direction is enough."""
    algorithm, theta = Done(), torch.tensor([3.0, -1.0], dtype=torch.float64)
    server = algorithm.start(theta)
    g = A[0] @ theta - B[0]
    server = algorithm.update(server, {"answer": g}, Cohort(1, 1, 0, 1))
    state = algorithm.begin(algorithm.down(server), {}, Client(0, 1, 1.0))
    d = -torch.linalg.solve(A[0], state["gradient"])
    server = algorithm.update(server, {"answer": d}, Cohort(1, 1, 0, 2))
    close(server["theta"], torch.linalg.solve(A[0], B[0]), 1e-14)
    assert not server["gradient"].any(), "the next odd round asks for a new gradient"


class Losing(LocalGrid):
    """A grid that loses all replies of a round."""

    def __init__(self, overrides: Sequence[str], lost: int) -> None:
        super().__init__(to_run_config(overrides), 1)
        self.lost = str(lost)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        sent = list(messages)
        replies = list(super().send_and_receive(sent, timeout=timeout))
        return [] if sent[0].metadata.group_id == self.lost else replies


def test_a_lost_gradient_moves_nothing(run: Callable[..., Any]) -> None:
    """Round 4 then answers zero, and rounds 5 and 6 are the next iteration."""
    steps = ("local.steps=3", "optimizer.lr=0.2")
    lost = run(
        *TASK,
        *steps,
        "rounds=6",
        grid=lambda o: Losing(o, 3),
        quick=(),
    )
    norms = [r["strategy"]["theta_norm"] for r in lost.records[1:]]
    assert norms[1] == norms[2] == norms[3] == norms[4] != norms[5]
    whole = run(*TASK, *steps, "rounds=4", quick=())
    close(lost.theta, whole.theta, 1e-15)


def test_a_lost_direction_leaves_nothing_to_be_added_twice(
    run: Callable[..., Any],
) -> None:
    steps = ("local.steps=3", "optimizer.lr=0.2")
    lost = run(*TASK, *steps, "rounds=6", grid=lambda o: Losing(o, 2), quick=())
    whole = run(*TASK, *steps, "rounds=4", quick=())
    close(lost.theta, whole.theta, 1e-14)


def test_other_optimizers_are_refused(run: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"done needs answer.*optimizer=richardson"):
        run(*TASK, "optimizer=sgd", quick=())
