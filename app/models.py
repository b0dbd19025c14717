"""The networks that clients train.

A model is a function ``f(input_shape, outputs, vocabulary, **knobs)`` that returns a
module; the knobs' defaults stand in ``conf/model/NAME.yaml``. Modules take a batch
(n, *input_shape) and return (n, outputs), or (n,) when ``outputs`` is 1 (regression).
None holds running statistics, and `app.layers` keeps randomness outside, so that a
training step is a pure function of its tensors. `app.building.make_model` calls them.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from app.building import flat_width, image_channels, numbers_in, refuse_text, sequence
from app.data import Fraction, Positive
from app.errors import UserError
from app.layers import LSTM, Dropout, LastStep


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
    refuse_text("linear", vocabulary)
    layer = nn.Linear(numbers_in(input_shape), outputs, bias=bias)
    if zero:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
    return sequence([nn.Flatten(), layer], outputs)


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
    refuse_text("mlp", vocabulary)
    layers: list[nn.Module] = [nn.Flatten()]
    width = numbers_in(input_shape)
    for number in hidden:
        layers.append(nn.Linear(width, number))
        if dropout:
            layers.append(Dropout(dropout))
        layers.append(nn.ReLU())
        width = number
    return sequence([*layers, nn.Linear(width, outputs)], outputs)


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
    channels = image_channels("cnn_mnist", input_shape, vocabulary)
    features = [
        *(nn.Conv2d(channels, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
    ]
    width = flat_width("cnn_mnist", features, input_shape)
    head = [nn.Linear(width, 512), nn.ReLU(), nn.Linear(512, outputs)]
    return sequence([*features, *head], outputs)


def cnn_small(
    input_shape: tuple[int, ...], outputs: int, vocabulary: int = 0
) -> nn.Module:
    """Return a small convolutional network, as Terashita and Hara 2022 take for digits.

    Two 5x5 convolutions of 20 channels without padding, each followed by ReLU and 2x2
    pooling, and a linear layer: 13,750 parameters on MNIST. See `linear` for the
    parameters.

    Raises
    ------
    UserError
        If the samples are no images, or smaller than 16x16.
    """
    channels = image_channels("cnn_small", input_shape, vocabulary)
    features = [
        *(nn.Conv2d(channels, 20, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(20, 20, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
    ]
    width = flat_width("cnn_small", features, input_shape)
    return sequence([*features, nn.Linear(width, outputs)], outputs)


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
    channels = image_channels("cnn_cifar", input_shape, vocabulary)
    features = [
        *(nn.Conv2d(channels, 64, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 64, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
    ]
    width = flat_width("cnn_cifar", features, input_shape)
    head = [
        *(nn.Linear(width, 384), nn.ReLU(), nn.Linear(384, 192), nn.ReLU()),
        nn.Linear(192, outputs),
    ]
    return sequence([*features, *head], outputs)


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
    channels = image_channels("cnn_sophia", input_shape, vocabulary)
    features = [
        *(nn.Conv2d(channels, 10, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(10, 20, 5)),
        *(Dropout(dropout, channelwise=True), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten()),
    ]
    width = flat_width("cnn_sophia", features, input_shape)
    head = [nn.Linear(width, 50), nn.ReLU(), Dropout(dropout), nn.Linear(50, outputs)]
    return sequence([*features, *head], outputs)


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

    channels = image_channels("resnet18", input_shape, vocabulary)
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
    return sequence([network], outputs) if outputs == 1 else network


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
    return sequence([*stack, LastStep(), nn.Linear(hidden, outputs)], outputs)
