"""`python -m app.experiment`: one run, or a sweep with `-m`, from Hydra's command line.

    python -m app.experiment strategy=feddyn data=mnist data.root=DIR runtime=local nodes=2
    python -m app.experiment -m strategy=fedavg,feddyn seed=0,1,2

It returns the objective (the reported accuracy, of a regression minus the loss; the larger the
better), so that Hydra's optimizers work.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ValueType
from hydra.errors import CompactHydraException, HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from app import influence
from app.binding import bind
from app.callbacks import Callback, Record
from app.compose import CONF
from app.config import Config, load
from app.derive import check_grid, derive
from app.errors import UserError
from app.estimation import estimate
from app.host import setting
from app.local_grid import LocalGrid
from app.network_check import check_kept
from app.run import Run, Say
from app.run_config import quote, to_run_config
from strategies.hypergrad import HGP
from strategies.influence import Influence

#: Flower's own connection to a SuperLink that it starts here.
LOCAL = "local"
#: Settings of data and network that name files or folders.
PATHS = ("root", "path", "cache")


def run_local(
    overrides: Sequence[str], callbacks: Sequence[Callback] = (), say: Say = print
) -> dict[str, Any]:
    """Run settings on the local runtime and return the summary.

    Parameters
    ----------
    overrides : sequence of str
        The settings, as Hydra overrides.
    callbacks : sequence of Callback
        Called after each round.
    say : callable
        Where the lines for a person go.
    """
    config = load(overrides)
    how = bind("estimate", config.estimate)()
    if isinstance(how, Influence):
        return influence.estimate(overrides, callbacks, say)
    if isinstance(how, HGP):
        return estimate(overrides, callbacks, say)
    run = Run(overrides, callbacks, say)
    grid = LocalGrid(to_run_config(overrides), config.nodes, processes(config))
    return run(grid)


def processes(config: Config) -> int:
    """Return the worker processes: as asked, or one for each node up to the cores."""
    if config.processes is not None:
        return config.processes
    # A GPU is shared best by one process; a single node needs no second one.
    if config.nodes == 1 or config.torch_device.type == "cuda":
        return 0
    return min(config.nodes, os.cpu_count() or 1)


def argument(overrides: Sequence[str]) -> str:
    """Return settings as the value of `flwr run --run-config`, with absolute paths.

    Flower's processes work in other folders than this one.
    """
    config = load(overrides)
    named = {"output_dir": config.output_dir, "resume": config.resume}
    for kind in ("data", "topology"):
        options = getattr(config, kind).options
        named |= {f"{kind}.{k}": options[k] for k in PATHS if k in options}
    if config.resume == "auto":
        del named["resume"]
    where = [
        f"{key}={quote(str(Path(path).expanduser().resolve()))}"
        for key, path in named.items()
        if path
    ]
    text = to_run_config([*overrides, *where])["overrides"]
    # Flower ends a value at the next quote mark, escaped or not, so none is written.
    quoted = "".join(
        c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08X}" for c in text
    )
    return f'overrides="{quoted}"'


def checked(overrides: Sequence[str]) -> Config:
    """Return a configuration that a ServerApp would take: data, partition and all.

    Raises
    ------
    UserError
        If it would not.
    """
    config = load(overrides)
    check_grid(config)
    samples = setting(tuple(overrides)).dataset.test
    check_kept(config, len(samples), lambda _: None)
    return config


def run_flower(
    overrides: Sequence[str],
    say: Say = print,
    superlink: str = "",
    place: Mapping[str, str] | None = None,
) -> None:
    """Check settings, then hand them to `flwr run` and stream its log.

    Parameters
    ----------
    overrides : sequence of str
        The settings, as Hydra overrides.
    say : callable
        Where the lines of the log go.
    superlink : str
        A connection of Flower's config.toml; empty is the one called ``local``, Flower's simulation
        unless it was given another address, whatever the default: that may be a SuperLink at work.
    place : mapping, optional
        The environment of `flwr run`, this process's unless given.

    Raises
    ------
    UserError
        If the settings are wrong (before Flower starts), or the run failed.
    """
    config = checked(overrides)
    flwr = Path(sys.executable).with_name("flwr")
    where = superlink or LOCAL
    command = [str(flwr), "run", str(CONF.parent), where]
    command += ["--stream", "--run-config", argument(overrides)]
    if not superlink:
        gpus = 1.0 / config.nodes if config.torch_device.type == "cuda" else 0.0
        resources = f"num-cpus=1 client-resources-num-gpus={gpus}"
        federation = f"num-supernodes={config.nodes} client-resources-{resources}"
        command += ["--federation-config", federation]
    environment = {
        "FLWR_TELEMETRY_ENABLED": "0",
        # The app runs in this environment, which has what it needs already.
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_DEDUP_LOGS": "0",
        **(os.environ if place is None else place),
        "PATH": f"{flwr.parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    failed, run = False, ""
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                failed = failed or line.startswith("error: ")
                if started := re.search(r"Successfully started run (\d+)", line):
                    run = started[1]
                say(line.rstrip())
        except KeyboardInterrupt:
            process.terminate()
            if superlink or not run:
                raise
            # The SuperLink of `flwr run` is a process of its own and would go on.
            subprocess.run(
                [str(flwr), "stop", run, where], env=environment, capture_output=True
            )
            raise UserError(f"interrupted; run {run} was stopped") from None
    if process.returncode or failed or not run:
        hint = (
            "" if superlink else f" (over the connection '{LOCAL}' of its config.toml)"
        )
        raise UserError(f"flwr run failed{hint}; its log is above")
    # Whoever streams a log is not told how the run ended.
    asked = [str(flwr), "ls", where, "--run-id", run, "--format", "json"]
    told = subprocess.run(asked, env=environment, capture_output=True, text=True)
    if '"finished:completed"' not in told.stdout:
        raise UserError(f"run {run} did not complete; its log is above")


def main_once(overrides: Sequence[str]) -> dict[str, Any] | None:
    """Run once with a progress bar where there is a terminal."""
    config = load(overrides)
    if config.runtime == "flower":
        run_flower(overrides)
        return None
    if config.program is not None:
        grid = LocalGrid(to_run_config(overrides), config.nodes, processes(config))
        derive(overrides, grid)
        return None
    console = Console()
    if not console.is_terminal:
        return run_local(overrides)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("rounds", total=config.rounds)

        def advance(record: Record) -> tuple[bool, dict[str, float]]:
            bar.update(task, completed=record["round"])
            return False, {}

        def say(text: str) -> None:
            bar.console.print(text, highlight=False, markup=False)

        return run_local(overrides, [advance], say)


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def experiment(_: DictConfig) -> float | None:
    """Run one job of Hydra's and return its objective."""
    overrides = list(HydraConfig.get().overrides.task)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        # The runs of a sweep lie together, so that they can be compared.
        overrides.append(f"output_dir={quote(HydraConfig.get().sweep.dir)}")
    try:
        summary = main_once(overrides)
    except UserError as error:
        # The kind of error that Hydra reports without a traceback.
        raise CompactHydraException(f"error: {error}") from None
    return None if summary is None else objective_of(summary)


def objective_of(summary: dict[str, Any]) -> float:
    """Return what a search should maximize."""
    if summary["accuracy"] is not None:
        return float(summary["accuracy"])
    return math.nan if summary["loss"] is None else -float(summary["loss"])


def check_sweep(arguments: Sequence[str]) -> None:
    """Check every combination of a sweep before the first one runs.

    Another sweeper than Hydra's own draws its values later; its jobs check themselves.
    """
    overrides = [a for a in arguments if not a.startswith("-")]
    other = any(a.startswith("hydra/sweeper=") for a in overrides)
    if other or not {"-m", "--multirun"} & set(arguments):
        return
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
        if any(o.value_type == ValueType.GLOB_CHOICE_SWEEP for o in parsed):
            return  # Hydra alone knows what it stands for; its jobs check themselves
        batches = list(BasicSweeper.split_arguments(parsed, None))
    except HydraException as error:
        raise UserError(str(error).strip().splitlines()[0]) from None
    for batch in batches:
        for combination in batch:
            load([o for o in combination if not o.startswith("hydra")])


def main() -> None:
    """Run once; leave sweeps and every other option to Hydra."""
    try:
        if any(a.startswith("-") for a in sys.argv[1:]):
            check_sweep(sys.argv[1:])
            experiment()
        else:
            main_once(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
