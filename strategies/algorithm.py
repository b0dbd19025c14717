"""What every algorithm is made of: a server half and a client half on flat vectors.

The runtime, the engines and the Flower strategy know algorithms only through this protocol.
Every method is a pure function of its arguments. The client half consists of tensor operations
alone, so that an engine may loop over clients or vectorize over them.

The words: ``theta`` is a model in R^d, ``anchor`` the server's model that a client received,
``down`` what the server sends, ``up`` what a client returns, ``memory`` what a client keeps from
one participation to the next, ``state`` what it holds during one local training, and the cohort
is the clients whose replies were accepted in a round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

Vectors = dict[str, Tensor]
#: ``net(theta, x)``: the outputs (B, ...) of the model at a vector (d,), in evaluation mode.
Net = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Client:
    """The facts about one client that an algorithm may use.

    Attributes
    ----------
    id : int
        Its number, from 0.
    samples : int
        n_k, its training samples.
    share : float
        w_k = n_k / mean of n over all clients, so that the mean of w is 1.
    entropy : float
        Of the labels among its training samples, in nats; 0 without classes. Clients know it of
        themselves, the server does not.
    """

    id: int
    samples: int
    share: float
    entropy: float = 0.0


@dataclass(frozen=True)
class Cohort:
    """The clients whose replies the server accepted in a round.

    Attributes
    ----------
    size : int
        How many they are, |P_t|.
    total : int
        m, all clients of the federation, in the cohort or not.
    newcomers : int
        How many of the cohort are accepted for the first time in this run.
    round_ : int
        The round, from 1.
    """

    size: int
    total: int
    newcomers: int
    round_: int = 1


@runtime_checkable
class Algorithm(Protocol):
    """One federated algorithm (see the module docstring for the words).

    Attributes
    ----------
    mirror : tuple of str or None
        ``(memory, server)``: the names of a client memory vector and of the server vector that
        equals its mean over all clients after every round. The strategy audits it.
    up : tuple of str
        The names of the vectors that go to the server: those that ``finish`` returns, and
        possibly some of ``needs``, as local training leaves them.
    needs : tuple of str
        What it cannot do without in the local optimizer's state (see `strategies.optimizer`):
        ``effort``, or vectors, which start from those of the same name in ``down`` if they are
        there.
    """

    @property
    def mirror(self) -> tuple[str, str] | None:
        """The audited pair ``(memory vector, server vector)``, or None."""

    @property
    def up(self) -> tuple[str, ...]:
        """The names of the vectors that a client returns; most are of shape (d,)."""

    @property
    def needs(self) -> tuple[str, ...]:
        """What it relies on in the local optimizer's state."""

    # Client half.

    def fresh(self, theta: Tensor) -> Vectors:
        """Return the memory of a client that has not taken part yet."""

    def begin(
        self, down: Mapping[str, Tensor], memory: Vectors, client: Client
    ) -> Vectors:
        """Return the state that stays constant during one local training."""

    def direction(
        self, gradient: Tensor, theta: Tensor, anchor: Tensor, state: Vectors
    ) -> Tensor:
        """Turn the data's gradient at theta into the gradient that is stepped along."""

    def finish(
        self, theta: Tensor, anchor: Tensor, state: Vectors, effort: Tensor
    ) -> tuple[Vectors, Vectors]:
        """Return ``(up, memory)`` after local training.

        ``effort`` is the total weight with which directions entered ``theta``, a 0-dim tensor:
        learning rate times steps for plain SGD. It is NaN with an optimizer that has none.
        """

    # Server half.

    def weight(self, client: Client) -> float:
        """Return the client's weight in the means that the server receives."""

    def start(self, theta: Tensor) -> Vectors:
        """Return the server's vectors before the first round; ``theta`` is among them."""

    def down(self, server: Vectors) -> Vectors:
        """Return the vectors that the server sends to the cohort."""

    def update(self, server: Vectors, mean: Vectors, cohort: Cohort) -> Vectors:
        """Return the server's vectors after a round from the weighted means of ``up``."""

    def models(self, server: Vectors) -> Vectors:
        """Return the models worth evaluating by name; the first is the one reported."""


@runtime_checkable
class Witness(Protocol):
    """An algorithm whose client half wants to see the first batch."""

    def witness(self, state: Vectors, gradient: Tensor, loss: Tensor) -> Vectors:
        """Return the state after a look at the first batch, before the first step.

        ``gradient`` (d,) is the data's, unclipped, and ``loss`` the mean, a 0-dim tensor, both at
        the anchor.
        """


@runtime_checkable
class Individual(Protocol):
    """An algorithm whose clients each have a model of their own, and are judged with it."""

    def predict(
        self, net: Net, down: Mapping[str, Tensor], memory: Vectors, x: Tensor
    ) -> Tensor:
        """Return the outputs (B, ...) of a client's own model.

        ``down`` is what the server sends now, or in a network without one what the client holds;
        ``memory`` is of the client's last participation that counted, or `Algorithm.fresh`.
        """


class Mirrored(Algorithm, Protocol):
    """An algorithm whose server holds means of the clients' memories (``mirror`` is not None)."""

    def recount(self, server: Vectors, sums: Vectors, seen: int, total: int) -> Vectors:
        """Return the server's vectors with those means made anew.

        It serves when a client has lost its memory and begins again: what the server held of it
        is in no memory any more.

        Parameters
        ----------
        server : Vectors
            The server's vectors.
        sums : Vectors
            The sum of each memory vector, shape (d,), over the clients that have one.
        seen, total : int
            How many these are, and m, all clients of the federation.
        """
