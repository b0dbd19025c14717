"""Kinds of hyper-parameters that a client may have of its own: what each does at l.

`personalization.py` says what they are for and lists them. A family overrides the hooks that it
needs; what it does not touch it returns as it is. l = 0 changes nothing, to the last bit; of a
mixture, which has no plain model, it is the mean of the learners.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Own:
    """What a client has.

    Attributes
    ----------
    x, y : Tensor
        Its training samples (N, ...) and their classes (N,).
    outer_x, outer_y : Tensor
        Those on which its outer cost is measured.
    local : Tensor or None
        Its local model, a vector like the shared one.
    """

    x: Tensor
    y: Tensor
    outer_x: Tensor
    outer_y: Tensor
    local: Tensor | None = None


def relative(l: Tensor) -> Tensor:  # noqa: E741 - the papers' lambda
    """Return C softmax(l), exactly one everywhere for l = 0."""
    weights = (l - l.detach().max()).exp()
    return weights / weights.mean()


@dataclass(frozen=True)
class Family(ABC):
    """One kind of hyper-parameters. What a kind does not touch, it returns as it is.

    Attributes
    ----------
    gamma : float
        Of its regularizer gamma/2 |l|^2.
    """

    gamma: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < float("inf"):
            raise ValueError(f"{self.name}: gamma={self.gamma:g}: at least 0")

    @property
    def name(self) -> str:
        """What messages call it."""
        return type(self).__name__

    def unfit(self, classes: int, learners: int, own: Own) -> str:
        """Say why it does not go with a model or a client's data; empty if it does."""
        return ""

    @abstractmethod
    def size(self, classes: int, own: Own) -> int:
        """Return how many numbers a client has of it."""

    def inputs(self, x: Tensor, own: Tensor) -> Tensor:
        """Return the inputs (B, ...) that the model sees."""
        return x

    def model(self, theta: Tensor, local: Tensor | None, own: Tensor) -> Tensor:
        """Return the model that the client uses, a vector like theta."""
        return theta

    def logits(self, logits: Tensor, own: Tensor) -> Tensor:
        """Return the logits (B, C) of a learner as the client uses them."""
        return logits

    def weights(self, y: Tensor, rows: Tensor, own: Tensor) -> Tensor | None:
        """Return factors (B,) of the training losses of samples, None for ones."""
        return None

    def penalty(self, theta: Tensor, own: Tensor) -> Tensor | None:
        """Return what it adds to the training cost, None for nothing."""
        return None

    def admitted(self, own: Tensor, decay: float) -> Tensor:
        """Return the nearest l with which there is something to train for.

        ``decay`` is everybody's weight decay. l = 0 is always admitted.
        """
        return own


@dataclass(frozen=True)
class ClassWeights(Family):
    """Weigh training losses by class; predictions are those of the shared model."""

    def size(self, classes: int, own: Own) -> int:
        """Return C."""
        return classes

    def weights(self, y: Tensor, rows: Tensor, own: Tensor) -> Tensor:
        """Return C softmax(l)_y."""
        return relative(own)[y]


@dataclass(frozen=True)
class LogitWeights(Family):
    """Weigh logits by class: a personal last layer of C numbers."""

    def size(self, classes: int, own: Own) -> int:
        """Return C."""
        return classes

    def logits(self, logits: Tensor, own: Tensor) -> Tensor:
        """Return logits times C softmax(l)."""
        return logits * relative(own)


@dataclass(frozen=True)
class Mixture(Family):
    """Mix the predictions of K shared learners, which have to start apart.

    Attributes
    ----------
    learners : int
        K.
    """

    learners: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learners < 2:
            raise ValueError(f"Mixture: learners={self.learners}: at least 2")

    def unfit(self, classes: int, learners: int, own: Own) -> str:
        """Refuse a model of another number of learners."""
        if learners != self.learners:
            return f"mixes {self.learners} learners, and the model has {learners}"
        return ""

    def size(self, classes: int, own: Own) -> int:
        """Return K."""
        return self.learners


@dataclass(frozen=True)
class SampleWeights(Family):
    """Weigh every training sample: what influence is the derivative by."""

    def size(self, classes: int, own: Own) -> int:
        """Return the number of the client's training samples."""
        return len(own.y)

    def weights(self, y: Tensor, rows: Tensor, own: Tensor) -> Tensor:
        """Return 1 + l_j."""
        return 1 + own[rows]

    def admitted(self, own: Tensor, decay: float) -> Tensor:
        """Return l from -1 up: below, the training cost falls as a sample gets ever worse."""
        return own.clamp(min=-1)


@dataclass(frozen=True)
class Interpolation(Family):
    """Use a model between the shared and the client's local one."""

    def unfit(self, classes: int, learners: int, own: Own) -> str:
        """Refuse a client without a local model."""
        return "" if own.local is not None else "needs each client's local model"

    def size(self, classes: int, own: Own) -> int:
        """Return 1."""
        return 1

    def model(self, theta: Tensor, local: Tensor | None, own: Tensor) -> Tensor:
        """Return x + l (x_i - x)."""
        assert local is not None  # see unfit
        return theta + own * (local - theta)


@dataclass(frozen=True)
class WeightDecay(Family):
    """Pull the shared model to zero, as strongly as the client wants."""

    def size(self, classes: int, own: Own) -> int:
        """Return 1."""
        return 1

    def penalty(self, theta: Tensor, own: Tensor) -> Tensor:
        """Return l/2 |x|^2."""
        return own[0] / 2 * theta.square().sum()

    def admitted(self, own: Tensor, decay: float) -> Tensor:
        """Return l from -decay up: below, the training cost falls without end far from zero."""
        return own.clamp(min=-decay)


@dataclass(frozen=True)
class FeatureScales(Family):
    """Scale each feature, or each channel of an image, before the model."""

    def size(self, classes: int, own: Own) -> int:
        """Return the number of features or channels."""
        return own.x.shape[1]

    def inputs(self, x: Tensor, own: Tensor) -> Tensor:
        """Return x times e^l."""
        return x * own.exp().view(-1, *[1] * (x.ndim - 2))
