"""`python -m app.study`: a study runs a claim's variants and says whether it holds.

    python -m app.study --list
    python -m app.study digits size=quick seeds=3 [further overrides for all runs]
    python -m app.study digits --publish

A study is a preset of ``conf/experiment`` with a section ``study`` (docs/studies.md).
Each variant and seed is an ordinary run below ``runs/studies/NAME-SIZE``. What has
finished is not run again, so a study that was interrupted goes on where it stopped.
"""

import argparse
import shutil
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml
from rich.console import Console

from app import checkpoint, results, results_page
from app.alone import hold
from app.config import load
from app.errors import UserError
from app.plan import Job, Plan, plan, read, studies
from app.progress import Board
from app.records import read_summary
from app.resume import differing
from app.run_config import quote
from app.tables import show


def settle(job: Job, folder: Path) -> tuple[bool, tuple[str, ...]]:
    """Look at what is left of a job, and make room for it if it has to run.

    A finished run of the same settings counts. An unfinished one is resumed from its
    checkpoint, or removed if it has none. What has other settings, as after a change of the
    preset, is kept below ``replaced``.

    Returns
    -------
    tuple
        Whether it is done, and the overrides to run it with if not.
    """
    path = folder / job.name
    if not path.exists():
        return False, job.overrides
    try:
        there = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        there = None  # it died before it wrote, or while it did
    same = not differing(load(job.overrides), there, free=())
    if read_summary(path) is None:
        begun = checkpoint.newest(path / "checkpoints") is not None
        if same and begun:
            return False, (*job.overrides, f"resume={quote(str(path.resolve()))}")
        if not begun:
            shutil.rmtree(path)
            return False, job.overrides
    elif same:
        return True, job.overrides
    aside = folder / "replaced"
    aside.mkdir(exist_ok=True)
    number = sum(1 for _ in aside.glob(f"{job.name}-*")) + 1
    path.rename(aside / f"{job.name}-{number}")
    return False, job.overrides


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a study's directory: two processes would remove each other's runs."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}.") from error
    with hold(folder / ".lock", f"{folder}: the study is being run there."):
        yield


def run(plan: Plan, console: Console) -> dict[str, str]:
    """Run what has not finished, and return the failures: why, by the run's name."""
    from app.experiment import run_local

    failures: dict[str, str] = {}
    with _alone(plan.folder), Board(console, len(plan.jobs)) as board:
        for job in plan.jobs:
            try:
                done, overrides = settle(job, plan.folder)
                if done:
                    board.skip(job.name)
                    continue
                board.start(job.name, load(overrides).rounds)
                run_local(overrides, [board.advance], lambda _: None)
            except Exception as error:
                failures[job.name] = f"{type(error).__name__}: {error}".splitlines()[0]
                if isinstance(error, UserError):
                    failures[job.name] = str(error)
                else:
                    with open(plan.folder / "failures.log", "a") as file:
                        file.write(f"{job.name}\n{traceback.format_exc()}\n")
            board.end(job.name, failures.get(job.name))
    return failures


def listing() -> list[list[str]]:
    """Return what there is: name, sizes with their minutes on two cores, claim."""
    lines = [["study", "minutes (seeds)", "claim"]]
    for name in studies():
        study = read(name)
        sizes = [f"{n} {s.minutes:g} ({s.seeds})" for n, s in study.sizes.items()]
        lines.append([name, ", ".join(sizes), study.claim])
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns
    -------
    int
        0; 1 if runs failed, 2 after a user's mistake, 130 if interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="python -m app.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words", nargs="*", metavar="NAME [size=S] [seeds=N] [KEY=VALUE]"
    )
    parser.add_argument("--list", action="store_true", help="say what there is")
    parser.add_argument(
        "--page", action="store_true", help="make docs/results.md again"
    )
    parser.add_argument(
        "--publish", action="store_true", help="keep the result in docs"
    )
    given = parser.parse_intermixed_args(argv)
    try:
        if given.list or given.page:
            if given.list:
                show_list()
            else:
                results_page.write_page()
            return 0
        if not given.words:
            raise UserError(f"which study? One of {', '.join(studies())}; or --list.")
        return _study(given.words, given.publish)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def show_list() -> None:
    """Print the studies."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 1, 0))
    (*head, last), *rows = listing()
    for name in head:
        table.add_column(name, no_wrap=True)
    table.add_column(last)
    for row in rows:
        table.add_row(*row)
    Console(markup=False, highlight=False).print(table)


def _study(words: Sequence[str], publishing: bool) -> int:
    """Run one study and tell what came of it."""
    name, *rest = words
    options = {"size": "quick", "seeds": ""}
    extra = []
    for word in rest:
        key, _, value = word.partition("=")
        if key in options:
            options[key] = value
        else:
            extra.append(word)
    if options["seeds"] and not (
        options["seeds"].isdecimal() and int(options["seeds"])
    ):
        raise UserError(f"seeds={options['seeds']}: how many, at least 1.")
    seeds = int(options["seeds"]) if options["seeds"] else None
    planned = plan(name, options["size"], seeds, extra)
    console = Console(markup=False, highlight=False, soft_wrap=True)
    size = planned.study.sizes[planned.size]
    minutes = size.minutes * planned.seeds / size.seeds
    console.print(f"study {name}: {planned.study.claim}")
    console.print(f"{len(planned.jobs)} runs, about {minutes:.2g} minutes on two cores")
    console.print(f"directory: {planned.folder}")
    failures = run(planned, console)
    result = results.summarize(planned, failures)
    if result:
        metric, focus = result["metric"], planned.study.verdict.target
        show(results_page.cells(result["variants"], metric, planned.targets, focus))
        for line in results_page.models(result["variants"], planned.targets):
            console.print(line)
        console.print(f"verdict: {result['verdict']['text']}")
        console.print(f"{planned.folder / 'study.md'}, {planned.folder / 'study.png'}")
    if failures:
        listed = [f"{run}: {why}" for run, why in failures.items()]
        console.print(f"{len(failures)} of {len(planned.jobs)} runs failed:")
        for line in listed:
            console.print(f"  {line}")
    if publishing and (failures or not result):
        raise UserError(f"{name}: not published, since runs are missing.")
    if publishing and result:
        results.publish(result, planned.folder)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
