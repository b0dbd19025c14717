"""How a model is put together: checks of the samples, common ends, weights from a seed.

`make_model` is what others call; the rest is what the functions of `app.models` share.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from app.data import Dataset
from app.errors import UserError
from app.layers import Scalar, probe

Model = Callable[[tuple[int, ...], int, int], nn.Module]


def make_model(model: Model, dataset: Dataset, seed: int) -> nn.Module:
    """Build a model for some data, with weights that depend on ``seed`` alone.

    Parameters
    ----------
    model : Callable
        One of the functions of `app.models`, with its knobs bound (`functools.partial`).
    dataset : Dataset
        Gives the shape of a sample, the number of outputs and the alphabet.
    seed : int
        Seed of the initial weights. The global generator is left as it was.

    Returns
    -------
    nn.Module
        In training mode, with float64 parameters if the samples are float64.

    Raises
    ------
    UserError
        If the model does not fit the samples, or these are all of one class.
    """
    if dataset.classes == 1:
        raise UserError("data: all samples are of one class; nothing is to be learned")
    shape = tuple(dataset.train.x.shape[1:])
    outputs = dataset.classes or 1
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would also reseed the accelerators.
        torch.default_generator.manual_seed(seed)
        module = model(shape, outputs, dataset.vocabulary)
    if dataset.train.x.dtype == torch.float64:
        module = module.to(torch.float64)
    probe(module, shape, dataset.vocabulary)
    return module.train()


def sequence(layers: Sequence[nn.Module], outputs: int) -> nn.Sequential:
    """Return layers one after the other; a single output loses its axis."""
    return nn.Sequential(*layers, Scalar()) if outputs == 1 else nn.Sequential(*layers)


def numbers_in(shape: tuple[int, ...]) -> int:
    """Return how many numbers a sample of a shape has."""
    return int(torch.Size(shape).numel())


def refuse_text(name: str, vocabulary: int) -> None:
    """Raise UserError if the samples are text."""
    if vocabulary:
        raise UserError(
            f"model={name} takes numbers, but the samples are text: use "
            "model=char_lstm."
        )


def image_channels(name: str, input_shape: tuple[int, ...], vocabulary: int) -> int:
    """Return the channels of the samples; raise UserError if they are no images."""
    refuse_text(name, vocabulary)
    if len(input_shape) != 3:
        raise UserError(
            f"model={name} takes images (channels, height, width), but samples have "
            "shape "
            f"{input_shape}: use model=linear or model=mlp."
        )
    return input_shape[0]


def flat_width(
    name: str, features: Sequence[nn.Module], input_shape: tuple[int, ...]
) -> int:
    """Return how many numbers the convolutions leave of one sample."""
    try:
        with torch.no_grad():
            flat = nn.Sequential(*features).eval()(torch.zeros(1, *input_shape))
    except RuntimeError as error:
        raise UserError(
            f"model={name} needs larger images than {input_shape[1]}x{input_shape[2]}: "
            "use model=mlp or model=cnn_mnist."
        ) from error
    return int(flat.shape[1])
