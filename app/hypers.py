"""What clients have of their own on a node: where it is kept, and what it is measured on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from flwr.app import ConfigRecord, Context
from torch import Tensor

from app.errors import UserError
from app.host import Samples
from app.personal_check import settings
from app.store import ContextStore, DirectoryStore, Store, recall
from strategies.algorithm import Client, Vectors
from strategies.engine import loop
from strategies.families import Own
from strategies.local import Job, Part
from strategies.personal_objective import PersonalObjective
from strategies.personalize import Personalize
from strategies.wire import Refused

if TYPE_CHECKING:
    from app.node import Node

Hypers = Callable[[int], Vectors]


def beside(store: Store, kind: str = "hyper") -> Store:
    """Return where hyper-parameters, or something else, are kept beside training's memories."""
    if isinstance(store, DirectoryStore):
        return DirectoryStore(store.path / kind, store.synced)
    assert isinstance(store, ContextStore)
    return ContextStore(store.state, kind)


def rows(part: Part) -> tuple[Tensor, Tensor]:
    """Return a client's samples by themselves."""
    return part.x[part.index], part.y[part.index]


def own_of(samples: Samples, how: Personalize, local: Tensor | None = None) -> Own:
    """Return what a client has: for the inner cost, and for the outer one.

    Raises
    ------
    UserError
        If the outer cost is that of samples which it does not have.
    """
    kept = samples.train if how.outer == "train" else samples.validation
    if not len(kept):
        raise UserError("personal.outer=validation: the client keeps no samples for it")
    return Own(*rows(samples.train), *rows(kept), local)


def alone(node: Node, how: Personalize, store: Store, k: int) -> tuple[Tensor, int]:
    """Return the model that client k has trained alone, (d,), and how many gradients it took.

    It is trained once and then kept beside the hyper-parameters. It depends on the run's settings
    only, so it has no versions, and where it is lost it is trained again.

    Raises
    ------
    ArithmeticError
        If that training diverges.
    """
    run, part = node.trainer(), node.samples(k).train
    theta, buffers = run.objective.initial()
    store = beside(store, "alone")
    try:
        kept = store.load(k, 0, {"theta": theta, "gradients": theta.new_zeros(1)})
    except (KeyError, Refused):
        solo = how.solo(run)
        job = Job(Client(k, len(part), 1.0), part, solo.fresh(theta))
        found = loop(solo, {"theta": theta, "buffers": buffers}, job, 1)
        if why := found.faults():
            raise ArithmeticError(f"its model of its own: {why[0]}") from None
        counted = theta.new_tensor([float(found.gradients[0])])
        kept = {"theta": theta + found.up["delta"][0], "gradients": counted}
        store.save(k, 0, kept)
    return kept["theta"].to(theta.device), int(kept["gradients"])


def hypers_of(node: Node, order: ConfigRecord, context: Context) -> Hypers | None:
    """Return the function that gives what each client has, l in the version that an order names.

    None in a run without personalization. A client of which the order names no version has l = 0.
    The function raises Lost if a version is not here any more.
    """
    goal, how = node.trainer().objective, settings(node.config)
    if how is None or not isinstance(goal, PersonalObjective):
        return None
    clients, named = order["hyper"], order["hyper_versions"]
    pairs = zip(cast(list[int], clients), cast(list[int], named), strict=True)
    versions = dict(pairs)

    def hyper(k: int) -> Vectors:
        store, version = node.store(context, order), versions.get(k, 0)
        fresh = how.fresh(goal.zeros(len(node.samples(k).train)))
        own = {"l": recall(beside(store), k, version, fresh)["l"]}
        if not how.interpolates:
            return own
        # Before the first step l = 0, and any model serves: its own is trained for the estimate.
        first, _ = goal.initial()
        return own | {"local": alone(node, how, store, k)[0] if version else first}

    return hyper
