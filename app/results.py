"""What a study found: its result, the table, and the page of all results.

A result is plain data, one JSON file for each study in ``docs/results``. It holds the
numbers of every run by variant and seed, so that means, table, verdict and page can be
made again from it.
"""

import io
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from app import plots, report, tuning
from app.compose import CONF
from app.config import load
from app.dots import dots
from app.errors import UserError
from app.measure import EXCESS, last_value, measure, with_excess
from app.plan import Plan
from app.records import read_summary, series, write_atomic
from app.resume import describe, settings
from app.tables import Spread, markdown
from app.verdict import DISTANCE, Rule, Table, better, judge

DOCS = CONF.parent / "docs"


def summarize(plan: Plan) -> dict[str, Any] | None:
    """Measure the finished runs, draw them, and write ``study.md`` and ``study.png``.

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
        if not path.is_dir() or read_summary(path) is None:
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
        "machine": {**last["machine"], "device": _device(plan)},
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
    band = "quartiles" if _wide(study.metric) else "std"
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


def _wide(metric: str) -> bool:
    """Return whether seeds lie powers of ten apart, so that the largest decides a mean."""
    return metric == DISTANCE or "error" in metric


def _device(plan: Plan) -> str:
    """Return what computes: the GPU by its name, or ``cpu``."""
    device = load(plan.jobs[0].overrides).torch_device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


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


def further(figure: Path, metric: str) -> Path:
    """Return where the figure of another metric lies, beside a study's own."""
    return figure.with_stem(f"{figure.stem}-{metric.replace('/', '-')}")


def costs(table: Table, baseline: str) -> list[list[str]]:
    """Return what each variant costs relative to one of them, its header first."""
    keys = ("rounds", "bytes_down", "bytes_up", "gradients")
    lines = [
        [f"relative to {baseline}", "rounds", "bytes down", "bytes up", "gradients"]
    ]
    for name, seeds in table.items():
        common = [s for s in seeds if s in table[baseline]]
        ratios = [
            Spread.of(seeds[s][key] / table[baseline][s][key] for s in common)
            for key in keys
        ]
        lines.append([name, *(r.text(".3f") for r in ratios)])
    return lines


def _small(path: Path) -> bytes:
    """Return a figure with a palette of 256 colors: a third of its size."""
    image = io.BytesIO()
    with Image.open(path) as figure:
        # By coverage of the color cube: the usual median cut loses rare line colors.
        palette = figure.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
        palette.save(image, "PNG", optimize=True)
    return image.getvalue()


def write_page(docs: Path = DOCS) -> None:
    """Write ``docs/results.md`` from the summaries."""
    write_atomic(docs / "results.md", page(docs / "results"))
    print(docs / "results.md")


def cells(
    table: Table, metric: str, targets: Sequence[float], focus: float | None = None
) -> list[list[str]]:
    """Return the comparison as text, its header first; mean and sd over the seeds.

    Of the target ``focus`` it also says what was sent until then, and how long it took.
    """
    sign = "≤" if better(metric) else "≥"
    head = ["variant", "runs", *(f"rounds to {sign} {t:g}" for t in targets)]
    every = [run for seeds in table.values() for run in seeds.values()]
    # Results of before know nothing of it.
    told = focus is not None and all("spent_to" in run for run in every)
    head += [f"{unit} to {sign} {focus:g}" for unit in ("MB", "s") if told]
    # What validation has chosen has no best: that would be chosen by what is told.
    few = _wide(metric) or "chosen" in metric or "/cost/" in metric
    ends = ["final"] if few else ["final", "best"]
    head += [f"{end} {metric}" for end in ends]
    head += ["median (least to largest)"] if _wide(metric) else []
    # No seconds of whole runs: they share the machine with whatever else it does.
    also = list(every[0].get("also", {})) if every else []
    lines = [[*head, *(f"final {name}" for name in also), "MB sent", "gradients"]]
    form = ".4f" if metric == "accuracy" else ".3g"
    for name, seeds in table.items():
        runs = list(seeds.values())
        line = [name, str(len(runs))]
        for t in targets:
            line.append(Spread.of(r["rounds_to"][f"{t:g}"] for r in runs).text(".1f"))
        if told:
            until = [(r["spent_to"][f"{focus:g}"] or {}) for r in runs]
            megabytes = [u["bytes"] / 1e6 if u else None for u in until]
            line.append(Spread.of(megabytes).text(".3g"))
            line.append(Spread.of(u.get("seconds") for u in until).text(".3g"))
        for key in ends:
            line.append(Spread.of(r[key] for r in runs).text(form))
        if _wide(metric):
            line.append(Spread.of(r["final"] for r in runs).quantiles(".2g"))
        line += [Spread.of(r["also"][n] for r in runs).text(".3g") for n in also]
        line.append(Spread.of(r["bytes"] / 1e6 for r in runs).text(".3g"))
        line.append(Spread.of(r["gradients"] for r in runs).text(",.0f"))
        lines.append(line)
    return lines


def models(table: Table, targets: Sequence[float]) -> list[str]:
    """Return a line for each variant whose records name several models."""
    lines = []
    for name, seeds in table.items():
        runs = [r for r in seeds.values() if r.get("models")]
        if not runs or not targets:
            continue
        parts = []
        for model in runs[0]["models"]:
            found = []
            for t in targets:
                spread = Spread.of(r["models"][model][f"{t:g}"] for r in runs)
                found.append(f"{t:g} in {spread.text('.1f')}")
            parts.append(f"{model} model {', '.join(found)}")
        reported = runs[0]["reported_model"]
        lines.append(
            f"{name} reports its {reported} model; rounds to target by model: "
            f"{'; '.join(parts)}."
        )
    return lines


def reference(result: Mapping[str, Any]) -> str:
    """Return what others published of the same variants as a table of its own."""
    given = result.get("reference")
    if not given:
        return ""
    targets = [f"{t:g}" for t in result["targets"]]
    lines = [["variant", *(f"rounds to ≥ {t}" for t in targets)]]
    for name, numbers in given["rounds_to"].items():
        reached = {f"{float(t):g}": at for t, at in numbers.items()}
        found = [reached.get(t) for t in targets]
        lines.append([name, *("-" if at is None else f"{at:g}" for at in found)])
    return f"\nFor comparison, {given['source']}:\n\n{markdown(lines)}"


def body(result: Mapping[str, Any], figure: str) -> str:
    """Return a study's result as Markdown below its heading."""
    table, targets = tuning.compared(result), result["targets"]
    metric = result["metric"]
    notes = "".join(f"\n{line}\n" for line in models(table, targets))
    verdict = judge(Rule(**result["rule"]), table, result["seeds"], metric)
    focus = result["rule"].get("target")
    if result.get("baseline") in table:
        notes += f"\n{markdown(costs(table, result['baseline']))}"
    more = "".join(
        f"![{result['study']}: {name}]({further(Path(figure), name).as_posix()})\n\n"
        for name in result.get("drawn", [])
    )
    if result.get("tuning"):
        by = result["tuning"]["by"]
        notes += f"\nEach method at the setting with the best {by}, of these:\n\n"
        notes += markdown(tuning.grid(result))
    machine, versions = result["machine"], result["versions"]
    with_ = ", ".join(f"{name} {v}" for name, v in versions.items() if v)
    given = " ".join(result["overrides"])
    every = [r for of in result["variants"].values() for r in of.values()]
    failed = sum(r["failures"] for r in every)
    timed = any("spent_to" in r for r in every)
    shared = " Seconds are wall time, whatever else the machine did." if timed else ""
    lost = f" {failed} times a client failed and was left out." if failed else ""
    rounds = sorted({r["rounds"] for r in every})
    many = f"{len(result['seeds'])} seed{'s' if len(result['seeds']) > 1 else ''}"
    return (
        f"Claim: {result['claim']}\n\n"
        f"Verdict: {verdict['text']}\n\n"
        f"{markdown(cells(table, metric, targets, focus))}{notes}"
        f"{reference(result)}\n"
        f"![{result['study']}]({figure})\n\n{more}"
        f"Fairness: {result['fairness']}\n\n"
        f"Run: size {result['size']}, {many}, "
        f"{' or '.join(map(str, rounds)) or 'no'} rounds; {result['minutes']:.1f} "
        f"minutes of rounds in all, on {machine['device']} with {machine['cores']} "
        f"cores ({machine['cpu']}), {result['date'][:10]}; {with_}.{lost}{shared}"
        f"{f' Further settings: `{given}`.' if given else ''}\n"
    )


def page(folder: Path) -> str:
    """Return ``docs/results.md``, made of the summaries in a folder and nothing else.

    Raises
    ------
    UserError
        If a summary cannot be read.
    """
    text = (
        "# Results\n\nGenerated by `python -m app.study --page` from the summaries in "
        "`docs/results`; do not edit.\n"
        "Numbers are mean ± standard deviation over the seeds; `(2/3)` counts the runs\n"
        "that have a value. [Studies](studies.md) says how a verdict is computed.\n"
    )
    for file in sorted(folder.glob("*.json")):
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            name = result["study"]
            section = body(result, f"results/{name}.png")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: is no summary of a study ({error!r}).") from error
        text += f"\n## {name}\n\n{section}"
        words = [name, f"size={result['size']}", f"seeds={len(result['seeds'])}"]
        again = shlex.join([*words, *result["overrides"]])
        text += f"\nAgain: `python -m app.study {again}`\n"
    return text
