"""One run's directory: what is written while a run goes on, and when it ends.

Whole files are replaced atomically. The two logs, ``metrics.jsonl`` and
``clients.csv``, are appended to line by line, so that a run that dies loses at most the
line it was writing. ``summary.json`` comes last: a run that has it has finished.
"""

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import yaml
from numpy.typing import NDArray

from app import client_rows, label_plots, plots
from app.alone import hold
from app.client_rows import CLIENTS
from app.environment import environment
from app.errors import UserError
from app.records import (
    ROUNDS,
    SUMMARY,
    plain,
    read_rounds,
    scalars,
    write_atomic,
)
from app.screen import screen

if TYPE_CHECKING:
    import torch
    from torch.utils.tensorboard import SummaryWriter

CONFIG, ENVIRONMENT = "config.yaml", "environment.json"
#: Held by the process that is at the run. Never replaced: a lock is on a file, not on its name.
LOCK = ".lock"


class RunDir:
    """The directory of one run, open for writing by one process.

    Made by `create` or `reopen`, and closed by `finish`, or by `close` if the run ends
    otherwise.

    Attributes
    ----------
    path : Path
        The directory.
    """

    def __init__(
        self, path: Path, writer: "SummaryWriter", lock: IO[bytes] | None = None
    ) -> None:
        self.path = path
        self._writer = writer
        self._lock = lock or claim(path)

    @classmethod
    def create(
        cls,
        base: Path,
        name: str,
        config: dict[str, Any],
        data: str,
        device: str,
    ) -> "RunDir":
        """Make a new directory for a run.

        Parameters
        ----------
        base : Path
            Where runs are kept; made if missing.
        name : str
            The directory's name; ``NAME-2``, ``NAME-3``, ... where it is taken.
        config : dict
            The composed configuration, kept as ``config.yaml``.
        data : str
            What tells its samples from others, kept in ``environment.json``.
        device : str
            What computes, kept there too.

        Raises
        ------
        UserError
            If the name is no plain file name, or nothing can be written there.
        """
        if name in ("", ".", "..") or Path(name).name != name:
            raise UserError(f"name={name!r}: a run's name is a plain folder name.")
        try:
            path = _claim(Path(base), name)
        except OSError as error:
            raise UserError(
                f"{base}: cannot keep runs here ({error.strerror})."
            ) from error
        write_atomic(path / CONFIG, _yaml(config))
        write_atomic(path / ENVIRONMENT, _json(environment(device) | {"data": data}))
        write_atomic(path / ROUNDS, b"")
        write_atomic(path / CLIENTS, client_rows.HEADER)
        return cls(path, _tensorboard(path))

    @classmethod
    def reopen(
        cls,
        path: Path,
        last_round: int,
        lock: IO[bytes] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> "RunDir":
        """Open the directory of a run that goes on after a round.

        What the logs hold of later rounds is cut off, since those rounds are run again,
        and so is a summary, since the run is not finished any more.

        Parameters
        ----------
        path : Path
            The run directory.
        last_round : int
            The last round to keep, usually that of the checkpoint.
        lock : file, optional
            What `claim` returned, if the run has been claimed before something of it was read.
        config : dict, optional
            The settings with which it goes on, as after more rounds were asked.

        Raises
        ------
        UserError
            If this is no run directory, or another process is at it.
        """
        path = Path(path)
        lock = lock or claim(path)
        kept = [r for r in read_rounds(path) if r["round"] <= last_round]
        (path / SUMMARY).unlink(missing_ok=True)
        if config is not None:
            write_atomic(path / CONFIG, _yaml(config))
        write_atomic(path / ROUNDS, "".join(_line(record) for record in kept))
        write_atomic(path / CLIENTS, client_rows.until(path / CLIENTS, last_round))
        return cls(path, _tensorboard(path, purge_step=last_round + 1), lock)

    def labels(self, counts: NDArray[Any], names: Sequence[str]) -> None:
        """Write how the labels are spread: ``labels.csv`` and ``labels.png``.

        Parameters
        ----------
        counts : ndarray of shape (clients, classes)
            Samples of each class at each client.
        names : sequence of str
            The classes.
        """
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["client", *names])
        for client, row in enumerate(np.asarray(counts).astype(int).tolist()):
            table.writerow([client, *row])
        write_atomic(self.path / "labels.csv", text.getvalue())
        label_plots.label_map(counts, names, self.path / "labels.png")

    def round(self, record: Mapping[str, Any]) -> None:
        """Append one round's record to ``metrics.jsonl`` and to TensorBoard.

        NaN and infinities become null, and are left out of TensorBoard.

        Parameters
        ----------
        record : dict
            Nested numbers, strings and lists; ``round`` is the step.
        """
        clean = plain(record, finite=True)
        with open(self.path / ROUNDS, "a", encoding="utf-8") as file:
            file.write(_line(clean))
        for tag, value in scalars(clean):
            if tag != "round":
                self._writer.add_scalar(tag, value, clean["round"])

    def replace(self, record: Mapping[str, Any]) -> None:
        """Put another record in the place of the last one in ``metrics.jsonl``."""
        kept = read_rounds(self.path)[:-1]
        clean = plain(record, finite=True)
        text = "".join(_line(r) for r in [*kept, clean])
        write_atomic(self.path / ROUNDS, text)

    def clients(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append one line for each row to ``clients.csv``; missing values stay empty.

        Raises
        ------
        ValueError
            If a row has a column that the file has not.
        """
        text = client_rows.lines(rows)
        with open(self.path / CLIENTS, "a", encoding="utf-8") as file:
            file.write(text)

    def sync(self) -> None:
        """See the logs onto the disk: a checkpoint must not be ahead of them."""
        for name in (ROUNDS, CLIENTS):
            with open(self.path / name, "rb") as file:
                os.fsync(file.fileno())

    def finish(
        self, summary: Mapping[str, Any], tensors: Mapping[str, "torch.Tensor"]
    ) -> str:
        """Write the model, the curves and the summary, and close the directory.

        Parameters
        ----------
        summary : dict
            The run in a few numbers (see docs/runs.md).
        tensors : dict
            The server's model, for ``model.safetensors``.

        Returns
        -------
        str
            The summary as text of at most a screen.
        """
        from safetensors.torch import save

        # Copies, since safetensors refuses tensors that share memory (tied weights).
        weights = {
            name: tensor.detach().cpu().clone().contiguous()
            for name, tensor in tensors.items()
        }
        write_atomic(self.path / "model.safetensors", save(weights))
        plots.overview(read_rounds(self.path), self.path / "curves.png", self.path.name)
        clean = plain(summary, finite=True)
        write_atomic(self.path / SUMMARY, _json(clean))
        self.close()
        return screen(clean, self.path)

    def close(self) -> None:
        """Write out what TensorBoard still holds back; may be called twice."""
        self._writer.close()
        self._lock.close()


def claim(path: Path) -> IO[bytes]:
    """Take a run for this process, until the file that is returned is closed.

    Raises
    ------
    UserError
        If this is no run directory, or another process is at it: a resumed run may still go on
        elsewhere, as after a SuperLink has started it again by itself.
    """
    if not (path / CONFIG).exists():
        raise UserError(f"{path}: no run directory (no {CONFIG} there).")
    (path / LOCK).touch()
    return hold(path / LOCK, f"{path}: another process is at this run; let it go on.")


def _claim(base: Path, name: str) -> Path:
    """Make the first free one of NAME, NAME-2, ...; each process gets its own."""
    base.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = base / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1


def _tensorboard(path: Path, purge_step: int | None = None) -> "SummaryWriter":
    """Open TensorBoard's log; imported here, as reading runs must not load torch."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(path / "tensorboard", purge_step=purge_step, flush_secs=10)


def _line(record: Mapping[str, Any]) -> str:
    """Return a record as one line."""
    return json.dumps(record, allow_nan=False) + "\n"


def _yaml(config: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(plain(config, finite=False), sort_keys=False))


def _json(value: Any) -> str:
    """Return a value as the text of a JSON file."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"
