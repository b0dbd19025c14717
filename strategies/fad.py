"""Federated automatic differentiation (Rush, Charles and Garrett 2024, arXiv 2301.07806).

A value is on the server, and then it is a tensor, or on the clients, and then it is a handle
(`Placed`) whose tensors never leave them. Programs are ordinary Python and torch:

    broadcast(x, clients)             server  -> clients   each client has x
    federated_map(name, c, ...)       clients -> clients   each client applies a function
    federated_sum(c)                  clients -> server    sum_k c_k
    federated_mean(c)                 clients -> server    (1/|A|) sum_k c_k
    federated_weighted_mean(c, w)     clients -> server    sum_k w_k c_k / sum_k w_k

A is the clients that answered. The derivative rules make derivatives of the same kind of messages:

    y = broadcast(x)    forward: broadcast(dx)    reverse: sum over clients of their cotangents
    y = sum(c)          forward: sum(dc)          reverse: broadcast(dy)

Handles are lazy: what leads to a sum is one plan, and the sum is one exchange with each node: the
plan and the values that it broadcasts go down, the sums over the node's clients come up. A program
costs as many exchanges as it has sums. Its derivative has three modes:

    reverse   ``y.backward()`` or ``torch.autograd.grad``: as many exchanges again. Clients get
              the same values and the cotangent, evaluate again, and pull back.
    forward   ``torch.func.jvp(program, ...)`` or ``torch.func.jacfwd``: tangents travel with the
              values, no further exchange, payload times 1 + p for p directions.
    mixed     ``broadcast(x, clients, columns=True)`` for a small x: the clients' Jacobian columns
              come with the value, and the server needs no exchange to go back to x.

Second derivatives are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from strategies.fad_client import Call, Plan
from strategies.fad_exchange import Clients, Dropped, sums
from strategies.fad_site import Site, register

__all__ = [
    "Clients",
    "Dropped",
    "Placed",
    "Site",
    "broadcast",
    "federated_map",
    "federated_mean",
    "federated_sum",
    "federated_weighted_mean",
    "register",
    "value_and_grad",
]


@dataclass(frozen=True, eq=False)
class Placed:
    """A value on the clients: what they have to evaluate to get it.

    Attributes
    ----------
    clients : Clients
        Where it is.
    name, round, arguments
        The function, the round of its draws, and what it takes; a broadcast has no name.
    value : Tensor or None
        What was broadcast.
    columns : bool
        Whether Jacobian columns by this broadcast travel with values.
    """

    clients: Clients
    name: str = ""
    round: int = 1
    arguments: tuple[Placed, ...] = ()
    value: Tensor | None = None
    columns: bool = False


def broadcast(x: Tensor, clients: Clients, columns: bool = False) -> Placed:
    """Place a server's tensor on every client.

    Parameters
    ----------
    x : Tensor
        Floating point, of any shape.
    clients : Clients
        Where to.
    columns : bool
        Whether the derivative by x is taken forward on the clients (mixed mode): worth it for a few
        numbers, as a learning rate.

    Raises
    ------
    TypeError
        If x is no tensor of float32 or float64.
    """
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
        raise TypeError("broadcast takes a tensor of float32 or float64")
    return Placed(clients, value=x, columns=columns)


def federated_map(
    name: str, *values: Placed, over: Clients | None = None, round: int = 1
) -> Placed:
    """Apply a function that is registered on the clients.

    Parameters
    ----------
    name : str
        Its name there (see `register`).
    *values : Placed
        Its arguments.
    over : Clients, optional
        Where, if there are no arguments.
    round : int
        The address of the function's random draws: the same round draws the same.

    Raises
    ------
    ValueError
        If the values are not on the same clients.
    """
    places = [v.clients for v in values] + ([over] if over else [])
    if not places or any(p is not places[0] for p in places):
        raise ValueError(f"{name}: give values on the same clients, or over=clients")
    return Placed(places[0], name, round, values)


def federated_sum(value: Placed) -> Tensor:
    """Return the sum over the clients."""
    return _sums([value])[0][0]


def federated_mean(value: Placed) -> Tensor:
    """Return the mean over the clients that answered."""
    (total,), count = _sums([value])
    return total / count


def federated_weighted_mean(value: Placed, weight: Placed) -> Tensor:
    """Return sum w_k c_k / sum w_k, w_k being one number; one exchange."""
    (total, weights), _ = _sums([federated_map("times", weight, value), weight])
    return total / weights


def value_and_grad(
    program: Callable[..., Tensor],
    clients: Clients,
    *inputs: Tensor,
    dropped: Literal["error", "remove"] = "error",
) -> tuple[Tensor, tuple[Tensor, ...], Clients]:
    """Return a program's value, its gradients by all inputs, and whom they were asked of.

    A client that did not answer for the value is in neither; the clients returned are fewer than
    those given if some were removed after it.

    Parameters
    ----------
    program : callable
        ``program(clients, *inputs)``, one number on the server.
    clients : Clients
        Who takes part.
    *inputs : Tensor
        Where to differentiate.
    dropped : {"error", "remove"}
        What to do if a client that is in the value does not answer for the derivative: raise
        `Dropped`, or compute both again without it.
    """
    while True:
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        try:
            value = program(clients, *leaves)
            grads = torch.autograd.grad(value, leaves, allow_unused=True)
        except Dropped as error:
            left = set(clients.cohort) - set(error.clients)
            if dropped == "error" or not left or len(left) == len(clients.cohort):
                raise
            clients = clients.only(left)
            continue
        pairs = zip(grads, leaves, strict=True)
        filled = tuple(torch.zeros_like(x) if g is None else g for g, x in pairs)
        return value.detach(), filled, clients


# From handles to messages.


def _plan(values: Sequence[Placed]) -> tuple[Plan, list[Placed]]:
    """Return the plan of some handles, and the broadcasts that it starts from."""
    order: list[Placed] = []
    seen: set[int] = set()
    # Without recursion: a handle may have a long history.
    stack: list[tuple[Placed, bool]] = [(v, False) for v in reversed(values)]
    while stack:
        value, ready = stack.pop()
        if ready:
            order.append(value)
        elif id(value) not in seen:
            seen.add(id(value))
            stack.append((value, True))
            stack += [(a, False) for a in reversed(value.arguments)]
    leaves = [v for v in order if v.value is not None]
    maps = [v for v in order if v.value is None]
    place = {id(v): i for i, v in enumerate([*leaves, *maps])}
    calls = tuple(
        Call(v.name, v.round, tuple(place[id(a)] for a in v.arguments)) for v in maps
    )
    return Plan(len(leaves), calls, tuple(place[id(v)] for v in values)), leaves


def _sums(values: Sequence[Placed]) -> tuple[tuple[Tensor, ...], int]:
    """Return the sums of some handles over the clients, in one exchange, and how many they are."""
    plan, handles = _plan(values)
    columns = tuple(i for i, h in enumerate(handles) if h.columns)
    leaves = [h.value for h in handles if h.value is not None]
    return sums(plan, leaves, values[0].clients, columns)
