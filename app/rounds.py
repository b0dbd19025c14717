"""One round over the network: sent, waited for, and taken again if too few have answered."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid

from app.config import Config
from app.errors import UserError
from app.exchange import exchange, gather
from strategies.federation import Federation
from strategies.recovery import begin_anew, named
from strategies.relay import Relay
from strategies.wire import pack


def too_few(config: Config, where: str, failed: Mapping[int, str]) -> UserError:
    """Return the error that ends a run after its last attempt, with a reason if there is one."""
    why = [f" (client {k}: {reason})" for k, reason in sorted(failed.items())][:1]
    hint = "; resume it when the nodes are back" if config.checkpoint_every else ""
    return UserError(
        f"{where}: fewer than min_replies={config.min_replies} replies in {config.attempts} "
        f"attempts{''.join(why)}{hint}"
    )


def refuse_lost(config: Config, lost: Sequence[int], failed: Mapping[int, str]) -> None:
    """Raise UserError if clients have lost what they keep, and ``lost_state`` does not allow it."""
    if lost and config.lost_state == "fail":
        raise UserError(
            f"client {lost[0]}: {failed[lost[0]]}; restore it and resume, or choose "
            "lost_state=reset or lost_state=skip"
        )


@dataclass
class Taken:
    """What a round cost, over all its attempts.

    Attributes
    ----------
    attempts : int
        How often it was taken.
    anew : list of int
        Clients that began anew before it, because they had lost their memory.
    wire : float
        Seconds between sending and the last reply.
    down, up : Counter
        Bytes of model, state and metrics.
    gradients : int
        Gradient evaluations of the clients.
    """

    attempts: int = 0
    anew: list[int] = field(default_factory=list)
    wire: float = 0.0
    down: Counter[str] = field(default_factory=Counter)
    up: Counter[str] = field(default_factory=Counter)
    gradients: int = 0


class Rounds:
    """Takes the rounds of a run.

    Parameters
    ----------
    federation : Federation
        The strategy.
    config : Config
        Deadline, least number of replies, and what becomes of lost memories.
    say : callable
        Where the lines for a person go.
    """

    def __init__(
        self, federation: Federation | Relay, config: Config, say: Callable[[str], None]
    ) -> None:
        self.federation = federation
        self.config = config
        self.say = say
        self.lost: set[int] = set()

    def take(self, grid: Grid, round_: int) -> Taken:
        """Take one round; ``federation.round`` then tells what happened.

        A repeated round has the same cohort (of those who are there), and its clients begin from
        the same versions, so an attempt that failed leaves no trace.

        Raises
        ------
        UserError
            If every attempt had too few replies, or a client has lost its memory and
            ``lost_state=fail``.
        """
        federation, config, taken = self.federation, self.config, Taken()
        for taken.attempts in range(1, config.attempts + 1):
            if self.lost:  # also in the attempt before
                taken.anew += self._begin_anew(grid)
            arrays = pack({"theta": federation.server["theta"]})
            messages = federation.configure_train(round_, arrays, ConfigRecord(), grid)
            began = time.perf_counter()
            # Longer each time: a deadline that is too short for a busy machine must not
            # repeat the round for ever.
            patience = config.deadline * taken.attempts
            replies = exchange(grid, messages, patience)
            taken.wire += time.perf_counter() - began
            federation.aggregate_train(round_, replies)
            told = federation.round
            taken.down.update(told.down)
            taken.up.update(told.up)
            for row in told.rows.values():
                taken.gradients += int(row.get("gradients", 0))
            refuse_lost(config, told.lost, told.failed)
            if config.lost_state == "reset":
                self.lost |= set(told.lost)
            if not told.short:
                return taken
            self.say(f"round {round_}: too few replies, attempt {taken.attempts}")
            if taken.attempts < config.attempts:
                gather(grid, federation.roster, config.min_replies, config.deadline)
        raise too_few(config, f"round {round_}", federation.round.failed)

    def _begin_anew(self, grid: Grid) -> list[int]:
        """Let those who have lost their memory begin anew, and return who does."""

        def ask(messages: list[Message]) -> list[Message]:
            return exchange(grid, messages, self.config.deadline)

        self.federation.roster.call(grid)
        anew = begin_anew(self.federation, self.lost, ask)
        # Whom the books name still could not begin anew; others have nothing that counts.
        self.lost = (self.lost - set(anew)) & named(self.federation)
        return anew
