"""How a run's clients are personalized, and whether that goes with its other settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from app.binding import bind
from app.errors import UserError
from app.network_check import check_throughout
from strategies.algorithm import Individual
from strategies.gossip import Gossip, solver_of
from strategies.individual import (
    Costing,
    Phased,
    Plural,
    Practising,
    Rooted,
    Surveying,
    Weighing,
)
from strategies.local import missing
from strategies.personalize import Personalize
from strategies.sgd import SGD

if TYPE_CHECKING:
    from app.config import Config


#: What an algorithm is that has clients differ by other means.
OTHER = (Individual, Costing, Phased, Plural, Practising, Rooted, Surveying)
FITTING = "strategy=fedavg, fedprox, scaffold, feddyn, fedopt, fedopt_hyper, pushsum or push_diging"


def nothing() -> None:
    """Clients have nothing of their own."""


def settings(config: Config) -> Personalize | None:
    """Return how the clients of a run are personalized, None if they are not."""
    found = bind("personal", config.personal)()
    return found if isinstance(found, Personalize) else None


def check_personal(config: Config) -> None:
    """Raise UserError where clients cannot have hyper-parameters, or not learn them."""
    how = settings(config)
    if how is None:
        return
    what = f"personal={config.personal.name}"
    if config.estimate.name != "none":
        raise UserError(f"{what} and estimate={config.estimate.name}: one of the two")
    if config.program is not None:
        raise UserError(f"{what} and program={config.program}: one of the two")
    if config.privacy.name != "none":
        raise UserError(
            f"{what}: the vectors of an estimate are not protected; use privacy=none"
        )
    optimizer = bind("optimizer", config.optimizer)()
    built = bind("strategy", config.strategy)()
    if optimizer.curvature:
        own = missing(solver_of(built), SGD())  # as of Fed-Sophia
        raise UserError(
            f"{what}: optimizer={config.optimizer.name} estimates the curvature of the plain "
            f"model; use {FITTING if own else 'optimizer=sgd'}"
        )
    if how.interpolates and optimizer.models(2):
        raise UserError(
            f"{what}: optimizer={config.optimizer.name} trains no model alone, which "
            "interpolation needs; use optimizer=sgd"
        )
    if how.outer == "validation" and not config.client_validation:
        raise UserError(
            f"{what}: the outer cost needs samples that clients do not train on; use "
            "client_validation=0.2, or personal.outer=train"
        )
    for kind, does in ((OTHER, "gives clients models"), (Weighing, "weighs clients")):
        if isinstance(solver_of(built), kind):
            raise UserError(
                f"{what}: strategy={config.strategy.name} {does} in its own way; "
                f"use {FITTING}"
            )
    if how.start == "cold" and how.every and config.stop.patience is not None:
        raise UserError(
            "stop.patience: with personal.start=cold the model begins anew after each outer step, "
            "which patience takes for a model that does not improve; leave it out"
        )
    if how.method != "push":
        if isinstance(built, Gossip):
            raise UserError(
                f"personal.method={how.method}: needs exact averages; use a strategy with a "
                "server, or personal.method=push"
            )
        if how.batch:
            raise UserError(
                f"personal.method={how.method}: needs all samples in every product; use "
                "personal.batch=0"
            )
    if how.every and config.rounds <= how.every:
        raise UserError(
            f"{what}: with rounds={config.rounds} and personal.every={how.every} no outer step "
            "is taken, as none follows the last round; take more rounds, or personal.every=0 "
            "for none"
        )
    if how.every and isinstance(built, Gossip):
        check_throughout(config, what)
