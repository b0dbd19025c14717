"""Studies: presets, the runner, the verdict, and the page made of the summaries."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from app import label_plots, plots, results_page, study
from app.compose import compose, names
from app.config import load
from app.dots import dots
from app.errors import UserError
from app.experiment import run_local
from app.measure import measure
from app.plan import Study, plan, read, studies
from app.records import read_summary
from app.results import publish, summarize
from app.results_page import DOCS, body, page
from app.synthetic import QUADRATICS_A, QUADRATICS_B
from app.tables import Run
from app.tuning import BY, Tuning, chosen, compared
from app.verdict import Rule, judge

#: A run of a preset in a second: one round, few clients, in this process.
TINY = ("rounds=1", "local.epochs=1", "nodes=1", "processes=0", "device=cpu")
ROUNDS = Rule(rule="rounds", lead=["dyn"], rivals=["avg"], target=0.9)


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """Draw no run's own figures: they take most of a tiny run's time."""
    monkeypatch.setattr(plots, "overview", lambda *_: None)
    monkeypatch.setattr(label_plots, "label_map", lambda *_: None)


def quiet():
    return Console(file=io.StringIO())


# Presets.


def pictures(folder: Path) -> Path:
    """Write an image folder like CIFAR-10, of noise."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 1)):
        for label in range(10):
            place = folder / split / f"class{label}"
            place.mkdir(parents=True)
            for number in range(count):
                noise = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(noise).save(place / f"{number}.png")
    return folder


def data_of(name: str, tmp_path: Path) -> list[str]:
    """Return what a preset needs besides its own settings, to run here."""
    if name.endswith("cifar10"):
        root = pictures(tmp_path / "pictures")
        few = ["clients=4", "partition.minimum=6", "partition.alpha=10"]
        return ["data=imagefolder", f"data.root={root}", *few]
    data = load([f"experiment={name}"]).data
    if data.name == "text" and not Path(data.options["path"]).is_file():
        pytest.skip("no plays here: FEDGRAD_DATA holds shakespeare/tinyshakespeare.txt")
    if data.name == "text":
        return ["data.stride=200"]  # few windows: a round in a second
    if data.name == "mnist":
        root = Path(os.environ.get("FEDGRAD_DATA", "data"))
        if not (root / "MNIST" / "raw").is_dir():
            pytest.skip(
                "no MNIST here: FEDGRAD_DATA is the folder that holds MNIST/raw"
            )
    if name.startswith("influence"):
        given = ["estimate.check=2", "estimate.train_steps=2", "estimate.samples=100"]
        return [*given, "estimate.pushes=1"]
    # In its one round no outer step would be taken.
    return ["personal.every=0"] if name == "hypergrad_cost" else []


@pytest.mark.parametrize("name", names("experiment"))
def test_every_preset_runs_a_round(name, tmp_path):
    needs = data_of(name, tmp_path)
    tiny = [*TINY, "clients_per_round=2", *needs]
    if compose((f"experiment={name}",))[1]["estimate"] != "none":
        tiny.remove("local.epochs=1")  # no estimate reads it
    given = [f"experiment={name}", *tiny]
    summary = run_local([*given, f"output_dir={tmp_path}"], [], lambda _: None)
    assert summary["rounds"] == 1 and summary["loss"] is not None
    assert summary["failures"] == 0


@pytest.mark.parametrize("name", studies())
def test_every_variant_and_every_size_composes(name):
    study = read(name)
    assert list(study.sizes) == ["quick", "paper"]
    first, *others = study.sizes
    # Composes one run of each variant: seeds differ in a number, sizes in a few settings.
    planned = plan(name, first, None)
    assert len(planned.jobs) == len(study.variants) * study.sizes[first].seeds
    assert len({job.overrides for job in planned.jobs}) == len(planned.jobs)
    variant = next(iter(study.variants.values()))
    for size in others:
        load([f"experiment={name}", *variant, *study.sizes[size].overrides])


def test_a_preset_is_no_setting_of_a_run():
    assert load(["experiment=digits"]).targets == [0.8, 0.9]
    assert not hasattr(load(["experiment=digits"]), "study")


# Tuning.


def tuned(by="clients/validation_loss_mean"):
    methods = {"dyn": ["dyn-1", "dyn-2"], "avg": ["avg-1", "avg-2"]}
    return Tuning(by=by, methods=methods)


def tried(**numbers):
    """Return a table of validation numbers, a list over the seeds for each variant."""
    names = {name.replace("_", "-"): values for name, values in numbers.items()}
    return {
        name: {str(seed): {BY: v} for seed, v in enumerate(values)}
        for name, values in names.items()
    }


def test_each_method_chooses_its_setting_on_validation():
    table = tried(dyn_1=[1, 4], dyn_2=[2, 2], avg_1=[3, 3], avg_2=[3, 3])
    assert chosen(tuned(), table) == {"dyn": "dyn-2", "avg": "avg-1"}  # lower is better
    rising = tuned("clients/validation_accuracy_mean")
    assert chosen(rising, table) == {"dyn": "dyn-1", "avg": "avg-1"}


def test_a_setting_that_diverged_is_not_chosen_whatever_is_better():
    table = tried(dyn_1=[None, 0], dyn_2=[9, 9], avg_1=[1, 1], avg_2=[None, None])
    for by in ("clients/validation_loss_mean", "clients/validation_accuracy_mean"):
        assert chosen(tuned(by), table) == {"dyn": "dyn-2", "avg": "avg-1"}


def test_nothing_is_chosen_from_half_a_grid():
    table = tried(dyn_1=[1, 1], dyn_2=[2], avg_1=[1, 1], avg_2=[2, 2])
    assert chosen(tuned(), table) == {"avg": "avg-1"}


def test_a_study_does_not_choose_on_the_test_set():
    with pytest.raises(ValueError, match="by"):
        tuned("clients/accuracy_mean")


# The runner.


@pytest.fixture
def small(tmp_path):
    """Return a function that plans a study of two rounds in a temporary folder."""

    def make(*extra, seeds=1):
        given = [*TINY, "rounds=2", f"output_dir={tmp_path}", *extra]
        return plan("digits", "quick", seeds, given)

    return make


def test_finished_runs_are_not_run_again(small, monkeypatch):
    planned = small()
    assert study.run(planned, quiet()) == {}
    first = planned.folder / planned.jobs[0].name
    stamps = {p: p.stat().st_mtime_ns for p in planned.folder.rglob("summary.json")}
    assert len(stamps) == 4
    (first / "summary.json").unlink()  # as if it had been killed
    ran = []

    def count(overrides, *rest):
        ran.append(overrides)
        return run_local(overrides, *rest)

    monkeypatch.setattr("app.experiment.run_local", count)
    study.run(planned, quiet())
    assert len(ran) == 1 and read_summary(first) is not None
    again = {p: p.stat().st_mtime_ns for p in planned.folder.rglob("summary.json")}
    assert {p for p in again if again[p] != stamps[p]} == {first / "summary.json"}


def test_an_unfinished_run_goes_on_from_its_checkpoint(small):
    planned = small("checkpoint_every=1", "rounds=3")
    job = planned.jobs[0]

    def die(record):
        if record["round"] == 2:
            raise KeyboardInterrupt
        return False, {}

    with pytest.raises(KeyboardInterrupt):
        run_local(job.overrides, [die], lambda _: None)
    done, overrides = study.settle(job, planned.folder)
    assert not done and overrides[-1].startswith("resume=")
    assert run_local(overrides, [], lambda _: None)["rounds"] == 3


def test_a_finished_run_of_other_settings_is_kept_aside(small):
    planned = small()
    job = planned.jobs[0]
    run_local([*job.overrides, "local.batch=20"], [], lambda _: None)
    assert study.settle(job, planned.folder) == (False, job.overrides)
    assert (planned.folder / "replaced" / f"{job.name}-1" / "summary.json").exists()
    assert not (planned.folder / job.name).exists()


def test_a_failing_variant_is_listed_and_the_rest_go_on(small, monkeypatch, capsys):
    planned = small()

    def fail(overrides, *rest):
        if "strategy=scaffold" in overrides:
            raise ValueError("no luck")
        return run_local(overrides, *rest)

    monkeypatch.setattr("app.experiment.run_local", fail)
    words = [*TINY, "rounds=2", f"output_dir={planned.folder.parent.parent}"]
    assert study.main(["digits", "seeds=1", *words]) == 1
    told = capsys.readouterr().out
    assert (
        "1 of 4 runs failed" in told and "scaffold-seed0: ValueError: no luck" in told
    )
    assert "feddyn" in (planned.folder / "study.md").read_text()
    assert (planned.folder / "study.png").stat().st_size < 150_000
    assert "no luck" in (planned.folder / "failures.log").read_text()


def test_other_settings_are_another_study(small):
    assert small().folder == small("device=cpu", "threads=2").folder
    here, there = (plan("mnist", "quick", 1, [f"data.root={r}"]) for r in "ab")
    assert here.folder != there.folder and here.extra == there.extra == ()
    assert small().folder != small("local.batch=20").folder


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["digit"], "did you mean 'digits'"),
        (["digits", "size=quik"], "did you mean 'quick'"),
        (["digits", "seeds=none"], "at least 1"),
        (["digits", "strategy=fedavg"], "the study itself sets strategy"),
        (["digits", "resume=auto"], "the study itself sets resume"),
        (["digits", "local.epoch=1"], "local.epoch"),
        (["digits", "rounds"], "is not key=value"),
        ([], "which study?"),
    ],
)
def test_mistakes_are_told_in_one_line(words, told, capsys):
    assert study.main(words) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_the_list_names_every_study(capsys):
    assert study.main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert studies() and all(name in shown for name in studies())


# The verdict.


def numbers(rounds=None, final=None):
    return {"rounds": 60, "rounds_to": {"0.9": rounds}, "final": final}


def table(lead, rival, key="rounds"):
    """Return numbers of two variants, one for each seed."""
    return {
        name: {str(seed): numbers(**{key: value}) for seed, value in enumerate(values)}
        for name, values in (("dyn", lead), ("avg", rival))
    }


@pytest.mark.parametrize(
    ("lead", "rival", "holds", "count"),
    [
        ([15, 16, 18], [30, 31, 35], True, 3),
        ([15, 16, 18], [None, 31, None], True, 3),
        ([15, 40, 18], [30, 31, 35], False, 2),
        ([15, 16, 18], [15, 16, 18], False, 0),
        ([None, None, None], [None, None, None], False, 0),
    ],
)
def test_fewer_rounds(lead, rival, holds, count):
    told = judge(ROUNDS, table(lead, rival), [0, 1, 2], "accuracy")
    assert (told["holds"], told["seeds_for"]) == (holds, count)
    assert ("does not hold" in told["text"]) is not holds


def test_the_sentence_has_the_numbers():
    told = judge(ROUNDS, table([15, 16, 18], [30, None, None]), [0, 1, 2], "accuracy")
    assert told["text"] == (
        "dyn reaches accuracy 0.9 in 16.3 ± 1.5 rounds, avg in 30.0 (1/3) rounds: "
        "the claim holds in 3 of 3 seeds."
    )
    never = judge(ROUNDS, table([9], [None]), [0], "accuracy")["text"]
    assert "avg not at all within 60 rounds" in never


def test_a_missing_run_leaves_the_verdict_open():
    told = judge(ROUNDS, table([15, 16], [30, 31]), [0, 1, 2], "accuracy")
    assert told["holds"] is None and "runs of 1 of 3 seeds are missing" in told["text"]


@pytest.mark.parametrize(
    ("metric", "lead", "rival", "holds"),
    [
        ("loss", 0.1, 0.2, True),
        ("loss", 0.2, 0.1, False),
        ("loss", None, 0.1, False),
        ("accuracy", 0.9, 0.8, True),
        ("accuracy", 0.8, 0.9, False),
        ("accuracy", 0.9, None, True),
    ],
)
def test_a_better_end(metric, lead, rival, holds):
    rule = Rule(rule="final", lead=["dyn"], rivals=["avg"])
    told = judge(rule, table([lead], [rival], "final"), [0], metric)
    assert told["holds"] is holds


def test_each_lead_has_its_own_rival():
    def told(**final):
        runs = {n: {"0": numbers(final=v)} for n, v in final.items()}
        rule = Rule(rule="paired", lead=["a", "b"], rivals=["c", "d"])
        return judge(rule, runs, [0], "accuracy")

    # a is behind d, which is not its rival.
    held = told(a=0.5, b=0.9, c=0.4, d=0.8)
    assert held["holds"] and "a 0.5 against c 0.4, b 0.9 against d 0.8" in held["text"]
    assert not told(a=0.5, b=0.7, c=0.4, d=0.8)["holds"]
    assert not told(a=0.5, b=0.8, c=0.4, d=0.8)["holds"]
    with pytest.raises(ValueError, match="as many rivals as leads"):
        Rule(rule="paired", lead=["a", "b"], rivals=["c"])


def test_of_many_pairs_the_wrong_ones_are_told():
    names = [f"a{i}" for i in range(7)]
    runs = {n: {"0": numbers(final=0.9), "1": numbers(final=0.9)} for n in names}
    runs["b"] = {"0": numbers(final=0.8), "1": numbers(final=0.8)}
    rule = Rule(rule="paired", lead=names, rivals=["b"] * 7)
    text = judge(rule, runs, [0, 1], "accuracy")["text"]
    told = "final accuracy: 7 of 7 pairs are right in every seed"
    assert text == f"{told}: the claim holds in 2 of 2 seeds."
    runs["a3"]["1"] = numbers(final=0.8)
    text = judge(rule, runs, [0, 1], "accuracy")["text"]
    assert text.startswith(
        "final accuracy: 6 of 7 pairs are right in every seed; not so a3"
    )
    assert "against b 0.8 ± 0 (1 of 2 seeds): the claim does not hold" in text


def test_dots_stand_at_the_means(tmp_path, monkeypatch):
    def end(mean, decile):
        return {"final": mean, "also": {"clients/accuracy_decile": decile}}

    drawn = {
        "avg": {"0": end(0.8, 0.5), "1": end(0.6, 0.7)},
        "dyn": {"0": end(None, 0.9), "1": end(0.9, None)},
    }
    figures = []
    monkeypatch.setattr("app.dots.canvas.save", lambda f, _: figures.append(f))
    shown = ["clients/accuracy_mean", "clients/accuracy_decile"]
    dots(drawn, "clients/accuracy_mean", shown, tmp_path / "study.png")
    (axes,) = figures[0].axes
    assert [t.get_text() for t in axes.get_yticklabels()] == ["avg", "dyn"]
    assert axes.get_xlabel() == "fraction of samples"
    places = [c[0].get_xydata().tolist() for c in axes.containers]
    assert np.allclose(places, [[[0.7, 0], [0.9, 1]], [[0.6, 0], [0.9, 1]]])
    bars = axes.containers[0][2][0].get_segments()
    assert np.ptp(bars[0][:, 0]) == pytest.approx(2 * 0.1414, rel=1e-3)


def test_a_study_draws_only_what_it_measures():
    given = read("personalization_networks").model_dump()
    with pytest.raises(ValueError, match="name the metric or one of also"):
        Study(**given | {"dots": ["accuracy"]})


def test_costs_are_relative_to_the_baseline():
    kept = {"rounds": 10, "bytes_down": 50, "bytes_up": 40, "gradients": 8}
    more = {**kept, "bytes_up": 80, "gradients": 6}
    lines = results_page.costs({"avg": {"0": kept}, "dyn": {"0": more}}, "avg")
    assert lines[0][0] == "relative to avg"
    assert lines[1][1:] == ["1.000"] * 4
    assert lines[2][1:] == ["1.000", "1.000", "2.000", "0.750"]


@pytest.mark.parametrize(
    ("lead", "rival", "holds"),
    [(1e-9, 0.1, True), (1e-3, 0.1, False), (1e-9, 1e-5, False)],
)
def test_a_limit(lead, rival, holds):
    rule = Rule(rule="limit", lead=["dyn"], rivals=["avg"], within=1e-6, beyond=1e-2)
    told = judge(rule, table([lead], [rival], "final"), [0], "distance")
    assert told["holds"] is holds


@pytest.mark.parametrize(
    ("lead", "rival", "holds"),
    [(0.9, 0.8, True), (0.89, 0.1, False), (0.95, 0.81, False), (None, -3.0, False)],
)
def test_a_limit_of_what_should_be_large(lead, rival, holds):
    rule = Rule(rule="limit", lead=["dyn"], rivals=["avg"], within=0.9, beyond=0.8)
    told = judge(rule, table([lead], [rival], "final"), [0], "influence/r2")
    assert told["holds"] is holds


def test_a_rule_wants_what_it_needs():
    with pytest.raises(ValueError, match="takes exactly lead, rivals, target"):
        Rule(rule="rounds", lead=["dyn"], rivals=["avg"])


def test_quadratics_end_where_they_should(tmp_path):
    """The claim in small: FedDyn at the minimizer, FedAvg at its closed-form limit."""
    extra = [f"output_dir={tmp_path}", "rounds=100", "evaluate_every=50"]
    planned = plan("quadratics", "quick", 1, extra)
    for job in planned.jobs:
        if job.variant in ("fedavg", "feddyn"):
            run_local(job.overrides, [], lambda _: None)
    ends = {n: s["0"]["final"] for n, s in summarize(planned)["variants"].items()}
    # FedAvg ends at [sum P_k]^-1 sum P_k A_k^-1 b_k with P_k = I - (I - 0.05 A_k)^5.
    a, b = QUADRATICS_A, QUADRATICS_B
    p = np.eye(2) - np.linalg.matrix_power(np.eye(2) - 0.05 * a, 5)
    pull = p @ np.linalg.solve(a, b[..., None])
    limit = np.linalg.solve(p.sum(0), pull.sum(0))[:, 0]
    away = np.linalg.norm(limit - np.linalg.solve(a.sum(0), b.sum(0)))
    assert ends["fedavg"] == pytest.approx(away, rel=1e-9)
    assert ends["feddyn"] < 1e-6


# The page.


def test_the_page_is_what_the_summaries_say():
    if not list((DOCS / "results").glob("*.json")):
        assert not (DOCS / "results.md").exists()
        pytest.skip("no study has been published")
    assert (DOCS / "results.md").read_text(encoding="utf-8") == page(DOCS / "results")


@pytest.mark.parametrize("file", sorted((DOCS / "results").glob("*.json")), ids=str)
def test_a_published_verdict_follows_from_its_numbers(file):
    kept = json.loads(file.read_text(encoding="utf-8"))
    rule = Rule(**kept["rule"])
    told = judge(rule, compared(kept), kept["seeds"], kept["metric"])
    assert told == kept["verdict"]
    if "tuning" in kept:
        by, methods = kept["tuning"]["by"], kept["tuning"]["methods"]
        again = chosen(Tuning(by=by, methods=methods), kept["variants"])
        assert again == kept["tuning"]["chosen"]
    assert file.with_suffix(".png").stat().st_size < 150_000


@pytest.mark.parametrize("missing", ["fedavg-0.1", "fedavg-0.3", ""])
def test_a_study_with_runs_missing_is_told_as_far_as_it_goes(missing):
    """Of the baseline's grid, or of everything: no cost relative to it, and no verdict."""
    kept = json.loads((DOCS / "results" / "personalization_baselines.json").read_text())
    for name, runs in kept["variants"].items():
        if not missing or name == missing:
            runs.pop("1")
    if not missing:
        kept["variants"] = {n: {} for n in kept["variants"]}
    kept["tuning"]["chosen"] = chosen(
        Tuning(**{k: kept["tuning"][k] for k in ("by", "methods")}), kept["variants"]
    )
    text = body(kept, "study.png")
    assert "relative to fedavg" not in text
    assert "no verdict" in text


def test_what_a_target_cost_stands_beside_its_round(tmp_path):
    records = [
        {
            "round": r,
            "accuracy": 0.2 * r,
            "bytes": {"down": {"model": 10}, "up": {"model": 5}},
            "seconds": {"round": 2.0},
        }
        for r in (1, 2, 3, 4)
    ]
    run = Run(tmp_path, {}, records, None)
    told = measure(run, "accuracy", [0.5, 0.9])
    assert told["rounds_to"] == {"0.5": 3, "0.9": None}
    assert told["spent_to"] == {"0.5": {"bytes": 45, "seconds": 6}, "0.9": None}
    table = {"avg": {"0": told, "1": told}}
    (head, line) = results_page.cells(table, "accuracy", [0.5, 0.9], 0.5)
    cells = dict(zip(head, line, strict=True))
    assert cells["MB to ≥ 0.5"] == "4.5e-05 ± 0" and cells["s to ≥ 0.5"] == "6 ± 0"
    (head, line) = results_page.cells(table, "accuracy", [0.5, 0.9], 0.9)
    assert dict(zip(head, line, strict=True))["MB to ≥ 0.9"] == "- (0/2)"
    del told["spent_to"]  # as results published before
    assert not any(
        h.startswith("MB to") for h in results_page.cells(table, "x", [], 0.5)[0]
    )


def test_others_numbers_stand_below_ours():
    given = {
        "targets": [0.8, 0.9],
        "reference": {
            "source": "their paper says",
            "rounds_to": {"avg": {"0.80": 33, "0.9": None}, "dyn": {"0.8": 4.5}},
        },
    }
    text = results_page.reference(given)
    assert "For comparison, their paper says:" in text
    assert "| avg | 33 | - |" in text and "| dyn | 4.5 | - |" in text
    assert results_page.reference({"targets": [0.8]}) == ""


def test_publishing_keeps_the_numbers_and_makes_the_page(small, tmp_path):
    planned = small()
    study.run(planned, quiet())
    for file in planned.folder.rglob("environment.json"):  # of runs made elsewhere
        told = json.loads(file.read_text())
        assert told["machine"]["device"] == "cpu"
        told["machine"]["device"] = "a GPU"
        file.write_text(json.dumps(told))
    result, docs = summarize(planned), tmp_path / "docs"
    assert result["machine"]["device"] == "a GPU"
    curves = (planned.folder / "study.png").read_bytes()
    ends = planned.study.model_copy(update={"dots": ("accuracy",)})
    assert summarize(replace(planned, study=ends)) == result
    assert (planned.folder / "study.png").read_bytes() != curves
    docs.mkdir()
    publish(result, planned.folder, docs)
    kept = json.loads((docs / "results" / "digits.json").read_text())
    assert kept == json.loads(json.dumps(result)) and str(tmp_path) not in str(kept)
    text = (docs / "results.md").read_text()
    assert text == page(docs / "results")
    assert kept["claim"] in text and kept["verdict"]["text"] in text
    job = planned.jobs[
        0
    ]  # whose place could not be made free: what lies there is another
    assert str(job.seed) not in summarize(planned, {job.name})["variants"].get(
        job.variant, {}
    )
    result["verdict"]["holds"] = None
    with pytest.raises(UserError, match="runs are missing"):
        publish(result, planned.folder, docs)
    (docs / "results" / "digits.json").write_text("{}")
    with pytest.raises(UserError, match="no summary of a study"):
        results_page.page(docs / "results")
