"""What a run tells a person: a line for each round, and what it came to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from app.config import Config
from strategies.acceptance import SCORES
from strategies.hyper_wire import Told


def line(record: dict[str, Any], rounds: int, pace: float) -> str:
    """Return one line about a round, with the time left.

    Parameters
    ----------
    record : dict
        The round's record.
    rounds : int
        How many rounds there will be.
    pace : float
        Seconds that a round has taken so far.
    """
    round_, clients = record["round"], record["clients"]
    parts = [f"round {round_}/{rounds}"]
    if "accuracy" in record:
        parts.append(f"accuracy {record['accuracy']:.4f} ({record['reported_model']})")
    if "loss" in record:
        parts.append(f"loss {record['loss']:.4g}")
    if clients["failed"]:
        shown = list(clients["failed"])
        more = f" and {len(shown) - 9} more" if len(shown) > 9 else ""
        parts.append(f"left out: clients {', '.join(shown[:9])}{more}")
    left = math.ceil(pace * (rounds - round_))
    clock = f"{left // 60}:{left % 60:02d}"
    parts.append(f"{record['seconds']['round']:.2f} s, {clock} left")
    return "  ".join(parts)


def summarize(config: Config, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what the records of a run came to, for its summary.json."""
    judged = [r for r in records if r.get("accuracy") is not None]
    best = max(judged, key=lambda r: r["accuracy"], default={})
    last: dict[str, Any] = next((r for r in reversed(records) if "loss" in r), {})
    rounds_to = {
        f"{t:g}": next((r["round"] for r in judged if r["accuracy"] >= t), None)
        for t in config.targets
    }
    sides = {
        side: sum(sum(r["bytes"][side].values()) for r in records if "bytes" in r)
        for side in ("down", "up")
    }
    return {
        "strategy": config.strategy.name,
        "data": config.data.name,
        "seed": config.seed,
        "rounds": records[-1]["round"],
        "reported_model": last.get("reported_model"),
        "accuracy": last.get("accuracy"),
        "loss": last.get("loss"),
        "best_accuracy": best.get("accuracy"),
        "best_round": best.get("round"),
        "rounds_to": rounds_to if judged else {},
        "bytes_down": sides["down"],
        "bytes_up": sides["up"],
        "gradients": sum(r.get("gradients", 0) for r in records),
        "failures": sum(len(r["clients"]["failed"]) for r in records if "clients" in r),
    }


def clients_block(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and bottom decile over clients of what each measured on its own samples."""
    block: dict[str, Any] = {}
    trained = [r for r in rows if "train_loss" in r]
    if trained:
        weight = sum(r["samples"] for r in trained)
        block["train_loss"] = (
            sum(r["train_loss"] * r["samples"] for r in trained) / weight
        )
    for role, prefix in (("train", ""), ("holdout", "holdout_")):
        for metric in SCORES:
            values = torch.tensor(
                [r[metric] for r in rows if r["role"] == role and metric in r],
                dtype=torch.float64,
            )
            if len(values):
                block[f"{prefix}{metric}_mean"] = float(values.mean())
            if len(values) and metric == "accuracy":
                block[f"{prefix}{metric}_decile"] = float(values.quantile(0.1))
    return block


def chosen(
    before: Sequence[dict[str, Any]], round_: int, block: dict[str, Any]
) -> dict[str, Any]:
    """Return what clients told in the round that validation prefers, of all up to this one.

    The mean accuracy on the clients' validation samples decides, without one the mean loss; of
    equal rounds the first. Empty where nothing was kept for validation.

    Parameters
    ----------
    before : sequence of dict
        The records of earlier rounds.
    round_ : int
        This one.
    block : dict
        What its clients told (see `clients_block`).
    """
    told = [r["clients"].get("chosen") for r in before if "clients" in r]
    best: dict[str, Any] = next((c for c in reversed(told) if c), {})

    def rank(found: dict[str, Any]) -> float:
        worst = -found["validation_loss_mean"]
        return float(found.get("validation_accuracy_mean", worst))

    if "validation_loss_mean" not in block or (best and rank(best) >= rank(block)):
        return best
    names = [n for n in block if n.split("_")[0] in ("loss", "accuracy", "validation")]
    return {"round": round_, **{n: block[n] for n in names}}


def training_block(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the mean over clients of what the local optimizer tells of their training."""
    told = [r["metrics"] for r in rows if "metrics" in r]
    names = told[0] if told else ()
    return {name: sum(t[name] for t in told) / len(told) for name in names}


def cost(told: Told, record: Mapping[str, Any]) -> dict[str, float]:
    """Return what an estimate has cost, in rounds of training like the one before it."""
    # Of a run that goes on after its end, clients may have measured before this.
    sent = [{**kinds, "hyper": 0} for kinds in record["bytes"].values()]
    down, up, *rounds = (sum(kinds.values()) for kinds in (told.down, told.up, *sent))
    pairs = {
        # An exchange asks every node once, as a round does.
        "messages": (told.exchanges, 1),
        "bytes": (down + up, sum(rounds)),
        "link_bytes": (told.link_bytes, record["strategy"].get("link_bytes", 0)),
    }
    return {name: mine / one for name, (mine, one) in pairs.items() if one}
