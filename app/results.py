"""What a study found: its runs measured, judged, drawn and published.

A result is plain data, one JSON file for each study in ``docs/results``. It holds the
numbers of every run by variant and seed, so that means, table, verdict and page
(`app.results_page`) can be made again from it.
"""

import io
import json
from collections.abc import Container
from pathlib import Path
from typing import Any

from PIL import Image

from app import plots, report, tuning
from app.config import load
from app.dots import dots
from app.errors import UserError
from app.measure import EXCESS, last_value, measure, with_excess
from app.plan import Plan
from app.records import read_summary, series, write_atomic
from app.results_page import DOCS, body, further, wide, write_page
from app.resume import describe, settings
from app.verdict import DISTANCE, judge


def summarize(plan: Plan, failures: Container[str] = ()) -> dict[str, Any] | None:
    """Measure the finished runs, draw them, and write ``study.md`` and ``study.png``.

    ``failures`` names runs that do not count, whatever lies in their place.

    Returns
    -------
    dict or None
        The result, as it is published; None if no run has finished.
    """
    study, variants = plan.study, dict[str, dict[str, Any]]()
    drawn: dict[str, list[Any]] = {}
    environments = []
    for job in plan.jobs:
        path = plan.folder / job.name
        if job.name in failures or not path.is_dir() or read_summary(path) is None:
            continue
        found = report.load([path])[0]
        numbers = measure(found, study.metric, plan.targets)
        if study.also:
            numbers["also"] = {name: last_value(found, name) for name in study.also}
        if study.tuning:
            numbers[tuning.BY] = last_value(found, study.tuning.by)
        variants.setdefault(job.variant, {})[str(job.seed)] = numbers
        exact = study.metric == DISTANCE
        records = with_excess(found.rounds) if exact else found.rounds
        drawn.setdefault(job.variant, []).append(records)
        environments.append(json.loads((path / "environment.json").read_text()))
    if not variants:
        return None
    last = max(environments, key=lambda e: str(e["date"]))
    seeds = list(range(plan.seeds))
    common = settings(describe(load(plan.jobs[0].overrides)))
    runs = [r for of in variants.values() for r in of.values()]
    result = {
        "study": plan.name,
        "claim": study.claim,
        "fairness": study.fairness,
        "size": plan.size,
        "metric": study.metric,
        "targets": plan.targets,
        "drawn": list(study.drawn),
        "baseline": study.baseline,
        "rule": study.verdict.model_dump(exclude_none=True),
        "overrides": list(plan.extra),
        "seeds": seeds,
        "variants_overrides": study.variants,
        "config": {
            k: v
            for k, v in common.items()
            if k != "seed" and not k.startswith("strategy.")
        },
        **{key: last[key] for key in ("date", "versions")},
        "machine": {"device": "an unknown device", **last["machine"]},
        "minutes": round(sum(r["seconds"] for r in runs) / 60, 2),
        "variants": variants,
        "reference": study.reference and study.reference.model_dump(mode="json"),
    }
    if study.tuning:
        picks = tuning.chosen(study.tuning, variants)
        result["tuning"] = {**study.tuning.model_dump(), "chosen": picks}
        drawn = {method: drawn[name] for method, name in picks.items()} or drawn
    table = tuning.compared(result)
    result["verdict"] = judge(study.verdict, table, seeds, study.metric)
    metric = EXCESS if study.metric == DISTANCE else study.metric
    band = "quartiles" if wide(study.metric) else "std"
    figure = plan.folder / "study.png"
    if study.dots:
        dots(table, study.metric, study.dots, figure)
    else:
        plots.curves(drawn, metric, study.x, figure, band=band)
    for name in study.drawn:
        groups = {
            v: [r for r in of if series(r, name)[1].size] for v, of in drawn.items()
        }
        groups = {v: of for v, of in groups.items() if of}
        plots.curves(groups, name, "rounds", further(figure, name))
    text = f"# {plan.name}\n\n{body(result, 'study.png')}"
    write_atomic(plan.folder / "study.md", text)
    return result


def publish(result: dict[str, Any], folder: Path, docs: Path = DOCS) -> None:
    """Keep a study's result and figure in the documentation and make its page again.

    Raises
    ------
    UserError
        If runs are missing.
    """
    if result["verdict"]["holds"] is None:
        raise UserError(f"{result['study']}: not published, since runs are missing.")
    (docs / "results").mkdir(exist_ok=True)
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    write_atomic(docs / "results" / f"{result['study']}.json", text)
    figure, target = folder / "study.png", docs / "results" / f"{result['study']}.png"
    write_atomic(target, _small(figure))
    for name in result["drawn"]:
        write_atomic(further(target, name), _small(further(figure, name)))
    write_page(docs)


def _small(path: Path) -> bytes:
    """Return a figure with a palette of 256 colors: a third of its size."""
    image = io.BytesIO()
    with Image.open(path) as figure:
        # By coverage of the color cube: the usual median cut loses rare line colors.
        palette = figure.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
        palette.save(image, "PNG", optimize=True)
    return image.getvalue()
