"""The networks that clients train, and how they are made.

A model is a function ``f(input_shape, outputs, vocabulary, **knobs)`` that returns a
module; the knobs' defaults stand in ``conf/model/NAME.yaml``. Modules take a batch
(n, *input_shape) and return (n, outputs), or (n,) when ``outputs`` is 1 (regression).
None holds running statistics, and `app.layers` keeps randomness outside, so that a
training step is a pure function of its tensors.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from app.data import Dataset, Fraction, Positive
from app.errors import UserError
from app.layers import LSTM, Dropout, LastStep, probe

Model = Callable[[tuple[int, ...], int, int], nn.Module]


def linear(
    input_shape: tuple[int, ...],
    outputs: int,
    vocabulary: int = 0,
    bias: bool = True,
    zero: bool = False,
) -> nn.Module:
    """Return a linear model of the flattened input: logistic or linear regression.

    Parameters
    ----------
    input_shape : tuple[int, ...]
        Shape of one sample.
    outputs : int
        Number of classes, or 1 for regression.
    vocabulary : int
        Number of different characters if samples are text, else 0.
    bias : bool
        Add a constant.
    zero : bool
        Start from zeros instead of random weights.

    Raises
    ------
    UserError
        If the samples are text.
    """
    _numbers("linear", vocabulary)
    layer = nn.Linear(_size(input_shape), outputs, bias=bias)
    if zero:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
    return _stack([nn.Flatten(), layer], outputs)


def mlp(
    input_shape: tuple[int, ...],
    outputs: int,
    vocabulary: int = 0,
    hidden: Sequence[Positive] = (64,),
    dropout: Fraction = 0.0,
) -> nn.Module:
    """Return a network of fully connected layers with ReLU between them.

    Widths (200, 200) and (100, 100) are those of Acar et al. 2021 for MNIST and EMNIST;
    (100,) with dropout 0.5 is that of Elbakary et al. 2024. See `linear` for the other
    parameters.

    Parameters
    ----------
    hidden : Sequence[int]
        Widths of the hidden layers.
    dropout : float
        Share of each hidden layer's outputs to drop, before the ReLU.

    Raises
    ------
    UserError
        If the samples are text.
    """
    _numbers("mlp", vocabulary)
    layers: list[nn.Module] = [nn.Flatten()]
    width = _size(input_shape)
    for number in hidden:
        layers.append(nn.Linear(width, number))
        if dropout:
            layers.append(Dropout(dropout))
        layers.append(nn.ReLU())
        width = number
    return _stack([*layers, nn.Linear(width, outputs)], outputs)


def cnn_mnist(
    input_shape: tuple[int, ...], outputs: int, vocabulary: int = 0
) -> nn.Module:
    """Return the convolutional network of McMahan et al. 2017 for MNIST.

    5x5 convolutions of 32 and 64 channels, each padded and followed by ReLU and 2x2
    pooling, then 512 hidden units: 1,663,370 parameters on MNIST. See `linear` for the
    parameters.

    Raises
    ------
    UserError
        If the samples are no images, or smaller than 4x4.
    """
    channels = _channels("cnn_mnist", input_shape, vocabulary)
    features = [
        *(nn.Conv2d(channels, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
    ]
    width = _width("cnn_mnist", features, input_shape)
    head = [nn.Linear(width, 512), nn.ReLU(), nn.Linear(512, outputs)]
    return _stack([*features, *head], outputs)


def cnn_cifar(
    input_shape: tuple[int, ...], outputs: int, vocabulary: int = 0
) -> nn.Module:
    """Return the convolutional network of Acar et al. 2021 for CIFAR.

    Two 5x5 convolutions of 64 channels without padding, each followed by ReLU and 2x2
    pooling, then 384 and 192 hidden units: 797,962 parameters on CIFAR-10. See `linear`
    for the parameters.

    Raises
    ------
    UserError
        If the samples are no images, or smaller than 16x16.
    """
    channels = _channels("cnn_cifar", input_shape, vocabulary)
    features = [
        *(nn.Conv2d(channels, 64, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 64, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
    ]
    width = _width("cnn_cifar", features, input_shape)
    head = [
        *(nn.Linear(width, 384), nn.ReLU(), nn.Linear(384, 192), nn.ReLU()),
        nn.Linear(192, outputs),
    ]
    return _stack([*features, *head], outputs)


def cnn_sophia(
    input_shape: tuple[int, ...],
    outputs: int,
    vocabulary: int = 0,
    dropout: Fraction = 0.5,
) -> nn.Module:
    """Return the convolutional network of Elbakary et al. 2024 for MNIST.

    5x5 convolutions of 10 and 20 channels, the second with channelwise dropout, each
    followed by 2x2 pooling and ReLU, then 50 hidden units with dropout: 21,840
    parameters on MNIST. See `linear` for the other parameters.

    Parameters
    ----------
    dropout : float
        Share of channels, and of hidden units, to drop.

    Raises
    ------
    UserError
        If the samples are no images, or smaller than 16x16.
    """
    channels = _channels("cnn_sophia", input_shape, vocabulary)
    features = [
        *(nn.Conv2d(channels, 10, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(10, 20, 5)),
        *(Dropout(dropout, channelwise=True), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten()),
    ]
    width = _width("cnn_sophia", features, input_shape)
    head = [nn.Linear(width, 50), nn.ReLU(), Dropout(dropout), nn.Linear(50, outputs)]
    return _stack([*features, *head], outputs)


def resnet18(
    input_shape: tuple[int, ...],
    outputs: int,
    vocabulary: int = 0,
    stem: Literal["imagenet", "cifar"] = "imagenet",
    groups: Annotated[int, Field(ge=1, le=64)] = 2,
) -> nn.Module:
    """Return ResNet-18 (He et al. 2016) with group instead of batch normalization.

    Batch statistics neither average well nor are a function of the parameters. Acar et
    al. 2021 use 2 groups and the ImageNet stem. See `linear` for the other parameters.

    Parameters
    ----------
    stem : str
        ``imagenet``: a 7x7 convolution of stride 2, then pooling; ``cifar``: a 3x3
        convolution that keeps the size of small images.
    groups : int
        Groups of each normalization; must divide 64.

    Raises
    ------
    UserError
        If the samples are no images, or ``groups`` does not divide 64.
    """
    from torchvision.models import resnet18 as torchvision_resnet18

    channels = _channels("resnet18", input_shape, vocabulary)
    if 64 % groups:
        raise UserError(f"model.groups={groups}: a divisor of 64 is needed.")
    network: nn.Module = torchvision_resnet18(
        num_classes=outputs, norm_layer=lambda width: nn.GroupNorm(groups, width)
    )
    if stem == "cifar":
        network.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    elif channels != 3:
        network.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    return _stack([network], outputs) if outputs == 1 else network


def char_lstm(
    input_shape: tuple[int, ...],
    outputs: int,
    vocabulary: int = 0,
    embedding: Positive = 8,
    hidden: Positive = 100,
    layers: Positive = 2,
) -> nn.Module:
    """Return the next-character network of Acar et al. 2021 for Shakespeare.

    An embedding, stacked LSTM layers, and a linear layer on the last step. See `linear`
    for the other parameters.

    Parameters
    ----------
    embedding : int
        Numbers that represent a character.
    hidden : int
        Width of each LSTM layer.
    layers : int
        Number of LSTM layers.

    Raises
    ------
    UserError
        If the samples are not text.
    """
    if not vocabulary:
        raise UserError(
            "model=char_lstm reads characters, but the samples are numbers: use "
            "data=text."
        )
    stack: list[nn.Module] = [nn.Embedding(vocabulary, embedding)]
    for number in range(layers):
        stack.append(LSTM(hidden if number else embedding, hidden))
    return _stack([*stack, LastStep(), nn.Linear(hidden, outputs)], outputs)


def make_model(model: Model, dataset: Dataset, seed: int) -> nn.Module:
    """Build a model for some data, with weights that depend on ``seed`` alone.

    Parameters
    ----------
    model : Callable
        One of the functions above, with its knobs bound (`functools.partial`).
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
        If the model does not fit the samples.
    """
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


class Scalar(nn.Module):
    """Turns (n, 1) into the (n,) that a regression target is."""

    def forward(self, x: Tensor) -> Tensor:
        """Drop the last axis."""
        return x.squeeze(-1)


def _stack(layers: Sequence[nn.Module], outputs: int) -> nn.Sequential:
    return nn.Sequential(*layers, Scalar()) if outputs == 1 else nn.Sequential(*layers)


def _size(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _numbers(name: str, vocabulary: int) -> None:
    if vocabulary:
        raise UserError(
            f"model={name} takes numbers, but the samples are text: use "
            "model=char_lstm."
        )


def _channels(name: str, input_shape: tuple[int, ...], vocabulary: int) -> int:
    _numbers(name, vocabulary)
    if len(input_shape) != 3:
        raise UserError(
            f"model={name} takes images (channels, height, width), but samples have "
            "shape "
            f"{input_shape}: use model=linear or model=mlp."
        )
    return input_shape[0]


def _width(
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
