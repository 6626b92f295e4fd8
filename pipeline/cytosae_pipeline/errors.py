"""Errors that a user can fix, shown as one message."""

from collections.abc import Iterable

_MAX_QUOTED = 100


class UserError(ValueError):
    """The user can fix this; the message says what was found, what was expected and what to type."""


def quote(text: str) -> str:
    """A name from a file or folder in single quotes, safe on a terminal: escaped where not printable, and shortened."""
    return f"'{escape(text if len(text) <= _MAX_QUOTED else text[: _MAX_QUOTED - 3] + '...')}'"


def escape(text: str, *, keep: str = "") -> str:
    """Text that cannot control a terminal: characters that are not printable are escaped.

    Args:
        text: Any text.
        keep: Characters that stay as they are nevertheless.
    """
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def install(extra: str) -> str:
    """How to install an extra."""
    return f'pip install ".[{extra}]" in your clone of cytosae-cache'


def say_count(n: int, one: str, several: str = "") -> str:
    """A number of things, such as `1 image` and `1,234 images`.

    Args:
        n: How many.
        one: What stands behind 1; it may go on after the noun, such as `image has none`.
        several: What stands behind other numbers; default `one` with an s.
    """
    return f"{n:,} {one if n == 1 else several or one + 's'}"


def join_few(texts: Iterable[str], n: int) -> str:
    """The first n texts, separated by commas, and how many more there are."""
    every = list(texts)
    more = len(every) - n
    return ", ".join(every[:n]) + (f" and {more:,} more" if more > 0 else "")
