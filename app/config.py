"""One configuration: Hydra composes `conf/`, pydantic types it, and mistakes are told in one line.

A run's settings are a list of Hydra overrides, wherever they come from: the command line of
`python -m app.experiment`, a sweep, or the run config that Flower delivers to server and clients.
Each process composes the same list, so all of them hold the same `Config`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, ValidationError

from app.binding import Group, Model, bind, explain
from app.compose import PARTS, PRESETS, compose, first_line, names
from app.errors import UserError, nearest
from app.network_check import check_estimate, check_network
from app.personal_check import check_personal
from app.privacy_check import check_privacy
from app.programs import known
from strategies.engine import Choice
from strategies.gossip import solver_of
from strategies.local import Local, missing
from strategies.wire import DTYPES

#: Nodes of Flower's simulation beyond which a round would cost seconds before any training.
MOST_NODES = 2000
#: Settings that say where a run happens, not what it computes.
PLACE = (
    "output_dir",
    "resume",
    "name",
    "runtime",
    "nodes",
    "processes",
    "join_timeout",
    "deadline",
    "attempts",
    "checkpoint_keep",
)


class Stop(Model):
    """When to end early (see conf/config.yaml)."""

    accuracy: Annotated[float, Field(gt=0, le=1)] | None
    patience: Annotated[int, Field(ge=1)] | None
    least: Annotated[float, Field(ge=0)]


class Config(Model):
    """A run's settings; conf/config.yaml says what each one means."""

    strategy: Group
    topology: Group
    faults: Group
    data: Group
    partition: Group
    shift: Group
    model: Group
    optimizer: Group
    privacy: Group
    estimate: Group
    personal: Group
    rounds: Annotated[int, Field(ge=0)]
    clients: Annotated[int, Field(ge=1)]
    clients_per_round: Annotated[int, Field(ge=1)]
    holdout_clients: Annotated[int, Field(ge=0)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
    dtype: Literal["float32", "float64"]
    local: Local
    program: Annotated[str, Field(pattern=r"^\w+$")] | None
    evaluate_every: Annotated[int, Field(ge=0)]
    evaluate_clients: Literal["all", "cohort", "none"]
    client_test: Annotated[float, Field(ge=0, lt=1)]
    client_validation: Annotated[float, Field(ge=0, lt=1)]
    targets: list[Annotated[float, Field(gt=0, le=1)]]
    stop: Stop
    output_dir: str
    name: str | None
    resume: str
    checkpoint_every: Annotated[int, Field(ge=0)]
    checkpoint_keep: Annotated[int, Field(ge=1)]
    client_memory: Literal["auto", "context", "directory"]
    lost_state: Literal["reset", "skip", "fail"]
    runtime: Literal["local", "flower"]
    nodes: Annotated[int, Field(ge=1)]
    processes: Annotated[int, Field(ge=0)] | None
    engine: Choice
    threads: Annotated[int, Field(ge=1)]
    min_clients: Annotated[int, Field(ge=0)]
    join_timeout: Annotated[float, Field(gt=0)]
    deadline: Annotated[float, Field(gt=0)]
    min_replies: Annotated[int, Field(ge=0)]
    attempts: Annotated[int, Field(ge=1)]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch names it."""
        return DTYPES[self.dtype]

    @property
    def torch_device(self) -> torch.device:
        """The device; ``auto`` is the first GPU if there is one."""
        return device_of(self.device)

    @property
    def device_name(self) -> str:
        """What computes: a GPU by its model, or ``cpu``."""
        device = self.torch_device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def device_of(name: str) -> torch.device:
    """Return the device of a name; ``auto`` is the first GPU if there is one.

    Raises
    ------
    UserError
        If a GPU is asked for that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name != "cpu" and not torch.cuda.is_available():
        raise UserError(f"device={name}: no GPU is visible; use device=cpu")
    found = torch.device(name)
    if (found.index or 0) >= max(torch.cuda.device_count(), 1):
        raise UserError(f"device={name}: there are {torch.cuda.device_count()} GPUs")
    return found


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
    config = _typed(overrides)
    _check(config)
    return config


def _typed(overrides: tuple[str, ...]) -> Config:
    """Compose and type a configuration whose settings may not go together."""
    composed, choices = compose(overrides)
    for key in sorted(OmegaConf.missing_keys(composed)):
        raise UserError(f"{key} has no value; give one: {key}=...")
    try:
        plain: Any = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"configuration: {first_line(error)}") from None
    for kind in PARTS:
        options = plain[kind] if isinstance(plain[kind], dict) else {}
        target = options.pop("_target_", "")
        plain[kind] = {"name": choices[kind], "target": target, "options": options}
    section = plain["local"] if isinstance(plain["local"], dict) else {}
    unknown = section.keys() - {f.name for f in dataclasses.fields(Local)}
    for key in unknown:
        hint = nearest(key, (f.name for f in dataclasses.fields(Local)))
        raise UserError(f"no setting is called 'local.{key}'; {hint}")
    for kind in PRESETS:
        plain.pop(kind, None)
    plain.pop("study", None)  # what a preset says of its study is none of a run's
    try:
        return Config(**plain)
    except ValidationError as error:
        raise UserError(explain(error)) from None


def _check(config: Config) -> None:
    """Raise UserError for what only shows when settings meet."""
    if config.clients_per_round > config.clients:
        raise UserError(
            f"clients_per_round={config.clients_per_round} is more than "
            f"clients={config.clients}; draw at most all of them"
        )
    if config.min_replies > config.clients_per_round:
        raise UserError(
            f"min_replies={config.min_replies} is more than "
            f"clients_per_round={config.clients_per_round}"
        )
    if config.min_clients > config.clients + config.holdout_clients:
        raise UserError(
            f"min_clients={config.min_clients} is more than there are clients"
        )
    if config.runtime == "flower" and config.nodes > MOST_NODES:
        raise UserError(
            f"nodes={config.nodes}: Flower's simulation looks through all messages for each "
            f"node, so take at most {MOST_NODES}; a node hosts any number of clients"
        )
    if config.client_test + config.client_validation >= 1:
        raise UserError(
            f"client_test={config.client_test} and client_validation="
            f"{config.client_validation} leave nothing to train on"
        )
    if config.program is not None:
        known(config.program)
    _check_judged(config)
    _check_alone(config)
    _check_optimizer(config)
    check_network(config)
    check_estimate(config)
    check_personal(config)
    check_privacy(config)
    bind("data", config.data)
    bind("partition", config.partition, ("labels", "natural", "clients", "seed"))
    bind("shift", config.shift)
    bind("model", config.model, ("input_shape", "outputs", "vocabulary"))


def _check_judged(config: Config) -> None:
    """Raise UserError for what waits for an evaluation, or is kept for one, that never comes."""
    stop = config.stop
    for name in ("accuracy", "patience"):
        if getattr(stop, name) is not None and not config.evaluate_every:
            raise UserError(
                f"stop.{name}: with evaluate_every=0 nothing is seen before the end"
            )
    if config.evaluate_clients != "none":
        return
    others = (config.personal.name, config.estimate.name)
    if config.client_validation and others == ("none", "none"):
        raise UserError(
            f"client_validation={config.client_validation}: nobody looks at these samples "
            "with evaluate_clients=none"
        )


def _check_alone(config: Config) -> None:
    """Raise UserError if what has no rounds is given what only rounds know."""
    what = f"program={config.program}"
    if config.program is None:
        what = f"estimate={config.estimate.name}"
        if config.estimate.name == "none":
            return
    if config.privacy.name != "none":
        raise UserError(
            f"privacy={config.privacy.name}: {what} sends what clients compute as it is; "
            "use privacy=none"
        )
    stop = config.stop
    if config.resume or stop.accuracy is not None or stop.patience is not None:
        unknown = f"resume={config.resume}" if config.resume else "stop"
        raise UserError(f"{unknown}: {what} has no rounds of training; leave it out")


def _check_optimizer(config: Config) -> None:
    """Raise UserError if the algorithm needs another local optimizer."""
    algorithm = solver_of(bind("strategy", config.strategy)())
    optimizer = bind("optimizer", config.optimizer)()
    if optimizer.models(2) and "answer" not in algorithm.needs:
        raise UserError(
            f"optimizer={config.optimizer.name}: answers with a direction, which "
            f"strategy={config.strategy.name} does not ask for; use optimizer=sgd"
        )
    if optimizer.along and optimizer.along not in algorithm.needs:
        raise UserError(
            f"optimizer={config.optimizer.name}: is for a strategy that tunes the clients' "
            f"rate, which strategy={config.strategy.name} as set does not; use optimizer=sgd"
        )
    lacking = missing(algorithm, optimizer)
    if not lacking:
        return
    fitting = []
    for name in names("optimizer"):
        other = _typed((f"optimizer={name}",)).optimizer
        if not missing(algorithm, bind("optimizer", other)()):
            fitting.append(f"optimizer={name}")
    raise UserError(
        f"strategy={config.strategy.name} needs {' and '.join(lacking)} in the state of "
        f"the local optimizer, and optimizer={config.optimizer.name} has none; use "
        f"{' or '.join(fitting)}"
    )
