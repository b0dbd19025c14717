"""What a node's config says: whom it hosts, and data of its own in place of the run's.

A node of a deployment points at the data of its one client by ``data-path``; they never leave it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app.arrays import npz
from app.config import load
from app.data import Split
from app.errors import UserError
from app.host import Samples, place, setting, split, undivided
from app.images import alike
from strategies.local import Part

#: What a node config may say, in this app and of Flower's simulation.
KEYS = frozenset(
    {"clients", "data-path", "label", "state-dir", "partition-id", "num-partitions"}
)


def hosted(node: Mapping[str, Any], total: int) -> list[int]:
    """Return the clients that a node hosts, by its node config.

    ``clients="0,3,8-11"`` names them; otherwise partition ``partition-id`` of ``num-partitions``
    hosts every client whose id leaves that remainder.

    Raises
    ------
    UserError
        If the node config says neither, or names no client of the federation.
    """
    if "clients" in node:
        found: list[int] = []
        for part in str(node["clients"]).split(","):
            ends = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part.strip())
            span = range(int(ends[1]), int(ends[2] or ends[1]) + 1) if ends else ()
            if not span:
                raise UserError(
                    f"node config clients={node['clients']}: write 0,3,8-11"
                )
            found.extend(span)
        wrong = [k for k in found if k >= total]
        if wrong:
            raise UserError(f"node config clients: {wrong[0]} is not below {total}")
        return sorted(set(found))
    if "partition-id" not in node or "num-partitions" not in node:
        raise UserError(
            "node config: needs clients, or partition-id and num-partitions"
        )
    return list(range(int(node["partition-id"]), total, int(node["num-partitions"])))


@functools.lru_cache(maxsize=4)
def local_samples(path: str, label: str, overrides: tuple[str, ...]) -> Samples:
    """Load the data that a node's config points at: an .npz file or an image folder.

    Raises
    ------
    UserError
        If nothing usable is there.
    """
    config = load(overrides)
    file, given = Path(path).expanduser(), config.data.options
    expected = undivided(overrides)
    if not file.exists():
        raise UserError(
            f"{path}: nothing is there; data-path names an .npz or a folder"
        )
    if file.suffix == ".npz":
        if config.data.name != "npz":
            given = {}
        share = config.client_test or given.get("test", 0.2)
        more = {name: given[name] for name in ("scale", "seed") if name in given}
        dataset = npz(path=str(file), label=label, test=share, **more)
    elif config.data.name in ("imagefolder", "described"):
        numbers = (given.get(name, [0.5]) for name in ("mean", "std"))
        dataset = alike(str(file), expected, *numbers)
    else:  # whose pictures are scaled in a way of their own
        raise UserError(
            f"{path}: pictures go with data=imagefolder and data=described; with "
            f"data={config.data.name} a node's own data are an .npz, scaled as the run's are"
        )
    shape, classes = tuple(expected.train.x.shape[1:]), expected.classes
    if tuple(dataset.train.x.shape[1:]) != shape:
        found = tuple(dataset.train.x.shape[1:])
        raise UserError(f"{path}: samples of shape {found}; the run's have {shape}")
    if bool(classes) != bool(dataset.classes):
        kinds = "numbers", "classes"
        raise UserError(
            f"{path}: {label} are {kinds[bool(dataset.classes)]} where the run has "
            f"{kinds[bool(classes)]}"
        )
    if classes and dataset.classes > classes:
        raise UserError(f"{path}: has more classes than the run's {classes}")
    device, dtype = config.torch_device, config.torch_dtype
    train, test = (place(p, device, dtype) for p in (dataset.train, dataset.test))
    if not config.client_validation:
        return Samples(whole(train), whole(test), nothing(train))
    # Its test set is what it says; only the validation samples are taken from training.
    rows = np.arange(len(train.y))
    kept = round(len(rows) * config.client_validation)
    if not 0 < kept < len(rows):
        raise UserError(
            f"{path}: client_validation={config.client_validation} keeps {kept} of "
            f"{len(rows)} training samples; some have to be kept, and some left"
        )
    cut = split(train, rows, config.model_copy(update={"client_test": 0.0}), 0)
    return Samples(cut.train, whole(test), cut.validation)


def whole(part: Split) -> Part:
    """Return all rows of a split."""
    return Part(part.x, part.y, torch.arange(len(part.y), device=part.y.device))


def nothing(part: Split) -> Part:
    """Return no rows of a split."""
    return Part(part.x, part.y, torch.arange(0, device=part.y.device))


def source(
    node: Mapping[str, Any], mine: list[int], overrides: tuple[str, ...]
) -> Callable[[int], Samples]:
    """Return the function that gives the samples of each client (``mine``) that a node hosts."""
    for key in (
        node.keys() - KEYS
    ):  # a node may serve other apps, which have keys of their own
        if close := get_close_matches(key.replace("_", "-"), KEYS, 1, 0.8):
            raise UserError(f"node config: no '{key}' is known; write {close[0]}")
    if "data-path" not in node:
        return setting(overrides).samples
    if (shift := load(overrides).shift.name) != "none":
        raise UserError(f"node config: data-path holds data as they are; shift={shift}")
    if len(mine) != 1:
        raise UserError(
            "node config: data-path holds one client's data; name one client"
        )
    path, label = str(node["data-path"]), str(node.get("label", "y"))
    return lambda _: local_samples(path, label, overrides)
