"""What the tests share: a quick federation, and what a run of it left."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file
from torch import Tensor

from app import label_plots, network_plots, plots
from app.experiment import run_local
from app.local_grid import LocalGrid
from app.run import Run
from app.run_config import to_run_config

# Examples are not timed: a machine may be busy. On CI they are the same each time.
settings.register_profile("fedgrad", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("fedgrad")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Offer the long forms: `./run.sh test --long`."""
    parser.addoption(
        "--long", action="store_true", help="also the tests that take long"
    )


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Leave out the long forms unless they are asked for."""
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="needs --long"))


#: Six clients on the embedded digits, three of them in a round: well under a second.
QUICK = (
    "partition=iid",
    "model.hidden=[8]",
    "clients=6",
    "clients_per_round=3",
    "rounds=3",
    "local.epochs=1",
    "local.batch=60",
    "device=cpu",
    "nodes=2",
    "processes=0",
)


@dataclass(frozen=True)
class Result:
    """What a run returned and wrote.

    Attributes
    ----------
    summary : dict
        What the run returned.
    path : Path
        Its directory.
    model : dict of str to Tensor
        The final model by the module's names.
    records : list of dict
        The lines of metrics.jsonl.
    lines : list of str
        What it said.
    """

    summary: dict[str, Any]
    path: Path
    model: dict[str, Tensor]
    records: list[dict[str, Any]]
    lines: list[str]

    @property
    def theta(self) -> Tensor:
        """The model as one vector."""
        return torch.cat([t.flatten() for _, t in sorted(self.model.items())])


def found(path: Path, summary: dict[str, Any], lines: Sequence[str] = ()) -> Result:
    """Return what a finished run left in its directory."""
    text = (path / "metrics.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    model = load_file(path / "model.safetensors")
    return Result(summary, path, model, records, list(lines))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Compute in the main process as a worker does, and let messages be made."""
    LocalGrid({}, 0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def grid_of(overrides: Sequence[str], nodes: int) -> LocalGrid:
    """Return a grid of so many nodes in this process; none to fill with `add_node`."""
    return LocalGrid(to_run_config(overrides), nodes)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Give a function that runs overrides, after those of QUICK, in this process.

    ``callbacks`` go to the run. ``grid``, a function of the overrides, makes the grid instead of
    the local runtime; ``edit`` sees the `Run` before it starts. No plots are drawn: a run then
    takes a tenth of a second.
    """
    monkeypatch.setattr(plots, "overview", lambda *_: None)
    monkeypatch.setattr(label_plots, "label_map", lambda *_: None)
    monkeypatch.setattr(network_plots, "draw", lambda *_: None)

    def run(
        *overrides: str,
        callbacks: Sequence[Any] = (),
        grid: Callable[[Sequence[str]], LocalGrid] | None = None,
        edit: Callable[[Run], None] | None = None,
        quick: Sequence[str] = QUICK,
    ) -> Result:
        lines: list[str] = []
        given = [*quick, f"output_dir={tmp_path}/runs", *overrides]
        if grid is None and edit is None:
            summary = run_local(given, callbacks, lines.append)
        else:
            task = Run(given, callbacks, lines.append)
            if edit:
                edit(task)
            make = grid or (lambda o: grid_of(o, task.config.nodes))
            summary = task(make(given))
        place = next(line for line in lines if line.startswith("run directory: "))
        return found(Path(place.removeprefix("run directory: ")), summary, lines)

    return run
