"""The run directory that a run gets, or continues (one that is named, or the newest), and where."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf

from app import checkpoint
from app.compose import PARTS, compose
from app.config import PLACE, Config
from app.errors import UserError
from app.outer import Outer
from app.records import plain, read_summary
from app.report import flat
from app.rounds import Rounds
from app.rundir import ENVIRONMENT, RunDir
from strategies.federation import Federation
from strategies.relay import Relay

#: Where data lie and how a run is carried out; none of it changes what is computed.
APART = {
    *PLACE,
    *("checkpoint_every", "client_memory", "device", "threads"),
    *("data.root", "data.cache", "data.path", "data.download"),
}
#: What may be chosen anew when a run goes on, beside those.
FREE = ("rounds", "lost_state", "min_replies", "min_clients")


def describe(config: Config) -> dict[str, Any]:
    """Return the configuration as plain data, each group as its name and settings."""
    described = config.model_dump()
    for kind in PARTS:
        group = described[kind]
        described[kind] = {"name": group["name"], **group["options"]}
    # As it is written and read back: the keys of faults.crash={3: 10} become words.
    return dict(plain(described, finite=False))


def settings(described: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings, by dotted names, that decide what a described run computes."""
    found = flat(plain(described, finite=False))
    return {k: v for k, v in found.items() if k not in APART}


def differing(
    config: Config, there: Any, free: Sequence[str] = FREE
) -> list[tuple[str, Any, Any]]:
    """Return the settings that decide otherwise in a run: their names, there and here.

    A run of an earlier version lacks settings that have come since; it is as if it had had their
    defaults.

    Parameters
    ----------
    config : Config
        Here.
    there : object
        What the run's ``config.yaml`` holds. If that is none, a reason without a name is returned.
    free : sequence of str
        What may differ.
    """
    if not isinstance(there, dict) or not there:
        return [("", "config.yaml cannot be read", None)]
    ours, theirs = settings(describe(config)), settings(there)
    plain, _ = compose(tuple(f"{kind}={ours[f'{kind}.name']}" for kind in PARTS))
    for kind, default in compose(())[1].items():  # also of a group that has come since
        theirs.setdefault(f"{kind}.name", default)
    for key in ours.keys() - theirs.keys():
        name = f"{key.partition('.')[0]}.name"
        if theirs.get(name) == ours.get(name):
            theirs[key] = OmegaConf.select(plain, key)
    # Of a mapping (faults.crash) also what is not there any more.
    mappings = {k.rpartition(".")[0] for k in ours if k.count(".") > 1}
    gone = {k for k in theirs.keys() - ours if k.rpartition(".")[0] in mappings}
    return [
        (k, theirs.get(k), ours.get(k))
        for k in sorted({*ours, *gone} - {*free})
        if theirs.get(k) != ours.get(k)
    ]


def new_directory(config: Config, *words: str, data: str = "") -> RunDir:
    """Return a new run directory, called by the time and some words unless the run has a name.

    ``data`` tells its samples from others (`Dataset.digest`).

    Raises
    ------
    UserError
        If it cannot be made.
    """
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    title = "-".join([stamp, *words, f"seed{config.seed}"])
    base = Path(config.output_dir).expanduser().resolve()
    try:
        return RunDir.create(
            base, config.name or title, describe(config), data, config.device_name
        )
    except OSError as error:
        raise UserError(f"output_dir={config.output_dir}: {error.strerror}") from error


def find_unfinished(config: Config, data: str) -> Path:
    """Return the run directory that ``resume`` names.

    ``data`` tells the samples from others: settings name a file, not what is in it.

    Raises
    ------
    UserError
        If there is none, or it has other settings or samples.
    """

    def began_with(path: Path) -> str:
        try:
            told = json.loads((path / ENVIRONMENT).read_text())
            return str(told.get("data", data))
        except (OSError, ValueError, AttributeError):
            return data

    def others(path: Path) -> list[str]:
        try:
            there = yaml.safe_load((path / "config.yaml").read_text())
        except (OSError, yaml.YAMLError):
            there = None
        found = differing(config, there)
        return [f"{k} is {a} there and {b} here" if k else str(a) for k, a, b in found]

    if config.resume != "auto":
        path = Path(config.resume).expanduser().resolve()
        if not (path / "config.yaml").exists():
            raise UserError(
                f"resume={config.resume}: no run directory (no config.yaml there)"
            )
        if found := others(path):
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise UserError(
                f"resume={config.resume}: that run has other settings: "
                f"{', '.join(found[:3])}{more} (only {', '.join(FREE)} and where and how it "
                "runs may change)"
            )
        if began_with(path) != data:
            raise UserError(
                f"resume={config.resume}: that run began with other samples than "
                f"data={config.data.name} has now"
            )
        return path
    base = Path(config.output_dir).expanduser().resolve()
    paths = [p.parent for p in base.glob("*/config.yaml")]
    open_ = [p for p in paths if checkpoint.oldest(p / "checkpoints")]
    open_ = [
        p for p in open_ if not _finished(p) and not others(p) and began_with(p) == data
    ]
    if not open_:
        raise UserError(
            f"resume=auto: no unfinished run of these settings has a checkpoint in {base}"
        )
    return max(open_, key=lambda p: p.stat().st_mtime)


def _finished(path: Path) -> bool:
    """Return whether a run has finished; a summary that a power failure has torn is none."""
    try:
        return read_summary(path) is not None
    except UserError:
        return False


def stand(
    path: Path,
    federation: Federation | Relay,
    rounds: Rounds,
    outer: Outer | None,
    config: Config,
) -> int:
    """Let a run stand where its newest checkpoint was written, and return that round.

    Raises
    ------
    UserError
        If there is no checkpoint.
    """
    found = checkpoint.newest(path / "checkpoints")
    if found is None:
        raise UserError(
            f"resume={path}: no checkpoint there; run with checkpoint_every=N first, N at "
            "most the number of rounds"
        )
    round_, vectors, rest = found
    if round_ > config.rounds:
        raise UserError(
            f"resume={path}: that run has come to round {round_}, beyond rounds={config.rounds}"
        )
    checkpoint.cut(path / "checkpoints", round_)
    empty = torch.zeros(0, dtype=config.torch_dtype)
    federation.restore({"buffers": empty, **vectors}, rest)
    rounds.lost = set(rest.get("to_begin_anew", []))
    if outer:
        outer.restore(rest["outer"], round_, path)
    federation.keep = checkpoint.oldest(path / "checkpoints")
    return round_
