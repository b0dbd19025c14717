"""What a data set is, how a part of it is held out, and the simplest: digits.

A data set is a plain function with keyword parameters that returns a `Dataset`: whole
tensors in memory, loaded once per process, from which batches are index selections. Its
defaults stand in ``conf/data/NAME.yaml`` beside the dotted path of the function. The
others live in `app.arrays`, `app.images`, `app.synthetic`, `app.text` and `app.vision`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from app.errors import UserError

Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


@dataclass(frozen=True)
class Split:
    """Samples and their targets.

    Attributes
    ----------
    x : Tensor
        Inputs, shape (n, ...): float32 (float64 for `app.synthetic.quadratics`), or
        int64 character numbers for text.
    y : Tensor
        Targets, shape (n,): int64 classes, or floating point for regression.
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.y)

    def take(self, index: np.ndarray) -> "Split":
        """Return the samples at ``index`` (integers or a mask), in that order."""
        chosen = torch.from_numpy(index)
        return Split(self.x[chosen], self.y[chosen])


@dataclass(frozen=True)
class Dataset:
    """A training split, a test split, and what a model has to know of them.

    Attributes
    ----------
    train, test : Split
        The samples.
    classes : int
        Number of classes; 0 means regression.
    loss : str
        ``cross_entropy``, or ``squared`` for the mean of (output - y)^2 / 2.
    natural : np.ndarray or None
        The client that each training sample comes from, (n_train,) int64, where the
        data have clients by nature.
    labels : list[str]
        Names of the classes; empty for regression.
    vocabulary : int
        Number of different characters, for text only.
    """

    train: Split
    test: Split
    classes: int
    loss: str
    natural: np.ndarray | None
    labels: list[str]
    vocabulary: int = 0

    def digest(self) -> str:
        """Return what tells these samples from others: all targets, and inputs evenly spread.

        At most some 16 MB of inputs are read, so that it costs milliseconds.
        """
        found = hashlib.blake2b(digest_size=16)
        for part in (self.train, self.test):
            step = 1 + part.x.nbytes // 2**24
            for rows in (part.y, part.x[::step]):
                found.update(f"{tuple(rows.shape)} {rows.dtype}".encode())
                found.update(rows.cpu().contiguous().numpy().tobytes())
        return found.hexdigest()


def split_mask(groups: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Choose a fraction of every group, leaving at least one sample in each.

    Parameters
    ----------
    groups : np.ndarray
        Group of each sample, (n,) integers.
    fraction : float
        Share to choose, rounded to the nearest count in each group.
    seed : int
        Decides which samples.

    Returns
    -------
    np.ndarray
        (n,) bool, true where chosen.
    """
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(groups), dtype=bool)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        count = min(round(fraction * len(members)), len(members) - 1)
        chosen[rng.permutation(members)[:count]] = True
    return chosen


def _groups(dataset: Dataset) -> np.ndarray:
    """Return the natural client of each training sample, or else its class, (n,)."""
    if dataset.natural is not None:
        return dataset.natural
    y = dataset.train.y.numpy()
    return y if dataset.classes else np.zeros(len(y), dtype=np.int64)


def thin(dataset: Dataset, share: float, seed: int) -> Dataset:
    """Use only a share of the training split, as large of each client or class.

    Parameters
    ----------
    dataset : Dataset
        The data as they are.
    share : float
        How much to keep, in (0, 1]; 1 returns ``dataset`` unchanged. The test split stays.
    seed : int
        Decides which samples.
    """
    if share == 1:
        return dataset
    kept = ~split_mask(_groups(dataset), 1 - share, seed)
    natural = None if dataset.natural is None else dataset.natural[kept]
    return replace(dataset, train=dataset.train.take(kept), natural=natural)


def hold_out(dataset: Dataset, validation: float, seed: int) -> Dataset:
    """Replace the test split by a part of the training split, for tuning.

    Hyper-parameters chosen on the result have never seen the true test set. The part is
    drawn within each natural client, or else within each class.

    Parameters
    ----------
    dataset : Dataset
        The data as they are.
    validation : float
        Share of the training samples to hold out; 0 returns ``dataset`` unchanged.
    seed : int
        Decides which samples.

    Raises
    ------
    UserError
        If the share is not in [0, 1), or so small that no sample is held out.
    """
    if not 0 <= validation < 1:
        raise UserError(f"validation={validation}: a share in [0, 1) is needed.")
    if validation == 0:
        return dataset
    out = split_mask(_groups(dataset), validation, seed)
    if not out.any():
        raise UserError(
            f"validation={validation} holds out no sample of {len(out)}: a larger "
            "share "
            "is needed."
        )
    return replace(
        dataset,
        train=dataset.train.take(~out),
        test=dataset.train.take(out),
        natural=None if dataset.natural is None else dataset.natural[~out],
    )


def digits(validation: Fraction = 0.0, seed: Seed = 0) -> Dataset:
    """Return the 1,797 handwritten digits of scikit-learn: 8x8 images, 10 classes.

    They travel with scikit-learn, so this set needs neither files nor a network. x is
    (n, 1, 8, 8) in [0, 1]. A fixed stratified split gives 1,437 training and 360 test
    samples.

    Parameters
    ----------
    validation : float
        See `hold_out`.
    seed : int
        Which samples are held out by ``validation``; the test split never depends on
        it.
    """
    # Imported here: scikit-learn costs a second that the other data sets need not pay.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = torch.from_numpy(bunch.images.astype(np.float32) / 16).unsqueeze(1)
    whole = Split(images, torch.from_numpy(bunch.target.astype(np.int64)))
    train, test = train_test_split(
        np.arange(len(whole)), test_size=0.2, stratify=bunch.target, random_state=0
    )
    names = [str(digit) for digit in range(10)]
    data = Dataset(
        whole.take(train), whole.take(test), 10, "cross_entropy", None, names
    )
    return hold_out(data, validation, seed)


def described(
    shape: Sequence[Annotated[int, Field(ge=1)]],
    classes: Annotated[int, Field(ge=0)],
    labels: Sequence[str] | None = None,
) -> Dataset:
    """Describe data that only the nodes of a deployment hold.

    The server builds the model from the description and evaluates nothing itself; each node
    points at its samples by ``data-path`` in its node config.

    Parameters
    ----------
    shape : sequence of int
        Shape of one input.
    classes : int
        Number of classes; 0 is a regression.
    labels : sequence of str or None
        Their names, by which the nodes' folders of pictures are known; 0, 1, ... by default.

    Raises
    ------
    UserError
        If there are not as many names as classes.
    """
    names = list(labels or map(str, range(classes)))
    if len(set(names)) != classes or len(names) != classes:
        raise UserError(f"data.labels: {len(set(names))} names for {classes} classes")
    dtype = torch.int64 if classes else torch.float32
    none = Split(torch.zeros(0, *shape), torch.zeros(0, dtype=dtype))
    loss = "cross_entropy" if classes else "squared"
    return Dataset(none, none, classes, loss, None, names)
