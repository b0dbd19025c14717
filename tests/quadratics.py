"""A small federation run by hand: the halves of an algorithm on four quadratics, in float64.

L_k = 1/2 theta'A_k theta - b_k'theta. Local problems are solved exactly or by gradient steps.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from strategies.algorithm import (
    Algorithm,
    Client,
    Cohort,
    Individual,
    Vectors,
    Witness,
)
from strategies.individual import Costing, Rooted, Seen, Surveying
from strategies.mean import Mean
from strategies.sgd import SGD

A = torch.tensor(
    [
        [[1, 0], [0, 4]],
        [[3, 1], [1, 2]],
        [[0.5, 0], [0, 1]],
        [[2, -0.5], [-0.5, 5]],
    ],
    dtype=torch.float64,
)
B = torch.tensor([[1, -2], [0, 3], [-4, 1], [2, 2]], dtype=torch.float64)
OPTIMUM = torch.linalg.solve(A.sum(0), B.sum(0))
ALL = [0, 1, 2, 3]
ONE = torch.ones(1, dtype=torch.float64)
Solver = Callable[[Algorithm, Vectors, int, Tensor], tuple[Tensor, Tensor]]


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def loss(k: int, theta: Tensor) -> Tensor:
    """Return L_k(theta)."""
    return 0.5 * theta @ A[k] @ theta - B[k] @ theta


def gradient(algorithm: Algorithm, state: Vectors, k: int, theta: Tensor) -> Tensor:
    """Return the gradient of what client k minimizes, as the engines take it."""
    if not isinstance(algorithm, Costing):
        return A[k] @ theta - B[k]
    seen = Seen(lambda model: model, lambda model: loss(k, model)[None], ONE)
    slope = torch.func.grad(lambda point: algorithm.cost(seen, point, state).sum())
    return slope(theta)


def exact(
    algorithm: Algorithm, state: Vectors, k: int, anchor: Tensor
) -> tuple[Tensor, Tensor]:
    """Find the zero of the algorithm's local direction, which is affine in theta."""
    zero = torch.zeros_like(anchor)
    # Its linear part is what is left without anchor, memory and b.
    blank = {n: v if v.ndim == 0 else torch.zeros_like(v) for n, v in state.items()}
    columns = [
        algorithm.direction(A[k] @ e, e, zero, blank)
        for e in torch.eye(len(anchor), dtype=anchor.dtype)
    ]
    offset = algorithm.direction(-B[k], zero, anchor, state)
    return -torch.linalg.solve(torch.stack(columns, 1), offset), zero.new_ones(())


def descent(steps: int, optimizer: SGD) -> Solver:
    """Take gradient steps along the algorithm's direction."""

    def solve(
        algorithm: Algorithm, state: Vectors, k: int, anchor: Tensor
    ) -> tuple[Tensor, Tensor]:
        theta, moving = anchor.clone(), optimizer.init(anchor, {})
        for _ in range(steps):
            slope = gradient(algorithm, state, k, theta)
            along = algorithm.direction(slope, theta, anchor, state)
            theta, moving = optimizer.step(theta, along, moving, 1)
        return theta, moving["effort"]

    return solve


@dataclass
class Federation:
    """A federation of the four quadratics, run by hand."""

    algorithm: Algorithm
    solve: Solver = exact
    shares: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    start: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    server: Vectors = field(init=False)
    memories: dict[int, Vectors] = field(init=False)
    last: dict[int, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.server = self.algorithm.start(self.start)
        self.memories = {k: self.algorithm.fresh(self.start) for k in ALL}
        self.last = {}

    def round(self, cohort: list[int]) -> None:
        mean, down = Mean(), self.algorithm.down(self.server)
        newcomers = len(set(cohort) - self.last.keys())
        for k in cohort:
            client = Client(k, int(10 * self.shares[k]), self.shares[k])
            memory, anchor = self.begun(k)
            mine = {**down, "theta": anchor}
            state = self.algorithm.begin(mine, memory, client)
            if isinstance(self.algorithm, Witness):
                gradient = A[k] @ anchor - B[k]
                state = self.algorithm.witness(state, gradient, loss(k, anchor))
            theta, effort = self.solve(self.algorithm, state, k, anchor)
            up, self.memories[k] = self.algorithm.finish(theta, anchor, state, effort)
            self.last[k] = theta
            mean.add(up, self.algorithm.weight(client))
        told = Cohort(len(cohort), len(ALL), newcomers)
        self.server = self.algorithm.update(
            self.server, mean.value(torch.float64), told
        )

    def begun(self, k: int) -> tuple[Vectors, Tensor]:
        """Return a client's memory after a look at its samples, and where it starts."""
        algorithm, down = self.algorithm, self.algorithm.down(self.server)
        memory = self.memories[k]
        if isinstance(algorithm, Surveying):
            losses = [loss(k, m) for m in algorithm.candidates(down)]
            memory = algorithm.survey(memory, torch.stack(losses)[:, None])
        if isinstance(algorithm, Rooted):
            return memory, algorithm.origin(down, memory)
        return memory, down["theta"]

    def personal(self, k: int) -> Tensor:
        """Return a client's own model, whose outputs are itself."""
        assert isinstance(self.algorithm, Individual)
        memory, _ = self.begun(k)
        down = self.algorithm.down(self.server)
        return self.algorithm.predict(lambda model, _: model, down, memory, ONE)

    def run(self, cohorts: list[list[int]]) -> Tensor:
        for cohort in cohorts:
            self.round(cohort)
        return self.server["theta"]

    def mean_memory(self, name: str) -> Tensor:
        return torch.stack([self.memories[k][name] for k in ALL]).mean(0)


def pairs(rounds: int, seed: int = 0) -> list[list[int]]:
    """Return random cohorts of 2 of 4."""
    random = torch.Generator().manual_seed(seed)
    return [
        sorted(torch.randperm(4, generator=random)[:2].tolist()) for _ in range(rounds)
    ]


def close(actual: Tensor, expected: Tensor, atol: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)
