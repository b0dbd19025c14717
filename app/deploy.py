"""`./run.sh deploy`: a small real deployment on this machine, for one job, and torn down.

    ./run.sh deploy                                  three nodes, a client and data of its own each
    ./run.sh deploy nodes=4 strategy=scaffold rounds=10
    ./run.sh deploy --memory ...                     and tell the peak memory of each process

An authority, a certificate and a key for each node are made; a SuperLink with TLS and node
authentication and a SuperNode for each node are started as processes of their own; the job goes
through `flwr run`, as a person would send it. What was started is ended, also after Ctrl-C.
"""

from __future__ import annotations

import contextlib
import csv
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from app.config import Config, load
from app.deployment import LINK, Deployment
from app.errors import UserError
from app.experiment import checked, run_flower
from app.host import Samples, setting
from app.peaks import Peaks
from app.run import Say
from app.run_config import quote

MEMORY = "--memory"
#: What ends a deployment from outside.
ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

#: What a deployment without settings runs.
DEFAULTS = (
    *("deployment=shared_data", "nodes=3", "rounds=5"),
    *("client_test=0.2", "evaluate_clients=cohort"),
)


def settings(given: Sequence[str]) -> list[str]:
    """Return the settings of the job: as many clients as nodes, unless it is said otherwise."""
    named = {o.split("=")[0].lstrip("+") for o in given}
    # A preset says itself how long and on what.
    found = [*(DEFAULTS[:2] if "experiment" in named else DEFAULTS), *given]
    if "clients" not in named and "experiment" not in named:
        # All of them in each round, unless it is said otherwise.
        all_of = ["clients_per_round=${clients}"]
        found += [] if "clients_per_round" in named else all_of
        found.append(f"clients={load([*found, 'clients=1000000']).nodes}")
    return found


def hosting(config: Config) -> list[list[int]]:
    """Return the clients of each node: node i has those whose id leaves the remainder i."""
    total = config.clients + config.holdout_clients
    return [list(range(i, total, config.nodes)) for i in range(config.nodes)]


def apart(config: Config) -> bool:
    """Return whether a client's samples, given to its node as a file, are what they were.

    Not if it sees them in a way of its own, if it would choose its validation samples anew, if it
    has no test samples, if they are not numbers, or if its node would scale them once more; the
    nodes then cut the shared data themselves.
    """
    if config.shift.name != "none" or config.client_validation:
        return False
    if config.data.options.get("scale", 1.0) != 1.0:
        return False
    return bool(config.client_test) and config.data.name != "text"


def own_data(file: Path, part: Samples) -> Path:
    """Write one client's samples as the data of its node."""
    x, y = part.train.x.cpu().numpy(), part.train.y.cpu().numpy()
    mine = part.train.index.cpu().numpy()
    judged = part.judged()[1].index.cpu().numpy()
    np.savez(file, x=x[mine], y=y[mine], x_test=x[judged], y_test=y[judged])
    return file


def build(deployment: Deployment, overrides: Sequence[str], say: Say) -> dict[str, str]:
    """Start the SuperLink and a node for each of ``nodes``; return their ids by name."""
    config, data = load(overrides), setting(tuple(overrides))
    deployment.start_link()
    say(f"SuperLink at {deployment.address}, TLS, registered nodes only")
    names = {}
    for i, clients in enumerate(hosting(config), start=1):
        name = f"node-{i}"
        node: dict[str, Any] = {"clients": ",".join(map(str, clients))}
        home = deployment.folder / name
        home.mkdir()
        if len(clients) == 1 and data.parts and apart(config):
            file = own_data(home / "data.npz", data.samples(clients[0]))
            node["data-path"] = str(file)
        names[deployment.add_node(name, node)] = name
        deployment.start_node(name)
    deployment.wait_online(config.nodes, max(60, config.join_timeout))
    return names


def status(
    deployment: Deployment, names: dict[str, str], config: Config, run: Path | None
) -> str:
    """Return a table of the nodes: who is there, whom it hosts, what came of its work."""
    trained: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    if run is not None:
        with (run / "clients.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                trained[row["node"]] += bool(row["steps"])
                failed[row["node"]] += bool(row["error"])
    states = {n["node-id"]: n["status"] for n in deployment.listed()}
    rows = [("node", "id", "status", "clients", "trained", "left out", "process")]
    for (node, name), clients in zip(names.items(), hosting(config), strict=True):
        process = deployment.nodes.get(name)
        alive = f"{process.pid}" if process and process.poll() is None else "ended"
        hosts = ",".join(map(str, clients[:6])) + (",..." if len(clients) > 6 else "")
        state, done = states.get(node, "unknown"), (trained[node], failed[node])
        rows.append((name, node, state, hosts, *map(str, done), alive))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def deploy(given: Sequence[str], say: Say = print, memory: bool = False) -> Path:
    """Build a deployment, run a job on it, and tear it down.

    Parameters
    ----------
    given : sequence of str
        Settings, as Hydra overrides.
    say : callable
        Where the lines for a person go.
    memory : bool
        Whether to tell the peak of each process's resident memory.

    Returns
    -------
    Path
        The run's directory; of a program, which has none, the deployment's.

    Raises
    ------
    UserError
        If the settings are wrong, or a part of the deployment does not start.
    """
    overrides = settings(given)
    config = checked(overrides)
    if config.resume:
        raise UserError(
            f"resume={config.resume}: a deployment for one job has new nodes, which remember "
            "nothing; leave it out"
        )
    if not all(hosting(config)):
        raise UserError(
            f"nodes={config.nodes}: a node without a client has nothing to do; there are "
            f"{config.clients + config.holdout_clients} clients"
        )
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    base = Path(config.output_dir).expanduser().resolve()
    deployment = Deployment(base / f"deploy-{stamp}-{os.getpid()}")
    say(f"deployment: {deployment.folder}")
    job = [*overrides, f"output_dir={quote(f'{deployment.folder}/runs')}"]
    peaks = Peaks(deployment.processes)
    try:
        names = build(deployment, overrides, say)
        say(status(deployment, names, config, None))
        with peaks if memory else contextlib.nullcontext():
            run_flower(job, say, LINK, deployment.environment())
        # A program has no run directory.
        run = next((deployment.folder / "runs").glob("*/clients.csv"), None)
        say(status(deployment, names, config, run and run.parent))
        if memory:
            say(str(peaks))
        return run.parent if run else deployment.folder
    finally:
        with unmoved():
            deployment.stop()
        say("deployment ended")


@contextlib.contextmanager
def unmoved() -> Iterator[None]:
    """Let no signal keep us from ending what was started."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread alone
        return
    before = {each: signal.signal(each, signal.SIG_IGN) for each in ENDS}
    try:
        yield
    finally:
        for each, how in before.items():
            signal.signal(each, how)


def main() -> None:
    """Deploy with the settings of the command line."""

    def interrupted(*_: object) -> None:
        for each in ENDS:  # a second one comes while the first is at work
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    # Also where it was started in the background, with interrupts ignored.
    for each in ENDS:
        signal.signal(each, interrupted)
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        return
    try:
        given = [a for a in sys.argv[1:] if a != MEMORY]
        deploy(given, memory=MEMORY in sys.argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
