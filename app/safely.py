"""One client must not cost the others theirs: its failure is told, and they go on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from logging import WARNING
from typing import Any, TypeVar

from flwr.common.logger import log

from strategies.algorithm import Vectors
from strategies.engine import train
from strategies.local import Job, Trained, Trainer

Row = TypeVar("Row")


def brief(error: Exception) -> str:
    """Return an exception in one line of at most 300 letters."""
    return f"{type(error).__name__}: {error}"[:300]


def one_by_one(clients: Iterable[int], judged: Callable[[int], Row]) -> dict[int, Row]:
    """Return what is found for each client, without those that cannot be judged."""
    found: dict[int, Row] = {}
    for k in clients:
        try:
            found[k] = judged(k)
        except Exception as error:
            log(WARNING, "client %s cannot be judged: %s", k, brief(error))
    return found


def trained(
    run: Trainer,
    down: Vectors,
    jobs: list[Job],
    round_: int,
    engine: str,
    faults: dict[str, Any],
) -> Iterator[tuple[str, Trained]]:
    """Train, and find out who is at fault if it raises.

    With each result comes the engine that it is from. ``faults`` gets client id and reason of
    those that did not train.
    """
    try:
        if engine == "vmap":
            whole = list(train(run, down, jobs, round_, engine))
            yield from ((engine, part) for part in whole)
            return
    except Exception as error:
        log(
            WARNING,
            "vectorized training failed (%s); client after client",
            brief(error),
        )
    for job in jobs:
        try:
            alone = list(train(run, down, [job], round_))
            yield from (("loop", part) for part in alone)
        except Exception as error:
            faults[str(job.client.id)] = brief(error)
