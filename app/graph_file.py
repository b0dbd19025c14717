"""A user's own network: a GraphML file, or a list of arcs with or without shares."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError

import networkx as nx
import numpy as np

from app.errors import UserError
from strategies.network import check_shares
from strategies.topology import Arcs, Edges, shares

#: Bytes of a file that is read.
LARGEST = 2**28


def graph_file(n: int, seed: int, path: str) -> Edges:
    """Return the fixed network that a file describes.

    Parameters
    ----------
    n : int
        Clients, numbered from 0; the file may name no other.
    seed : int
        Not used: nothing is drawn.
    path : str
        ``.graphml``: nodes named by their numbers (``3`` or ``n3``), shares in the edge attribute
        ``weight``; an undirected graph goes both ways. Anything else: a line ``sender receiver``
        or ``sender receiver share`` for each arc, ``#`` begins a comment. Where shares are given,
        what a client does not send it keeps, or as much as an arc to itself says.

    Raises
    ------
    UserError
        If the file cannot be read, names a client that does not exist, or its shares are negative
        or do not sum to one.
    """
    file = Path(path).expanduser()
    try:
        if file.stat().st_size > LARGEST:
            raise UserError(f"{path}: larger than {LARGEST >> 20} MB")
        rows = _graphml(file) if file.suffix == ".graphml" else _lines(file)
    except OSError as error:
        raise UserError(f"topology.path={path}: {error.strerror}") from None
    for where, src, dst, share in rows:
        if not 0 <= min(src, dst) <= max(src, dst) < n:
            raise UserError(f"{where}: there are clients 0 to {n - 1}")
        if share is not None and not 0 <= share <= 1:
            raise UserError(f"{where}: a share lies between 0 and 1, not {share:g}")
    given = [row[3] is not None for row in rows]
    if any(given) and not all(given):
        raise UserError(f"{path}: give a share for every arc or for none")
    ends = [(row[1], row[2]) for row in rows]
    if len(set(ends)) < len(ends):
        twice = next(e for e in ends if ends.count(e) > 1)
        raise UserError(f"{path}: the arc {twice[0]} to {twice[1]} is there twice")
    arcs = _arcs(rows, n, str(path))
    return lambda t: arcs


Row = tuple[str, int, int, float | None]


def _arcs(rows: list[Row], n: int, path: str) -> Arcs:
    """Return the arcs of the rows; one to oneself only says how much is kept."""
    others = [row for row in rows if row[1] != row[2]]
    src = np.array([row[1] for row in others], dtype=np.int64)
    dst = np.array([row[2] for row in others], dtype=np.int64)
    if not rows or rows[0][3] is None:
        return Arcs(src, dst)
    share = np.array([row[3] for row in others], dtype=float)
    kept = {row[1]: row[3] for row in rows if row[1] == row[2]}
    sent = np.bincount(src, share, minlength=n)
    for client, own in kept.items():
        total = float(sent[client]) + float(own or 0)
        if abs(total - 1) > 1e-9:
            raise UserError(
                f"{path}: the shares of client {client} sum to {total:g}, not 1"
            )
    arcs = Arcs(src, dst, share)
    try:
        check_shares(shares(n, arcs, "push"), path)
    except ValueError as error:
        raise UserError(str(error)) from None
    return arcs


def _lines(file: Path) -> list[Row]:
    rows: list[Row] = []
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{file}: neither GraphML nor text") from None
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].replace(",", " ").split()
        where = f"{file}, line {number}"
        if not words:
            continue
        try:
            share = float(words[2]) if len(words) == 3 else None
            rows.append((where, int(words[0]), int(words[1]), share))
        except (ValueError, IndexError):
            share, words = None, []
        if not 2 <= len(words) <= 3:
            raise UserError(
                f"{where}: write 'sender receiver' or 'sender receiver share'"
            )
    return rows


def _graphml(file: Path) -> list[Row]:
    try:
        graph: Any = nx.read_graphml(file)
    except (ParseError, nx.NetworkXException, ValueError, KeyError) as error:
        raise UserError(
            f"{file}: no GraphML ({' '.join(str(error).split())})"
        ) from None
    rows: list[Row] = []
    for tail, head, data in graph.edges(data=True):
        where = f"{file}, edge {tail} to {head}"
        try:
            share = float(data["weight"]) if "weight" in data else None
            src, dst = (int(str(name).removeprefix("n")) for name in (tail, head))
        except ValueError:
            raise UserError(f"{where}: nodes are numbers, weights are shares") from None
        rows.append((where, src, dst, share))
        if not graph.is_directed() and src != dst:
            rows.append((where, dst, src, share))
    return rows
