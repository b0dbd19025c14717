"""The pure step of local training, which the engines run or map over clients.

step:  (theta, anchor, state, gradient) -> (theta, state)
"""

from __future__ import annotations

import torch
from torch import Tensor

from strategies.algorithm import Vectors
from strategies.local import Trainer


def clip(gradient: Tensor, largest: float) -> Tensor:
    """Scale a gradient (d,) down to the norm ``largest``; 0 leaves it as it is."""
    if not largest:
        return gradient
    norm = torch.linalg.vector_norm(gradient)
    return gradient * torch.clamp(largest / (norm + 1e-12), max=1.0)


def clip_along(gradient: Tensor, product: Tensor, largest: float) -> Tensor:
    """Return the derivative of the clipped gradient, the gradient's own being ``product``."""
    if not largest:
        return product
    norm = torch.linalg.vector_norm(gradient) + 1e-12
    across = product - gradient * (gradient @ product) / norm.square()
    return torch.where(norm > largest, largest / norm * across, product)


def step(
    trainer: Trainer,
    theta: Tensor,
    anchor: Tensor,
    state: tuple[Vectors, Vectors],
    gradient: Tensor,
    round_: int,
    product: Tensor | None = None,
) -> tuple[Tensor, tuple[Vectors, Vectors]]:
    """Return theta and state after one local step along one batch's gradient.

    ``state`` is the pair (algorithm's, optimizer's). All arguments are tensors or constants:
    the step is vectorized over clients by mapping it. ``product`` is the batch's Hessian times
    the vector that the optimizer names, if it names one.
    """
    constant, moving = state
    if product is not None:
        product = clip_along(gradient, product, trainer.local.clip)
        moving = moving | {"product": product}
    largest = trainer.local.clip
    if trainer.costing is None or not largest:
        gradient = clip(gradient, largest)
    else:  # perhaps several models, each clipped by itself
        models = torch.split(gradient, trainer.objective.layout.size)
        gradient = torch.cat([clip(model, largest) for model in models])
    direction = trainer.algorithm.direction(gradient, theta, anchor, constant)
    if trainer.phased is None:
        theta, moving = trainer.optimizer.step(theta, direction, moving, round_)
        return theta, (constant, moving)
    # What does not move has no step: neither in theta nor in the optimizer's moments of it.
    mask, before = trainer.phased.moves(theta, constant["progress"]), theta.clone()
    held = {n: v.clone() for n, v in moving.items() if v.shape == theta.shape}
    theta, moving = trainer.optimizer.step(theta, direction * mask, moving, round_)
    moving = moving | {n: torch.where(mask, moving[n], v) for n, v in held.items()}
    return torch.where(mask, theta, before), (constant, moving)
