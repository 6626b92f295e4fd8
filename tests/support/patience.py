"""How long a test waits for something that ought to happen before it calls it hung.

No test measures speed: a wait ends as soon as its condition holds, and the limits only end what would never end.
"""

import os
import time
from collections.abc import Callable

FACTOR = float(os.environ.get("CYTOSAE_TEST_PATIENCE", "1"))
"""Multiplies all limits; a loaded machine may need more than 1."""


def patience(seconds: float = 120) -> float:
    """A limit in seconds, generous for a machine that does something else at the same time."""
    return seconds * FACTOR


def wait_until(condition: Callable[[], object], what: str = "waited in vain") -> None:
    """Wait until a condition holds.

    Raises:
        AssertionError: If it never does; the message is `what`.
    """
    deadline = time.monotonic() + patience()
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.002)
