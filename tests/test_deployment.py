"""A real deployment on loopback: who gets in, what a dead node costs, what is left behind.

One SuperLink with TLS and node authentication and two SuperNodes serve all tests here.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import Result, found
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from jobs import JOB, Job, Lively, kill_node, two_nodes

from app import credentials
from app.compose import CONF
from app.config import load
from app.deploy import apart, deploy, hosting, settings
from app.deployment import MARK, Deployment
from app.errors import UserError
from app.peaks import Peaks, peak
from app.processes import end_all, free_ports, marked
from app.records import read_summary

pytestmark = [
    pytest.mark.flower,
    pytest.mark.skipif(sys.platform != "linux", reason="finds processes by /proc"),
    pytest.mark.timeout(600),
]
Door = Callable[..., Result]


# Credentials.


def test_credentials_are_what_they_should_be(tmp_path: Path) -> None:
    hosts = ["fl.example.org", "10.1.2.3", "::1"]
    ca = credentials.authority(tmp_path)
    server, key = credentials.server(tmp_path, hosts)
    public = credentials.node_key(tmp_path / "node-1")
    for secret in (tmp_path / "ca.key", key, tmp_path / "node-1"):
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    certificate = x509.load_pem_x509_certificate(server.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert [str(n.value) for n in names.value] == hosts
    certificate.verify_directly_issued_by(
        x509.load_pem_x509_certificate(ca.read_bytes())
    )
    assert public.read_text().startswith("ecdsa-sha2-nistp384 ")
    if shutil.which("openssl"):
        command = ["openssl", "verify", "-x509_strict", "-CAfile", str(ca), str(server)]
        assert subprocess.run(command, capture_output=True).returncode == 0
    with pytest.raises(UserError, match="not replaced"):
        credentials.authority(tmp_path)
    with pytest.raises(UserError, match="not replaced"):
        credentials.node_key(tmp_path / "node-1")
    for hosts, line in (([], "every address"), (["münchen.de"], "as in the DNS")):
        with pytest.raises(UserError, match=line):
            credentials.server(tmp_path, hosts)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/d: "):
        Deployment(tmp_path / "file" / "d")


def test_a_certificate_is_renewed_with_its_key_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials.authority(tmp_path)
    made = credentials.server(tmp_path, ["fl.example.org"])
    old = [file.read_bytes() for file in made]
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(credentials, "_private", Mock(side_effect=OSError("disk full")))
        credentials.server(tmp_path, ["fl.example.org"])
    assert [file.read_bytes() for file in made] == old
    assert credentials.server(tmp_path, ["fl.example.org"]) == made
    new = [file.read_bytes() for file in made]
    assert new[0] != old[0] and new[1] != old[1]
    key = serialization.load_pem_private_key(new[1], None)
    assert x509.load_pem_x509_certificate(new[0]).public_key() == key.public_key()


def test_a_certificate_does_not_outlive_who_signs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends(name: str) -> datetime:
        file = tmp_path / name
        return x509.load_pem_x509_certificate(file.read_bytes()).not_valid_after_utc

    given = ["credentials", str(tmp_path), "--hosts", "a.org"]
    monkeypatch.setattr(sys, "argv", [*given, "--days", "90", "--nodes", "1"])
    credentials.main()
    assert (ends("ca.crt") - ends("server.pem")).days > 3000
    # Again, for another node: those that are there keep their keys.
    key = (tmp_path / "node-1").read_bytes()
    monkeypatch.setattr(sys, "argv", [*given, "--nodes", "2"])
    credentials.main()
    assert (tmp_path / "node-1").read_bytes() == key and (tmp_path / "node-2").exists()
    assert (ends("server.pem") - datetime.now(UTC)).days > 800
    with pytest.raises(UserError, match=r"days=4000: .*ca\.crt.* ends in 36\d\d days"):
        credentials.server(tmp_path, ["a.org"], 4000)


def test_an_authority_is_whole_or_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["credentials", *words, "--hosts", "a.org"])
        with pytest.raises(SystemExit) as ended:
            credentials.main()
        line = capsys.readouterr().err
        assert ended.value.code == 2 and line.count("\n") == 1
        return line

    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        credentials.authority(folder)
    (first / "ca.crt").unlink()
    assert "ca.key: there is an authority already" in told(str(first))
    (first / "ca.crt").write_bytes((second / "ca.crt").read_bytes())
    assert "ca.key is not the key of ca.crt" in told(str(first))
    (first / "ca.key").write_text("no key")
    assert "ca.key or ca.crt" in told(str(first))
    assert "--days 99999999" in told(str(second), "--days", "99999999")
    (tmp_path / "file").touch()
    assert "Not a directory" in told(str(tmp_path / "file" / "below"))
    # Also a file that anyone could read becomes private.
    (second / "server.key.new").touch(0o644)
    _, key = credentials.server(second, ["a.org"])
    assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_a_deployments_settings_are_those_of_its_nodes() -> None:
    config = load(settings(["nodes=4"]))
    assert (config.clients, config.clients_per_round) == (4, 4)
    assert hosting(config) == [[0], [1], [2], [3]]
    config = load(settings(["nodes=8", "min_replies=8"]))
    assert (config.clients_per_round, config.min_replies) == (8, 8)
    config = load(settings(["nodes=2", "clients=5", "clients_per_round=2"]))
    assert hosting(config) == [[0, 2, 4], [1, 3]]
    config = load(["deployment=own_data", "data.shape=[64]", "data.classes=10"])
    assert config.data.name == "described" and config.deadline == 600
    with pytest.raises(UserError, match=r"data\.\w+ has no value"):
        load(["deployment=own_data"])
    # A preset is run as it is.
    preset = load(settings(["experiment=digits"]))
    assert preset.rounds == load(["experiment=digits"]).rounds != 5
    assert preset.client_test == 0 and preset.min_replies == 1
    with pytest.raises(UserError, match="nodes=3: a node without a client"):
        deploy(["clients=2", "clients_per_round=2"], lambda _: None)
    with pytest.raises(UserError, match="resume=auto: a deployment for one job"):
        deploy(["resume=auto"], lambda _: None)
    network = ["strategy=pushsum", "topology=complete", "client_validation=0.2"]
    with pytest.raises(UserError, match="nobody looks at these samples"):
        deploy(network, lambda _: None)
    with pytest.raises(UserError, match="no deployment is called 'own'"):
        load(["deployment=own"])
    # What a node would scale once more is cut by the nodes.
    given = ["client_test=0.2", "data=npz", "data.path=mine.npz"]
    assert apart(load(given)) and not apart(load([*given, "data.scale=255"]))


# Processes.


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Give one deployment to all tests; nothing of it may be left."""
    made = two_nodes(tmp_path_factory.mktemp("deployment") / "d", Lively)
    try:
        yield made
    finally:
        made.stop()
    assert made.processes() == {}


def refused(deployment: Deployment, name: str, *options: str) -> str:
    """Start a node that must not get in, and return its log when it says why."""
    deployment.start_node(name, *options)
    end = time.monotonic() + 60
    pattern = r"(?i)error|fail|refus|invalid|denied|unauth|verif|exit"
    while time.monotonic() < end:
        text = deployment.log(name).read_text()
        if re.search(pattern, text.replace("Starting", "")):
            break
        time.sleep(0.2)
    time.sleep(1.0)
    kill_node(deployment, name)
    return deployment.log(name).read_text()


def test_strangers_stay_outside_and_the_job_is_the_local_one(
    deployment: Deployment, run: Door, tmp_path: Path
) -> None:
    """While a job runs: no registered key, another authority, no encryption.

    The job is one without a server: the relay is a SuperLink's here.
    """
    given = [*JOB, "strategy=pushsum", "topology=exponential", "rounds=1"]
    job = Job(deployment, "knock", [*given, "deadline=120", "attempts=20"])
    job.submit()
    members = {n["node-id"] for n in deployment.listed()}
    assert len(members) == 2

    deployment.add_node("stranger", {"clients": "0-5"}, known=False)
    told = refused(deployment, "stranger")
    assert "Failed to activate SuperNode" in told, told
    named = deployment.log("superlink").read_text()
    assert "No SuperNode found with the given public key" in named

    other = credentials.authority(tmp_path / "other")
    deployment.add_node("mistrustful", {"clients": "0-5"})
    told = refused(deployment, "mistrustful", "--root-certificates", str(other))
    assert re.search(r"(?i)certificate", told), told

    deployment.add_node("plain", {"clients": "0-5"})
    told = refused(deployment, "plain", "--insecure")
    assert "Exit Code: 303" in told or "secure TLS connection" in told, told

    states = {n["node-id"]: n["status"] for n in deployment.listed()}
    assert all(states[node] == "online" for node in members)
    assert [s for n, s in states.items() if n not in members and s == "online"] == []

    result = job.finish()
    nodes = {r["node"] for r in _rows(result.path)}
    assert nodes == members, "nobody else was heard"
    truth = run(*given, "processes=0", quick=())
    assert torch.equal(result.theta, truth.theta)
    for ours, theirs in zip(result.records, truth.records, strict=True):
        assert ours.get("strategy") == theirs.get("strategy")


def _rows(path: Path) -> list[dict[str, str]]:
    import csv

    with (path / "clients.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_plain_http_is_not_answered(deployment: Deployment) -> None:
    host, port = deployment.address.split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        connection.settimeout(5)
        try:
            answer = connection.recv(100)
        except OSError:
            answer = b""
    assert not answer.startswith(b"HTTP/"), answer


def test_kill_9_and_the_model_is_the_undisturbed_one(
    deployment: Deployment, run: Door
) -> None:
    """A node in training, the ServerApp and the SuperLink are killed in one round of a job.

    The long form, at random moments over all strategies: tests/test_long.py.
    """
    given = [*JOB, "rounds=2", "strategy=scaffold"]
    job = Job(deployment, "killed", [*given, "deadline=30", "attempts=50"])
    job.submit()
    job.until_round(1)
    job.until_training("node-1")
    job.kill_node("node-1")
    job.kill_app()
    job.submit()
    job.kill_link()
    job.submit()
    result = job.finish(500)
    assert [r["round"] for r in result.records] == [0, 1, 2]
    assert all(r["checks"]["memory_gap"] < 1e-5 for r in result.records[1:])
    assert torch.equal(result.theta, run(*given, "processes=0", quick=()).theta)


@pytest.mark.long
def test_the_command_runs_a_job_to_its_end(tmp_path: Path, run: Door) -> None:
    """From nothing to the tables, on files of the clients' own samples."""
    given = ["nodes=2", "rounds=2", "local.epochs=1", "model.hidden=[8]"]
    command = [sys.executable, "-m", "app.deploy", "--memory", *given]
    ended = subprocess.run(
        [*command, f"output_dir={tmp_path}"],
        cwd=CONF.parent,
        capture_output=True,
        text=True,
        timeout=230,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (path,) = re.findall(r"^run directory: (.*)$", ended.stdout, re.MULTILINE)[-1:]
    summary = read_summary(Path(path))
    assert summary is not None
    truth = run(*settings(given), "processes=0", "device=cpu", quick=())
    torch.testing.assert_close(found(Path(path), summary).theta, truth.theta)
    assert len({r["node"] for r in _rows(Path(path))}) == 2
    assert "deployment ended" in ended.stdout
    assert re.search(r"SuperNode .*MB", ended.stdout), ended.stdout


def test_interrupted_it_ends_what_it_started(tmp_path: Path) -> None:
    """Ctrl-C while the command is at work: no process is left, strangers stay alive."""
    bystander = subprocess.Popen(["sleep", "300"])
    mine = subprocess.Popen(
        [sys.executable, "-m", "app.deploy", f"output_dir={tmp_path}", "nodes=1"],
        cwd=CONF.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        assert mine.stdout is not None
        for line in mine.stdout:
            if line.startswith("node-1"):
                break
        (folder,) = tmp_path.glob("deploy-*")
        assert len(marked(f"{MARK}={folder}")) >= 3
        os.killpg(mine.pid, signal.SIGINT)
        text = mine.communicate(timeout=60)[0]
        assert mine.returncode == 130 and "deployment ended" in text, text
        assert marked(f"{MARK}={folder}") == {}
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
        if mine.poll() is None:
            mine.kill()
        for left in tmp_path.glob("deploy-*"):
            mark = f"{MARK}={left}"
            end_all(lambda mark=mark: marked(mark), signal.SIGKILL)
        assert mine.stdout is not None
        mine.stdout.close()
        mine.wait()


def test_the_largest_memory_of_each_kind_of_process_is_kept() -> None:
    living = {os.getpid(): "/x/bin/flwr-clientapp --token t", 1: "/sbin/init"}
    with Peaks(lambda: living) as peaks:
        peaks.look()
        living[2**22 + 1] = "/x/bin/flower-superlink --host h"  # gone before it is read
        peaks.look()
    # The kernel counts pages in batches, so a little off.
    assert peaks.found["ClientApp"] == pytest.approx(peak(os.getpid()), rel=0.05)
    assert peaks.found["SuperLink"] == 0
    assert "ClientApp" in str(peaks) and peaks.found.keys() == {
        "ClientApp",
        "SuperLink",
    }


def test_every_node_has_a_port_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Deployment, "_start", lambda *_: None)
    made, ports = Deployment(tmp_path / "many"), []
    for i in range(20):  # more than were looked for at the start
        home = made.folder / f"node-{i}"
        home.mkdir()
        (home / "node.json").write_text("{}")
        for _ in range(2):  # started again it keeps its port
            made.start_node(f"node-{i}")
            ports.append((home / "port").read_text())
    assert len({made.port, *ports}) == 21 and ports[::2] == ports[1::2]


def test_free_ports_differ() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
