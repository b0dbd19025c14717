"""What holds in every run, whatever was killed meanwhile: the invariants, from its own files."""

from __future__ import annotations

from collections.abc import Callable

import torch
from conftest import Result

from app import checkpoint
from app.store import DirectoryStore

#: A setting for each algorithm that keeps something, at the clients or at the server.
STATEFUL = {
    "FedDyn": ("strategy=feddyn",),
    "SCAFFOLD": ("strategy=scaffold",),
    "Fed-Sophia": ("strategy=fedsophia", "optimizer.tau=3"),
    "Push-Sum": (
        *("strategy=pushsum", "topology=k_out"),
        *("faults.loss=0.3", "faults.policy=running"),
    ),
    "Push-DIGing": ("strategy=push_diging", "topology=exponential"),
    "FedOptHyper": (
        *("strategy=fedopt_hyper", "strategy.optimizer=adam", "strategy.momentum=0.5"),
        "strategy.server_lr=0.05",
        *("strategy.client_lr=true", "optimizer=tuned_sgd"),
    ),
}
#: Those, and clients with models or hyper-parameters of their own.
EVERY = {
    **STATEFUL,
    "Ditto": ("strategy=ditto",),
    "HGP": (
        *("strategy=pushsum", "topology=stochastic_directed", "strategy.judge=own"),
        *("personal=hgp", "personal.every=1", "personal.depth=2", "dtype=float64"),
        "personal.power_steps=1",
        *("partition.alpha=1", "client_validation=0.25", "client_test=0.2"),
        "clients_per_round=6",
    ),
}
#: What a client remembers, and the server's vector that is its mean over all clients.
MEANS = {"FedDyn": ("gradient", "h"), "SCAFFOLD": ("control", "control")}


def audited(
    result: Result,
    name: str,
    clients: int,
    stores: Callable[[str], list[DirectoryStore]],
) -> float:
    """Assert the invariants of a finished run.

    Parameters
    ----------
    result : Result
        Its last round has a checkpoint.
    name : str
        A name of `EVERY`.
    clients : int
        How many there are.
    stores : callable
        From the run's key to the places where clients' memories are.

    Returns
    -------
    float
        The largest relative gap: of h and the mean of the memories, relative to the memories (they
        cancel: at the optimum h is zero and they are not), or of the sums of mass.
    """
    rounds = [r["round"] for r in result.records]
    assert rounds == list(range(rounds[-1] + 1)), "a round is missing, or there twice"
    found = checkpoint.newest(result.path / "checkpoints")
    assert found is not None and found[0] == rounds[-1]
    _, vectors, rest = found
    ledger = {int(k): round_ for k, round_ in rest["ledger"].items()}
    accepted: dict[int, int] = {}
    gaps = [0.0]
    for record in result.records[1:]:
        accepted |= dict.fromkeys(record["clients"]["cohort"], record["round"])
        gaps.append(record["checks"].get("memory_gap", 0.0))
        if mass := record["strategy"].get("mass"):
            total = mass["w"] + mass["w_in_flight"] + mass["w_lost"]
            gaps += [abs(total / clients - 1), mass["x_gap"], mass["w_gap"]]
    assert ledger == accepted, "the ledger is not that of the replies that counted"
    if name in MEANS:
        memory, mirror = MEANS[name]
        like = {memory: vectors[mirror]}
        places, kept = stores(rest["run"]), []
        for k, version in ledger.items():
            (store,) = [s for s in places if version in s.versions(k)]
            kept.append(store.load(k, version, like)[memory].double())
        off = torch.linalg.vector_norm(sum(kept) / clients - vectors[mirror].double())
        scale = sum(map(torch.linalg.vector_norm, kept)) / clients
        gaps.append(float(off / scale))
    assert max(gaps) < 1e-5, gaps
    return max(gaps)
