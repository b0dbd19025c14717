"""Whether strategy, network and estimate go together: some need a network, others a server."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from app.binding import bind
from app.compose import compose
from app.errors import UserError
from strategies.faults import CHANGES, Faults
from strategies.gossip import Gossip
from strategies.influence import Influence
from strategies.sgd import SGD

if TYPE_CHECKING:
    from app.config import Config


def check_estimate(config: Config) -> None:
    """Raise UserError where an estimate is asked for that the other settings do not give."""
    if config.estimate.name == "none":
        return
    how = bind("estimate", config.estimate)()
    what = f"estimate={config.estimate.name}"
    if not isinstance(bind("strategy", config.strategy)(), Gossip):
        raise UserError(
            f"{what}: vectors go over a network; use strategy=pushsum and a topology "
            "(topology=complete averages as a server does)"
        )
    if config.program is not None:
        raise UserError(f"{what} and program={config.program}: one of the two")
    _check_unread(config, what, isinstance(how, Influence))
    check_throughout(config, what)
    if isinstance(how, Influence):
        _check_influence(config, how, what)
        return
    if config.model.name != "linear" or config.dtype != "float64":
        raise UserError(
            f"{what}: is about logistic regression in float64; use model=linear dtype=float64"
        )
    if not config.client_test:
        raise UserError(
            f"{what}: the outer cost needs samples that clients do not train on; "
            "use client_test=0.5"
        )


def check_throughout(config: Config, what: str) -> None:
    """Raise UserError if clients crash, leave or join during an estimate."""
    faults = bind("faults", config.faults)()
    for change in CHANGES:
        if getattr(faults, change):
            raise UserError(
                f"{what}: faults.{change}: an estimate needs all clients throughout"
            )


def _check_unread(config: Config, what: str, trains: bool) -> None:
    """Raise UserError for settings that were given and that no estimate reads."""
    choices = (f"{n}={getattr(config, n).name}" for n in ("strategy", "optimizer"))
    plain, _ = compose(tuple(choices))
    if config.strategy.options.get("solver") != OmegaConf.select(
        plain, "strategy.solver"
    ):
        raise UserError(f"strategy.solver: {what} does not read it; leave it out")
    local, options = config.local, config.optimizer.options
    given: dict[str, Any] = {
        "checkpoint_every": config.checkpoint_every,
        **{f"local.{n}": getattr(local, n) for n in ("epochs", "steps", "clip")},
    }
    if not trains:
        given["optimizer"] = config.optimizer.name
        given["client_validation"] = config.client_validation
        given |= {f"optimizer.{name}": value for name, value in options.items()}
    for key, value in given.items():
        default = "sgd" if key == "optimizer" else OmegaConf.select(plain, key)
        if value != default:
            raise UserError(f"{key}={value}: {what} does not read it; leave it out")


def _check_influence(config: Config, how: Influence, what: str) -> None:
    """Raise UserError where influence cannot be estimated as asked."""
    if not config.client_validation:
        raise UserError(
            f"{what}: is about the loss on samples that clients do not train on; use "
            "client_validation=0.25"
        )
    if not isinstance(bind("optimizer", config.optimizer)(), SGD):
        raise UserError(
            f"optimizer={config.optimizer.name}: {what} trains by gradient steps whose "
            "weight decay is part of the cost; use optimizer=sgd"
        )
    if how.method != "conjugate_gradients":
        return
    if config.topology.name != "complete":
        raise UserError(
            f"estimate.method={how.method}: needs exact averages; use topology=complete, "
            "or estimate.method=push"
        )
    if config.local.batch:
        raise UserError(
            f"estimate.method={how.method}: needs all samples in every product; use "
            "local.batch=0"
        )


def check_network(config: Config) -> None:
    """Raise UserError where strategy, topology and faults do not go together."""
    faults = bind("faults", config.faults)()
    name, there = config.strategy.name, config.topology.name != "none"
    network = isinstance(bind("strategy", config.strategy)(), Gossip)
    if network and not there:
        raise UserError(
            f"strategy={name} has no server: choose a network, such as "
            "topology=one_peer_exponential"
        )
    if not network and (there or faults != Faults()):
        what = f"topology={config.topology.name}" if there else "faults"
        raise UserError(
            f"strategy={name} has a server: {what} is for strategies without one, "
            "such as strategy=pushsum"
        )
    if not network:
        return
    bind("topology", config.topology, ("n", "seed"))
    if config.holdout_clients:
        raise UserError(
            f"holdout_clients={config.holdout_clients}: strategy={name} has no "
            "server whose model clients outside the network could get"
        )
    try:
        faults.check(config.clients)
    except ValueError as error:
        raise UserError(f"faults: {error}") from None


def check_kept(config: Config, common: int, say: Callable[[str], None]) -> None:
    """Raise UserError for validation samples that nobody looks at, and say so of test samples.

    Parameters
    ----------
    config : Config
        The settings.
    common : int
        Samples of the test set that is nobody's. Without one, a network too judges its clients on
        what they keep.
    say : callable
        Where the lines for a person go.
    """
    built = bind("strategy", config.strategy)()
    if not (isinstance(built, Gossip) and built.judge == "test" and common):
        return
    if config.personal.name != "none":
        return  # whose outer level looks at both
    if config.client_validation:
        raise UserError(
            f"client_validation={config.client_validation}: nobody looks at these samples "
            "with strategy.judge=test, which takes the common test set; use strategy.judge=own"
        )
    if config.client_test:
        say(
            f"client_test={config.client_test}: kept from training, and not looked at with "
            "strategy.judge=test"
        )
