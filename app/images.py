"""One's own pictures: a folder, or a tar of it, with a subfolder for each class.

The layout is ``train/CLASS/NAME.jpg`` and ``test/CLASS/NAME.jpg`` (JPEG or PNG).
Pictures are decoded once into bytes; a tar is read in memory and never unpacked to
disk.
"""

import contextlib
import hashlib
import io
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from app.data import Dataset, Fraction, Positive, Seed, Share, Split, hold_out, thin
from app.errors import UserError
from app.vision import normalize

SUFFIXES = {".jpg", ".jpeg", ".png"}
# A picture beyond these is a mistake or an attack, and would exhaust the memory.
MAX_BYTES = 32 * 2**20
MAX_PIXELS = 4096 * 4096
MAX_TOTAL = 16 * 2**30
#: To be raised with a change of what pictures become: a cache of before is then made anew.
DECODING = 2


def imagefolder(
    root: str,
    size: Positive | None = None,
    grey: bool = False,
    mean: Sequence[float] = (0.5,),
    std: Sequence[Annotated[float, Field(gt=0)]] = (0.5,),
    cache: str | None = None,
    share: Share = 1.0,
    validation: Fraction = 0.0,
    seed: Seed = 0,
) -> Dataset:
    """Return the pictures below ``root``, x (n, channels, height, width).

    Classes are the names of the subfolders of ``train``, sorted. Normalization is by
    fixed numbers, never by statistics of the pictures, so that nodes with different
    pictures feed the same model alike.

    Parameters
    ----------
    root : str
        A folder, or a ``.tar`` (also compressed) of one.
    size : int or None
        Resize to a square of this side; without it all pictures must be of one size.
    grey : bool
        One channel instead of three.
    mean, std : Sequence[float]
        Subtracted from, then divided into the pixels in [0, 1]: one number for each
        channel, or one for all.
    cache : str or None
        An ``.npz`` file to keep the decoded pictures in. It is rebuilt when the
        pictures or the options have changed.
    share, validation, seed
        See `app.data.thin` and `app.data.hold_out`.

    Raises
    ------
    UserError
        If ``root`` is missing or damaged, a picture cannot be decoded, or sizes differ.
    """
    channels = 1 if grey else 3
    for name, numbers in (("mean", mean), ("std", std)):
        if len(numbers) not in (1, channels):
            raise UserError(
                f"data.{name} has {len(numbers)} numbers; 1 or {channels} fit."
            )
    source = Path(root).expanduser()
    if not source.exists():
        raise UserError(
            f"data.root={root} does not exist: it must be a folder, or a tar of one, "
            "with "
            "train/CLASS/*.jpg and test/CLASS/*.jpg."
        )
    arrays = None
    kept = Path(cache).expanduser() if cache else None
    fingerprint = _fingerprint(source, size, grey) if kept else ""
    if kept and kept.exists():
        arrays = _read_cache(kept, fingerprint)
    if arrays is None:
        arrays = _decode_all(source, size, grey)
        if kept:
            _write_cache(kept, fingerprint, arrays)
    names = [str(name) for name in arrays["labels"]]
    splits = [
        Split(
            normalize(_tensor(arrays[f"x_{part}"]), mean, std),
            _tensor(arrays[f"y_{part}"]),
        )
        for part in ("train", "test")
    ]
    data = Dataset(splits[0], splits[1], len(names), "cross_entropy", None, names)
    return hold_out(thin(data, share, seed), validation, seed)


def alike(
    root: str, like: Dataset, mean: Sequence[float], std: Sequence[float]
) -> Dataset:
    """Return a node's own pictures in the size, channels and class numbers of a run's data.

    Raises
    ------
    UserError
        If the run's inputs are no square pictures, or it does not know a class.
    """
    shape = tuple(like.train.x.shape[1:])
    if len(shape) != 3 or shape[0] not in (1, 3) or shape[1] != shape[2]:
        raise UserError(
            f"{root}: a folder holds square pictures of one or three channels; the run's "
            f"inputs have the shape {shape}"
        )
    data = imagefolder(root, shape[1], shape[0] == 1, mean, std)
    for name in data.labels:
        if name not in like.labels:
            raise UserError(
                f"{root}: class '{name}' is none of the run's {', '.join(like.labels[:9])}; "
                "with data=described, data.labels=[...] names them"
            )
    # A node need not have all classes, so its own order of names says nothing.
    numbers = torch.tensor([like.labels.index(name) for name in data.labels])
    train, test = (Split(p.x, numbers[p.y]) for p in (data.train, data.test))
    known = like.classes, like.labels
    return replace(data, train=train, test=test, classes=known[0], labels=known[1])


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array)


def _decode_all(root: Path, size: int | None, grey: bool) -> dict[str, np.ndarray]:
    """Decode every picture, in an order that a folder and its tar share."""
    pictures: dict[str, list[tuple[str, str, np.ndarray]]] = {"train": [], "test": []}
    total = 0
    for name, content in _members(root):
        split, label, file = PurePosixPath(name).parts[-3:]
        pixels = _decode(root, name, content, size, grey)
        total += pixels.nbytes
        if total > MAX_TOTAL:
            raise UserError(
                f"{root} decodes to more than {MAX_TOTAL >> 30} GiB; set size."
            )
        pictures[split].append((label, file, pixels))
    for split, found in pictures.items():
        if not found:
            raise UserError(f"{root} holds no picture in {split}/CLASS/ (.jpg, .png).")
    names = sorted({label for label, _, _ in pictures["train"]})
    strangers = {label for label, _, _ in pictures["test"]} - set(names)
    if strangers:
        raise UserError(
            f"{root}: class '{min(strangers)}' is in test/ but not in train/."
        )
    shape = pictures["train"][0][2].shape
    arrays = {"labels": np.array(names)}
    for split, found in pictures.items():
        found.sort(key=lambda item: item[:2])
        for label, file, pixels in found:
            if pixels.shape != shape:
                raise UserError(
                    f"{root}: {split}/{label}/{file} is "
                    f"{pixels.shape[2]}x{pixels.shape[1]}"
                    f", others {shape[2]}x{shape[1]}; set data.size to resize them all."
                )
        arrays[f"x_{split}"] = np.stack([pixels for _, _, pixels in found])
        numbers = [names.index(label) for label, _, _ in found]
        arrays[f"y_{split}"] = np.array(numbers, dtype=np.int64)
    return arrays


def _decode(
    root: Path, name: str, content: bytes, size: int | None, grey: bool
) -> np.ndarray:
    """Return one picture as bytes (channels, height, width)."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise UserError(f"{root}: {name} has more than {MAX_PIXELS} pixels.")
            image: Image.Image = picture
            if picture.mode.startswith("I"):
                # 16 bits, which convert would cut off at 255.
                high = np.asarray(picture).clip(0, 65535) >> 8
                image = Image.fromarray(high.astype(np.uint8))
            image = image.convert("L" if grey else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{root}: {name} is not a readable JPEG or PNG.") from error
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels[None] if grey else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _wanted(name: str) -> bool:
    path = PurePosixPath(name)
    return (
        len(path.parts) >= 3
        and path.parts[-3] in ("train", "test")
        and path.suffix.lower() in SUFFIXES
        and not path.name.startswith(".")
    )


def _files(root: Path) -> list[tuple[str, Path]]:
    found = [(path.relative_to(root).as_posix(), path) for path in root.glob("*/*/*")]
    return sorted((name, path) for name, path in found if _wanted(name))


def _members(root: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of each picture below a folder or in a tar."""
    if root.is_dir():
        for name, path in _files(root):
            if path.stat().st_size > MAX_BYTES:
                raise UserError(f"{root}: {name} is larger than {MAX_BYTES >> 20} MiB.")
            yield name, path.read_bytes()
        return
    try:
        # A stream: members are read once, in order, whatever the compression.
        with tarfile.open(root, "r|*") as archive:
            for member in archive:
                if not (member.isfile() and _wanted(member.name)):
                    continue
                if member.size > MAX_BYTES:
                    raise UserError(
                        f"{root}: {member.name} is larger than {MAX_BYTES >> 20} MiB."
                    )
                stream = archive.extractfile(member)
                yield member.name, stream.read() if stream else b""
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{root} is not a readable tar: {error}") from error


def _fingerprint(root: Path, size: int | None, grey: bool) -> str:
    """Name the pictures and options cheaply: by names, lengths and times."""
    files = _files(root) if root.is_dir() else [(root.name, root)]
    digest = hashlib.sha256(f"{DECODING} {size} {grey}".encode())
    for name, path in files:
        stat = path.stat()
        digest.update(f"\n{name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def _read_cache(path: Path, fingerprint: str) -> dict[str, np.ndarray] | None:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            if str(stored["fingerprint"]) != fingerprint:
                return None
            return {name: stored[name] for name in stored.files}
    except PermissionError as error:
        raise UserError(f"data.cache={path}: {error.strerror}") from error
    except (
        *(ValueError, OSError, EOFError, KeyError),
        *(zipfile.BadZipFile, zlib.error),
    ) as error:
        raise UserError(
            f"data.cache={path} is not a cache of pictures; delete it or name another "
            "file."
        ) from error


def _write_cache(path: Path, fingerprint: str, arrays: dict[str, np.ndarray]) -> None:
    """Write beside the target, then rename: a reader never meets half a file."""
    arrays = {**arrays, "fingerprint": np.array(fingerprint)}
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"data.cache={path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
