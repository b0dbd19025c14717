"""The local runtime: a Flower `Grid` that hands messages straight to the same `ClientApp`.

No Ray, no SuperLink, no polling. Nodes live in a few worker processes that stay alive from run to
run, or, with none, in this process. It is the fast path for sweeps and studies, the oracle for
tests and the home of notebooks.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import multiprocessing
import time
from collections import deque
from collections.abc import Iterable, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
from flwr.app import Context, Error, Message, RecordDict, UserConfig
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

#: Flower's code for a ClientApp that raised.
RAISED = 2
RUN_ID = 1
#: Of messages, over all grids: these share the worker processes.
_IDS = itertools.count(1)


class Nodes:
    """The contexts of some nodes, and their ClientApp."""

    def __init__(self, contexts: Mapping[int, Context]) -> None:
        self.contexts = dict(contexts)

    def answer(self, message: Message) -> Message:
        """Return the ClientApp's reply; an exception becomes an error reply, as in Flower."""
        from app.client_app import (
            app,
        )  # here: a worker imports torch, its parent need not

        try:
            context = self.contexts[message.metadata.dst_node_id]
            return app(message, context)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            return Message(Error(code=RAISED, reason=reason[:300]), reply_to=message)


def _identify() -> None:
    """Say for whom this process works: Flower asks when a message is made."""
    TaskIdentity.run_id = RUN_ID
    TaskIdentity.node_id = TaskIdentity.task_id = 1


def _serve(pipe: Connection) -> None:
    """Answer messages until the parent goes away (a worker process)."""
    nodes = Nodes({})
    _identify()
    # A copy of the server's generator would be every worker's: Flower's privacy draws from it.
    np.random.seed()
    try:
        while True:
            task = pipe.recv()
            if isinstance(task, Message):
                pipe.send(nodes.answer(task))
            else:
                nodes = Nodes(task)
    except (EOFError, KeyboardInterrupt):
        pass


class Worker:
    """A process that hosts nodes, with at most one message under way."""

    def __init__(self) -> None:
        spawner = multiprocessing.get_context("forkserver")
        spawner.set_forkserver_preload(["app.client_app"])
        self.pipe, other = spawner.Pipe()
        self.process = spawner.Process(target=_serve, args=(other,), daemon=True)
        self.process.start()
        other.close()
        self.waiting: deque[Message] = deque()
        self.busy: Message | None = None
        self.contexts: dict[int, Context] = {}

    def assign(self, contexts: dict[int, Context]) -> None:
        """Forget earlier nodes and host these."""
        self.waiting.clear()
        self.contexts = contexts
        self.pipe.send(contexts)

    def push(self, message: Message) -> None:
        """Queue a message; it is sent when the one before it is answered."""
        self.waiting.append(message)
        self.advance()

    def advance(self) -> None:
        """Send the next message if none is under way."""
        if self.busy is None and self.waiting:
            self.busy = self.waiting.popleft()
            with contextlib.suppress(OSError):  # it has died: collect() will see it
                self.pipe.send(self.busy)

    def forget(self, names: set[str]) -> set[str]:
        """Drop the messages of these ids that are not begun yet, and return their ids."""
        dropped = {m.metadata.message_id for m in self.waiting} & names
        kept = [m for m in self.waiting if m.metadata.message_id not in dropped]
        self.waiting = deque(kept)
        return dropped

    def collect(self) -> Message:
        """Return the reply that is ready, or an error reply if the process has died."""
        assert self.busy is not None
        try:
            reply: Message = self.pipe.recv()
        except (EOFError, OSError):  # also in the middle of a message
            error = Error(code=RAISED, reason="the worker process died")
            reply = Message(error, reply_to=self.busy)
            waiting, contexts = self.waiting, self.contexts
            self.close()
            self.__init__()  # type: ignore[misc]
            self.assign(contexts)
            self.waiting = waiting
        self.busy = None
        self.advance()
        return reply

    def close(self) -> None:
        """End the process: an idle one leaves by itself and cleans up, a busy one is told to."""
        self.pipe.close()
        if self.busy is None:
            self.process.join(5)
        self.process.terminate()
        self.process.join(5)


_WORKERS: list[Worker] = []


def _workers(count: int) -> list[Worker]:
    """Return idle workers, started once and kept for later runs."""
    for i, worker in enumerate(_WORKERS):
        if worker.busy is not None or not worker.process.is_alive():
            worker.close()
            _WORKERS[i] = Worker()
    while len(_WORKERS) < count:
        _WORKERS.append(Worker())
    return _WORKERS[:count]


@atexit.register
def close_workers() -> None:
    """End the worker processes that runs have left for later ones."""
    while _WORKERS:
        _WORKERS.pop().close()


class LocalGrid(Grid):
    """An in-process grid.

    Parameters
    ----------
    run_config : mapping
        What Flower would deliver to each context.
    nodes : int
        How many nodes there are; node i has the config ``partition-id = i`` of ``nodes``.
    processes : int
        Worker processes; 0 answers in this process.
    """

    def __init__(
        self, run_config: Mapping[str, Any], nodes: int, processes: int = 0
    ) -> None:
        _identify()
        self.run_config = run_config
        self._contexts: dict[int, Context] = {}
        self._nodes = itertools.count(1000)
        self._replies: dict[str, Message] = {}
        self._late: set[str] = set()
        for i in range(nodes):
            self._context({"partition-id": i, "num-partitions": nodes})
        self._workers = _workers(min(processes, nodes))
        self._inline = Nodes({} if self._workers else self._contexts)
        self._begun = False
        every, count = list(self._contexts.items()), len(self._workers)
        self._hosted = [dict(every[i::count]) for i in range(count)]
        for worker, mine in zip(self._workers, self._hosted, strict=True):
            worker.assign(mine)

    def _context(self, node_config: Mapping[str, Any]) -> Context:
        node = next(self._nodes)  # ids carry no meaning: nobody may rely on them
        context = Context(
            run_id=RUN_ID,
            node_id=node,
            node_config=UserConfig(node_config),
            state=RecordDict(),
            run_config=UserConfig(self.run_config),
        )
        self._contexts[node] = context
        return context

    def add_node(self, node_config: Mapping[str, Any]) -> int:
        """Let a node join; without worker processes only.

        Returns
        -------
        int
            Its id.
        """
        if self._workers:
            raise ValueError("a node can join a grid without worker processes only")
        context = self._context(node_config)
        self._inline.contexts[context.node_id] = context
        return context.node_id

    def remove_node(self, node: int) -> None:
        """Let a node leave; without worker processes only."""
        if self._workers:
            raise ValueError("a node can leave a grid without worker processes only")
        del self._contexts[node]
        self._inline.contexts.pop(node, None)

    def set_run(self, run: Run) -> None:
        """Nothing to set: there is one run."""

    @property
    def run(self) -> Run:
        """An empty description of the run."""
        return Run.create_empty(RUN_ID)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message, as the constructor makes it."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the nodes that are there."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand messages to their nodes; without worker processes they are answered at once."""
        pushed = []
        for message in messages:
            name = f"local-{next(_IDS)}"
            message.metadata.__dict__["_message_id"] = name
            node = message.metadata.dst_node_id
            pushed.append(name)
            if not self._workers:
                self._replies[name] = self._inline.answer(message)
                continue
            place = list(self._contexts).index(node) % len(self._workers)
            worker, mine = self._workers[place], self._hosted[place]
            if worker.contexts is not mine:
                if (
                    self._begun
                ):  # what its nodes remember may have gone with the process
                    raise RuntimeError(
                        "another grid has taken the worker processes of this one: make a grid "
                        "for each run, after the run before it, or processes=0"
                    )
                worker.assign(mine)
            worker.push(message)
        self._begun = self._begun or bool(pushed)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to these messages that have arrived."""
        self._collect(0.0)
        return [self._replies.pop(m) for m in set(message_ids) & self._replies.keys()]

    def _collect(self, timeout: float) -> None:
        """Wait for a reply of any worker and take in what has arrived."""
        busy = {w.pipe: w for w in self._workers if w.busy is not None}
        for pipe in wait(list(busy), timeout) if busy else []:
            reply = busy[pipe].collect()  # type: ignore[index]
            name = reply.metadata.reply_to_message_id
            if name in self._late:
                self._late.remove(name)
            else:
                self._replies[name] = reply

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Hand over messages and return the replies that arrive before the timeout."""
        ids = set(self.push_messages(messages))
        end = time.monotonic() + (timeout if timeout is not None else 10**9)
        replies: list[Message] = []
        while ids:
            left = end - time.monotonic()
            self._collect(max(left, 0.0))
            arrived = ids & self._replies.keys()
            replies += [self._replies.pop(m) for m in sorted(arrived)]
            ids -= arrived
            if left <= 0:
                break
        # Nobody will ask for these again: not begun they never are, late they are dropped.
        for worker in self._workers:
            ids -= worker.forget(ids)
        self._late |= ids
        return replies
