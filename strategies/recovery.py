"""When a client has lost the memory that the ledger names: it begins anew, and the books agree.

An algorithm's server may hold the mean of all clients' memories (FedDyn's h, SCAFFOLD's c). What
a client has lost is still in that mean, and nobody else knows it. So the others are asked for the
sum of what they remember, each client in the version that the ledger names; the mean is made anew
from it, with nothing for the client that has lost. After that the client is one that never took
part, and server and memories agree exactly.

Whoever turns out to have lost its memory when it is asked begins anew with them: one disk may have
held those of many. Until every other client has answered, the one that lost sits out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from logging import WARNING
from typing import cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.common.logger import log

from strategies.algorithm import Mirrored, Vectors
from strategies.federation import Federation, probe_direction
from strategies.relay import Relay
from strategies.wire import Refused, cause, ids, limit, unpack

MEMORIES = f"{MessageType.QUERY}.memories"
Exchange = Callable[[list[Message]], Iterable[Message]]


def begin_anew(
    federation: Federation | Relay, lost: Iterable[int], exchange: Exchange
) -> list[int]:
    """Let clients that have lost their memory begin anew, if the books can be made to agree.

    Parameters
    ----------
    federation : Federation
        The strategy; its ledger and its server vectors are changed.
    lost : iterable of int
        The clients.
    exchange : callable
        Sends messages and returns their replies.

    Returns
    -------
    list of int
        Those that begin anew; empty if some of the others cannot be asked now.
    """
    since = federation.since  # what was remembered before counts no more
    ledger = {k: v for k, v in federation.ledger.items() if v > since}
    hypers = federation.hyper or {}
    gone = named(federation) & set(lost)
    server = isinstance(federation, Federation)  # a relay keeps no mean of memories
    if gone and server and federation.algorithm.mirror is not None:
        try:
            sums, others = _sums(federation, sorted(ledger.keys() - gone), exchange)
        except Refused as error:
            log(WARNING, "clients %s cannot begin anew yet: %s", sorted(gone), error)
            return []
        gone |= others
        seen, total = len(ledger.keys() - gone), federation.roster.clients
        algorithm = cast(Mirrored, federation.algorithm)
        federation.server = algorithm.recount(federation.server, sums, seen, total)
    for k in gone:
        federation.ledger.pop(k, None)
        hypers.pop(k, None)
        federation.probes.pop(k, None)
    return sorted(gone)


def named(federation: Federation | Relay) -> set[int]:
    """Return the clients of which the books name something that they remember."""
    known = {k for k, v in federation.ledger.items() if v > federation.since}
    return known | (federation.hyper or {}).keys()


def _sums(
    federation: Federation, clients: list[int], exchange: Exchange
) -> tuple[Vectors, set[int]]:
    """Return the sum over clients of each of their memory vectors, and who has lost its own.

    Raises
    ------
    Refused
        If a client is not there, or does not tell, or tells what its reports contradict.
    """
    roster, theta = federation.roster, federation.server["theta"]
    away = [k for k in clients if k not in roster.hosts]
    if away:
        raise Refused(f"clients {away} are not there"[:300])
    messages, asked = [], dict[int, list[int]]()
    for node in sorted({roster.hosts[k] for k in clients}):
        mine = [k for k in clients if roster.hosts[k] == node]
        asked[node] = mine
        order = {"clients": mine, "versions": [federation.ledger[k] for k in mine]}
        content = RecordDict({"order": ConfigRecord({**order, **federation.place()})})
        messages.append(Message(content, node, MEMORIES))
    fresh = federation.algorithm.fresh(theta)
    sizes = {name: len(vector) for name, vector in fresh.items()}
    sums = {n: torch.zeros(len(v), dtype=torch.float64) for n, v in fresh.items()}
    lost = set[int]()
    replies = exchange(messages)
    # By clients, not by the nodes' random ids: the sum has the same bits in every run.
    for reply in sorted(replies, key=lambda r: asked.get(r.metadata.src_node_id, [])):
        mine = asked.pop(reply.metadata.src_node_id, [])
        if reply.has_error():
            raise Refused(cause(reply))
        report = reply.content.metric_records.get("report")
        if report is None:
            raise Refused("no report")
        found, gone = ids(report, "clients"), ids(report, "lost")
        if sorted([*found, *gone]) != mine:
            raise Refused(f"answers for clients {sorted([*found, *gone])}"[:300])
        record = reply.content.array_records.get("sums", ArrayRecord())
        part = unpack(record, sizes, torch.float64)
        limit(part)
        _audit(federation, part, found)
        sums = {n: v + part[n] for n, v in sums.items()}
        lost |= set(gone)
    if missing := sorted(k for mine in asked.values() for k in mine):
        raise Refused(f"clients {missing} did not tell what they remember"[:300])
    return {n: v.to(theta.dtype) for n, v in sums.items()}, lost


def _audit(federation: Federation, sums: Vectors, clients: list[int]) -> None:
    """Compare a sum of memories with what its clients reported of them.

    Raises
    ------
    Refused
        If a client has never reported, or the sum is another one.
    """
    probes, mirror = federation.probes, federation.algorithm.mirror
    assert mirror is not None
    unknown = [k for k in clients if k not in probes]
    if unknown or len(set(clients)) < len(clients):
        raise Refused(f"clients {clients} were not asked"[:300])
    told = sum(probes[k] for k in clients)
    scale = sum(abs(probes[k]) for k in clients)
    vector = sums[mirror[0]]
    found = float(vector @ probe_direction(federation.roster.seed, len(vector)))
    if abs(found - told) > 1e-3 * scale + 1e-9:
        raise Refused(f"the memories of clients {clients} differ from reports"[:300])
