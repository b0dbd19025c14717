"""The Flower ClientApp: what a node does with a message.

One handler serves training and evaluation: the message names the clients to train, each with the
version of its memory, and the clients that evaluate the received model.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from app import hyper_node, relay_node
from app.alone import turn
from app.judging import evaluate, received
from app.node import Node, remembered, respond, train_all
from strategies.algorithm import Client, Vectors
from strategies.fad_wire import pack_answer
from strategies.mean import Mean
from strategies.wire import pack, unpack


def in_turn(
    message: Message, context: Context, call: Callable[[Message, Context], Message]
) -> Message:
    """Answer when this node's earlier messages are done with.

    A node starts a process for each message and does not wait for one whose round is over: two of
    them would write the memories of one client at the same time.
    """
    if "state-dir" not in context.node_config:
        return call(message, context)
    with turn(Path(str(context.node_config["state-dir"])).expanduser()):
        return call(message, context)


app = ClientApp(mods=[in_turn])


@app.query("roll_call")
def roll_call(message: Message, context: Context) -> Message:
    """Tell which clients live here, their numbers of samples, and whether they are bound here."""
    node = Node(context)
    counts = [len(node.samples(k).train) for k in node.ids]
    bound = int(node.binds_clients())
    report = MetricRecord({"clients": node.ids, "samples": counts, "bound": bound})
    return Message(RecordDict({"hosted": report}), reply_to=message)


@app.train()
def work(message: Message, context: Context) -> Message:
    """Train and evaluate the clients that the message names."""
    began = time.perf_counter()
    node = Node(context)
    order = message.content.config_records["order"]
    run = node.trainer()
    theta, buffers = run.objective.initial()
    names = run.algorithm.down(run.algorithm.start(theta))
    sizes = {**{n: len(v) for n, v in names.items()}, "buffers": len(buffers)}
    arrived = unpack(message.content.array_records["down"], sizes, theta.dtype)
    down = {n: v.to(node.config.torch_device) for n, v in arrived.items()}
    evaluated = evaluate(run, lambda: received(node, run, down, order, context))
    mean, weight = Mean(), run.algorithm.weight

    def collect(clients: list[Client], up: Vectors) -> None:
        mean.add_rows(up, [weight(client) for client in clients])

    trained, faults = train_all(node, run, down, order, context, collect)
    busy = [time.perf_counter() - began]
    report = MetricRecord({**evaluated, **trained, "busy": busy})
    up = pack(mean.value(theta.dtype))
    content = RecordDict({"up": up, "report": report, "faults": ConfigRecord(faults)})
    return Message(content, reply_to=message)


@app.query("derive")
def derive(message: Message, context: Context) -> Message:
    """Take part in a differentiated program: evaluate, push forward or pull back."""
    found = respond(Node(context), message.content)
    return Message(pack_answer(found), reply_to=message)


@app.query("memories")
def tell_memories(message: Message, context: Context) -> Message:
    """Tell the sum of what the named clients remember, and who does not any more."""
    node = Node(context)
    run, order = node.trainer(), message.content.config_records["order"]
    theta, _ = run.objective.initial()
    sums, found, lost = remembered(node, run, theta.cpu(), order, context)
    report = MetricRecord({"clients": found, "lost": lost})
    return Message(RecordDict({"sums": pack(sums), "report": report}), reply_to=message)


@app.query("hyper")
def estimate(message: Message, context: Context) -> Message:
    """Take part in an estimate of hyper-gradients."""
    return hyper_node.work(message, context)


@app.evaluate()
def judge(message: Message, context: Context) -> Message:
    """Evaluate the received model: the same message with nobody to train."""
    return work(message, context)


@app.train("relay")
def push(message: Message, context: Context) -> Message:
    """Train and evaluate clients that have models of their own (no server)."""
    return relay_node.work(message, context)


@app.evaluate("relay")
def look(message: Message, context: Context) -> Message:
    """Evaluate such models: the same message with nobody to train."""
    return relay_node.work(message, context)
