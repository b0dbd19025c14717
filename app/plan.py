"""What a study is made of: its description in a preset, and the runs it asks for.

Every run is composed and checked before the first one starts, so that a mistake in a
long study shows at once.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from pydantic import Field, ValidationError, model_validator

from app.binding import Model
from app.compose import CONF, names
from app.config import load
from app.errors import UserError, nearest
from app.resume import APART
from app.run_config import quote
from app.tuning import Tuning
from app.verdict import DISTANCE, Rule

# What the study itself sets.
OWN = {"seed", "name", "resume", "experiment", "runtime", "study"}


class Size(Model):
    """How far a study goes.

    Attributes
    ----------
    seeds : int
        Runs of each variant, unless the command line says otherwise.
    minutes : float
        Estimated for all runs on two cores.
    overrides : list of str
        Settings of this size.
    """

    seeds: Annotated[int, Field(ge=1)]
    minutes: Annotated[float, Field(gt=0)]
    overrides: list[str]


class Reference(Model):
    """Numbers that others published, to be held against a study's own.

    Attributes
    ----------
    source : str
        Where they are from, and what has to be known to compare them.
    rounds_to : dict
        From variant to target to rounds; null where the target was not reached.
    """

    source: str
    rounds_to: dict[str, dict[float, float | None]]


class Study(Model):
    """The section ``study`` of a preset; docs/studies.md explains each key.

    ``drawn`` names further metrics of the records, each with a figure of its own, ``dots`` those
    whose last values the figure shows in place of curves, ``baseline`` the variant to which the
    table of costs is relative. With ``tuning``, the verdict and the baseline name its methods
    (`app.tuning`).
    """

    claim: str
    fairness: str
    variants: dict[Annotated[str, Field(pattern=r"^[\w.-]+$")], list[str]]
    metric: str
    also: tuple[str, ...] = ()
    x: Literal["rounds", "bytes", "links"] = "rounds"
    verdict: Rule
    drawn: tuple[str, ...] = ()
    dots: tuple[str, ...] = ()
    baseline: str | None = None
    sizes: dict[str, Size]
    reference: Reference | None = None
    tuning: Tuning | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        named = {*self.verdict.lead, *self.verdict.rivals}
        named |= {self.baseline} if self.baseline else set()
        there = self.tuning.methods.keys() if self.tuning else self.variants.keys()
        if unknown := named - there:
            raise ValueError(f"no variants are called {sorted(unknown)}")
        if unknown := set(self.dots) - {self.metric, *self.also}:
            raise ValueError(f"dots: {sorted(unknown)}: name the metric or one of also")
        known = self.reference.rounds_to if self.reference else {}
        if unknown := known.keys() - self.variants.keys():
            raise ValueError(f"reference: no variants are called {sorted(unknown)}")
        if self.tuning:
            tried = {v for names in self.tuning.methods.values() for v in names}
            if unknown := tried - self.variants.keys():
                raise ValueError(f"tuning: no variants are called {sorted(unknown)}")
        return self


@dataclass(frozen=True)
class Job:
    """One run of a study: a variant with a seed, and the overrides that make it."""

    variant: str
    seed: int
    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """A study at one size: its jobs, in the order in which they run."""

    name: str
    study: Study
    size: str
    seeds: int
    extra: tuple[str, ...]
    folder: Path
    jobs: tuple[Job, ...]

    @property
    def targets(self) -> list[float]:
        """Values of the metric to look for, from the settings and from the rule."""
        if self.study.metric == DISTANCE:
            return []
        found = (
            set() if self.study.verdict.target is None else {self.study.verdict.target}
        )
        if self.study.metric == "accuracy":
            found |= set(load(self.jobs[0].overrides).targets)
        return sorted(found)


def read(name: str) -> Study:
    """Return the study of a preset.

    Raises
    ------
    UserError
        If there is no such preset, or its section ``study`` is missing or wrong.
    """
    if name not in names("experiment"):
        raise UserError(f"no study is called '{name}'; {nearest(name, studies())}")
    file = CONF / "experiment" / f"{name}.yaml"
    section = yaml.safe_load(file.read_text(encoding="utf-8")).get("study")
    if section is None:
        raise UserError(f"{name}: a preset without a study; {nearest(name, studies())}")
    try:
        return Study(**section)
    except (ValidationError, TypeError) as error:
        found = error.errors()[0] if isinstance(error, ValidationError) else None
        where = ".".join(map(str, found["loc"])) if found else "study"
        what = found["msg"] if found else str(error)
        raise UserError(f"conf/experiment/{name}.yaml: {where}: {what}") from None


def studies() -> list[str]:
    """Return the presets that have a study."""
    folder = CONF / "experiment"
    files = {name: folder / f"{name}.yaml" for name in names("experiment")}
    return [n for n, f in files.items() if "study" in yaml.safe_load(f.read_text())]


def plan(name: str, size: str, seeds: int | None, extra: Sequence[str] = ()) -> Plan:
    """Compose and check every run of a study before the first one starts.

    Parameters
    ----------
    name, size : str
        The preset and one of its sizes.
    seeds : int, optional
        Runs of each variant, with seeds 0, 1, ...; None takes the size's own number.
    extra : sequence of str
        Overrides for all runs.

    Raises
    ------
    UserError
        If a name or value is wrong, or an override sets what the study itself sets.
    """
    study = read(name)
    if size not in study.sizes:
        raise UserError(f"size={size}: {name} has none; {nearest(size, study.sizes)}")
    taken = OWN | {_key(o) for given in study.variants.values() for o in given}
    for override in extra:
        if _key(override) in taken:
            raise UserError(f"{override}: the study itself sets {_key(override)}.")
    base = next((o for o in extra if _key(o) == "output_dir"), "output_dir=runs")
    kept = [o for o in extra if _key(o) != "output_dir"]
    # Other settings are another study, and so are other data: they never mix with the plain one.
    telling = sorted(o for o in kept if _key(o) not in APART)
    marked = sorted(
        o for o in kept if _key(o) not in APART - {"data.path", "data.root"}
    )
    tag = hashlib.sha256(" ".join(marked).encode()).hexdigest()[:6]
    folder = Path(load([base]).output_dir).expanduser() / "studies"
    folder /= f"{name}-{size}-{tag}" if marked else f"{name}-{size}"
    count = study.sizes[size].seeds if seeds is None else seeds
    jobs = []
    for seed in range(count):
        for variant, given in study.variants.items():
            run = f"{variant}-seed{seed}"
            place = quote(str(folder.resolve()))
            parts = [f"experiment={name}", *study.sizes[size].overrides, *given, *kept]
            parts += [f"seed={seed}", f"name={run}", f"output_dir={place}"]
            if seed == 0:  # the others differ in a number
                load(parts)
            jobs.append(Job(variant, seed, run, tuple(parts)))
    return Plan(name, study, size, count, tuple(telling), folder, tuple(jobs))


def _key(override: str) -> str:
    """Return the setting that an override is about."""
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:
        raise UserError(f"{override}: is not key=value.") from None
    return str(parsed.key_or_group)
