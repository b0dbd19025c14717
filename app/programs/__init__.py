"""Programs to run instead of training: one file each, named by the setting ``program``.

A file holds the functions that clients may be asked for, each with `register`, and the program
itself, ``program(clients, theta)``. Both sides import it: no code travels in messages.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from app.errors import UserError, nearest

HERE = Path(__file__).parent


def programs() -> list[str]:
    """Return the names of the programs that there are."""
    return sorted(p.stem for p in HERE.glob("*.py") if p.stem != "__init__")


def known(name: str) -> None:
    """Raise UserError if there is no program of that name."""
    if name not in programs():
        raise UserError(f"no program is called '{name}'; {nearest(name, programs())}")


def program_of(name: str) -> Callable[..., Any]:
    """Import a program, which registers the functions that it asks of clients.

    Raises
    ------
    UserError
        If there is none of that name, or its file does not hold one.
    """
    known(name)
    module = importlib.import_module(f"app.programs.{name}")
    if not callable(getattr(module, "program", None)):
        raise UserError(f"app/programs/{name}.py: has no function called program")
    return cast(Callable[..., Any], module.program)
