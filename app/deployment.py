"""A deployment on this machine: a SuperLink, some SuperNodes, and who may talk to whom.

The same pieces as on real hosts (docs/deployment.md): an authority of its own, TLS, a registered
key for each node. Every process carries a mark in its environment, so that what is ended is what
was started here, and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from app import credentials
from app.errors import UserError
from app.processes import HOST, end_all, free_ports, marked

MARK = "FEDGRAD_DEPLOYMENT"
#: The name of the connection in Flower's config.toml.
LINK = "deployment"
#: Seconds that Flower's command line may take.
PATIENCE = 120


class Deployment:
    """A SuperLink and its SuperNodes as processes of this machine.

    Parameters
    ----------
    folder : Path
        A new folder for certificates, keys, the database, logs and the nodes' own folders.

    Attributes
    ----------
    nodes : dict of str to Popen
        The running SuperNodes by name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        try:
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"{self.folder}: {error.strerror or error}") from error
        self.certificates = self.folder / "certificates"
        self.home = self.folder / "flower"
        for path in (self.home, self.folder / "logs"):
            path.mkdir()
        self.port, *self._ports = free_ports(17)
        self.link: subprocess.Popen[bytes] | None = None
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        credentials.authority(self.certificates)
        credentials.server(self.certificates, ["localhost", HOST])
        (self.home / "config.toml").write_text(
            f'[superlink]\ndefault = "{LINK}"\n\n[superlink.{LINK}]\n'
            f'address = "{self.address}"\n'
            f"root-certificates = {json.dumps(str(self.certificates / 'ca.crt'))}\n"
        )

    @property
    def address(self) -> str:
        """Where the SuperLink listens, for nodes and for people."""
        return f"{HOST}:{self.port}"

    def environment(self, home: Path | None = None) -> dict[str, str]:
        """Return the environment of a process of this deployment."""
        tools = str(Path(sys.executable).parent)
        return {
            **os.environ,
            "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}",
            "FLWR_HOME": str(home or self.home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            # The app runs in this environment, which has what it needs already.
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            # A ClientApp starts when its message arrives, not up to a second later.
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            "PYTHONUNBUFFERED": "1",
            MARK: str(self.folder),
        }

    def _start(
        self, name: str, command: Sequence[str], home: Path
    ) -> subprocess.Popen[bytes]:
        """Start a process that writes to its own log."""
        with (self.folder / "logs" / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [_tool(command[0]), *command[1:]],
                env=self.environment(home),
                cwd=home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def start_link(self, patience: float = 60) -> None:
        """Start the SuperLink, with TLS and node authentication, and wait until it answers.

        Its database is a file: runs, messages and registered nodes survive a restart.

        Raises
        ------
        UserError
            If it does not answer in time; its log says why.
        """
        files = self.certificates
        home = self.folder / "superlink"
        home.mkdir(exist_ok=True)
        command = ["flower-superlink", "--host", HOST, "--port", self.port]
        command += ["--ssl-ca-certfile", str(files / "ca.crt")]
        command += ["--ssl-certfile", str(files / "server.pem")]
        command += ["--ssl-keyfile", str(files / "server.key")]
        command += [
            "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
        ]
        command += ["--database", str(home / "state.db")]
        self.link = self._start("superlink", command, home)
        end = time.monotonic() + patience
        while time.monotonic() < end and self.link.poll() is None:
            with contextlib.suppress(UserError):
                self.listed()
                return
            time.sleep(0.2)
        raise UserError(f"the SuperLink does not answer; see {self.log('superlink')}")

    def add_node(self, name: str, config: Mapping[str, Any], known: bool = True) -> str:
        """Give a node a folder and a key, and register the key.

        Parameters
        ----------
        name : str
            Its name.
        config : mapping
            Its node config; ``state-dir`` is added, in its folder.
        known : bool
            Whether the key is registered; a stranger's is not.

        Returns
        -------
        str
            Its id; empty for a stranger.

        Raises
        ------
        UserError
            If the SuperLink does not register it.
        """
        home = self.folder / name
        (home / "state").mkdir(parents=True)
        public = credentials.node_key(home / "key")
        given = {"state-dir": str(home / "state"), **config}
        (home / "node.json").write_text(json.dumps(given))
        if not known:
            return ""
        command = ["supernode", "register", str(public), LINK, "--name", name]
        try:
            return str(self.asked(*command)["node-id"])
        except UserError as error:
            raise UserError(f"{name}: its key was not registered: {error}") from None

    def start_node(self, name: str, *options: str) -> None:
        """Start, or start again, a node that was added; options replace the TLS ones."""
        home = self.folder / name
        given = json.loads((home / "node.json").read_text())
        config = " ".join(f"{key}={json.dumps(value)}" for key, value in given.items())
        port = home / "port"
        if not port.exists():
            port.write_text(self._ports.pop() if self._ports else free_ports(1)[0])
        trust = options or ("--root-certificates", str(self.certificates / "ca.crt"))
        command = ["flower-supernode", "--superlink", self.address, *trust]
        command += ["--auth-supernode-private-key", str(home / "key")]
        command += ["--host", HOST, "--port", port.read_text()]
        command += ["--node-config", config]
        self.nodes[name] = self._start(name, command, home)

    def log(self, name: str) -> Path:
        """Return the log of a process: ``superlink`` or a node's name."""
        return self.folder / "logs" / f"{name}.log"

    def flwr(self, *arguments: str) -> tuple[int, str]:
        """Run Flower's command line as the operator; return its exit status and output.

        Raises
        ------
        UserError
            If it does not end.
        """
        command = [_tool("flwr"), *arguments]
        environment = self.environment() | {"NO_COLOR": "1", "COLUMNS": "200"}
        try:
            done = subprocess.run(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=PATIENCE,
            )
        except subprocess.TimeoutExpired:
            words = " ".join(["flwr", *arguments[:2]])
            raise UserError(f"{words}: no answer within {PATIENCE} s") from None
        return done.returncode, done.stdout

    def listed(self) -> list[dict[str, Any]]:
        """Return what the SuperLink says of the registered nodes."""
        found: list[dict[str, Any]] = self.asked("supernode", "list", LINK)["nodes"]
        return found

    def asked(self, *arguments: str) -> dict[str, Any]:
        """Return the JSON that Flower's command line answers.

        Raises
        ------
        UserError
            If it does not succeed; Flower says so in the JSON, and ends with status 0.
        """
        code, text = self.flwr(*arguments, "--format", "json")
        try:
            told = json.loads(text)
        except ValueError:
            told = {}
        if code or not isinstance(told, dict) or not told.get("success"):
            raise UserError(f"the SuperLink does not answer: {text.strip()[-300:]}")
        return told

    def wait_online(self, count: int, patience: float = 60) -> None:
        """Wait until so many nodes are online.

        Raises
        ------
        UserError
            If a node ends, or they take too long.
        """
        end = time.monotonic() + patience
        while time.monotonic() < end:
            if dead := [n for n, p in self.nodes.items() if p.poll() is not None]:
                raise UserError(f"{dead[0]} has ended; see {self.log(dead[0])}")
            online = [n for n in self.listed() if n["status"] == "online"]
            if len(online) >= count:
                return
            time.sleep(0.3)
        raise UserError(f"{count} nodes did not come online within {patience:g} s")

    def processes(self) -> dict[int, str]:
        """Return the living processes of this deployment: id -> command line."""
        return marked(f"{MARK}={self.folder}")

    def stop(self) -> None:
        """End every process of this deployment, politely first.

        Raises
        ------
        UserError
            If one would not end.
        """
        for process in [*self.nodes.values(), self.link]:
            if process is not None and process.poll() is None:
                process.terminate()
        for how, patience in ((signal.SIGTERM, 8.0), (signal.SIGKILL, 5.0)):
            if not end_all(self.processes, how, patience):
                break
        for process in [*self.nodes.values(), self.link]:
            if process is not None:
                process.wait(5)
        self.nodes, self.link = {}, None
        if left := self.processes():
            raise UserError(f"processes {sorted(left)} would not end")


def _tool(name: str) -> str:
    """Return a command of this Python's environment."""
    return str(Path(sys.executable).with_name(name))
