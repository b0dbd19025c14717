"""The outer level of a personalized run: after every so many rounds, a step of the clients' own.

The record of such a round has what the clients measured before the step, each with its own model
and hyper-parameters, what became of it, and what it cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from flwr.app import Message
from flwr.serverapp import Grid

from app import best
from app.config import Config
from app.exchange import exchange, gather
from app.personal_check import settings
from app.rounds import refuse_lost, too_few
from app.summary import cost
from strategies.bilevel import Bilevel
from strategies.federation import Federation
from strategies.hyper_wire import SCORES, Told
from strategies.relay import Relay


def outer(
    federation: Federation | Relay, config: Config, say: Callable[[str], None]
) -> Outer | None:
    """Return the outer level of a run, None if its clients have nothing of their own."""
    how = settings(config)
    return None if how is None else Outer(Bilevel(federation, how), config, say)


class Outer:
    """Takes the outer steps of a run.

    Parameters
    ----------
    level : Bilevel
        Asks the clients.
    config : Config
        Deadline, and what becomes of clients that have lost what they remember.
    say : callable
        Where the lines for a person go.

    Attributes
    ----------
    steps : int
        Taken so far.
    best : dict
        What the clients told when validation was best, and its ``round`` and ``step``.
    warnings : list of str
        What spoke against the settings.
    before : dict or None
        What was the best before the last round, once the clients have measured in it.
    """

    def __init__(
        self, level: Bilevel, config: Config, say: Callable[[str], None]
    ) -> None:
        self.level, self.config, self.say = level, config, say
        self.steps, self.best = 0, dict[str, Any]()
        self.before: dict[str, Any] | None = None
        self.warnings: list[str] = []
        # Without validation samples the clients choose by those that they train on.
        self.chooses = "validation" if config.client_validation else "train"

    def before_round(self, round_: int) -> None:
        """Begin the inner training anew, if a step has just been taken and the start is cold.

        Not with the step: a run that ends here keeps the model that it has trained.
        """
        last, federation = round_ - 1, self.level.federation
        cold = self.level.how.start == "cold"
        if cold and self._due(last) and federation.since < last:
            federation.restart(last)

    def after(
        self,
        grid: Grid,
        round_: int,
        record: dict[str, Any],
        place: Path,
        stopped: bool = False,
    ) -> None:
        """Take the outer step that is due after a round, and enter it into the round's record.

        After the last round, also of a run that has been stopped, the clients only measure.

        Parameters
        ----------
        grid : Grid
            Where the nodes are.
        round_ : int
            The round.
        record : dict
            Its record, to which ``personal`` is added, and the cost of it to the other costs.
        place : Path
            The run's directory.
        stopped : bool
            Whether the run ends with this round although more were asked for.

        Raises
        ------
        UserError
            If a client has lost what it remembers and ``lost_state=fail``, or too few answer.
        """
        last = stopped or round_ == self.config.rounds
        if not (self._due(round_) or last):
            return

        def better(told: Told) -> bool:
            return self._is_best(told, round_, place)

        self._reach(grid, round_)
        if last:
            told, self.before = self.level.look(round_), self.best
            better(told)
        else:
            told = self.level.estimate(round_, better)
            self.steps += 1
        self._lose(told)
        self.warnings += told.warnings
        found = self._summary(told) | {
            "step": self.steps,
            "best": self.best.get("round"),
        }
        self._enter(record, told, found, stepped=not last)
        measured, so_far = found.get("accuracy_mean", math.nan), found["best"]
        parts = [f"round {round_}: own models {measured:.4f}"]
        parts.append(
            f"best after round {so_far}" if so_far else "no round is the best yet"
        )
        if not last:
            parts.append(f"{len(told.moved)} clients took step {self.steps}")
        self.say(", ".join(parts))

    def catch_up(self, grid: Grid, record: dict[str, Any], place: Path) -> bool:
        """Take the step that a shorter run left out after its last round, now that it goes on.

        Returns
        -------
        bool
            Whether the record of that round has become another.
        """
        round_, how = record["round"], self.level.how
        if round_ >= self.config.rounds:
            return False
        if self.before is not None:
            # The longer run, had it been asked for at once, would have measured elsewhere.
            self.best, self.before = self.before, None
            best.restore(place, self.best.get("round"), round_)
        if not self._due(round_) or self.steps == round_ // how.every:
            return False
        # Entered before, by a run that went on and died before its next checkpoint.
        entered = record["personal"]["step"] > self.steps
        self.after(grid, round_, deepcopy(record) if entered else record, place)
        return not entered

    def settle(self, grid: Grid, summary: dict[str, Any]) -> None:
        """Let the clients return to what validation preferred, once the run has ended.

        Parameters
        ----------
        grid : Grid
            Where the nodes are.
        summary : dict
            The run's, to which ``personal`` is added, and the bytes of this.

        Raises
        ------
        UserError
            As after a round.
        """
        summary["personal"] = found = {**self.best, "warnings": self.warnings}
        if not self.best or self.best["step"] == self.steps:
            return  # no step has been taken since
        self._reach(grid, summary["rounds"])
        told = self.level.settle(summary["rounds"])
        self._lose(told)
        for k, why in sorted(told.failed.items()):
            self.say(f"client {k} did not return to round {self.best['round']}: {why}")
        sides = {"down": told.down, "up": told.up}
        sent = {side: sum(kinds.values()) for side, kinds in sides.items()}
        failed = {str(k): why for k, why in sorted(told.failed.items())}
        found["settled"] = {"failed": failed, "messages": told.messages, "bytes": sent}
        for side, count in sent.items():
            summary[f"bytes_{side}"] += count

    def _due(self, round_: int) -> bool:
        """Return whether a step follows a round, unless it is the last."""
        every = self.level.how.every
        return bool(every) and round_ % every == 0

    def _reach(self, grid: Grid, round_: int) -> None:
        """See who is there, and tell the level how to ask them, and to ask again."""
        config, roster = self.config, self.level.federation.roster
        patience = config.deadline

        def ask(messages: list[Message]) -> list[Message]:
            return exchange(grid, messages, patience)

        def again(attempt: int) -> None:
            nonlocal patience
            if attempt >= config.attempts:
                raise too_few(config, f"round {round_}, outer step", {})
            self.say(f"round {round_}: too few replies, outer step, attempt {attempt}")
            # Longer each time, as for a round.
            patience = config.deadline * (attempt + 1)
            gather(grid, roster, config.min_replies, config.deadline)

        gather(grid, roster, config.min_replies, config.deadline)
        self.level.ask, self.level.again = ask, again

    def _is_best(self, told: Told, round_: int, place: Path) -> bool:
        """Say whether what chooses has never been better, and keep the model if so.

        Means over other clients say nothing: a round counts if all have told.
        """
        if len(told.scores) < self.level.federation.roster.clients:
            return False
        found, by = self._summary(told), self.chooses

        def rank(found: Mapping[str, Any]) -> tuple[float, float]:
            return found[f"{by}_accuracy_mean"], -found[f"{by}_loss_mean"]

        if self.best and rank(found) <= rank(self.best):
            return False
        former = self.best.get("round", 0)
        self.best = {"round": round_, "step": self.steps, **found}
        federation = self.level.federation
        vectors = {"theta": federation.server["theta"]}
        if isinstance(federation, Relay):
            vectors["models"] = torch.from_numpy(federation.carried["model"].z())
        every = self.config.checkpoint_every
        saved = (round_ - 1) // every * every if every else 0
        # A checkpoint knows it as the best, or a longer run will, which does not measure here.
        named = former <= saved or (every and self.before is not None)
        best.put(place, round_, vectors, former if former and named else None)
        return True

    def _summary(self, told: Told) -> dict[str, Any]:
        """Return mean and bottom decile over clients of what they measured."""
        found: dict[str, Any] = {}
        for name in SCORES:
            scores = [row[name] for row in told.scores.values()]
            values = torch.tensor(scores, dtype=torch.float64)
            if name == "held_out" or not len(values):
                continue
            name = name.replace("choosing", self.chooses)
            found[f"{name}_mean"] = float(values.mean())
            if name.endswith("accuracy"):
                found[f"{name}_decile"] = float(values.quantile(0.1))
        return found

    def _lose(self, told: Told) -> None:
        """Do as ``lost_state`` says with clients that have lost their hyper-parameters."""
        refuse_lost(self.config, told.lost, told.failed)
        if self.config.lost_state == "reset":
            for k in told.lost:
                self.level.ledger.pop(k, None)

    def _enter(
        self, record: dict[str, Any], told: Told, found: dict[str, Any], stepped: bool
    ) -> None:
        """Enter what was told, and what it cost, into the record of a round."""
        sides = {"down": told.down, "up": told.up}
        record["personal"] = {
            **found,
            "moved": len(told.moved),
            "failed": {str(k): why for k, why in sorted(told.failed.items())},
            "largest_eigenvalue": told.largest,
            **({} if told.residual is None else {"residual": told.residual}),
            "warnings": told.warnings,
            "exchanges": told.exchanges,
            "messages": told.messages,
            "bytes": {side: sum(sent.values()) for side, sent in sides.items()},
            "link_messages": told.link_messages,
            "link_bytes": told.link_bytes,
        }
        if stepped:
            record["personal"]["cost"] = cost(told, record)
            record["seconds"]["step"] = told.seconds
        for side, sent in sides.items():
            record["bytes"][side]["hyper"] = sum(sent.values())
        record["seconds"]["hyper"] = told.seconds
        record["seconds"]["round"] += told.seconds
        record["gradients"] += told.gradients
        if "link_bytes" in record["strategy"]:
            links = record["strategy"]["link_bytes"] + told.link_bytes
            record["strategy"] = record["strategy"] | {"link_bytes": links}

    # What a checkpoint holds.

    def state(self) -> dict[str, Any]:
        """Return what ``restore`` continues from, as JSON."""
        mine = {"steps": self.steps, "best": self.best, "before": self.before}
        return mine | {"warnings": self.warnings} | self.level.state()

    def restore(self, state: Mapping[str, Any], round_: int, place: Path) -> None:
        """Continue from what ``state`` returned after a round."""
        self.steps, self.before = state["steps"], state.get("before")
        self.best = dict(state["best"])
        self.warnings = list(state.get("warnings", []))
        self.level.restore(state)
        best.restore(place, self.best.get("round"), round_)
