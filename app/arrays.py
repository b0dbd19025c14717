"""One's own arrays as a data set: a NumPy ``.npz`` file."""

import zipfile
import zlib
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from app.data import Dataset, Fraction, Seed, Split, hold_out, split_mask
from app.errors import UserError, nearest

MOST_CLASSES = 100_000


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
        See `app.data.hold_out`.
    seed : int
        Decides the test and the validation samples.

    Raises
    ------
    UserError
        If the file or an array is missing, or the arrays do not fit each other.
    """
    arrays = _read(Path(path).expanduser())
    own_test = "x_test" in arrays
    wanted = ["x", label] + ([client] if client else [])
    for name in wanted + (["x_test", f"{label}_test"] if own_test else []):
        if name not in arrays:
            raise UserError(f"{path} has no array '{name}': {nearest(name, arrays)}")
    whole = _checked(path, arrays["x"], arrays[label], label, scale)
    classes = int(whole.y.max()) + 1 if whole.y.dtype == torch.int64 else 0
    if classes > MOST_CLASSES:
        raise UserError(
            f"{path}: {label} has the class {classes - 1}; classes are counted from 0, at most "
            f"{MOST_CLASSES}"
        )
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


def _read(path: Path) -> dict[str, np.ndarray]:
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
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
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
