"""One configuration: Hydra composes `conf/`, pydantic types it, and mistakes are told in one line.

A run's settings are a list of Hydra overrides, wherever they come from: the command line of
`python -m app.experiment`, a sweep, or the run config that Flower delivers to server and clients.
Each process composes the same list, so all of them hold the same `Config`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from app.errors import UserError, nearest
from strategies.engine import Choice
from strategies.local import Local
from strategies.wire import DTYPES

CONF = Path(__file__).resolve().parent.parent / "conf"
GROUPS = ("strategy", "data", "partition", "model", "optimizer", "experiment")
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
#: Settings that say where a run happens, not what it computes.
PLACE = (
    "output_dir",
    "resume",
    "name",
    "runtime",
    "nodes",
    "processes",
    "join_timeout",
)


class Model(BaseModel):
    """A frozen section of the configuration that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


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


class Stop(Model):
    """When to end early (see conf/config.yaml)."""

    accuracy: Annotated[float, Field(gt=0, le=1)] | None
    patience: Annotated[int, Field(ge=1)] | None
    least: Annotated[float, Field(ge=0)]


class Config(Model):
    """A run's settings; conf/config.yaml says what each one means."""

    strategy: Group
    data: Group
    partition: Group
    model: Group
    optimizer: Group
    rounds: Annotated[int, Field(ge=0)]
    clients: Annotated[int, Field(ge=1)]
    clients_per_round: Annotated[int, Field(ge=1)]
    holdout_clients: Annotated[int, Field(ge=0)]
    seed: Annotated[int, Field(ge=0)]
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
    dtype: Literal["float32", "float64"]
    local: Local
    evaluate_every: Annotated[int, Field(ge=0)]
    evaluate_clients: Literal["all", "cohort", "none"]
    client_test: Annotated[float, Field(ge=0, lt=1)]
    targets: list[Annotated[float, Field(gt=0, le=1)]]
    stop: Stop
    output_dir: str
    name: str | None
    resume: str
    checkpoint_every: Annotated[int, Field(ge=0)]
    client_memory: Literal["auto", "context", "directory"]
    runtime: Literal["local", "flower"]
    nodes: Annotated[int, Field(ge=1)]
    processes: Annotated[int, Field(ge=0)] | None
    engine: Choice
    threads: Annotated[int, Field(ge=1)]
    min_clients: Annotated[int, Field(ge=0)]
    join_timeout: Annotated[float, Field(gt=0)]
    deadline: Annotated[float, Field(gt=0)]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch names it."""
        return DTYPES[self.dtype]

    @property
    def torch_device(self) -> torch.device:
        """The device; ``auto`` is the first GPU if there is one."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device != "cpu" and not torch.cuda.is_available():
            raise UserError(f"device={self.device}: no GPU is visible; use device=cpu")
        return torch.device(self.device)


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
    schema = create_model(
        "Settings", __config__=ConfigDict(arbitrary_types_allowed=True), **fields
    )
    try:
        checked = schema(**group.options)
        values = {name: getattr(checked, name) for name in fields}
        return functools.partial(target, **values) if given else _call(target, values)
    except ValidationError as error:
        raise UserError(_explain(error, f"{kind}.")) from None
    except ValueError as error:
        raise UserError(f"{kind} {group.name}: {error}") from error


def _call(target: Callable[..., Any], values: dict[str, Any]) -> Callable[..., Any]:
    """Return a function of nothing; classes are built at once, so that they check themselves."""
    if inspect.isclass(target):
        built = target(**values)
        return lambda: built
    return functools.partial(target, **values)


def _explain(error: ValidationError, prefix: str = "") -> str:
    """Return pydantic's findings in one line, at most three of them."""
    parts = []
    for found in error.errors()[:3]:
        key = prefix + ".".join(str(p) for p in found["loc"] if isinstance(p, str))
        parts.append(f"{key}={found['input']!r}: {found['msg']}")
    return "; ".join(parts)


def names(group: str) -> list[str]:
    """Return the choices of a folder of `conf/`."""
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


def load(overrides: Sequence[str]) -> Config:
    """Compose, type and check the configuration of a list of Hydra overrides.

    Raises
    ------
    UserError
        In one line, if a name or a value is wrong.
    """
    return _load(tuple(overrides))


@functools.lru_cache(maxsize=32)
def _load(overrides: tuple[str, ...]) -> Config:
    composed = _compose(overrides)
    choices = composed.hydra.runtime.choices
    with open_dict(composed):
        del composed["hydra"]
    try:
        plain: Any = OmegaConf.to_container(
            composed, resolve=True, throw_on_missing=True
        )
    except OmegaConfBaseException as error:
        raise UserError(f"configuration: {_first_line(error)}") from None
    for kind in GROUPS[:-1]:
        options = plain[kind] if isinstance(plain[kind], dict) else {}
        target = options.pop("_target_", "")
        plain[kind] = {"name": choices[kind], "target": target, "options": options}
    unknown = plain["local"].keys() - {f.name for f in dataclasses.fields(Local)}
    for key in unknown:
        hint = nearest(key, (f.name for f in dataclasses.fields(Local)))
        raise UserError(f"no setting is called 'local.{key}'; {hint}")
    plain.pop("experiment", None)
    plain.pop("study", None)  # what a preset says of its study is none of a run's
    try:
        config = Config(**plain)
    except ValidationError as error:
        raise UserError(_explain(error)) from None
    _check(config)
    return config


def _compose(overrides: tuple[str, ...]) -> DictConfig:
    """Run Hydra, with its complaints translated."""
    parsed = []
    for text in overrides:
        try:
            parsed.append(OverridesParser.create().parse_override(text))
        except HydraException as error:
            raise UserError(
                f"'{text}' is not key=value: {_first_line(error)}"
            ) from None
    for override in parsed:
        key, value = override.key_or_group, override.value()
        if key.partition(".")[0] == "study":
            raise UserError(f"'{key}' describes a study; it is no setting of a run")
        if key in GROUPS and isinstance(value, str) and value not in names(key):
            raise UserError(
                f"no {key} is called '{value}'; {nearest(value, names(key))}"
            )
    groups = tuple(
        o for o, p in zip(overrides, parsed, strict=True) if p.key_or_group in GROUPS
    )
    with _hydra():
        try:
            return compose("config", list(overrides), return_hydra_config=True)
        except (HydraException, OmegaConfBaseException) as error:
            known = set()
            if len(groups) < len(overrides):
                known = _keys(compose("config", list(groups)))
            for override in parsed:
                key = override.key_or_group
                if known and key not in known and key not in GROUPS:
                    raise UserError(
                        f"no setting is called '{key}'; {_near(key, known)}"
                    ) from None
            raise UserError(f"configuration: {_first_line(error)}") from None


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
    """Suggest among the settings of the same section, or of the top."""
    section = key.rpartition(".")[0]
    same = {k for k in known if k.rpartition(".")[0] == section}
    return nearest(key, same or {k for k in known if "." not in k})


def _first_line(error: Exception) -> str:
    return (
        str(error).strip().splitlines()[0]
        if str(error).strip()
        else type(error).__name__
    )


def _check(config: Config) -> None:
    """Raise UserError for what only shows when settings meet."""
    if config.clients_per_round > config.clients:
        raise UserError(
            f"clients_per_round={config.clients_per_round} is more than "
            f"clients={config.clients}; draw at most all of them"
        )
    if config.min_clients > config.clients + config.holdout_clients:
        raise UserError(
            f"min_clients={config.min_clients} is more than there are clients"
        )
    bind("strategy", config.strategy)
    bind("optimizer", config.optimizer)
    bind("data", config.data)
    bind("partition", config.partition, ("labels", "natural", "clients", "seed"))
    bind("model", config.model, ("input_shape", "outputs", "vocabulary"))


def from_run_config(run_config: Mapping[str, Any]) -> list[str]:
    """Return the overrides that a Flower run config stands for.

    A first-class key that holds its default says nothing, so that a preset named in
    ``overrides`` (``experiment=NAME``) may set it; ``overrides`` come last and win.
    """
    defaults = _load(())
    overrides = []
    for key in FIRST_CLASS:
        if key not in run_config:
            continue
        default = getattr(defaults, key)
        default = default.name if isinstance(default, Group) else default
        if run_config[key] != default:
            overrides.append(f"{key}={_quote(run_config[key])}")
    try:
        return overrides + shlex.split(str(run_config.get("overrides", "")))
    except ValueError as error:
        raise UserError(f"overrides: {error}") from None


def to_run_config(overrides: Sequence[str]) -> dict[str, str]:
    """Return the Flower run config that stands for a list of overrides."""
    return {"overrides": shlex.join(overrides)}


def _quote(value: Any) -> str:
    """Return a value as Hydra's grammar reads it back."""
    if not isinstance(value, str) or value.replace("_", "").isalnum():
        return str(value)
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
