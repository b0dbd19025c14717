"""Hydra's part of the configuration: compose `conf/`, and translate Hydra's complaints.

A wrong name is answered in one line, with the nearest right one.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from app.errors import UserError, nearest

CONF = Path(__file__).resolve().parent.parent / "conf"
#: The folders of `conf/` that hold the parts of a run, and those that hold presets of settings.
PARTS = (
    "strategy",
    "topology",
    "faults",
    "data",
    "partition",
    "shift",
    "model",
    "optimizer",
    "privacy",
    "estimate",
    "personal",
)
PRESETS = ("deployment", "experiment")
GROUPS = (*PARTS, *PRESETS)


def names(group: str) -> list[str]:
    """Return the choices of a folder of `conf/`."""
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


def compose(overrides: tuple[str, ...]) -> tuple[DictConfig, dict[str, str]]:
    """Compose the configuration of some overrides.

    Returns
    -------
    DictConfig
        The settings.
    dict
        The choice of each group.

    Raises
    ------
    UserError
        If a choice, a setting or the form of an override is wrong.
    """
    parsed = []
    for text in overrides:
        try:
            parsed.append(OverridesParser.create().parse_override(text))
        except HydraException as error:
            name, is_, given = text.partition("=")
            hint = f"; if it is text, quote it: {name}=\"'{given}'\"" if is_ else ""
            raise UserError(
                f"'{text}' is not key=value: {first_line(error)}{hint}"
            ) from None
    for text, override in zip(overrides, parsed, strict=True):
        if override.is_sweep_override():
            raise UserError(
                f"'{text}': several values are a sweep; add -m, or take ./run.sh sweep "
                f"(a list is in brackets, text with commas in quotes)"
            )
        key, value = override.key_or_group, override.value()
        chosen = isinstance(value, str) or (key in PRESETS and value is None)
        if key in GROUPS and override.is_add():
            raise UserError(f"'{text}': write {key}={value}, without the plus")
        if key in GROUPS and not chosen:
            raise UserError(f"{key}={value}: choose one of {', '.join(names(key))}")
        if key.partition(".")[0] == "study":
            raise UserError(f"'{key}' describes a study; it is no setting of a run")
        if key in GROUPS and isinstance(value, str) and value not in names(key):
            raise UserError(
                f"no {key} is called '{value}'; {nearest(value, names(key))}"
            )
    groups = tuple(
        o for o, p in zip(overrides, parsed, strict=True) if p.key_or_group in GROUPS
    )
    rest = [p for p in parsed if p.key_or_group not in GROUPS]
    if not any(_special(p) for p in rest):
        try:
            config, choices = _chosen(groups)
            config = copy.deepcopy(config)
            for override in rest:  # as Hydra does it
                OmegaConf.update(
                    config, override.key_or_group, override.value(), merge=True
                )
            return config, choices
        except (HydraException, OmegaConfBaseException, ValueError):
            pass  # and as a whole below, for what there is to say
    with _hydra():
        try:
            return _whole(overrides)
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            known = set()
            if len(groups) < len(overrides):
                with contextlib.suppress(HydraException, OmegaConfBaseException):
                    known = _keys(hydra.compose("config", list(groups)))
            for override in parsed:
                key = override.key_or_group
                if known and key not in known and key not in GROUPS:
                    raise UserError(
                        f"no setting is called '{key}'; {_near(key, known)}"
                    ) from None
            raise UserError(f"configuration: {first_line(error)}") from None


def _special(override: Override) -> bool:
    """Return whether an override does more than change a value that is there."""
    return (
        override.is_add()
        or override.is_force_add()
        or override.is_delete()
        or override.is_sweep_override()
        or override.is_hydra_override()
        or override.package is not None
    )


@functools.lru_cache(maxsize=64)
def _chosen(groups: tuple[str, ...]) -> tuple[DictConfig, dict[str, str]]:
    """Compose choices alone: reading and merging two dozen files is most of the work."""
    with _hydra():
        return _whole(groups)


def _whole(overrides: tuple[str, ...]) -> tuple[DictConfig, dict[str, str]]:
    config = hydra.compose("config", list(overrides), return_hydra_config=True)
    choices = dict(config.hydra.runtime.choices)
    with open_dict(config):
        del config["hydra"]
    return config, choices


@contextlib.contextmanager
def _hydra() -> Iterator[None]:
    """Initialize Hydra for composing, also inside a job that Hydra itself runs."""
    hydra = GlobalHydra.instance()
    outer = hydra.hydra
    hydra.clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            yield
    finally:
        hydra.hydra = outer


def _keys(config: Any, prefix: str = "") -> set[str]:
    """Return the dotted names of all settings."""
    found = set()
    for key in config:
        name = f"{prefix}{key}"
        found.add(name)
        if not OmegaConf.is_missing(config, key) and OmegaConf.is_dict(config[key]):
            found |= _keys(config[key], f"{name}.")
    return {k for k in found if not k.endswith("_target_")}


def _near(key: str, known: set[str]) -> str:
    """Suggest settings of this name elsewhere, else those of the same section, or of the top."""
    if there := sorted(k for k in known if k.endswith(f".{key}")):
        return f"did you mean {' or '.join(there)}?"
    section = key.rpartition(".")[0]
    same = {k for k in known if k.rpartition(".")[0] == section}
    if section in GROUPS and not same:
        return (
            f"{section} as chosen has none; choose one of {', '.join(names(section))}"
        )
    return nearest(key, same or {k for k in known if "." not in k} - {"study"})


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (
        str(error).strip().splitlines()[0]
        if str(error).strip()
        else type(error).__name__
    )
