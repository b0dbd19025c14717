"""Whether privacy and the other settings go together: a promise that cannot be kept is none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from app.binding import bind
from app.errors import UserError
from strategies.gossip import Gossip
from strategies.individual import Rooted
from strategies.privacy import Unprotected

if TYPE_CHECKING:
    from app.config import Config


def check_privacy(config: Config, buffers: int = 0) -> None:
    """Raise UserError where the clients would not be protected as the settings promise.

    ``buffers`` is the number of the model's buffers, which only the data tell.
    """
    privacy = bind("privacy", config.privacy)()
    if isinstance(privacy, Unprotected):
        return
    algorithm = bind("strategy", config.strategy)()
    if isinstance(algorithm, Gossip):
        why = "the relay of a network holds every client's own model"
    elif isinstance(algorithm, Rooted):
        why = "its clients train more than what they send, and noise would enter both"
    else:
        why = privacy.unfit(algorithm, buffers, config.evaluate_clients != "none")
    if why:
        names = config.privacy.name, config.strategy.name
        raise UserError(f"privacy={names[0]} with strategy={names[1]}: {why}")
