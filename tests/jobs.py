"""A job on a real deployment, which tests watch and disturb."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from conftest import Result, found, grid_of

from app.compose import CONF
from app.deployment import LINK, Deployment
from app.experiment import argument
from app.local_grid import LocalGrid
from app.processes import end_all, marked
from app.records import read_summary
from app.store import DirectoryStore

#: Six clients on two nodes, all of them in every round: a lost reply is a repeated round.
JOB = (
    "deployment=shared_data",
    "partition=dirichlet",
    "model.hidden=[8]",
    "clients=6",
    "clients_per_round=6",
    "min_replies=6",
    "local.epochs=1",
    "local.batch=60",
    "engine=loop",
    "device=cpu",
    "nodes=2",
    "evaluate_clients=none",
)
#: Whom the first and the second node host.
HOSTED = ("0,2,4", "1,3,5")
#: A SuperNode that says every few seconds that it lives, and is believed for 20 s.
OFTEN = """
import sys
from flwr.supercore import heartbeat
from flwr.supernode import fleet_http_connection
from flwr.supernode.cli import flower_supernode
for module in (heartbeat, fleet_http_connection):
    module.HEARTBEAT_DEFAULT_INTERVAL = 10  # the least that Flower admits
sys.exit(flower_supernode())
"""
#: Puts a command in this process's place.
BEHIND = "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])"


def kill_node(deployment: Deployment, name: str) -> None:
    """End a node as a power failure does: it, and the ClientApp that it had started."""
    home = f"FLWR_HOME={deployment.folder / name}"
    end_all(lambda: marked(home), signal.SIGKILL)
    deployment.nodes.pop(name).wait()


class Job:
    """A job by name, submitted to a deployment as often as needed.

    Parameters
    ----------
    deployment : Deployment
        Where.
    name : str
        Its name, and that of its run directory.
    overrides : sequence of str
        Its settings.
    """

    def __init__(
        self, deployment: Deployment, name: str, overrides: Sequence[str]
    ) -> None:
        self.deployment = deployment
        self._again = 0.0
        runs = deployment.folder / "runs"
        self.path = runs / name
        self.overrides = [*overrides, f"output_dir='{runs}'", f"name={name}"]

    def submit(self) -> None:
        """Hand it to the SuperLink: from its checkpoint if there is one."""
        resume = []
        if list((self.path / "checkpoints").glob("*.safetensors")):
            resume = [f"resume='{self.path}'"]
        elif self.path.exists():  # it died before the first checkpoint
            self.path.rename(self.path.with_name(f"{self.path.name}-{time.time_ns()}"))
        value = argument([*self.overrides, *resume])
        code, text = self.deployment.flwr(
            "run", str(CONF.parent), LINK, "--run-config", value
        )
        assert code == 0, text

    def rounds(self) -> int:
        """Return the last round that is done, -1 if it has not begun."""
        file = self.path / "metrics.jsonl"
        if not file.exists():
            return -1
        # Asked ten times a second: the last whole line is enough.
        last = file.read_bytes().rpartition(b"\n")[0].rpartition(b"\n")[2]
        return int(json.loads(last)["round"]) if last else -1

    def until(self, done: Callable[[], bool], patience: float) -> None:
        """Wait for something, a bounded time."""
        end = time.monotonic() + patience
        while not done():
            self.revive()
            assert time.monotonic() < end, (self.rounds(), self.told())
            time.sleep(0.1)

    def until_round(self, round_: int, patience: float = 300) -> None:
        """Wait until a round is done."""
        self.until(lambda: self.rounds() >= round_, patience)

    def finish(self, patience: float = 300) -> Result:
        """Wait for its end and return what it left."""
        self.until(lambda: read_summary(self.path) is not None, patience)
        summary: dict[str, Any] = json.loads((self.path / "summary.json").read_text())
        return found(self.path, summary)

    def told(self) -> str:
        """Return the end of the logs."""
        logs = sorted((self.deployment.folder / "logs").glob("*.log"))
        return "\n".join(f"== {p.name}\n{p.read_text()[-1500:]}" for p in logs)

    def revive(self) -> None:
        """Start nodes again that have ended, as systemd would.

        A SuperLink refuses a node that it still believes to be online; the node then ends.
        """
        for name, process in list(self.deployment.nodes.items()):
            if process.poll() is not None and time.monotonic() > self._again:
                self.deployment.start_node(name)
                self._again = time.monotonic() + 5

    def ended(self) -> bool:
        """Return whether it has ended."""
        return (self.path / "summary.json").exists()

    def kill_app(self, patience: float = 120) -> bool:
        """Kill the ServerApp; return False if the job ended before."""

        def found() -> list[int]:
            parts = self.deployment.processes().items()
            return [pid for pid, command in parts if "flwr-serverapp" in command]

        self.until(lambda: self.ended() or bool(found()), patience)
        ended = self.ended()
        for pid in found():
            os.kill(pid, signal.SIGKILL)
        return not ended

    def kill_link(self) -> None:
        """Kill the SuperLink and all that it has started, and start it again."""
        home = f"FLWR_HOME={self.deployment.folder / 'superlink'}"
        end_all(lambda: marked(home), signal.SIGKILL)
        assert self.deployment.link is not None
        self.deployment.link.wait()
        self.deployment.start_link()

    def kill_node(self, name: str) -> None:
        """Kill a SuperNode with its ClientApp, and start it again."""
        kill_node(self.deployment, name)
        self.deployment.start_node(name)

    def until_training(self, name: str, patience: float = 300) -> None:
        """Wait until a node has been asked to train and has not answered, or the job has ended."""
        log = self.deployment.log(name)

        def works() -> bool:
            living = log.read_text().rpartition("Starting Flower SuperNode")[2]
            return living.count("Receiving: train") > living.count("Sending: train")

        self.until(lambda: self.ended() or works(), patience)

    def stores(self, key: str) -> list[DirectoryStore]:
        """Return where the nodes keep the memories of a run."""
        places = sorted(self.deployment.folder.glob(f"node-*/state/{key}"))
        return [DirectoryStore(place) for place in places]


class Lively(Deployment):
    """A deployment that notices a node's death after 20 s instead of 60: for short tests.

    Attributes
    ----------
    prepared : dict of str to str
        By node, shell commands that it runs before it starts, in a mount namespace of its own:
        what it mounts, nobody else sees, and it goes with the node.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.prepared: dict[str, str] = {}

    def _start(
        self, name: str, command: Sequence[str], home: Path
    ) -> subprocess.Popen[bytes]:
        if command[0] == "flower-supernode":
            python = Path(sys.executable).name
            command = [python, "-c", OFTEN, *command[1:]]
            if prepare := self.prepared.get(name):
                whole = f'{prepare} && exec "$@"'
                inner = ["sh", "-c", whole, "sh", sys.executable, *command[1:]]
                command = [python, "-c", BEHIND, "unshare", "-rm", *inner]
        return super()._start(name, command, home)


def same_hosts(overrides: Sequence[str]) -> LocalGrid:
    """Return the local runtime with the clients of `two_nodes`.

    A node's mean is rounded before it is sent, so who trains where shows in the last bits.
    """
    grid = grid_of(overrides, 0)
    for clients in HOSTED:
        grid.add_node({"clients": clients})
    return grid


def two_nodes(
    folder: Path, kind: Callable[[Path], Deployment] = Deployment
) -> Deployment:
    """Return a running deployment of two nodes with three clients each."""
    deployment = kind(folder)
    try:
        deployment.start_link()
        for i, clients in enumerate(HOSTED, start=1):
            deployment.add_node(f"node-{i}", {"clients": clients})
            deployment.start_node(f"node-{i}")
        deployment.wait_online(2)
    except BaseException:
        deployment.stop()
        raise
    return deployment
