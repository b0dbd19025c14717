"""A run's summary as text of at most a screen."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def screen(summary: Mapping[str, Any], path: Path) -> str:
    """Return the summary as aligned lines; what was not measured has no line."""

    def number(key: str, form: str = ".4g") -> str:
        value = summary.get(key)
        return "not finite" if value is None else format(value, form)

    lines = [("run", str(path))]
    what = [str(summary[k]) for k in ("strategy", "data") if summary.get(k) is not None]
    if what:
        lines.append(("what", f"{' on '.join(what)}, seed {summary.get('seed')}"))
    lines.append(("status", f"{summary.get('status')} after {number('rounds')} rounds"))
    model = summary.get("reported_model")
    of = f" of the {model} model" if model else ""
    scored = summary.get("accuracy") is not None  # a regression has none
    if scored:
        text = number("accuracy", ".4f") + of
        if summary.get("best_accuracy") is not None:
            best, at = number("best_accuracy", ".4f"), summary.get("best_round")
            text += f"; best {best} in round {at}"
        lines.append(("accuracy", text))
    if summary.get("loss") is not None or model:
        lines.append(("loss", number("loss") + ("" if scored else of)))
    lines += _clients(summary.get("clients") or {})
    for target, at in (summary.get("rounds_to") or {}).items():
        reached = "not reached" if at is None else f"round {at}"
        lines.append((f"accuracy {target}", reached))
    if "bytes_down" in summary and "bytes_up" in summary:
        down, up = ((summary[k] or 0) / 1e6 for k in ("bytes_down", "bytes_up"))
        lines.append(("traffic", f"{down:,.2f} MB down, {up:,.2f} MB up"))
    if summary.get("gradients") is not None:
        lines.append(("gradients", number("gradients", ",")))
    if "seconds" in summary:
        lines.append(("time", f"{number('seconds', '.1f')} s"))
    if summary.get("failures"):
        lines.append(("failures", f"{summary['failures']} client rounds (clients.csv)"))
    if summary.get("failures") and not summary.get("gradients"):
        lines.append(
            ("", "no client's training counted: see the errors in clients.csv")
        )
    width = max(len(key) for key, _ in lines)
    return "\n".join(f"{key:<{width}}  {text}" for key, text in lines)


def _clients(told: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what the clients measured on their own samples, at the end and as chosen."""

    def pair(block: Mapping[str, Any]) -> str:
        mean, decile = block["accuracy_mean"], block["accuracy_decile"]
        return f"{mean:.4f} in the mean, {decile:.4f} of the worst decile"

    lines = []
    if told.get("accuracy_mean") is not None:
        common = told.get("judge") == "test"
        where = "the test set" if common else "their own samples"
        lines.append(("clients", f"{pair(told)}, on {where}"))
    best = told.get("chosen") or {}
    if best.get("accuracy_mean") is not None:
        lines.append(("chosen", f"{pair(best)}, received in round {best['round']}"))
    return lines
