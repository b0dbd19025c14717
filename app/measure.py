"""The numbers of one finished run, as a study compares them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from app.errors import UserError
from app.records import cumulative, lookup, series, traffic
from app.synthetic import QUADRATICS_A, QUADRATICS_B, quadratics
from app.tables import Run, rounds_to
from app.verdict import DISTANCE, Numbers, better

EXCESS = "excess_loss"  # drawn where the metric is the distance: loss above its minimum


def measure(run: Run, metric: str, targets: Sequence[float]) -> dict[str, Any]:
    """Return the numbers of one finished run.

    Parameters
    ----------
    run : Run
        As `app.report.load` gives it.
    metric : str
        ``accuracy``, ``loss`` or another metric of the records, or ``distance``.
    targets : sequence of float
        Values of the metric whose first round is looked for.

    Raises
    ------
    UserError
        If the run did not record the metric, or has no known minimizer.
    """
    numbers: dict[str, Any] = {"rounds": int(run.rounds[-1]["round"])}
    if metric == DISTANCE:
        far = distance(run)
        numbers["final"] = numbers["best"] = far if np.isfinite(far) else None
    else:
        values = series(run.rounds, metric)[1]
        finite = values[np.isfinite(values)]
        if not values.size:
            raise UserError(f"{run.path}: recorded no {metric}.")
        pick = np.min if better(metric) else np.max
        numbers["final"] = float(values[-1]) if np.isfinite(values[-1]) else None
        numbers["best"] = float(pick(finite)) if finite.size else None
        numbers["rounds_to"] = {f"{t:g}": rounds_to(run, t, metric) for t in targets}
        numbers["spent_to"] = {
            t: spent(run, at) for t, at in numbers["rounds_to"].items()
        }
        named = lookup(run.rounds[-1], "models") or {}
        if len(named) > 1 and targets:
            numbers["models"] = {
                name: {
                    f"{t:g}": rounds_to(run, t, f"models/{name}/{metric}")
                    for t in targets
                }
                for name in named
            }
    summary = run.summary or {}
    return numbers | {
        "reported_model": summary.get("reported_model"),
        "bytes": int(sum(traffic(record) for record in run.rounds)),
        **{f"bytes_{side}": _sent(run, side) for side in ("down", "up")},
        "gradients": int(cumulative(run.rounds, "gradients")[-1]),
        "seconds": round(float(cumulative(run.rounds, "seconds")[-1]), 1),
        "failures": summary.get("failures", 0),
    }


def spent(run: Run, until: int | None) -> dict[str, float] | None:
    """Return bytes and seconds of the rounds up to one, None of a round never reached."""
    places = [i for i, record in enumerate(run.rounds) if record["round"] == until]
    if not places:
        return None
    return {
        axis: round(float(cumulative(run.rounds, axis)[places[0]]), 1)
        for axis in ("bytes", "seconds")
    }


def _sent(run: Run, side: str) -> int:
    """Return the bytes of vectors in one direction: all but the metrics."""
    sent = [lookup(record, f"bytes/{side}") or {} for record in run.rounds]
    return int(sum(n for s in sent for kind, n in s.items() if kind != "metrics"))


def minimizer() -> np.ndarray:
    """Return the minimizer of the mean of the quadratics, in closed form."""
    return np.linalg.solve(QUADRATICS_A.sum(axis=0), QUADRATICS_B.sum(axis=0))


def distance(run: Run) -> float:
    """Return how far a run's final server model is from the minimizer.

    Raises
    ------
    UserError
        If the run is not about the quadratics with equal weights.
    """
    from safetensors.numpy import load_file

    data = run.config.get("data") or {}
    if data.get("name") != "quadratics" or len(set(data.get("repeats", [1]))) > 1:
        raise UserError("metric distance: needs data=quadratics with equal repeats.")
    tensors = load_file(run.path / "model.safetensors")
    if sum(t.size for t in tensors.values()) != 2:
        raise UserError("metric distance: needs model=linear model.bias=false.")
    theta = np.concatenate([t.ravel() for t in tensors.values()])
    return float(np.linalg.norm(theta - minimizer()))


def with_excess(records: Sequence[Numbers]) -> list[dict[str, Any]]:
    """Return round records of the quadratics with the loss above its minimum."""
    train = quadratics().train
    residual = train.x.numpy() @ minimizer() - train.y.numpy()
    least = float(np.mean(residual**2) / 2)
    # The loss is exact to about 1e-16: what is below is drawn there, the axis is log.
    return [
        {**r, EXCESS: max(r["loss"] - least, 1e-16)}
        if r.get("loss") is not None
        else dict(r)
        for r in records
    ]


def last_value(run: Run, metric: str) -> float | None:
    """Return a metric's value in the last record that has one, None if none has."""
    _, values = series(run.rounds, metric)
    return float(values[-1]) if len(values) and np.isfinite(values[-1]) else None
