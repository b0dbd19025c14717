"""Image sets in torchvision's file layout: MNIST and its kin, CIFAR-10 and CIFAR-100.

Each is converted once into a normalized float32 tensor. Every set takes ``root`` (the
folder that torchvision would be given), ``download`` (fetch what is missing), ``share``
and ``validation`` with ``seed`` (see `app.data.thin` and `app.data.hold_out`). MNIST and
Fashion-MNIST take ``pool`` too: their halves become one training set, and the test set
is what each client keeps of its part (``client_test``).
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from app.data import Dataset, Fraction, Seed, Share, Split, hold_out, thin
from app.errors import UserError

# Per-channel mean and standard deviation of images scaled to [0, 1]. MNIST's and
# CIFAR's are the ones used by Acar et al. 2021; EMNIST's, in wide use for the letters,
# serve all of its splits alike.
MNIST = ((0.1307,), (0.3081,))
FASHION_MNIST = ((0.2860,), (0.3530,))
EMNIST = ((0.1722,), (0.3309,))
CIFAR10 = ((0.491, 0.482, 0.447), (0.247, 0.243, 0.262))
CIFAR100 = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scale bytes to [0, 1], then subtract ``mean`` and divide by ``std``.

    Parameters
    ----------
    images : Tensor
        uint8, (n, channels, height, width).
    mean, std : Sequence[float]
        One number for each channel, or one for all.

    Returns
    -------
    Tensor
        float32, same shape.
    """
    x = images.to(torch.float32)
    # In place: 60,000 images are 188 MB, and one copy of them is enough.
    x.div_(255).sub_(torch.tensor(mean).view(-1, 1, 1))
    return x.div_(torch.tensor(std).view(-1, 1, 1))


def mnist(
    root: str,
    download: bool = False,
    pool: bool = False,
    normalize: Literal["whole", "pixels"] = "whole",
    share: Share = 1.0,
    validation: Fraction = 0.0,
    seed: Seed = 0,
) -> Dataset:
    """Return MNIST: 60,000 + 10,000 handwritten digits, x (n, 1, 28, 28).

    Parameters
    ----------
    pool : bool
        Put all 70,000 into the training set, none into the test set.
    normalize : str
        Mean and standard deviation are those of the ``whole`` set, or each of the
        ``pixels`` has its own, as Elbakary et al. 2024 do it.

    Raises
    ------
    UserError
        If the files are missing or damaged.
    """
    constants = None if normalize == "pixels" else MNIST
    data = _greys("MNIST", root, download, constants, pool)
    return hold_out(thin(data, share, seed), validation, seed)


def fashion_mnist(
    root: str,
    download: bool = False,
    pool: bool = False,
    share: Share = 1.0,
    validation: Fraction = 0.0,
    seed: Seed = 0,
) -> Dataset:
    """Return Fashion-MNIST: 60,000 + 10,000 pieces of clothing, x (n, 1, 28, 28).

    Raises
    ------
    UserError
        If the files are missing or damaged.
    """
    constants = FASHION_MNIST
    data = _greys("FashionMNIST", root, download, constants, pool)
    return hold_out(thin(data, share, seed), validation, seed)


def emnist(
    root: str,
    split: Literal[
        "byclass", "bymerge", "balanced", "letters", "digits", "mnist"
    ] = "letters",
    limit: Annotated[int, Field(ge=2)] | None = None,
    download: bool = False,
    share: Share = 1.0,
    validation: Fraction = 0.0,
    seed: Seed = 0,
) -> Dataset:
    """Return EMNIST: handwritten characters, x (n, 1, 28, 28), upright.

    Parameters
    ----------
    root : str
        Folder that holds ``EMNIST/raw``.
    split : str
        One of the six splits published by Cohen et al. 2017.
    limit : int or None
        Keep only the first so many classes; 10 letters give the a-j task of Acar et al.
        2021.
    download : bool
        Fetch what is missing (about 560 MB).
    share, validation, seed
        See `app.data.thin` and `app.data.hold_out`.

    Raises
    ------
    UserError
        If the files are missing or damaged, or ``limit`` exceeds the classes.
    """
    pairs = [
        _load("EMNIST", root, download, train, split=split) for train in (True, False)
    ]
    names = [str(name) for name in pairs[0].classes]
    # The letters are numbered from 1 in the files; 0 stands for nothing.
    first = 1 if split == "letters" else 0
    names = names[first:]
    if limit is not None and limit > len(names):
        raise UserError(f"limit={limit}: EMNIST {split} has only {len(names)} classes.")
    kept = len(names) if limit is None else limit
    splits = []
    for part in pairs:
        y = part.targets.to(torch.int64) - first
        keep = y < kept
        # The files hold each image transposed.
        images = part.data[keep].transpose(1, 2).unsqueeze(1)
        splits.append(Split(normalize(images, *EMNIST), y[keep]))
    data = Dataset(splits[0], splits[1], kept, "cross_entropy", None, names[:kept])
    return hold_out(thin(data, share, seed), validation, seed)


def cifar10(
    root: str,
    download: bool = False,
    share: Share = 1.0,
    validation: Fraction = 0.0,
    seed: Seed = 0,
) -> Dataset:
    """Return CIFAR-10: 50,000 + 10,000 colour images, x (n, 3, 32, 32), 10 classes.

    Raises
    ------
    UserError
        If the files are missing or damaged.
    """
    data = _colours("CIFAR10", root, download, CIFAR10)
    return hold_out(thin(data, share, seed), validation, seed)


def cifar100(
    root: str,
    download: bool = False,
    share: Share = 1.0,
    validation: Fraction = 0.0,
    seed: Seed = 0,
) -> Dataset:
    """Return CIFAR-100: 50,000 + 10,000 colour images, x (n, 3, 32, 32), 100 classes.

    Raises
    ------
    UserError
        If the files are missing or damaged.
    """
    data = _colours("CIFAR100", root, download, CIFAR100)
    return hold_out(thin(data, share, seed), validation, seed)


# What a folder must contain, told when it does not.
_LAYOUT = {
    "MNIST": "MNIST/raw/train-images-idx3-ubyte and its three companions",
    "FashionMNIST": "FashionMNIST/raw/train-images-idx3-ubyte and its three companions",
    "EMNIST": "EMNIST/raw/emnist-SPLIT-train-images-idx3-ubyte and its three "
    "companions",
    "CIFAR10": "cifar-10-batches-py/data_batch_1 to 5 and test_batch, undamaged",
    "CIFAR100": "cifar-100-python/train and test, undamaged",
}


def _load(name: str, root: str, download: bool, train: bool, **knobs: str) -> Any:
    """Open one half of a torchvision set, or say what is missing.

    CIFAR's files are pickles. torchvision compares their checksums with the published
    ones before it opens them, so that nothing but the published bytes is ever
    unpickled.
    """
    import torchvision

    try:
        half = getattr(torchvision.datasets, name)(
            root, train=train, download=download, **knobs
        )
        if len(half.data) != len(half.targets):
            raise ValueError(f"{len(half.data)} images, {len(half.targets)} labels")
        return half
    except (RuntimeError, ValueError, AssertionError, OSError, EOFError) as error:
        reason = str(error).strip().splitlines()
        detail = f" ({reason[0]})" if reason and "download" not in reason[0] else ""
        raise UserError(
            f"{name} cannot be read from data.root={root}{detail}: put {_LAYOUT[name]} "
            "there, or set data.download=true."
        ) from error


def _greys(
    name: str,
    root: str,
    download: bool,
    constants: tuple[Sequence[float], Sequence[float]] | None,
    pool: bool,
) -> Dataset:
    halves = [_load(name, root, download, train) for train in (True, False)]
    images = [half.data.unsqueeze(1) for half in halves]
    targets = [half.targets.to(torch.int64) for half in halves]
    if pool:
        images = [torch.cat(images), images[1][:0]]
        targets = [torch.cat(targets), targets[1][:0]]
    if constants:
        inputs = [normalize(part, *constants) for part in images]
    else:
        inputs = _by_pixel(images)
    splits = [Split(x, y) for x, y in zip(inputs, targets, strict=True)]
    names = [str(label) for label in halves[0].classes]
    return Dataset(splits[0], splits[1], len(names), "cross_entropy", None, names)


def _by_pixel(images: Sequence[Tensor]) -> list[Tensor]:
    """Normalize bytes by the mean and deviation that each pixel has in the first part."""
    first, *others = (part.to(torch.float32) for part in images)
    # The deviation of a pixel that never changes is 0; one grey level of 255 is 1.
    mean, scale = first.mean(0), first.std(0, correction=0).add_(1e-3)
    return [part.sub_(mean).div_(scale) for part in (first, *others)]


def _colours(
    name: str,
    root: str,
    download: bool,
    constants: tuple[Sequence[float], Sequence[float]],
) -> Dataset:
    halves = [_load(name, root, download, train) for train in (True, False)]
    splits = []
    for half in halves:
        images = torch.from_numpy(half.data).permute(0, 3, 1, 2).contiguous()
        target = torch.from_numpy(np.asarray(half.targets, dtype=np.int64))
        splits.append(Split(normalize(images, *constants), target))
    names = [str(label) for label in halves[0].classes]
    return Dataset(splits[0], splits[1], len(names), "cross_entropy", None, names)
