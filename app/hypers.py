"""Clients' own hyper-parameters on a node: where they are kept, and what they are measured on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from flwr.app import ConfigRecord, Context
from torch import Tensor

from app.errors import UserError
from app.host import Samples
from app.personal_check import settings
from app.store import ContextStore, DirectoryStore, Store, recall
from strategies.families import Own
from strategies.local import Part
from strategies.personal_objective import PersonalObjective
from strategies.personalize import Personalize

if TYPE_CHECKING:
    from app.node import Node

Hypers = Callable[[int], Tensor]


def beside(store: Store) -> Store:
    """Return where hyper-parameters are kept, beside the memories of training."""
    if isinstance(store, DirectoryStore):
        return DirectoryStore(store.path / "hyper", store.synced)
    assert isinstance(store, ContextStore)
    return ContextStore(store.state, "hyper")


def rows(part: Part) -> tuple[Tensor, Tensor]:
    """Return a client's samples by themselves."""
    return part.x[part.index], part.y[part.index]


def own_of(samples: Samples, how: Personalize) -> Own:
    """Return what a client has: for the inner cost, and for the outer one.

    Raises
    ------
    UserError
        If the outer cost is that of samples which it does not have.
    """
    kept = samples.train if how.outer == "train" else samples.validation
    if not len(kept):
        raise UserError("personal.outer=validation: the client keeps no samples for it")
    return Own(*rows(samples.train), *rows(kept))


def hypers_of(node: Node, order: ConfigRecord, context: Context) -> Hypers | None:
    """Return the function that gives the l of each client, in the version that an order names.

    None in a run without personalization. A client of which the order names no version has l = 0.
    The function raises Lost if a version is not here any more.
    """
    goal, how = node.trainer().objective, settings(node.config)
    if how is None or not isinstance(goal, PersonalObjective):
        return None
    clients, named = order["hyper"], order["hyper_versions"]
    pairs = zip(cast(list[int], clients), cast(list[int], named), strict=True)
    versions, fresh = dict(pairs), how.fresh(goal.zero)

    def hyper(k: int) -> Tensor:
        store = beside(node.store(context, order))
        return recall(store, k, versions.get(k, 0), fresh)["l"]

    return hyper
