"""Personalize: a shared model, and hyper-parameters of each client's own, in turn (bilevel).

    inner   rounds of training by any strategy, with a server or over a network, on f_i(x, l_i)
    then    v_i, the derivative of everybody's outer cost by l_i            (hypergrad.py)
    outer   l_i <- Adam(l_i, v_i), on the client

(Terashita and Hara, arXiv 2210.02129, v3 section 5.3; the families are those of
`personalization.py`.) l_i, Adam's moments and v_i stay on the client: what leaves it is what
training sends, and the vectors u_i in R^d of the estimate.

The family `Interpolation` needs a model that the client has trained alone (`solo`). It begins where
everybody begins, and nothing of it is sent.

The outer cost is that of samples which clients do not train on; ``outer: train`` is what the
authors' code does. A client whose hyper-gradient is not finite keeps its l_i.

With ``weighting: samples`` training minimizes sum w_i f_i, w_i = n_i / mean of n: J_i and H_i are
then taken times w_i. The estimate takes the model where inner training left it for the minimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from strategies.algorithm import Vectors
from strategies.families import (
    ClassWeights,
    Family,
    FeatureScales,
    Interpolation,
    LogitWeights,
    Mixture,
    Own,
    SampleWeights,
    WeightDecay,
)
from strategies.fedavg import FedAvg
from strategies.hypergrad import HGP
from strategies.local import Trainer
from strategies.personalization import Personal
from strategies.privacy import Unprotected
from strategies.randomness import generator

#: The families that a run can have, by the names that they have in its settings.
FAMILIES: dict[str, type[Family]] = {
    "class_weights": ClassWeights,
    "logit_weights": LogitWeights,
    "mixture": Mixture,
    "weight_decay": WeightDecay,
    "feature_scales": FeatureScales,
    "sample_weights": SampleWeights,
    "interpolation": Interpolation,
}
Kind = Literal[
    "class_weights",
    "logit_weights",
    "mixture",
    "weight_decay",
    "feature_scales",
    "sample_weights",
    "interpolation",
]
#: A number for all families, or one for each by name.
Each = float | dict[Kind, float]


@dataclass(frozen=True)
class Personalize(HGP):
    """Which hyper-parameters clients have, and how they are learned.

    Attributes
    ----------
    families : tuple of str
        Which (see `FAMILIES`).
    learners : int or None
        K, of the mixture; None is 3 with one, and 1 without.
    method : {"push", "conjugate_gradients"}
        The Neumann series, or with a server at most ``depth`` iterations of conjugate gradients.
    damping : float
        Added to the eigenvalues of the Hessian, which the estimate alone sees.
    alone : int or None
        Epochs of a client's training alone, for the interpolation; None is 20 with it.
    gamma : float or dict of str to float
        Of the regularizers gamma/2 |l|^2: one for all families, or each its own.
    every : int
        Rounds of inner training before each outer step; 0 takes no outer step.
    start : {"warm", "cold"}
        Whether inner training goes on after an outer step, or begins anew.
    outer : {"validation", "train"}
        On which samples clients measure the outer cost.
    batch : int
        Samples in a product with second derivatives; 0 takes all.
    lr : float or dict of str to float
        Adam's step.
    beta1, beta2, eps : float
        Adam's.
    """

    families: tuple[Kind, ...] = ("class_weights",)
    method: Literal["push", "conjugate_gradients"] = "push"
    damping: Annotated[float, Ge(0), Lt(float("inf"))] = 0.0
    learners: Annotated[int, Ge(1)] | None = None
    alone: Annotated[int, Ge(1)] | None = None
    gamma: Each = 0.0
    every: Annotated[int, Ge(0)] = 10
    start: Literal["warm", "cold"] = "warm"
    outer: Literal["validation", "train"] = "validation"
    batch: Annotated[int, Ge(0)] = 0
    lr: Each = 0.1
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.999
    eps: Annotated[float, Gt(0)] = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.families:
            raise ValueError(f"families=[]: name one of {', '.join(FAMILIES)}")
        for name in self.families:
            if self.families.count(name) > 1:
                raise ValueError(f"families: {name} is there twice")
        mixes = "mixture" in self.families
        if self.learners and not mixes and self.learners > 1:
            raise ValueError(
                f"learners={self.learners} without the family mixture: the model is one learner"
            )
        if self.alone and not self.interpolates:
            raise ValueError(
                f"alone={self.alone} without the family interpolation: nobody trains alone"
            )
        for what in ("gamma", "lr"):
            given = getattr(self, what)
            for name in given if isinstance(given, dict) else ():
                if name not in self.families:
                    raise ValueError(f"{what}: {name} is none of the families")
            for name in self.families:
                self._of(what, name)
        self.built()

    def _of(self, what: str, name: str) -> float:
        given = getattr(self, what)
        value = given.get(name) if isinstance(given, dict) else given
        if value is None:
            raise ValueError(f"{what}: has no number for {name}")
        if not 0 <= value < float("inf"):
            raise ValueError(f"{what}={value:g}: at least 0")
        return float(value)

    @property
    def K(self) -> int:
        """How many learners the shared model is made of."""
        return (self.learners or 3) if "mixture" in self.families else 1

    @property
    def interpolates(self) -> bool:
        """Whether each client needs a model that it has trained alone."""
        return "interpolation" in self.families

    @property
    def exchanges(self) -> int:
        """How many versions of a memory a round may take: those of an estimate, and settling's."""
        keeping = self.method != "push"  # has an exchange of its own
        return self.depth + 2 + keeping

    def batched(self, samples: int) -> bool:
        """Return whether a client with so many samples takes batches of them in its products."""
        return 0 < self.batch < samples

    def gradients(self, what: str, samples: int) -> int:
        """Return the gradients that a client's part in an exchange takes, one for each learner.

        A product with second derivatives counts as two. Those of a push come from one pass, unless
        each has a batch of its own.
        """
        passes = 2 if self.independent and self.batched(samples) else 1
        work = {"start": 1, "curvature": 2, "push": 2 * passes, "step": 2}
        return self.K * work.get(what, 0)

    def built(self) -> tuple[Family, ...]:
        """Return the families."""
        found: list[Family] = []
        for name in self.families:
            gamma = self._of("gamma", name)
            more = {"learners": self.K} if name == "mixture" else {}
            found.append(FAMILIES[name](gamma=gamma, **more))
        return tuple(found)

    def solo(self, run: Trainer) -> Trainer:
        """Return how a client of a run trains alone: with its optimizer, and batches of its own."""
        return replace(
            run,
            algorithm=FedAvg(),
            local=replace(run.local, epochs=self.alone or 20, steps=0),
            privacy=Unprotected(),  # the model stays where it is
            seed=generator(run.seed, "alone").initial_seed(),
        )

    # What a client remembers, and its step.

    def fresh(self, zero: Tensor) -> Vectors:
        """Return the memory of a client that has not taken part yet, l being ``zero`` (p,)."""
        names = ("l", "v", "first", "second", "best")
        return {name: zero.clone() for name in names} | {"count": zero.new_zeros(1)}

    def rates(self, task: Personal, lam: Tensor, own: Own) -> Tensor:
        """Return Adam's step for each hyper-parameter, (p,)."""
        names = {kind: name for name, kind in FAMILIES.items()}
        return torch.cat(
            [
                torch.full_like(part, self._of("lr", names[type(family)]))
                for family, part in task.split(lam, own)
            ]
        )

    def step(self, memory: Mapping[str, Tensor], rates: Tensor) -> Vectors:
        """Return the memory after Adam's step along v.

        Raises
        ------
        ArithmeticError
            If v or the step is not finite.
        """
        v, count = memory["v"], memory["count"] + 1
        first = self.beta1 * memory["first"] + (1 - self.beta1) * v
        second = self.beta2 * memory["second"] + (1 - self.beta2) * v.square()
        ahead = first / (1 - self.beta1**count)
        scale = (second / (1 - self.beta2**count)).sqrt() + self.eps
        moved = {
            **memory,
            "l": memory["l"] - rates * ahead / scale,
            "first": first,
            "second": second,
            "count": count,
        }
        if not all(bool(torch.isfinite(value).all()) for value in moved.values()):
            raise ArithmeticError("the hyper-gradient is not finite")
        return moved
