"""The one exception a user is meant to read, and the hint that ends many of its lines."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can put right: one line that says what, which value, which key, and what to do.

    Scripts print the line on stderr and exit with code 2 (`alexnet.cli.command`).
    """


def closest(wanted: str, known: Iterable[str]) -> str:
    """The known name that is most like `wanted`, empty where none is much alike."""
    return next(iter(difflib.get_close_matches(wanted, list(known), n=1)), "")


def did_you_mean(wanted: str, known: Iterable[str]) -> str:
    """What to do about an unknown name: the one that was meant, else all there are (the first twenty)."""
    known = list(known)
    near = closest(wanted, known)
    return f"did you mean {near}?" if near else f"must be one of {', '.join(sorted(known)[:20])}"
