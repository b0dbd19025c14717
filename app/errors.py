"""The one exception whose message is written for the user.

Raise it for a mistake that a person can mend (a wrong name, a missing file, a bad value). Every
entry point prints its message as one line and exits with status 2; any other exception is a defect
of the program and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A user's mistake, told in one line: what was wrong, where, and what would be right."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return the end of an error line: the closest valid name, then all of them.

    Parameters
    ----------
    name : str
        What the user wrote.
    valid : Iterable[str]
        The names that would have been right.

    Returns
    -------
    str
        For example ``did you mean 'feddyn'? Valid: fedavg, feddyn.``
    """
    names = sorted(set(valid))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}Valid: {', '.join(names) or '(none)'}."
