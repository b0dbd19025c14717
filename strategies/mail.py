"""Replies as a grid has them, so that no node can end the run or speak for another one.

What a reply says of itself, its sender included, is what its node has written. The id of the
message under which the SuperLink keeps it is not: there the node's key was checked. So replies are
asked for by few ids at a time, by one where there are few nodes, and held against what was sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from logging import WARNING

import httpx
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.common.logger import log
from flwr.serverapp import Grid

#: Requests in which one look at the mailbox is made at most.
LOOKS = 32


def arrived(grid: Grid, asked: Mapping[str, Message]) -> Iterator[tuple[str, Message]]:
    """Yield the replies that have arrived, each with the id of the message that it answers.

    What cannot be opened, or comes in another node's name, is an error of the node that was asked;
    so is what the SuperLink answers for a node that is gone.

    Parameters
    ----------
    grid : Grid
        Any grid.
    asked : mapping of str to Message
        What was sent and is not answered yet, by id.
    """
    names = list(asked)
    size = -(-len(names) // LOOKS) or 1
    for start in range(0, len(names), size):
        some = names[start : start + size]
        try:
            replies = list(grid.pull_messages(some))
        except (httpx.HTTPError, OSError):
            raise  # the SuperLink's failure, not a node's
        except Exception as error:
            why = f"a reply that cannot be opened ({type(error).__name__})"
            log(WARNING, "%s, of %s asked", why, len(some))
            if len(some) == 1:
                yield some[0], fault(asked[some[0]], why)
            continue
        for reply in replies:
            name = some[0] if size == 1 else reply.metadata.reply_to_message_id
            message = asked.get(name)
            if message is None:
                continue
            if reply.has_error():
                yield name, Message(reply.error, reply_to=message)
            elif reply.metadata.src_node_id != message.metadata.dst_node_id:
                yield name, fault(message, "answered in another node's name")
            else:
                yield name, reply


def fault(asked: Message, why: str) -> Message:
    """Return an error as the answer of the node that was asked."""
    return Message(Error(ErrorCode.UNKNOWN, why), reply_to=asked)
