"""What a study's numbers say about its claim.

A verdict is computed from numbers alone, seed by seed, by the rule that the study
states before anything is run; no study has a verdict of its own making.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import model_validator

from app.binding import Model
from app.records import falls
from app.tables import Spread

DISTANCE = "distance"  # of the final model to the known minimizer of the quadratics
#: Pairs up to which a verdict's sentence tells them all.
FEW = 6

Numbers = Mapping[str, Any]
#: From variant to seed (as text, since JSON knows no other keys) to a run's numbers.
Table = Mapping[str, Mapping[str, Numbers]]


class Rule(Model):
    """How a verdict follows from the numbers: each lead against each rival, by seed.

    Attributes
    ----------
    rule : {"rounds", "final", "paired", "limit"}
        ``rounds``: the lead reaches ``target`` in fewer rounds; a rival that never
        reaches it is behind a lead that does. ``final``: the lead ends at a better
        value; NaN is behind everything. ``paired``: the same, but each lead is held against
        the rival in its own place alone. ``limit``: leads end at ``within`` or better,
        rivals at ``beyond`` or worse.
    lead, rivals : list of str
        Variants.
    target, within, beyond : float, optional
        What the rule needs.
    """

    rule: Literal["rounds", "final", "paired", "limit"]
    lead: list[str]
    rivals: list[str]
    target: float | None = None
    within: float | None = None
    beyond: float | None = None

    @model_validator(mode="after")
    def _needs(self) -> Self:
        needed = {"rounds": {"target"}, "limit": {"within", "beyond"}}
        optional = {"target": self.target, "within": self.within, "beyond": self.beyond}
        given = {key for key, value in optional.items() if value is not None}
        wanted = needed.get(self.rule, set())
        if given != wanted or not self.lead or not self.rivals:
            words = ", ".join(["lead", "rivals", *sorted(wanted)])
            raise ValueError(f"rule {self.rule} takes exactly {words}")
        if self.rule == "paired" and len(self.lead) != len(self.rivals):
            raise ValueError("rule paired takes as many rivals as leads")
        return self


def better(metric: str) -> bool:
    """Return whether a smaller value of the metric is the better one."""
    return metric == DISTANCE or falls(metric)


def judge(
    rule: Rule, table: Table, seeds: Sequence[int], metric: str
) -> dict[str, Any]:
    """Return what the numbers say about the claim.

    Returns
    -------
    dict
        ``holds`` (in every seed; None if a run is missing), ``seeds_for`` of
        ``seeds_judged``, and ``text``, a sentence with the numbers.
    """
    names = [*rule.lead, *rule.rivals]
    judged = [s for s in map(str, seeds) if all(s in table.get(n, {}) for n in names)]
    won = [s for s in judged if _ahead(rule, table, s, metric)]
    holds = bool(judged) and len(won) == len(judged)
    count = f"{len(won)} of {len(judged)} seeds"
    end = (
        f"the claim holds in {count}."
        if holds
        else f"the claim does not hold ({count})."
    )
    missing = len(seeds) - len(judged)
    if missing:
        end = f"no verdict, as runs of {missing} of {len(seeds)} seeds are missing."
    text = f"{_evidence(rule, table, judged, metric)}: {end}" if judged else end
    return {
        "holds": None if missing else holds,
        "seeds_for": len(won),
        "seeds_judged": len(judged),
        "text": text,
    }


def _value(rule: Rule, table: Table, name: str, seed: str, metric: str) -> float:
    """Return the number of a run that is compared."""
    numbers = table[name][seed]
    if rule.rule == "rounds":
        at = numbers["rounds_to"][f"{rule.target:g}"]
        return math.inf if at is None else at
    # A run that ended at NaN is behind every other.
    worst = math.inf if better(metric) else -math.inf
    return worst if numbers["final"] is None else float(numbers["final"])


def _right(rule: Rule, table: Table, seed: str, metric: str) -> list[bool]:
    """Return for each pair whether its lead is better than its rival in one seed."""
    sign = -1 if better(metric) else 1
    found = []
    for pair in zip(rule.lead, rule.rivals, strict=True):
        a, b = (sign * _value(rule, table, name, seed, metric) for name in pair)
        found.append(a > b)
    return found


def _ahead(rule: Rule, table: Table, seed: str, metric: str) -> bool:
    """Return whether every lead is ahead of every rival in one seed."""
    if rule.rule == "paired":
        return all(_right(rule, table, seed, metric))
    leads, rivals = (
        [_value(rule, table, name, seed, metric) for name in names]
        for names in (rule.lead, rule.rivals)
    )
    if rule.rule == "limit":
        assert rule.within is not None and rule.beyond is not None
        if better(metric):
            return max(leads) <= rule.within and min(rivals) >= rule.beyond
        return min(leads) >= rule.within and max(rivals) <= rule.beyond
    if rule.rule == "final" and not better(metric):
        return min(leads) > max(rivals)
    return max(leads) < min(rivals)


def _evidence(rule: Rule, table: Table, seeds: Sequence[str], metric: str) -> str:
    """Return the numbers that the verdict rests on, in words."""
    parts = []
    names = [*rule.lead, *rule.rivals]
    if rule.rule == "paired":
        names = [n for pair in zip(rule.lead, rule.rivals, strict=True) for n in pair]
    for name in names:
        runs = [table[name][s] for s in seeds]
        if rule.rule == "rounds":
            spread = Spread.of(r["rounds_to"][f"{rule.target:g}"] for r in runs)
            within = max(r["rounds"] for r in runs)
            text = f"in {spread.text('.1f')} rounds"
            text = text if spread.values else f"not at all within {within} rounds"
        else:
            text = Spread.of(r["final"] for r in runs).text(".3g")
        parts.append(f"{name} {text}")
    if rule.rule == "rounds":
        first, *rest = parts
        name, _, number = first.partition(" ")
        head = f"{name} reaches {metric} {rule.target:g} {number}"
        return ", ".join([head, *rest])
    if rule.rule == "paired":
        parts = [
            f"{a} against {b}" for a, b in zip(parts[::2], parts[1::2], strict=True)
        ]
    if rule.rule == "paired" and len(parts) > FEW:
        right = zip(*(_right(rule, table, s, metric) for s in seeds), strict=True)
        won = [sum(pair) for pair in right]
        count = f"{won.count(len(seeds))} of {len(won)} pairs are right in every seed"
        others = [
            f"{part} ({n} of {len(seeds)} seeds)"
            for part, n in zip(parts, won, strict=True)
            if n < len(seeds)
        ]
        parts = [f"{count}; not so {others[0]}", *others[1:]] if others else [count]
    return f"final {metric}: {', '.join(parts)}"
