"""The start of everything over a Grid: wait until enough clients are there."""

from __future__ import annotations

import time
from collections.abc import Callable

from flwr.serverapp import Grid
from flwr.superlink.grid.http_grid import HttpGrid

from app.config import Config
from app.errors import UserError
from strategies.roster import Roster


def wait_for_clients(
    grid: Grid, roster: Roster, config: Config, say: Callable[[str], None]
) -> None:
    """Call the roll until enough clients are there, and fix the mean of their samples.

    Raises
    ------
    UserError
        If they do not join in time, or what nodes tell of themselves is impossible: every node
        or, where no other can come, one of them.
    """
    wanted = config.min_clients or config.clients + config.holdout_clients
    began, told = time.monotonic(), -1
    while True:
        roster.call(grid)
        here = len(roster.hosts)
        if here >= wanted and roster.trainable():
            break
        refused = next(iter(roster.faults.values()), "")
        # Over a SuperLink others may come yet; what this process holds is all there will be.
        alone = not here or not isinstance(grid, HttpGrid)
        if refused and alone and not roster.waiting:
            raise UserError(refused)
        if time.monotonic() - began > config.join_timeout:
            # A network starts with all of its clients.
            fewer = ", or lower min_clients" if config.topology.name == "none" else ""
            raise UserError(
                f"{here} of {wanted} clients joined within {config.join_timeout:g} s; "
                f"start more nodes{fewer}"
                + (f" (refused: {refused})" if refused else "")
            )
        if here != told:
            say(f"waiting for clients: {here} of {wanted}")
            told = here
        time.sleep(0.1)
    if not roster.mean_samples:
        roster.fix_mean()
