"""Errors that a user can fix, shown as one message."""

_MAX_QUOTED = 100


class UserError(ValueError):
    """The user can fix this; the message says what was found, what was expected and what to type."""


def quote(text: str) -> str:
    """A name from a file or folder in single quotes, safe on a terminal: escaped where not printable, and shortened."""
    cut = text if len(text) <= _MAX_QUOTED else text[: _MAX_QUOTED - 3] + "..."
    return "'" + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut) + "'"
