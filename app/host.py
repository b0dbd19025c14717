"""What a node holds: the data and the model of the clients that it hosts.

Data are loaded once for each process and kept as tensors on the device; a client is a set of
indices into them. What a node's config says of its clients and data is read in `app.node_config`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from app.binding import Group, bind
from app.config import Config, device_of, load
from app.data import Dataset, Split
from app.errors import UserError
from app.layers import noise_shapes
from app.learners import modules, personal
from app.shift import shifted
from strategies.gossip import solver_of
from strategies.individual import Plural, Tailored
from strategies.local import Part, Trainer
from strategies.objective import Objective
from strategies.personalize import Personalize
from strategies.randomness import permutations
from strategies.wire import DTYPES


@dataclass(frozen=True)
class Samples:
    """One client's samples.

    Attributes
    ----------
    train, test, validation : Part
        Its training samples, and those kept for its own evaluation (possibly none): what is told
        in the end, and what may decide.
    """

    train: Part
    test: Part
    validation: Part

    @functools.cached_property
    def entropy(self) -> float:
        """Of the training labels, in nats; 0 in a regression."""
        labels = self.train.y[self.train.index].flatten()
        if labels.is_floating_point():
            return 0.0
        counts = torch.bincount(labels[labels >= 0].cpu()).to(torch.float64)
        return float(torch.special.entr(counts / counts.sum()).sum())

    def judged(self) -> tuple[bool, Part]:
        """Return whether samples were held out, and those that the client evaluates on."""
        return (True, self.test) if len(self.test) else (False, self.train)


@dataclass(frozen=True)
class Setting:
    """A run's data and partition, the same in every process that composes the same config.

    Attributes
    ----------
    config : Config
        The settings.
    dataset : Dataset
        Training and test samples, on the device, in the run's dtype.
    parts : list of ndarray
        Indices into the training samples of each client, held-out clients last.
    """

    config: Config
    dataset: Dataset
    parts: list[np.ndarray]
    _cut: dict[int, Samples] = field(default_factory=dict)

    def samples(self, k: int) -> Samples:
        """Return client k's samples, cut the first time."""
        if not self.parts:
            raise UserError(
                f"client {k} has no samples: data={self.config.data.name} holds none, so "
                "the config of its node must say data-path"
            )
        if k not in self._cut:
            self._cut[k] = split(self.dataset.train, self.parts[k], self.config, k)
        return self._cut[k]

    def test(self) -> Split:
        """Return the test set: the data's own, or else what the clients keep of theirs."""
        own, config = self.dataset.test, self.config
        if len(own) or not (self.parts and config.client_test):
            return own
        kept = [self.samples(k).test.index for k in range(config.clients)]
        rows, train = torch.cat(kept), self.dataset.train
        return Split(train.x[rows], train.y[rows])


def place(part: Split, device: torch.device, dtype: torch.dtype) -> Split:
    """Move samples to a device, floats in the given dtype."""

    def moved(t: Tensor) -> Tensor:
        return t.to(device, dtype) if t.is_floating_point() else t.to(device)

    return Split(moved(part.x), moved(part.y))


def split(samples: Split, indices: np.ndarray, config: Config, k: int) -> Samples:
    """Cut client k's samples into training and test, at a seeded place of their order."""
    index = torch.from_numpy(indices)
    test, validation = _kept(config, len(index), k)
    order = permutations(config.seed, "split", 0, [k], len(index))[0]
    ends = [test, validation, len(index) - test - validation]
    x, y = samples.x, samples.y
    cut = [p.sort().values.to(x.device) for p in torch.split(index[order], ends)]
    return Samples(*(Part(x, y, rows) for rows in (cut[2], cut[0], cut[1])))


def _kept(config: Config, count: int, k: int) -> tuple[int, int]:
    """Return how many of a client's samples are kept from training: for test and validation."""
    shares = {
        "client_test": config.client_test,
        "client_validation": config.client_validation,
    }
    kept = {name: round(count * share) for name, share in shares.items()}
    for name, share in shares.items():
        if share and (not kept[name] or sum(kept.values()) >= count):
            raise UserError(
                f"{name}={share}: client {k} has {count} samples, "
                "too few to keep some for training and some for testing; take fewer clients, "
                "or raise partition.minimum where there is one"
            )
    return kept["client_test"], kept["client_validation"]


@functools.lru_cache(maxsize=2)
def setting(overrides: tuple[str, ...]) -> Setting:
    """Load the data of a configuration and partition them, once for each process.

    Raises
    ------
    UserError
        If the data are missing or cannot be partitioned as asked.
    """
    config, dataset = load(overrides), undivided(overrides)
    if not len(dataset.train.y):  # only the nodes hold samples
        if config.shift.name != "none":
            raise UserError(
                f"shift={config.shift.name}: data={config.data.name} holds no samples"
            )
        return Setting(config, dataset, [])
    partition = bind(
        "partition", config.partition, ("labels", "natural", "clients", "seed")
    )
    parts = partition(
        labels=dataset.train.y.cpu().numpy(),
        natural=dataset.natural,
        clients=config.clients + config.holdout_clients,
        seed=config.seed,
    )
    for k, part in enumerate(parts):
        _kept(config, len(part), k)
    shift = bind("shift", config.shift)()
    return Setting(config, shifted(dataset, parts, shift, config.seed), parts)


def undivided(overrides: tuple[str, ...]) -> Dataset:
    """Return the data of a configuration before they are divided, loaded once for each process."""
    config = load(overrides)
    return _dataset(config.data.model_dump_json(), config.dtype, config.device)


@functools.lru_cache(maxsize=2)
def _dataset(group: str, dtype: str, device: str) -> Dataset:
    """Load a data set and place it; the runs of a sweep share it."""
    dataset: Dataset = bind("data", Group.model_validate_json(group))()
    where, kind = device_of(device), DTYPES[dtype]
    placed = {n: place(getattr(dataset, n), where, kind) for n in ("train", "test")}
    return Dataset(**{**vars(dataset), **placed})


def objective(config: Config, dataset: Dataset) -> Objective:
    """Build the model of a run, weights drawn from its seed, on its device."""
    how = bind("personal", config.personal)()
    if isinstance(how, Personalize):
        return personal(config, dataset, how)
    algorithm = solver_of(bind("strategy", config.strategy)())
    more = algorithm.learners - 1 if isinstance(algorithm, Plural) else 0
    module, *learners = modules(config, dataset, more + 1)
    shapes = noise_shapes(module)
    return Objective(module, dataset.loss, shapes, learners)


def trainer(config: Config, goal: Objective) -> Trainer:
    """Put together what local training needs."""
    algorithm = solver_of(bind("strategy", config.strategy)())
    if isinstance(algorithm, Tailored):
        try:
            algorithm = algorithm.tailored(goal.layout)
        except ValueError as error:
            raise UserError(f"strategy={config.strategy.name}: {error}") from None
    return Trainer(
        algorithm=algorithm,
        optimizer=bind("optimizer", config.optimizer)(),
        privacy=bind("privacy", config.privacy)(),
        local=config.local,
        objective=goal,
        seed=config.seed,
    )
