"""A run's network on one page: who sends to whom, how much, and how the clients come together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
from matplotlib.figure import Figure

from app import canvas
from app.records import Records, series
from strategies.network import Network, delivered

#: Clients up to which the graph itself is drawn.
DRAWN = 64
#: Rounds whose mean is shown.
SHOWN = 16
#: Clients above which a heat map shows blocks of clients.
CELLS = 256


def draw(network: Network, records: Records, path: Path, title: str = "") -> None:
    """Draw a network: its graph (up to 64 clients), the mean of P(t), and its diagnostics.

    Parameters
    ----------
    network : Network
        Topology, weights and faults; its first rounds are shown.
    records : list of dict
        The round records of the run.
    path : Path
        The PNG to write, replaced as a whole.
    title : str
        Above the figure.
    """
    rounds = max(1, min(SHOWN, len(records) - 1))
    P: Any = sum(delivered(network.at(t), network.faults.policy) for t in range(rounds))
    P = P / rounds
    figure = Figure(figsize=(9.6, 7.2), layout="constrained")
    small = network.n <= DRAWN
    if small:
        _graph(figure.add_subplot(2, 2, 1), P, rounds)
    _heat(figure, figure.add_subplot(2, 2, 2 if small else 1), P, rounds)
    _lines(figure.add_subplot(2, 2, 3), records, "strategy/consensus_distance", 0)
    axes = figure.add_subplot(2, 2, 4)
    for index, (metric, label) in enumerate(
        (
            ("strategy/min_weight", "least weight of a client"),
            ("strategy/contraction", "disagreement left by a round"),
            ("strategy/mass/w_lost", "weight lost"),
            ("strategy/mass/w_in_flight", "weight in flight"),
        )
    ):
        x, y = series(records, metric)
        if index < 2 or np.any(y > 0):
            canvas.line(axes, x, y, label, index)
    axes.set(xlabel="communication round", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.suptitle(canvas.literal(title))
    canvas.save(figure, path)


def _graph(axes: Any, P: Any, rounds: int) -> None:
    """Draw the arcs on a circle, the more often used the darker."""
    parts = P.tocoo()
    graph = nx.DiGraph()
    graph.add_nodes_from(range(P.shape[0]))
    off = parts.row != parts.col
    graph.add_weighted_edges_from(
        zip(parts.col[off], parts.row[off], parts.data[off], strict=True)
    )
    shares = np.array([data["weight"] for *_, data in graph.edges(data=True)])
    strength = 0.15 + 0.85 * shares / max(shares.max(initial=0.0), 1e-12)
    nx.draw_circular(
        graph,
        ax=axes,
        node_size=90 if len(graph) <= 24 else 30,
        node_color=canvas.COLORS[1],
        edge_color=[(0.0, 0.0, 0.0, float(s)) for s in strength],
        arrowsize=7,
        width=0.8,
        with_labels=len(graph) <= 24,
        font_size=7,
    )
    axes.set_title(f"links of the first {rounds} rounds", fontsize=9)


def _heat(figure: Figure, axes: Any, P: Any, rounds: int) -> None:
    """Draw the mean of P(t); many clients as blocks of neighbours."""
    n = P.shape[0]
    size = -(-n // CELLS)
    parts = P.tocoo()
    cells = -(-n // size)
    blocks = np.zeros((cells, cells))
    np.add.at(blocks, (parts.row // size, parts.col // size), parts.data)
    image = axes.imshow(blocks / size, cmap="cividis", vmin=0, interpolation="nearest")
    who = "client" if size == 1 else f"block of {size} clients"
    axes.set(xlabel=f"sender ({who})", ylabel=f"receiver ({who})")
    axes.set_title(f"mean share over {rounds} rounds", fontsize=9)
    figure.colorbar(image, ax=axes, shrink=0.8)


def _lines(axes: Any, records: Records, metric: str, index: int) -> None:
    """Draw the distance from consensus, logarithmic if it spans much."""
    x, y = series(records, metric)
    canvas.line(axes, x, y, "clients from their mean (rms)", index)
    positive = y[y > 0]
    if positive.size and positive.max() > 30 * positive.min():
        axes.set_yscale("log")
    axes.set(xlabel="communication round", ylabel="relative distance")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
