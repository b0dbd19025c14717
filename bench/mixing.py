"""`./run.sh bench mixing`: seconds for one Push-Sum mixing and for a relay round without training.

A mixing reads and writes x once and reads a row for each share: at 10 GB/s it is bound by
4 n d (shares / n + 1) / 10^10 seconds in float32, which is printed beside the best of eight, and
beside the same from the best of eight copies of x made in between, on one core. The relay's round
is all but training: the clients' blocks packed, unpacked, checked, taken in, mixed, audited and
measured.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from strategies.fedavg import FedAvg
from strategies.network import Network
from strategies.pushsum import State, mix
from strategies.relay import Relay
from strategies.sgp import SGP
from strategies.topology import Edges, exponential, one_peer_exponential
from strategies.wire import pack, unpack

SIZES = (
    (10, 2_000_000),
    (100, 1_000_000),
    (1_000, 100_000),
    (10_000, 10_000),
    (100_000, 1_000),
    (10_000, 1_000),
)
TOPOLOGIES: dict[str, Callable[[int, int], Edges]] = {
    "one_peer_exponential": one_peer_exponential,
    "exponential": exponential,
}
BANDWIDTH = 1e10


def mixing(
    n: int, d: int, make: Callable[[int, int], Edges]
) -> tuple[float, float, float]:
    """Return the best seconds of a mixing, its bound at 10 GB/s, and by copies in between."""
    x = np.zeros((n, d), dtype=np.float32)
    x[:, ::97] = 1.0
    state, network = State.of(x), Network(n, 0, make(n, 0))
    links, best, copied = [network.at(t) for t in range(8)], np.inf, np.inf
    target = np.ones_like(x)
    for link in links:
        began = time.perf_counter()
        mix(link, state)
        best = min(best, time.perf_counter() - began)
        began = time.perf_counter()
        np.copyto(target, x)
        copied = min(copied, time.perf_counter() - began)
    moved = max(link.P.nnz for link in links) / n + 1
    # A copy moves x twice.
    return best, 4 * n * d * moved / BANDWIDTH, copied * moved / 2


def relaying(n: int, d: int, rounds: int = 5) -> dict[str, float]:
    """Return the median seconds of each part of a relay's round, two nodes, no training."""
    network = Network(n, 0, one_peer_exponential(n, 0))
    theta = torch.zeros(d)
    relay = Relay(SGP(FedAvg("uniform")), network, theta, theta[:0], per_round=n)
    roster = relay.roster
    roster.samples = dict.fromkeys(range(n), 1)
    roster.mean_samples = 1.0
    relay._begin()
    parts: dict[str, list[float]] = {
        "message": [],
        "take in": [],
        "mix": [],
        "tell": [],
    }
    halves = [np.arange(n)[i::2] for i in range(2)]
    for t in range(rounds):
        marks = [time.perf_counter()]
        model = relay.carried["model"]
        for rows in halves:
            down = pack({"theta": torch.from_numpy(model.z(rows)).reshape(-1)})
            unpack(down, {"theta": len(rows) * d}, torch.float32)
        marks.append(time.perf_counter())
        for rows in halves:
            up = pack({"delta": torch.full((len(rows) * d,), 1e-3)})
            change = unpack(up, {"delta": len(rows) * d}, torch.float32)["delta"]
            weight = torch.from_numpy(relay.weights[rows]).float()
            change = relay.algorithm.scaled(change.view(len(rows), d) * weight[:, None])
            relay.algorithm.take(relay.carried, relay.kept, rows, change.numpy())
        marks.append(time.perf_counter())
        relay.links = network.at(t)
        relay._mix(t + 1)
        marks.append(time.perf_counter())
        relay._report()
        marks.append(time.perf_counter())
        for name, (a, b) in zip(parts, pairwise(marks), strict=True):
            parts[name].append(b - a)
    return {name: float(np.median(found)) for name, found in parts.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="./run.sh bench mixing", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--largest", type=float, default=1e8, help="numbers in x")
    given = parser.parse_args(argv)
    console = Console()
    table = Table(
        "clients x parameters", "topology", "ms", "at 10 GB/s", "by a copy", "ratio"
    )
    for n, d in SIZES:
        if n * d > given.largest:
            continue
        for name, make in TOPOLOGIES.items():
            found = mixing(n, d, make)
            row = [f"{seconds * 1e3:.1f}" for seconds in found]
            table.add_row(f"{n:,} x {d:,}", name, *row, f"{found[0] / found[1]:.2f}")
    console.print(table)
    parts = relaying(1_000, 7_850)
    told = ", ".join(f"{name} {seconds * 1e3:.0f}" for name, seconds in parts.items())
    total = sum(parts.values()) * 1e3
    console.print(f"relay round, 1,000 clients x 7,850: {total:.0f} ms ({told})")
    return 0
