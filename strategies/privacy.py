"""Differential privacy for clients, by Flower's own mods and strategy wrapper.

The unit of privacy is the client, whatever node hosts it: each client's difference is clipped
alone, before it enters its node's mean and before the algorithm makes a memory of it.

    Central   delta_k <- delta_k min(1, C / ||delta_k||)    on the node: Flower's fixedclipping_mod
              mean    <- mean + N(0, (z C / n)^2 I)         on the server: Flower's wrapper
    Local     delta_k <- clipped + N(0, s^2 I)              on the node: Flower's LocalDpMod
              s = 2 C sqrt(2 ln(1.25 / delta)) / epsilon

Central protects what leaves the server (models, and what is published of them) against everyone
but the server and the nodes; the noise is that of the n clients that counted. Local protects
against the server too; two clients' clipped differences lie at most 2 C apart, and the formula is
that of the Gaussian mechanism, which holds for epsilon <= 1 in one release.

FedDyn takes the local form only. A client's memory is made of its released differences, so h stays
the mean of the memories, noise included, and what is not private enters neither. Central noise
would enter h and no memory: h would carry the sum of all noise so far, and at rest the mean
gradient would equal that sum instead of zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import numpy as np
import torch
from annotated_types import Gt, Le, Lt
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
    UserConfig,
)
from flwr.clientapp.mod import LocalDpMod, fixedclipping_mod
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping, FedAvg
from torch import Tensor

from strategies.algorithm import Algorithm, Client, Vectors

Mod = Callable[[Message, Context, Callable[[Message, Context], Message]], Message]
#: Flower's name for the clipping norm in a message.
NORM = "clipping_norm"


class Privacy(Protocol):
    """What protects the clients' differences."""

    @property
    def silent(self) -> bool:
        """Whether nodes keep what they measure on their own samples to themselves."""

    def unfit(self, algorithm: Algorithm, buffers: int, evaluated: bool) -> str:
        """Say why it would not protect, or would mislead; empty if it is sound."""

    def release(self, difference: Tensor) -> Tensor:
        """Return what a client may show of its difference (d,), on its node."""

    def excess(self, mean: Vectors) -> str:
        """Say what no node that protects its clients can have sent; empty if all is well."""

    def publish(self, mean: Vectors, clients: int) -> Vectors:
        """Return the mean over so many clients as the server may use it."""


@dataclass(frozen=True)
class Unprotected:
    """No protection."""

    silent = False

    def unfit(self, algorithm: Algorithm, buffers: int, evaluated: bool) -> str:
        """Return nothing: everything is allowed."""
        return ""

    def release(self, difference: Tensor) -> Tensor:
        """Return the difference."""
        return difference

    def excess(self, mean: Vectors) -> str:
        """Return nothing."""
        return ""

    def publish(self, mean: Vectors, clients: int) -> Vectors:
        """Return the mean."""
        return mean


@dataclass(frozen=True)
class Central:
    """Clients clip, the server adds noise.

    Attributes
    ----------
    clipping_norm : float
        C, the largest norm of a client's difference.
    noise_multiplier : float
        z, the noise on the sum over clients in units of C.
    """

    clipping_norm: Annotated[float, Gt(0)] = 1.0
    noise_multiplier: Annotated[float, Gt(0)] = 1.0

    silent = False

    def unfit(self, algorithm: Algorithm, buffers: int, evaluated: bool) -> str:
        """Refuse unequal weights, and a server that keeps means of the clients' memories."""
        if algorithm.mirror is not None:
            return (
                f"the server keeps {algorithm.mirror[1]}, the mean of what clients remember; "
                "noise that no client remembers would pile up in it and move the optimum. "
                "Use privacy=local"
            )
        if why := _unprotected(algorithm, buffers):
            return why
        if algorithm.weight(Client(0, 1, 0.5)) != algorithm.weight(Client(1, 3, 1.5)):
            return (
                "clients are weighted by their samples, so one of them may move the mean by "
                "more than the noise hides. Use strategy.weighting=uniform"
            )
        return ""

    def release(self, difference: Tensor) -> Tensor:
        """Return the clipped difference."""
        return _through(fixedclipping_mod, difference, self.clipping_norm)

    def excess(self, mean: Vectors) -> str:
        """Refuse a mean that is longer than C: the mean of clipped differences is not."""
        norm = float(torch.linalg.vector_norm(mean["delta"].to(torch.float64)))
        if norm <= self.clipping_norm * (1 + 1e-5):
            return ""
        return (
            f"delta has norm {norm:.3g}, more than clipping_norm={self.clipping_norm:g}"
        )

    def publish(self, mean: Vectors, clients: int) -> Vectors:
        """Return the mean with Flower's noise for the clients that counted."""
        wrapper = DifferentialPrivacyClientSideFixedClipping(
            FedAvg(), self.noise_multiplier, self.clipping_norm, clients
        )
        # Flower counts a reply as a client, so the mean is entered once for each.
        arrays = _record(mean["delta"])
        weight = MetricRecord({"num-examples": 1})
        content = RecordDict({"arrays": arrays, "metrics": weight})
        replies = [
            Message(content, i, MessageType.TRAIN) for i in range(1, clients + 1)
        ]
        noisy, _ = wrapper.aggregate_train(1, replies)
        assert noisy is not None, "replies of one kind are always aggregated"
        return {**mean, "delta": _tensor(noisy, mean["delta"])}


@dataclass(frozen=True)
class Local:
    """Clients clip and add noise themselves.

    Attributes
    ----------
    clipping_norm : float
        C, the largest norm of a client's difference.
    epsilon, delta : float
        The guarantee of one release: of one participation of one client.
    """

    clipping_norm: Annotated[float, Gt(0)] = 1.0
    epsilon: Annotated[float, Gt(0), Le(1)] = 1.0
    delta: Annotated[float, Gt(0), Lt(1)] = 1e-5

    silent = True

    def unfit(self, algorithm: Algorithm, buffers: int, evaluated: bool) -> str:
        """Refuse what would tell the server more than the released difference."""
        if evaluated:
            return (
                "clients would tell loss and accuracy on their own samples, unprotected. "
                "Use evaluate_clients=none"
            )
        return _unprotected(algorithm, buffers)

    def release(self, difference: Tensor) -> Tensor:
        """Return the clipped difference with noise."""
        mod = LocalDpMod(
            self.clipping_norm, 2 * self.clipping_norm, self.epsilon, self.delta
        )
        return _through(mod, difference, self.clipping_norm)

    def excess(self, mean: Vectors) -> str:
        """Return nothing: noise has no largest norm."""
        return ""

    def publish(self, mean: Vectors, clients: int) -> Vectors:
        """Return the mean: it is protected already."""
        return mean


def _unprotected(algorithm: Algorithm, buffers: int) -> str:
    """Say what would travel beside the difference."""
    others = sorted(set(algorithm.up) - {"delta"})
    if others:
        name = type(algorithm).__name__
        return f"{name} also sends {', '.join(others)}, and only the difference is protected"
    if buffers:
        return "the model's buffers (BatchNorm statistics) would travel unprotected"
    return ""


def _through(mod: Mod, difference: Tensor, norm: float) -> Tensor:
    """Send one client's difference through one of Flower's mods, as if it were a model from 0."""
    values = difference.detach().cpu()
    if not bool(torch.isfinite(values).all()):
        return difference  # it is refused for that, by name
    if not bool(values.any()):
        # Flower divides by the norm.
        values = torch.full_like(values, 1e-12)
    given = RecordDict(
        {
            "arrays": _record(torch.zeros_like(values)),
            "config": ConfigRecord({NORM: norm}),
        }
    )
    message = Message(given, 1, MessageType.TRAIN)
    message.metadata.__dict__["_message_id"] = "release"

    def app(asked: Message, _: Context) -> Message:
        return Message(RecordDict({"arrays": _record(values)}), reply_to=asked)

    context = Context(1, 1, UserConfig(), RecordDict(), UserConfig())
    reply = mod(message, context, app)
    if reply.has_error():
        raise RuntimeError(reply.error.reason)
    return _tensor(reply.content.array_records["arrays"], difference)


def _record(vector: Tensor) -> ArrayRecord:
    return ArrayRecord({"delta": Array(np.ascontiguousarray(vector.cpu().numpy()))})


def _tensor(record: Any, like: Tensor) -> Tensor:
    found: np.ndarray = record["delta"].numpy()
    return torch.from_numpy(found).to(like.device, like.dtype)
