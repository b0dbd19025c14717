"""Which Flower strategy drives a run (a federation with a server, or the relay), and its memory."""

from __future__ import annotations

from typing import Any

from flwr.serverapp import Grid

from app.binding import bind
from app.config import Config
from app.errors import UserError
from app.local_grid import LocalGrid
from app.privacy_check import check_privacy
from strategies.federation import Federation
from strategies.gossip import Gossip
from strategies.local import Trainer
from strategies.network import Network, Window
from strategies.relay import Relay
from strategies.topology import Edges

#: Rounds of a network that are looked at before the run, until they connect all to all.
AHEAD = 500


def strategy(config: Config, local: Trainer) -> Federation | Relay:
    """Return the strategy of a run.

    Parameters
    ----------
    config : Config
        The settings.
    local : Trainer
        What clients train with, of which the model's first values are taken.

    Raises
    ------
    UserError
        If the network cannot be, or never connects all clients.
    """
    theta, buffers = (v.cpu() for v in local.objective.initial())
    common: dict[str, Any] = {
        "per_round": config.clients_per_round,
        "seed": config.seed,
        "evaluate_every": config.evaluate_every,
        "evaluate_clients": config.evaluate_clients,
        "work": config.local.steps_of,
        "metrics": None if local.privacy.silent else local.optimizer.metrics,
        "min_replies": config.min_replies,
    }
    built = bind("strategy", config.strategy)()
    check_privacy(config, len(buffers))
    if isinstance(built, Gossip):
        return Relay(built, network(config, built), theta, buffers, **common)
    common |= {"clients": config.clients, "holdout": config.holdout_clients}
    common["privacy"] = local.privacy
    return Federation(local.algorithm, theta, buffers, **common)


def network(config: Config, gossip: Gossip) -> Network:
    """Return the network of a run, after a look at whether it connects its clients.

    Raises
    ------
    UserError
        If it does not, or cannot be.
    """
    try:
        edges: Edges = bind("topology", config.topology, ("n", "seed"))(
            n=config.clients, seed=config.seed
        )
        faults = bind("faults", config.faults)()
        found = Network(config.clients, config.seed, edges, gossip.weights, faults)
        found.at(0)
        ahead = min(max(config.rounds, 1), AHEAD)
        joined = _connects(found, ahead)
    except ValueError as error:
        raise UserError(f"topology={config.topology.name}: {error}") from None
    if not joined:
        raise UserError(
            f"topology={config.topology.name}: the links of {ahead} rounds "
            "together do not lead from every client to every other, so they cannot agree; "
            "make the topology denser, or take topology=self_loop for local training"
        )
    return found


def _connects(network: Network, rounds: int) -> bool:
    """Return whether some rounds connect all clients, or nobody ever means to send.

    All are there from the last round in which one joins.
    """
    joins = (network.faults.join or {}).values()
    last = max((round_ - 1 for round_ in joins if round_ <= rounds), default=0)
    watch, sent = Window(network.n), False
    for t in range(last, last + rounds):
        sent = sent or len(network.edges(t)) > 0
        watch.see(network.at(t), network.faults.present(t, network.n))
        if watch.longest is not None:
            return True
    return not sent


def keeps_files(config: Config, grid: Grid, remembers: bool) -> bool:
    """Return whether clients' memories go to files, in a run's directory.

    A checkpoint without them is worth nothing; and Flower's simulation hands a node's whole
    context to and fro with each message, the memories of clients that rest included.

    Raises
    ------
    UserError
        If clients that remember something would lose it with this process, and a checkpoint is
        kept for another.
    """
    here = isinstance(grid, LocalGrid)
    if config.client_memory == "auto":
        return config.checkpoint_every > 0 or not here
    if config.client_memory == "directory":
        return True
    if remembers and here and config.checkpoint_every:
        raise UserError(
            "client_memory=context: what clients remember ends with this process, so a "
            "resumed run would not have it; use client_memory=directory or auto"
        )
    return False
