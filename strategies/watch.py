"""What a run tells of its network: how well it connects, how far the clients are from consensus."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from strategies.faults import Mask
from strategies.ledger import distance
from strategies.network import Links, Network, Window, contraction, delivered
from strategies.pushsum import State
from strategies.topology import Floats


class Watch:
    """Watches the links that were used.

    Parameters
    ----------
    network : Network
        Whose links.
    tau : int
        Rounds over which the contraction is measured.
    """

    def __init__(self, network: Network, tau: int) -> None:
        self.network, self.tau = network, tau
        self.window = Window(network.n)
        self._recent: deque[tuple[csr_array, Mask]] = deque(maxlen=tau)

    def see(self, links: Links, t: int) -> None:
        """Take in the links of round t, counted from 0."""
        present = self.network.faults.present(t, self.network.n)
        self._keep(links, present)
        self.window.see(links, present)

    def _keep(self, links: Links, present: Mask) -> None:
        self._recent.append((delivered(links, self.network.faults.policy), present))

    def _contraction(self) -> float:
        """Return that of the links among those who were there in all of these rounds."""
        there = np.logical_and.reduce([present for _, present in self._recent])
        if there.all():
            return contraction([P for P, _ in self._recent])
        return contraction([csr_array(P[there][:, there]) for P, _ in self._recent])

    def told(
        self, links: Links, model: State, mean: Floats, quantities: int
    ) -> dict[str, Any]:
        """Return the record of a round: of the models, and of ``quantities`` alike on the links."""
        there = model.w > 0
        arcs = int(links.P.nnz - np.count_nonzero(links.P.diagonal()))
        vector = model.x.shape[1] * model.x.itemsize
        message = quantities * vector + model.w.itemsize
        return {
            "consensus_distance": distance(model, mean),
            "min_weight": float(model.w[there].min()),
            "contraction": self._contraction(),
            "window": self.window.longest,
            "links": arcs,
            "links_lost": int(links.lost.nnz),
            "bytes_per_link": message,
            "link_bytes": arcs * message,
        }

    def state(self) -> list[int | None]:
        """Return what cannot be seen again."""
        return [self.window.longest, self.window.length]

    def restore(self, done: int, state: list[int | None]) -> None:
        """Continue after ``done`` rounds: P(t) is a pure function, so the last are seen again."""
        n = self.network.n
        for t in range(max(0, done - self.tau), done):
            self._keep(self.network.at(t), self.network.faults.present(t, n))
        for t in range(done - (state[1] or 0), done):
            present = self.network.faults.present(t, n)
            self.window.see(self.network.at(t), present)
        self.window.longest = state[0]
