"""What a data set is, how a part of it is held out, and the two simplest: digits, npz.

A data set is a plain function with keyword parameters that returns a `Dataset`: whole
tensors in memory, loaded once per process, from which batches are index selections. Its
defaults stand in ``conf/data/NAME.yaml`` beside the dotted path of the function. The
others live in `app.images`, `app.synthetic`, `app.text` and `app.vision`.
"""

import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from app.errors import UserError, nearest

Fraction = Annotated[float, Field(ge=0, lt=1)]
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
    groups = dataset.natural
    if groups is None:
        y = dataset.train.y.numpy()
        groups = y if dataset.classes else np.zeros(len(y), dtype=np.int64)
    out = split_mask(groups, validation, seed)
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


def npz(
    path: str,
    label: str = "y",
    client: str | None = None,
    scale: Annotated[float, Field(gt=0)] = 1.0,
    test: Annotated[float, Field(gt=0, lt=1)] = 0.2,
    validation: Fraction = 0.0,
    seed: Seed = 0,
) -> Dataset:
    """Return one's own arrays from a NumPy ``.npz`` file.

    The file holds ``x`` (n, ...) and the label array (n,): integers from 0 are classes,
    floating point is a regression target. With ``x_test`` and ``LABEL_test`` it brings
    its own test split; without them a seeded share of the samples becomes it.

    Parameters
    ----------
    path : str
        The file.
    label : str
        Name of the label array.
    client : str or None
        Name of the array (n,) that says which client each sample belongs to.
    scale : float
        x is divided by it: 255 for bytes.
    test : float
        Share that becomes the test split when the file has none.
    validation : float
        See `hold_out`.
    seed : int
        Decides the test and the validation samples.

    Raises
    ------
    UserError
        If the file or an array is missing, or the arrays do not fit each other.
    """
    arrays = _read_npz(Path(path))
    own_test = "x_test" in arrays
    wanted = ["x", label] + ([client] if client else [])
    for name in wanted + (["x_test", f"{label}_test"] if own_test else []):
        if name not in arrays:
            raise UserError(f"{path} has no array '{name}': {nearest(name, arrays)}")
    whole = _checked(path, arrays["x"], arrays[label], label, scale)
    classes = int(whole.y.max()) + 1 if whole.y.dtype == torch.int64 else 0
    natural = None
    if client:
        if arrays[client].shape != (len(whole),):
            raise UserError(
                f"{path}: '{client}' has shape {arrays[client].shape}, ({len(whole)},) "
                "is "
                "needed: one client for each sample."
            )
        natural = np.unique(arrays[client], return_inverse=True)[1].astype(np.int64)
    if own_test:
        train, held = (
            whole,
            _checked(
                path, arrays["x_test"], arrays[f"{label}_test"], f"{label}_test", scale
            ),
        )
        if held.x.shape[1:] != whole.x.shape[1:] or held.y.dtype != whole.y.dtype:
            raise UserError(f"{path}: the test arrays differ from x, {label} in kind.")
        if classes:
            classes = max(classes, int(held.y.max()) + 1)
    else:
        groups = natural
        if groups is None:
            groups = whole.y.numpy() if classes else np.zeros(len(whole), np.int64)
        out = split_mask(groups, test, seed)
        if not out.any():
            raise UserError(
                f"{path}: test={test} of {len(whole)} samples leaves no test."
            )
        train, held = whole.take(~out), whole.take(out)
        natural = None if natural is None else natural[~out]
    loss = "cross_entropy" if classes else "squared"
    names = [str(number) for number in range(classes)]
    return hold_out(
        Dataset(train, held, classes, loss, natural, names), validation, seed
    )


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    """Read every array of a file, refusing pickled objects."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; data.path must name an .npz file.")
    try:
        # Opened here: NumPy forgets to close a file that it cannot read.
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                raise UserError(
                    f"{path} is one array (.npy): save x and y by np.savez."
                )
            return {name: loaded[name] for name in loaded.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is not a readable .npz of plain arrays: {error}"
        ) from error


def _checked(path: str, x: np.ndarray, y: np.ndarray, name: str, scale: float) -> Split:
    """Turn arrays into a split, or say what is wrong with them."""
    if x.dtype.kind not in "iuf" or x.ndim < 2 or len(x) == 0:
        raise UserError(
            f"{path}: x is {x.dtype} of shape {x.shape}; numbers of shape (n, ...) "
            "needed."
        )
    if y.shape != (len(x),) or y.dtype.kind not in "iuf":
        raise UserError(
            f"{path}: '{name}' is {y.dtype} of shape {y.shape}; {len(x)} integers "
            "(classes) "
            "or floats (regression) are needed."
        )
    inputs = torch.from_numpy(x.astype(np.float32) / np.float32(scale))
    if y.dtype.kind == "f":
        target = torch.from_numpy(y.astype(np.float32))
    else:
        target = torch.from_numpy(y.astype(np.int64))
        if int(target.min()) < 0:
            raise UserError(
                f"{path}: '{name}' has negative classes; they count from 0."
            )
    if not (bool(inputs.isfinite().all()) and bool(target.isfinite().all())):
        raise UserError(f"{path}: x or '{name}' holds NaN or infinite numbers.")
    return Split(inputs, target)
