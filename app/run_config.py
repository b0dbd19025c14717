"""A run's settings as they travel: in Flower's run config, and as text in Hydra's grammar."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString

from app.binding import Group
from app.config import load
from app.errors import UserError

#: The keys of [tool.flwr.app.config] besides `overrides`.
FIRST_CLASS = (
    "strategy",
    "data",
    "partition",
    "model",
    "rounds",
    "clients",
    "clients_per_round",
    "seed",
    "device",
    "evaluate_every",
    "output_dir",
    "resume",
)


def from_run_config(run_config: Mapping[str, Any]) -> list[str]:
    """Return the overrides that a Flower run config stands for.

    A first-class key that holds its default says nothing, so that a preset named in
    ``overrides`` (``experiment=NAME``) may set it; ``overrides`` come last and win.
    """
    defaults = load(())
    overrides = []
    for key in FIRST_CLASS:
        if key not in run_config:
            continue
        default = getattr(defaults, key)
        default = default.name if isinstance(default, Group) else default
        if run_config[key] != default:
            overrides.append(f"{key}={quote(run_config[key])}")
    try:
        return overrides + shlex.split(str(run_config.get("overrides", "")))
    except ValueError as error:
        raise UserError(f"overrides: {error}") from None


def to_run_config(overrides: Sequence[str]) -> dict[str, str]:
    """Return the Flower run config that stands for a list of overrides."""
    return {"overrides": shlex.join(overrides)}


def quote(value: Any) -> str:
    """Return a value as Hydra's grammar reads it back."""
    if not isinstance(value, str):
        return str(value)
    return QuotedString(text=value, quote=Quote.single).with_quotes()
