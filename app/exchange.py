"""Messages out, replies in: as the grid does it, but without its long pauses; and who is there.

Flower's grid of a deployment looks for replies every three seconds. A round of a small job takes
less, so here the pause grows with the time already waited.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from logging import WARNING

from flwr.app import Message
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.superlink.grid.http_grid import HttpGrid

from strategies.mail import arrived, fault
from strategies.roster import Roster

SHORTEST, LONGEST, SHARE = 0.1, 3.0, 0.05


def exchange(grid: Grid, messages: Iterable[Message], timeout: float) -> list[Message]:
    """Send messages and return the replies that arrive before the timeout.

    Parameters
    ----------
    grid : Grid
        Any grid.
    messages : iterable of Message
        What to send.
    timeout : float
        Seconds to wait for replies.
    """
    if not isinstance(grid, HttpGrid):
        return list(grid.send_and_receive(messages, timeout=timeout))
    began = time.monotonic()
    sent = list(messages)
    # None stands for a message that the SuperLink did not take, and nothing for all of them.
    names: list[str | None] = [*grid.push_messages(sent)] or [None] * len(sent)
    waiting, replies = dict[str, Message](), list[Message]()
    for name, message in zip(names, sent, strict=True):
        if name is None:
            replies.append(fault(message, "the SuperLink did not take the message"))
        else:
            waiting[name] = message
    while waiting:
        for name, reply in list(arrived(grid, waiting)):
            del waiting[name]
            replies.append(reply)
        waited = time.monotonic() - began
        if not waiting or waited > timeout:
            break
        pause = min(max(SHORTEST, SHARE * waited), LONGEST)
        time.sleep(min(pause, max(timeout - waited, 0.0)))
    if waiting:
        log(WARNING, "%s replies did not come within %g s", len(waiting), timeout)
    return replies


def gather(grid: Grid, roster: Roster, enough: int, patience: float) -> None:
    """Wait, so many seconds at most, until enough clients are there for a round."""
    end = time.monotonic() + patience
    roster.call(grid)
    while len(roster.trainable()) < enough and time.monotonic() < end:
        time.sleep(0.5)
        roster.call(grid)
