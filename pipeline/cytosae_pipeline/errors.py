"""Errors that a user can fix, shown as one message."""


class UserError(ValueError):
    """The user can fix this; the message says what was found, what was expected and what to type."""
