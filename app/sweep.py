"""What happens at the end of a sweep: a table, its curves, and the failed jobs.

Hydra calls the callback (``hydra.callbacks`` in ``conf/config.yaml``). It writes
``summary.md``, ``summary.csv``, ``summary.png`` and, when one number was swept,
``objective.png`` into ``hydra.sweep.dir``. The sweep itself is never disturbed: what
goes wrong here is told in one line.
"""

import atexit
import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

FAILURES = "failures.jsonl"


class SweepSummary(Callback):
    """Summarize the runs of a multirun when it ends, also when it ends in an error.

    Parameters
    ----------
    metric : str, optional
        What to compare; accuracy where it is recorded, the loss otherwise.
    axis : str
        The x axis of ``summary.png``: rounds, bytes, seconds or gradients.
    """

    def __init__(self, metric: str | None = None, axis: str = "rounds") -> None:
        self.metric = metric
        self.axis = axis
        self._done = False

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Make sure of a summary.

        Hydra does not call `on_multirun_end` if a job failed; the process then still
        ends, and the summary comes after the error.
        """
        atexit.register(self.on_multirun_end, config)

    def on_job_end(
        self, config: DictConfig, job_return: JobReturn, **kwargs: Any
    ) -> None:
        """Note a failed job of a sweep; called in whichever process ran it."""
        try:
            hydra = config.hydra
            if hydra.mode == RunMode.MULTIRUN and job_return.status == JobStatus.FAILED:
                # The value raises when it is an error; the field behind it does not.
                error = job_return._return_value
                said = " ".join(str(error).split())
                if isinstance(error, CompactHydraException):  # a user's mistake
                    said = said.removeprefix("error: ")
                else:
                    said = f"{type(error).__name__}: {said}"
                note = {
                    "job": hydra.job.num,
                    "overrides": list(job_return.overrides or []),
                    "error": said,
                }
                with open(Path(hydra.sweep.dir) / FAILURES, "a") as file:
                    file.write(json.dumps(note) + "\n")
        except Exception as error:
            print(f"sweep: the failure could not be noted ({error})")

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print and write the summary, once."""
        if self._done:
            return
        self._done = True
        atexit.unregister(self.on_multirun_end)
        try:
            summarize(Path(config.hydra.sweep.dir), self.metric, self.axis)
        except Exception as error:
            print(f"sweep: no summary ({' '.join(str(error).split())})")


def summarize(folder: Path, metric: str | None = None, axis: str = "rounds") -> None:
    """Print and write the summary of the runs below a folder.

    Parameters
    ----------
    folder : Path
        The directory of the sweep.
    metric : str, optional
        What to compare; accuracy where it is recorded, the loss otherwise.
    axis : str
        The x axis of ``summary.png``.

    Raises
    ------
    UserError
        If nothing failed and there is no run either, or none recorded the metric.
    """
    # Loaded here: every job imports this module, and only the end needs them.
    from app import plots, report, tables
    from app.records import ROUNDS, write_atomic

    failures = read_failures(folder)
    text = "# Sweep\n\n"
    if failures and not any(folder.rglob(ROUNDS)):
        print("sweep: no run was made")
    else:
        runs = report.load([folder])
        metric = report.choose_metric(runs, metric)
        groups = report.group(runs)
        targets = report.known_targets(runs) if metric == "accuracy" else []
        rows = tables.table(groups, targets, metric)
        lines = tables.cells(rows, metric)
        tables.show(lines)
        drawn = {label: [run.rounds for run in of] for label, of in groups.items()}
        plots.curves(drawn, metric, axis, folder / "summary.png")
        write_atomic(folder / "summary.csv", _csv(rows))
        text += f"{tables.markdown(lines)}\n![{metric}](summary.png)\n"
        found = swept(groups, rows)
        if found:
            key, values = found
            unit = f"final {metric}"
            plots.swept(values, key, unit, folder / "objective.png")
            text += f"\n![{unit} against {key}](objective.png)\n"
    if failures:
        listed = [
            f"job {f['job']} ({' '.join(f['overrides'])}): {f['error']}"
            for f in failures
        ]
        text += "\n## Failed jobs\n\n" + "".join(f"- {line}\n" for line in listed)
        print(f"{len(failures)} failed:", *listed, sep="\n  ")
    write_atomic(folder / "summary.md", text)
    print(f"summary: {folder / 'summary.md'}")


def read_failures(folder: Path) -> list[dict[str, Any]]:
    """Return the failed jobs noted in a sweep's directory, in the order of the jobs."""
    failures = []
    try:
        lines = (folder / FAILURES).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            failures.append(json.loads(line))
        except ValueError:
            continue  # a line that was being written when its process died
    return sorted(failures, key=lambda failure: int(failure["job"]))


def swept(
    groups: dict[str, list[Any]], rows: Sequence[dict[str, Any]]
) -> tuple[str, dict[float, list[float]]] | None:
    """Return the only key in which the groups differ and the final values at each.

    None if they differ in several, or in one that is no number everywhere.
    """
    from app import report

    configs = report.told([runs[0] for runs in groups.values()])
    keys = report.differing(configs)
    if len(keys) != 1:
        return None
    values: dict[float, list[float]] = {}
    for config, row in zip(configs, rows, strict=True):
        value = config.get(keys[0])
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return None
        values[float(value)] = row["final"].values
    return keys[0], values


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table as CSV: mean, sd and number of runs of each column, in full."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    for place, row in enumerate(rows):
        spreads = {f"rounds_to_{t:g}": s for t, s in row["rounds_to"].items()}
        for key in ("final", "best", "mb_down", "mb_up", "seconds", "gradients"):
            spreads[key] = row[key]
        if not place:
            ends = ("mean", "sd", "n")
            names = [f"{key}_{end}" for key in spreads for end in ends]
            table.writerow(["group", "runs", "state", *names])
        cells: list[Any] = [row["group"], row["runs"], row["state"]]
        for spread in spreads.values():
            for number in (spread.mean, spread.sd):
                cells.append("" if math.isnan(number) else number)
            cells.append(len(spread.values))
        table.writerow(cells)
    return text.getvalue()
