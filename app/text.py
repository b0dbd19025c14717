"""Next-character prediction on plays: one client for each speaking role.

The setting of McMahan et al. 2017 and LEAF (Caldas et al. 2018), read from one plain
text of the form ``ROLE:``, its lines, an empty line.
"""

import re
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from app.data import Dataset, Fraction, Positive, Seed, Split, hold_out
from app.errors import UserError


def plays(
    path: str,
    minimum: Positive = 2000,
    length: Positive = 80,
    stride: Positive = 10,
    test: Annotated[float, Field(gt=0, lt=1)] = 0.2,
    validation: Fraction = 0.0,
    seed: Seed = 0,
) -> Dataset:
    """Return windows of characters and the character that follows each.

    x is (n, length) int64 and y (n,) int64, both numbers of characters in the sorted
    alphabet of the whole file. The last part of each role's words is for testing: no
    test window overlaps a training window. Natural clients are the roles in
    alphabetical order; a role that appears under one name in several plays is one
    client.

    Parameters
    ----------
    path : str
        The text, UTF-8.
    minimum : int
        A role with fewer characters is left out.
    length : int
        Characters in a window.
    stride : int
        Step between windows. 1 gives every window, at 8 * ``length`` bytes each.
    test : float
        Share of each role's characters that is for testing.
    validation, seed
        See `app.data.hold_out`; windows held out may overlap training windows.

    Raises
    ------
    UserError
        If the file is missing or not such a text, or if no role is long enough.
    """
    text = _read(Path(path).expanduser())
    alphabet = sorted(set(text))
    number = {character: index for index, character in enumerate(alphabet)}
    trains, tests, counts = [], [], []
    for _, words in sorted(speeches(text).items()):
        codes = np.array([number[character] for character in words], dtype=np.int64)
        cut = len(codes) - round(test * len(codes))
        # Both parts need one window and the character after it.
        if len(codes) < minimum or min(cut, len(codes) - cut) <= length:
            continue
        trains.append(_windows(codes[:cut], length, stride))
        tests.append(_windows(codes[cut:], length, stride))
        counts.append(len(trains[-1]))
    if not trains:
        raise UserError(
            f"{path} has no role with data.minimum={minimum} characters and windows of "
            f"data.length={length} in both splits; lower them, or check the form "
            "'ROLE:'."
        )
    data = Dataset(
        _split(trains),
        _split(tests),
        classes=len(alphabet),
        loss="cross_entropy",
        natural=np.repeat(np.arange(len(counts)), counts),
        labels=alphabet,
        vocabulary=len(alphabet),
    )
    return hold_out(data, validation, seed)


def speeches(text: str) -> dict[str, str]:
    """Collect what each role says.

    Parameters
    ----------
    text : str
        Paragraphs separated by empty lines; the first line of each is ``ROLE:``.

    Returns
    -------
    dict[str, str]
        Role to its speeches in order, each ending with a newline. Paragraphs without a
        role are left out.
    """
    found: dict[str, list[str]] = {}
    for paragraph in re.split(r"\n\s*\n", text):
        head, _, speech = paragraph.strip("\n").partition("\n")
        if speech and head.rstrip().endswith(":"):
            found.setdefault(head.rstrip()[:-1], []).append(speech + "\n")
    return {role: "".join(parts) for role, parts in found.items()}


def _read(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"{path}: no such file; data.path must name a text of plays.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error


def _windows(codes: np.ndarray, length: int, stride: int) -> np.ndarray:
    """Return (n, length + 1) windows whose last column is the target."""
    return np.lib.stride_tricks.sliding_window_view(codes, length + 1)[::stride]


def _split(windows: list[np.ndarray]) -> Split:
    table = torch.from_numpy(np.concatenate(windows))
    return Split(table[:, :-1].contiguous(), table[:, -1].contiguous())
