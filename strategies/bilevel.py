"""HGP through messages: hyper-gradients that clients compute, and vectors that cross the network.

An estimate after a round of training is one exchange for ``start`` and one for each of M steps:

    start   down  x_i            up  u_i = (1/n) dF_i/dx         kept  v_i = (1/n) dF_i/dl_i
    m       down  x_i, z_i       up  z_i - alpha H_i z_i         kept  v_i - alpha J_i' z_i
    M       down  x_i, z_i                                       kept  also l_i, after Adam's step

Between two of them the u_i are averaged. Over a relay they are rows that S pushes of the network
mix (`pushsum.average`): a state of its own, whose weight starts at one in each step, so training's
is not touched. With a server, nodes send the sum over their clients, and z is its exact mean: a
complete network. Neither l_i nor v_i nor anything else of a client's own is in a message.

Each exchange gives the clients' memory of `personalize.py` a version, and the ledger names, as for
training, the last one whose reply was accepted. Who fails in an exchange has no further part in the
estimate: its l_i stays, u_i = z_i stands for it (0 at the start), and the others go on. But where
fewer than ``min_replies`` answer, those whose nodes were silent are asked again, for the same
version: what they did the first time leaves no trace.

Conjugate gradients, with a server, take the place of the series: z = y / alpha, where H y is the
mean of u, and H's products are exchanges of their own, of which clients keep nothing:

    start   down  x              up  u_i                         kept  v_i = (1/n) dF_i/dl_i
    keep                         if it is the best so far        kept  l_i as the best
            down  x, p           up  H_i p                       at most M times
    step    down  x, y / alpha                                   kept  v_i - J_i' y, then l_i

The check of alpha is hypergrad.py's power iteration, before the first estimate in which all answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from logging import WARNING
from typing import Any

import torch
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.common.logger import log
from torch import Tensor

from strategies.federation import Federation
from strategies.gossip import solver_of
from strategies.hyper_products import check, solved
from strategies.hyper_wire import Told
from strategies.personalize import Personalize
from strategies.pushsum import average
from strategies.relay import Relay
from strategies.wire import Refused, add_bytes, pack, weigh

HYPER = f"{MessageType.QUERY}.hyper"
Exchange = Callable[[list[Message]], Iterable[Message]]
#: Waits for nodes, after so many attempts of an exchange, or raises if it was the last.
Again = Callable[[int], None]


class Bilevel:
    """The outer level of a run.

    Parameters
    ----------
    federation : Federation or Relay
        The inner level: whose models, clients and network.
    how : Personalize
        The settings.

    Attributes
    ----------
    ask, again : callable
        How clients are reached: ``ask`` sends messages and returns their replies. To be set before
        the first exchange.
    ledger : dict of int to int
        The version of each client's memory that counts; training and evaluation name it too.
    told : Told
        What the estimate that goes on has come to.
    count : int
        n: of the network, or of those who are there.
    """

    def __init__(self, federation: Federation | Relay, how: Personalize) -> None:
        self.federation, self.how = federation, how
        self.each = isinstance(federation, Relay)  # clients have models of their own
        self.ledger: dict[int, int] = {}
        federation.hyper = self.ledger
        self.checked = False
        self.told, self.count, self._mean_samples = Told(), 0, 0.0
        self._round = self._t = 0
        self.ask: Exchange
        self.again: Again

    # What a run asks for.

    def look(self, round_: int) -> Told:
        """Let the clients measure the models and hyper-parameters after a round."""
        self._open(round_)
        self.exchange("look", 0, self._clients(), None)
        return self._closed()

    def estimate(self, round_: int, best: Callable[[Told], bool]) -> Told:
        """Let the clients measure, estimate their hyper-gradients, and take their steps.

        Parameters
        ----------
        round_ : int
            The round of training that has just ended; the network's next are used.
        best : callable
            Says, of what the clients measured, whether they have never been better: they then
            keep what they have beside what becomes of it.
        """
        self._open(round_)
        how, clients = self.how, self._clients()
        series = how.method == "push"
        if series and how.power_steps and not self.checked:
            self.checked = check(self, clients)
            # Who missed only the check takes part in what follows as if there had been none.
            self.told.failed = {k: self.told.failed[k] for k in self.told.lost}
            clients = [k for k in clients if k not in self.told.failed]
        u, clients = self.exchange("start", 0, clients, None)
        keeps, z = best(self.told), None
        if not series:
            if keeps:
                _, clients = self.exchange("keep", 1, clients, None, best=True)
            self.told.moved = solved(self, self.mean(u, None), clients)
            return self._closed()
        for m in range(1, how.depth + 1):
            if not clients:
                break
            z = self.mean(u, z)
            what = "step" if m == how.depth else "push"
            u, clients = self.exchange(what, m, clients, z, keeps and m == 1)
        self.told.moved = clients
        return self._closed()

    def settle(self, round_: int) -> Told:
        """Let the clients return to what they had when it was best."""
        self._open(round_)
        # After the last step of an estimate, whose version may have been of this round.
        self.exchange("settle", self.how.exchanges - 1, self._clients(), None)
        return self._closed()

    # How.

    def _open(self, round_: int) -> None:
        self.told, self._round, self._t = Told(), round_, round_
        self._began = time.perf_counter()

    def _closed(self) -> Told:
        self.told.seconds = time.perf_counter() - self._began
        return self.told

    def _clients(self) -> list[int]:
        attempt, least = 0, self.federation.min_replies
        while len(found := self.federation.roster.trainable()) < least:
            attempt += 1
            self.again(attempt)
        relay = self._relay()
        self.count = relay.network.n if relay else len(found)
        samples = [self.federation.roster.samples[k] for k in found]
        # Who comes or goes in an estimate leaves the weights as they are.
        self._mean_samples = sum(samples) / max(len(samples), 1)
        return found

    def _relay(self) -> Relay | None:
        return self.federation if isinstance(self.federation, Relay) else None

    def _shares(self, clients: list[int]) -> list[float]:
        """Return the weights of clients in what training minimizes, with a mean of one."""
        algorithm, roster = self.federation.algorithm, self.federation.roster
        # Not the weight in the server's mean: FedDyn's is uniform whatever it minimizes.
        weighting = getattr(solver_of(algorithm), "weighting", "uniform")
        if weighting != "samples":
            return [1.0] * len(clients)
        return [roster.samples[k] / self._mean_samples for k in clients]

    def mean(self, parts: Mapping[tuple[int, ...], Tensor], z: Tensor | None) -> Tensor:
        """Return the mean of u, (d,), or every client's estimate of it, (n, d).

        ``z`` stands for those of whom there is no u; None is zero.
        """
        theta = self.federation.server["theta"]
        if relay := self._relay():
            rows = theta.new_zeros(self.count, len(theta)) if z is None else z.clone()
            for clients, block in parts.items():
                rows[list(clients)] = block.view(len(clients), -1)
            mixed, sent = average(relay.network, rows.numpy(), self._t, self.how.pushes)
            self._t += self.how.pushes
            self.told.link_messages += sent
            self.told.link_bytes += sent * (rows.itemsize * len(theta) + 8)
            return torch.from_numpy(mixed)
        total = torch.zeros(len(theta), dtype=torch.float64)
        left = self.count
        for clients, block in parts.items():
            total, left = total + block, left - len(clients)
        if z is not None:
            total += left * z
        return (total / self.count).to(theta.dtype)

    def exchange(
        self,
        what: str,
        step: int,
        clients: list[int],
        z: Tensor | None,
        best: bool = False,
    ) -> tuple[dict[tuple[int, ...], Tensor], list[int]]:
        """Ask clients, and return what they sent, by clients, and who answered."""
        parts: dict[tuple[int, ...], Tensor] = {}
        enough = min(self.federation.min_replies, len(clients))
        self.told.exchanges += 1
        attempt, silent = 0, dict.fromkeys(clients, "its node is gone")
        while silent:
            silent = self._attempt(what, step, sorted(silent), z, best, parts)
            attempt += 1
            if len(clients) - len(silent) >= enough:
                break
            self.again(attempt)
        self.told.failed |= silent
        fine = [k for k in clients if k not in self.told.failed]
        samples = self.federation.roster.samples
        self.told.gradients += sum(self.how.gradients(what, samples[k]) for k in fine)
        if what in ("start", "keep", "push", "step", "settle"):
            self.ledger |= dict.fromkeys(fine, self._version(step))
        # In the clients' order, whichever attempt they answered: sums have the same bits.
        return dict(sorted(parts.items())), fine

    def _attempt(
        self,
        what: str,
        step: int,
        clients: list[int],
        z: Tensor | None,
        best: bool,
        parts: dict[tuple[int, ...], Tensor],
    ) -> dict[int, str]:
        """Ask clients, add what they sent to ``parts``, and return who was silent, and why."""
        hosts, theta = self.federation.roster.hosts, self.federation.server["theta"]
        silent = {k: "its node is gone" for k in clients if k not in hosts}
        present = [k for k in clients if k in hosts]
        messages, asked = self._messages(what, step, present, z, best)
        name = f"{self._round}.{what}.{step}"
        self.told.messages += len(messages)
        replies = sorted(
            self.ask(messages), key=lambda r: asked.get(r.metadata.src_node_id, [])[:1]
        )
        for reply in replies:
            mine = asked.pop(reply.metadata.src_node_id, None)
            self.told.messages += 1
            try:
                told, up = self.told.accept(
                    reply, name, mine, len(theta), theta.dtype, self.each
                )
            except Refused as error:
                log(WARNING, "%s: node refused: %s", name, error)
                silent |= dict.fromkeys(mine or (), str(error))
                continue
            if up is not None and told:
                parts[tuple(told)] = up
        for mine in asked.values():
            silent |= dict.fromkeys(mine, "no reply before the deadline")
        return silent

    def _version(self, step: int) -> int:
        return self._round * self.how.exchanges + step + 1

    def _messages(
        self, what: str, step: int, clients: list[int], z: Tensor | None, best: bool
    ) -> tuple[list[Message], dict[int, list[int]]]:
        """Return one message for each node that hosts any of these clients, and who is in it."""
        federation, messages, asked = self.federation, [], {}
        hosts = federation.roster.hosts
        shares = dict(zip(clients, self._shares(clients), strict=True))
        for node in sorted({hosts[k] for k in clients}):
            mine = [k for k in clients if hosts[k] == node]
            order: dict[str, Any] = {
                "what": what,
                "each": int(self.each),
                "step": step,
                "clients": mine,
                "hyper": mine,
                "hyper_versions": [self.ledger.get(k, 0) for k in mine],
                "version": self._version(step),
                "at": self._round * self.how.exchanges + step,
                "keep": (federation.keep + 1) * self.how.exchanges - 1,
                "total": self.count,
                "shares": [shares[k] for k in mine],
                "best": int(best),
                **federation.place(),
            }
            bare = what in ("keep", "settle")
            down = {} if bare else {"theta": self._models(mine)}
            if z is not None:
                down["z"] = z[mine].reshape(-1) if self.each else z
            content = RecordDict({"down": pack(down), "order": ConfigRecord(order)})
            add_bytes(self.told.down, weigh(content))
            group = f"{self._round}.{what}.{step}"
            messages.append(Message(content, node, HYPER, group_id=group))
            asked[node] = mine
        return messages, asked

    def _models(self, clients: list[int]) -> Tensor:
        """Return the model that all share, or a row for each of some clients."""
        if relay := self._relay():
            return torch.from_numpy(relay.carried["model"].z(clients)).reshape(-1)
        return self.federation.server["theta"]

    # What a checkpoint holds.

    def state(self) -> dict[str, Any]:
        """Return what ``restore`` continues from, as JSON."""
        ledger = {str(k): v for k, v in self.ledger.items()}
        return {"ledger": ledger, "checked": self.checked}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state`` returned."""
        self.ledger.clear()
        self.ledger |= {int(k): v for k, v in state["ledger"].items()}
        self.checked = state["checked"]
