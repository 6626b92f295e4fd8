"""Errors of backbones, and what of a file may stand in their messages."""


class BackboneError(ValueError):
    """A vision transformer cannot be used; the message states what was found and what was expected."""


class BackboneNotFoundError(BackboneError, FileNotFoundError):
    """The file or folder does not exist."""

    def __str__(self) -> str:
        return str(self.args[0])


def shown(value: object, most: int = 80) -> str:
    """A value from a file as it may stand in a message: one short line, without characters that steer a terminal."""
    text = value if isinstance(value, str) else repr(value)
    cut = text if len(text) <= most else text[: most - 1] + "…"
    return "".join(item if item.isprintable() else item.encode("unicode_escape").decode() for item in cut)


def listed(items: list[str], most: int = 6) -> str:
    """The first items of a list, and the number of the others."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return "; ".join(shown(item, 200) for item in items[:most]) + more
