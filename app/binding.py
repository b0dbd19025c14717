"""Settings and signatures: a group's YAML names a function or class, which says what it takes.

Types and bounds stand where the algorithm is; nothing is declared twice.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from app.errors import UserError, nearest


class Model(BaseModel):
    """A frozen section of the configuration that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Group(Model):
    """A choice from one folder of `conf/`: a function or class, and its settings.

    Attributes
    ----------
    name : str
        The chosen file, for example ``feddyn``.
    target : str
        Dotted path of the function or class below `app` or `strategies`.
    options : dict
        Its keyword arguments.
    """

    name: str
    target: str
    options: dict[str, Any]


def resolve(group: Group) -> Callable[..., Any]:
    """Return the function or class that a group names.

    Only names below `app` and `strategies` are imported: a configuration cannot run other code.

    Raises
    ------
    UserError
        If the target lies elsewhere or does not exist.
    """
    module, _, name = group.target.rpartition(".")
    if module.split(".")[0] not in ("app", "strategies"):
        raise UserError(f"{group.target}: a target must lie below app or strategies")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{group.target}: cannot be imported ({error})") from error
    return found


def bind(kind: str, group: Group, given: Sequence[str] = ()) -> Callable[..., Any]:
    """Check a group's settings against its target's signature and bind them.

    Parameters
    ----------
    kind : str
        The folder, for messages: ``strategy``.
    group : Group
        The choice.
    given : sequence of str
        Parameters that the caller passes later.

    Returns
    -------
    callable
        The target with its settings bound; it takes the ``given`` parameters by keyword.

    Raises
    ------
    UserError
        If a setting is unknown, missing, of the wrong type or out of bounds.
    """
    target = resolve(group)
    parameters = inspect.signature(target).parameters
    # Resolved where each was written: a field may be inherited from another module.
    hints = get_type_hints(target, include_extras=True)
    fields: dict[str, Any] = {
        name: (hints[name], ... if p.default is p.empty else p.default)
        for name, p in parameters.items()
        if name not in given
    }
    for key in group.options.keys() - fields.keys():
        hint = nearest(key, fields)
        raise UserError(f"{kind}.{key}: {group.name} has no such setting; {hint}")
    rules = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)
    schema = create_model("Settings", __config__=rules, **fields)
    try:
        checked = schema(
            **{k: _inner(f"{kind}.{k}", v) for k, v in group.options.items()}
        )
        values = {name: getattr(checked, name) for name in fields}
        return functools.partial(target, **values) if given else _call(target, values)
    except ValidationError as error:
        raise UserError(explain(error, f"{kind}.")) from None
    except ValueError as error:
        raise UserError(f"{kind} {group.name}: {error}") from error


def _inner(kind: str, value: Any) -> Any:
    """Return a setting; one that names a target itself (``strategy.solver``) is built."""
    if not isinstance(value, dict) or "_target_" not in value:
        return value
    options = {k: v for k, v in value.items() if k != "_target_"}
    target = str(value["_target_"])
    group = Group(name=target.rpartition(".")[2], target=target, options=options)
    return bind(kind, group)()


def _call(target: Callable[..., Any], values: dict[str, Any]) -> Callable[..., Any]:
    """Return a function of nothing; classes are built at once, so that they check themselves."""
    if inspect.isclass(target):
        built = target(**values)
        return lambda: built
    return functools.partial(target, **values)


def explain(error: ValidationError, prefix: str = "") -> str:
    """Return pydantic's findings in one line, at most three of them."""
    parts = []
    for found in error.errors()[:3]:
        key = prefix + ".".join(str(p) for p in found["loc"] if isinstance(p, str))
        if found["type"] == "missing":
            parts.append(f"{key} has no value")
            continue
        what = found["msg"]
        if key == "strategy.solver":
            what = f"choose it by strategy@strategy.solver={found['input']}"
        elif found["type"] in ("model_type", "dataclass_type"):
            what = f"{key} is a group; set what is in it, {key}.KEY=VALUE"
        elif found["type"] == "string_pattern_mismatch" and key == "device":
            what = "auto, cpu, cuda or cuda:N"
        parts.append(f"{key}={found['input']!r}: {what}")
    return "; ".join(parts)
