"""Local optimizers: how a client steps along the direction that its algorithm gives.

A local step of any client, whatever the engine, is

    gradient     of the batch at theta, by the objective; or of a model of it
    estimate     of the curvature there, at the steps that ``refreshes`` names
    direction    the algorithm's, from the gradient
    step         the optimizer's, along the direction

An optimizer is a pure function on vectors. What it holds during one local training is its state;
the part of it that is ``kept`` is remembered from one participation to the next, in the client's
memory and under the same versions as the algorithm's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Literal

from torch import Tensor

from strategies.algorithm import Vectors
from strategies.curvature import Estimator
from strategies.objective import Objective

#: What becomes of an optimizer's moments between two participations of a client.
Moments = Literal["persist", "reset"]


class Optimizer(ABC):
    """What every local optimizer is; the defaults are those of a first-order one."""

    @property
    def kept(self) -> tuple[str, ...]:
        """The names of the state's vectors, each of one axis, that a client remembers."""
        return ()

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the numbers that ``told`` returns."""
        return ()

    @property
    def curvature(self) -> Estimator | None:
        """Where ``refresh`` gets its estimates from, if it takes any."""
        return None

    @property
    def penalty(self) -> float:
        """The weight of |theta|^2 / 2 in the cost that it descends on.

        Zero where weight decay is decoupled from the gradient, and so no part of a cost.
        """
        return 0.0

    @property
    def along(self) -> str:
        """The state's vector along which every step wants the Hessian's product, or none."""
        return ""

    @abstractmethod
    def init(self, theta: Tensor, memory: Mapping[str, Tensor]) -> Vectors:
        """Return the state before the first local step, the kept vectors from ``memory``.

        A name that ``memory`` does not hold starts afresh. ``effort`` is in the state of an
        optimizer whose steps are linear in the directions: the total weight with which they
        entered theta.
        """

    def fresh(self, theta: Tensor) -> Vectors:
        """Return the kept vectors of a client that has not taken part yet."""
        state = self.init(theta, {})
        return {name: state[name] for name in self.kept}

    def length(self, round_: int, steps: int) -> int:
        """Return how many of a client's local steps it takes in a round."""
        return steps

    def models(self, round_: int) -> bool:
        """Return whether it descends on the second-order model of the loss at the anchor.

        The gradient of a step is then the Hessian there times (theta - anchor): the model's
        linear part is the algorithm's to add.
        """
        return False

    def refreshes(
        self, memory: Mapping[str, Tensor], round_: int, steps: int
    ) -> Collection[int]:
        """Return which of a client's coming local steps, from 0, estimate the curvature."""
        return ()

    def refresh(self, state: Vectors, estimate: Tensor) -> Vectors:
        """Return the state after an estimate of the Hessian's diagonal, shape (d,)."""
        raise NotImplementedError

    @abstractmethod
    def step(
        self, theta: Tensor, direction: Tensor, state: Vectors, round_: int
    ) -> tuple[Tensor, Vectors]:
        """Return theta and state after one step of the given round (counted from 1).

        With ``along``, ``state["product"]`` is the derivative of the direction along it.
        ``theta`` belongs to this training: its memory may be reused for the result.
        """

    def told(self, state: Vectors) -> Vectors:
        """Return numbers about one local training for the round's record, 0-dim tensors."""
        return {}

    def unfit(self, objective: Objective) -> str:
        """Say why a model cannot be trained by this optimizer; empty if it can."""
        return self.curvature.unfit(objective) if self.curvature else ""
