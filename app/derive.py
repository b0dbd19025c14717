"""Differentiated programs over a Grid: what ``program=NAME`` runs instead of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from flwr.app import Message
from flwr.serverapp import Grid

from app.config import Config, load
from app.errors import UserError
from app.exchange import exchange
from app.host import objective, setting
from app.joining import wait_for_clients
from app.programs import program_of
from app.run import Run, Say
from strategies.engine import unfit
from strategies.fad import Clients
from strategies.fad_exchange import Dropped, Unlike
from strategies.fad_wire import OverGrid
from strategies.roster import Roster


def start(overrides: Sequence[str], grid: Grid, say: Say = print) -> Any:
    """Run settings over a grid: the program that they name, or training."""
    config = load(overrides)
    check_grid(config)
    if config.program is None:
        return Run(overrides, say=say)(grid)
    return derive(overrides, grid, say)


def check_grid(config: Config) -> None:
    """Raise UserError for what no grid can carry."""
    if config.estimate.name != "none":
        raise UserError(
            f"estimate={config.estimate.name}: is computed in one process; use "
            "python -m app.experiment, with runtime=local"
        )


def derive(overrides: Sequence[str], grid: Grid, say: Say = print) -> Any:
    """Run a program over a grid, and say what it sent.

    Raises
    ------
    UserError
        If there is no such program, or it cannot be run on the model.
    """
    config = load(overrides)
    assert config.program is not None
    run = program_of(config.program)
    torch.set_num_threads(config.threads)
    goal = objective(config, setting(tuple(overrides)).dataset)
    if why := unfit(goal):
        raise UserError(f"program={config.program}: {why}")
    roster = Roster(config.clients, config.holdout_clients, config.seed)
    wait_for_clients(grid, roster, config, say)
    cohort = roster.draw(1, config.clients_per_round)

    def ask(messages: list[Message]) -> list[Message]:
        return exchange(grid, messages, config.deadline)

    clients = Clients(OverGrid(grid, roster, ask), tuple(cohort))
    try:
        result = run(clients, goal.initial()[0].cpu())
    except (Dropped, Unlike) as error:
        raise UserError(f"program={config.program}: {error}") from error
    found = clients.ledger.audit()
    say(
        f"{found.rounds} exchanges, {found.derivative_rounds} more for derivatives: "
        f"{found.down} messages down ({found.bytes_down} bytes), "
        f"{found.up} up ({found.bytes_up} bytes)"
    )
    if found.alone:
        say(f"{found.alone} messages held a single client's values, not a sum")
    return result
