"""The whole way: `flwr run`, a SuperLink, Ray's simulation, and the local runtime's model.

Each test uses a SuperLink of its own module: its own FLWR_HOME and free ports, so that it meets
nobody else's, and its processes are known by that FLWR_HOME and ended by their ids.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import QUICK, Result, found
from test_derive import GIVEN, centralized, printed

from app.errors import UserError
from app.experiment import run_flower
from app.records import read_summary
from bench.own_flower import belonging, end, own_flower

pytestmark = [
    pytest.mark.flower,
    pytest.mark.skipif(sys.platform != "linux", reason="finds processes by /proc"),
]
ROOT = Path(__file__).resolve().parent.parent
Run = Callable[..., Result]
OTHERS = """
[superlink]
default = "prod"
[superlink.prod]
address = "127.0.0.1:9"
insecure = true
[superlink.local]
address = ":local:"
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give the FLWR_HOME of this module's SuperLink: the first `flwr run` starts it."""
    path = tmp_path_factory.mktemp("flower")
    with own_flower(path):
        yield path


def test_a_mistake_is_told_before_flower_starts(home: Path) -> None:
    lines: list[str] = []
    with pytest.raises(UserError, match="did you mean 'feddyn'"):
        run_flower(["strategy=fedyn"], lines.append)
    with pytest.raises(UserError, match="no such file"):
        run_flower(["data=npz", f"data.path={home}/none.npz"], lines.append)
    assert lines == []
    assert belonging(home) == {}


def same(ours: Result, theirs: Result) -> None:
    """Assert that two runs gave the same model and the same records, bit for bit."""
    assert ours.model.keys() == theirs.model.keys()
    for name, tensor in ours.model.items():
        assert torch.equal(tensor, theirs.model[name]), name
    for a, b in zip(ours.records, theirs.records, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"seconds"}:
            assert a[key] == b[key], (a["round"], key)


@pytest.mark.timeout(120)
def test_a_node_for_each_client_gives_the_local_runtimes_model(
    home: Path, run: Run, tmp_path: Path
) -> None:
    given = [*QUICK, "rounds=2", "nodes=6", "seed=3", "evaluate_clients=cohort"]
    name = 'odd "name" = 1, x'
    lines: list[str] = []
    place = [f"output_dir={tmp_path}/flower", f"name='{name}'"]
    # Somebody who has a SuperLink at work, and has made it the default.
    (home / "config.toml").write_text(OTHERS)
    try:
        run_flower([*given, *place], lines.append)
    finally:
        (home / "config.toml").unlink()  # Flower writes its own again
    told = "\n".join(lines)
    path = tmp_path / "flower" / name
    summary = read_summary(path)
    assert summary is not None, told
    same(run(*given), found(path, summary))
    assert told.count(f"run directory: {path}") == 2
    assert "round 2/2" in told


def flwr(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Flower's command line in the project's folder, as a person does."""
    command = [str(Path(sys.executable).with_name("flwr")), "run", ".", *arguments]
    return subprocess.run(
        [*command, "--stream"], cwd=ROOT, capture_output=True, text=True, timeout=110
    )


@pytest.mark.timeout(120)
def test_plain_flwr_run_of_a_network(home: Path, run: Run, tmp_path: Path) -> None:
    """Each client also has a second model, which only its node remembers, and is judged by it."""
    rest = [o for o in QUICK if o.startswith(("model.", "local."))]
    network = ["topology=k_out", "faults.loss=0.2", "strategy.judge=own"]
    network += ["strategy@strategy.solver=ditto", "optimizer.momentum=0.9"]
    network += ["optimizer.moments=persist", "client_test=0.2", "client_validation=0.2"]
    ended = flwr(
        "--run-config",
        "strategy='pushsum' partition='iid' rounds=3 clients=6 clients_per_round=6 device='cpu' "
        f"output_dir='{tmp_path}/plain' overrides='{' '.join([*rest, *network])}'",
        "--federation-config",
        "num-supernodes=2",
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (path,) = (tmp_path / "plain").iterdir()
    summary = read_summary(path)
    assert summary is not None, ended.stdout
    assert f"run directory: {path}" in ended.stdout
    ours = run(
        "strategy=pushsum", *network, "rounds=3", "nodes=2", "clients_per_round=6"
    )
    same(ours, found(path, summary))


@pytest.mark.timeout(120)
def test_a_program_is_differentiated_over_flwr_run(home: Path) -> None:
    ended = flwr(
        "--run-config",
        f"overrides='{' '.join(GIVEN)}'",
        "--federation-config",
        "num-supernodes=2",
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert printed(ended.stdout) == pytest.approx(centralized(GIVEN), abs=2e-12)
    assert "3 exchanges, 3 more for derivatives: 12 messages down" in ended.stdout


@pytest.mark.long
@pytest.mark.timeout(300)
def test_hyper_gradients_are_those_of_the_local_runtime(
    home: Path, run: Run, tmp_path: Path
) -> None:
    network = ["strategy=pushsum", "topology=k_out", "strategy.judge=own"]
    own = [
        "personal=hgp",
        "personal.every=1",
        "personal.depth=2",
        "client_validation=0.2",
    ]
    given = [*QUICK, *network, *own, "personal.power_steps=1", "rounds=2"]
    lines: list[str] = []
    run_flower([*given, f"output_dir={tmp_path}/flower", "name=own"], lines.append)
    summary = read_summary(tmp_path / "flower" / "own")
    assert summary is not None, "\n".join(lines)
    ours = run(*given)
    same(ours, found(tmp_path / "flower" / "own", summary))
    assert ours.records[1]["personal"]["moved"] == 6


@pytest.mark.long
@pytest.mark.timeout(120)
def test_plain_flwr_run_tells_a_mistake_in_one_line(home: Path) -> None:
    ended = flwr(
        "--run-config", "strategy='fedyn'", "--federation-config", "num-supernodes=2"
    )
    told = (ended.stdout + ended.stderr).splitlines()
    errors = [line for line in told if "error: " in line]
    assert len(errors) == 1, "\n".join(told)
    assert "no strategy is called 'fedyn'; did you mean 'feddyn'?" in errors[0]
    # Flower may show one of its own, when the run ends before Ray has started.
    ours = [line for line in told if 'File "' in line and "/app/" in line]
    assert not ours, "\n".join(told)


def test_nothing_is_left_running(home: Path) -> None:
    assert belonging(home), "a SuperLink was expected"
    assert end(home) == []
