"""The models of a run: one, or several of a kind that start apart."""

from __future__ import annotations

from torch import nn

from app.binding import bind
from app.building import make_model
from app.config import Config
from app.data import Dataset
from app.errors import UserError
from app.layers import noise_shapes
from strategies.personal_objective import PersonalObjective
from strategies.personalize import Personalize
from strategies.randomness import generator


def modules(config: Config, dataset: Dataset, count: int) -> list[nn.Module]:
    """Build so many models: the plain one of the seed, then others with draws of their own."""
    build = bind("model", config.model, ("input_shape", "outputs", "vocabulary"))
    drawn = [generator(config.seed, "learner", k) for k in range(1, count)]
    seeds = [config.seed, *(random.initial_seed() for random in drawn)]
    device, dtype = config.torch_device, config.torch_dtype
    return [make_model(build, dataset, seed).to(device, dtype) for seed in seeds]


def personal(config: Config, dataset: Dataset, how: Personalize) -> PersonalObjective:
    """Build the model of a run whose clients have hyper-parameters, K learners if they mix."""
    what = f"personal={config.personal.name}"
    if not dataset.classes or dataset.vocabulary or dataset.train.y.ndim != 1:
        raise UserError(
            f"data={config.data.name}: {what} is about inputs of numbers, each of a class"
        )
    learners = modules(config, dataset, how.K)
    if noise_shapes(learners[0]) or any(True for _ in learners[0].buffers()):
        raise UserError(
            f"model={config.model.name}: {what} takes models without dropout and BatchNorm"
        )
    try:
        like = dataset.train.x[:1]
        return PersonalObjective(learners, how.built(), dataset.classes, like)
    except ValueError as error:
        raise UserError(f"{what}: {error}") from None
