"""Callbacks after each round: they see the round's record and return (stop, metrics).

A callback is any function of the record. Those here keep no state that the records do not give,
so a resumed run shows them its past records and they stand where they stood.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from app.config import Stop
from app.errors import UserError

Record = Mapping[str, Any]
Callback = Callable[[Record], tuple[bool, dict[str, float]]]


class Target:
    """Stop when the reported accuracy reaches a value.

    Parameters
    ----------
    accuracy : float
        The value, in (0, 1].
    """

    reason = "target"

    def __init__(self, accuracy: float) -> None:
        self.accuracy = accuracy

    def __call__(self, record: Record) -> tuple[bool, dict[str, float]]:
        """Look at one round."""
        return record.get("accuracy", 0.0) >= self.accuracy, {}


class Patience:
    """Stop when the accuracy (of a regression: the loss) has not improved for a while.

    Parameters
    ----------
    evaluations : int
        So many evaluations in a row without improvement end the run.
    least : float
        The smallest change that is an improvement.
    """

    reason = "stopped"

    def __init__(self, evaluations: int, least: float = 0.0) -> None:
        self.evaluations = evaluations
        self.least = least
        self.best = float("-inf")
        self.waited = 0

    def __call__(self, record: Record) -> tuple[bool, dict[str, float]]:
        """Look at one round; rounds without an evaluation do not count."""
        if "loss" not in record:
            return False, {}
        # A loss that was not finite is read back as None; it improves nothing.
        loss = math.inf if record["loss"] is None else record["loss"]
        value = record.get("accuracy", -loss)
        self.waited += 1
        if value > self.best + self.least:
            self.best, self.waited = value, 0
        return self.waited >= self.evaluations, {
            "evaluations_without_gain": self.waited
        }


def stops(stop: Stop, judged: int, classes: int) -> list[Callback]:
    """Return the callbacks that the configuration's ``stop`` asks for.

    Parameters
    ----------
    stop : Stop
        The settings.
    judged : int
        How many samples the server judges by.
    classes : int
        0 in a regression.

    Raises
    ------
    UserError
        If they would never see what they wait for.
    """
    found: list[Callback] = []
    for name in ("accuracy", "patience"):
        if getattr(stop, name) is not None and not judged:
            raise UserError(f"stop.{name}: the server has no samples to judge by")
    if stop.accuracy is not None and not classes:
        raise UserError("stop.accuracy: a regression has none; use stop.patience")
    if stop.accuracy is not None:
        found.append(Target(stop.accuracy))
    if stop.patience is not None:
        found.append(Patience(stop.patience, stop.least))
    return found
