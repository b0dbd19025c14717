"""`./run.sh bench`: seconds per round, side by side, one contender after another, several times.

    ./run.sh bench                                  all workloads, all contenders, 5 repeats
    ./run.sh bench --workloads W1,W4 --who local,bare-vmap --rounds 10 --repeats 3
    ./run.sh bench mixing                           a network's mixing and the relay, no training
    ./run.sh bench --workloads C10,C100,C1000,C10000,P0.1,P1,P10 --who local   how cost grows

A repeat runs every contender once, each in a process of its own, so that a machine that slows down
slows all of them. A contender's figure is the median over the repeats of the median round of each,
the first round left out (it loads, compiles and connects). The accuracy after equally many rounds
shows that the work was equal.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from app.config import load
from app.environment import environment
from app.errors import UserError, nearest
from app.host import setting
from app.processes import marked
from app.records import read_rounds, read_summary, write_atomic
from bench.own_flower import own_flower
from bench.workloads import ALL, WORKLOADS

ROOT = Path(__file__).resolve().parent.parent


def _ours(workload: str, rounds: int, how: str) -> dict[str, Any]:
    """Run fedgrad and read its own record; ``how`` is a runtime and an engine."""
    from app.experiment import run_flower, run_local

    with tempfile.TemporaryDirectory() as folder:
        runtime, engine = how.split()
        given = [f"rounds={rounds}", f"output_dir={folder}", "name=run", "nodes=2"]
        given.append(f"engine={engine}")
        overrides = [*ALL[workload].overrides, *given]
        stamps: list[float] = []

        def stamp(_: dict[str, Any]) -> tuple[bool, dict[str, float]]:
            stamps.append(time.perf_counter())
            return False, {}

        if runtime == "local":
            run_local(overrides, [stamp], say=lambda _: None)
        else:
            with own_flower(Path(folder) / "flower"):
                run_flower(overrides, say=lambda _: None)
        path = Path(folder) / "run"
        records, summary = read_rounds(path)[1:], read_summary(path) or {}
        # The test set is evaluated in the last round alone, so that one is left out too.
        # From one round's record to the next, all is counted: what is written between them too.
        seconds = [b - a for a, b in pairwise(stamps[:-1])]
        seconds = seconds or [r["seconds"]["round"] for r in records[:-1]]
        where = {
            part: statistics.median(r["seconds"][part] for r in records[1:-1])
            for part in ("client", "wire", "server")
        }
        return {
            "seconds": seconds,
            "accuracy": summary["accuracy"],
            "where": where,
            "engine": records[0]["engine"],
        }


def _bare(workload: str, rounds: int, how: str) -> dict[str, Any]:
    from bench.bare import timed

    return timed(workload, how, rounds)


def _stock(workload: str, rounds: int, _: str) -> dict[str, Any]:
    """Run stock Flower by `flwr run`, with a node for each client."""
    clients = load(ALL[workload].overrides).clients
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        config = f"workload='{workload}' rounds={rounds} out='{out}' root='{ROOT}'"
        nodes = f"num-supernodes={clients} client-resources-num-cpus=1"
        flwr = Path(sys.executable).with_name("flwr")
        command = [str(flwr), "run", str(ROOT / "bench" / "stock"), "--stream"]
        command += ["--run-config", config, "--federation-config", nodes]
        with own_flower(Path(folder) / "flower"):
            done = subprocess.run(command, capture_output=True, text=True)
        if not out.exists():
            # Errors come in a box; what is in it is the reason.
            lines = [
                x.strip("│╭╮╰╯─ ") for x in f"{done.stdout}{done.stderr}".split("\n")
            ]
            raise UserError(
                f"stock Flower failed: {' '.join([*filter(None, lines)][-4:])}"
            )
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def _pfl(workload: str, rounds: int, _: str) -> dict[str, Any]:
    """Run pfl in two processes."""
    if importlib.util.find_spec("pfl") is None:
        raise UserError("pfl is not installed; pip install 'pfl[pytorch]' brings it")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", str(ROOT / "bench" / "pfl_app.py"), workload]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "PFL_PYTORCH_DEVICE": "cpu"}
    done = subprocess.run(
        [*command, str(rounds)], env=quiet, capture_output=True, text=True
    )
    lines = [x for x in done.stdout.splitlines() if x.startswith('{"')]
    if not lines:
        raise UserError(f"pfl failed: {done.stderr[-800:]}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


CONTENDERS: dict[str, tuple[Callable[[str, int, str], dict[str, Any]], str]] = {
    "local": (_ours, "local auto"),
    "flower": (_ours, "flower auto"),
    "bare-loop": (_bare, "loop"),
    "bare-vmap": (_bare, "vmap"),
    "stock": (_stock, ""),
    "local-loop": (_ours, "local loop"),
    "local-vmap": (_ours, "local vmap"),
    "pfl": (_pfl, ""),
}
#: Those that are asked by default; pfl needs more than a run needs.
USUAL = list(CONTENDERS)[:5]


def measure(who: str, workload: str, rounds: int) -> dict[str, Any]:
    """Run one contender in a process of its own and return what it says."""
    command = [sys.executable, "-m", "bench", "--one", who, workload, str(rounds)]
    # All that the contender starts inherits this, so that its memory can be told.
    mark = f"FEDGRAD_BENCH={uuid.uuid4()}"
    environment_ = {**os.environ, **dict([mark.split("=")])}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment_, stdout=out, stderr=err, text=True
        )
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, resident(marked(mark)))
            time.sleep(0.5)
        out.seek(0)
        err.seek(0)
        lines = [x for x in out.read().splitlines() if x.startswith('{"')]
        if process.returncode or not lines:
            said = err.read().strip().splitlines() or ["nothing was said"]
            raise UserError(f"{who} on {workload}: {said[-1].removeprefix('error: ')}")
    found: dict[str, Any] = json.loads(lines[-1])
    return {**found, "peak_mb": peak}


def resident(processes: Iterable[int]) -> float:
    """Return the MB in memory of some processes; what they share counts for each."""
    pages = 0
    for pid in processes:
        with contextlib.suppress(OSError):  # it has ended meanwhile
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def one(who: str, workload: str, rounds: int) -> None:
    """Be a contender: print what it measured as one JSON line."""
    function, argument = CONTENDERS[who]
    found = function(workload, rounds, argument)
    config, here = (
        load(ALL[workload].overrides),
        setting(tuple(ALL[workload].overrides)),
    )
    share = config.clients_per_round / config.clients
    samples = config.local.epochs * share * len(here.dataset.train.y)
    print(json.dumps({**found, "samples": samples}), flush=True)


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians over the repeats of one contender on one workload."""
    rounds = [statistics.median(run["seconds"][1:]) for run in runs]
    found = {
        "seconds": statistics.median(rounds),
        "least": min(rounds),
        "most": max(rounds),
        "accuracy": statistics.mean(run["accuracy"] for run in runs),
        "samples_per_second": runs[0]["samples"] / statistics.median(rounds),
        "peak_mb": statistics.median(run["peak_mb"] for run in runs),
        "repeats": len(runs),
    }
    for extra in ("where", "engine"):
        if extra in runs[0]:
            found[extra] = runs[-1][extra]
    return found


def table(results: dict[str, dict[str, dict[str, Any]]]) -> Table:
    """Return the results as a table; ratios are against the better of the two bare ones."""
    shown = Table(
        *("workload", "who", "s/round", "min..max", "samples/s"),
        *("share of limit", "MB", "accuracy"),
    )
    for workload, found in results.items():
        bare = [found[n]["seconds"] for n in ("bare-loop", "bare-vmap") if n in found]
        for who, numbers in found.items():
            share = f"{min(bare) / numbers['seconds']:.2f}" if bare else ""
            spread = f"{numbers['least']:.4f}..{numbers['most']:.4f}"
            cells = [workload, who, f"{numbers['seconds']:.4f}", spread]
            cells += [f"{numbers['samples_per_second']:,.0f}", share]
            shown.add_row(
                *cells, f"{numbers['peak_mb']:.0f}", f"{numbers['accuracy']:.4f}"
            )
    return shown


def main() -> int:
    """Run the command line."""
    if sys.argv[1:2] == ["mixing"]:
        from bench.mixing import main as mixing

        return mixing(sys.argv[2:])
    parser = argparse.ArgumentParser(prog="./run.sh bench", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--who", default=",".join(USUAL))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"))
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        try:
            one(given.one[0], given.one[1], int(given.one[2]))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0
    console = Console()
    try:
        for names, valid in ((given.workloads, ALL), (given.who, CONTENDERS)):
            for name in names.split(","):
                if name not in valid:
                    raise UserError(f"'{name}' is not known; {nearest(name, valid)}")
        if given.rounds < 4 or given.repeats < 1:
            raise UserError("--rounds must be at least 4, --repeats at least 1")
        results: dict[str, dict[str, dict[str, Any]]] = {}
        for workload in given.workloads.split(","):
            runs: dict[str, list[dict[str, Any]]] = {
                w: [] for w in given.who.split(",")
            }
            for repeat in range(given.repeats):
                for who in runs:
                    console.print(f"{workload} {who} {repeat + 1}/{given.repeats}")
                    runs[who].append(measure(who, workload, given.rounds))
            results[workload] = {who: summarize(found) for who, found in runs.items()}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    what = {name: ALL[name].what for name in results}
    report = {"workloads": what, "rounds": given.rounds, "results": results}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(
        given.out, json.dumps({**report, **environment("cpu")}, indent=1) + "\n"
    )
    console.print(table(results))
    console.print(str(given.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
