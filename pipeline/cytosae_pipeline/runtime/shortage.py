"""Work that does not fit into memory: refused before it begins where its size is known, else explained by one error."""

import contextlib
import errno
import re
from collections.abc import Collection, Iterator

from cytosae_pipeline.errors import UserError
from cytosae_pipeline.runtime.progress import format_bytes

_TEXTS = (
    "can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory", "bad allocation",
    "bad_alloc", "alloc_failed", "size calculation overflowed", "multiplication overflow",
    "overflow when unpacking long", "invalid buffer size", "array is too big", "maximum allowed dimension exceeded",
)  # fmt: skip
"""Parts of what torch and numpy say, in small letters, when they get no memory or a size exceeds any memory."""

_SMALLER = {
    "expansion_factor": "--expansion_factor", "n_latents": "--n_latents", "batch_size": "--batch_size",
    "max_memory": "--max_memory", "top_k": "--top_k", "shard_images": "--shard_images", "workers": "--workers",
}  # fmt: skip
"""Options that take less memory if they are smaller, the most effective ones first."""


class NotEnoughMemoryError(UserError, MemoryError):
    """Something does not fit into memory; the message says what to make smaller."""


def require_memory(n_bytes: int, free: int | None, what: str, advice: str) -> None:
    """Refuse what certainly does not fit into memory, before any of it is allocated.

    Args:
        n_bytes: Bytes that are needed at the least.
        free: Bytes that are free; None if that is not known, and nothing is refused.
        what: What needs them, the subject of the message.
        advice: What to do, without a full stop.

    Raises:
        NotEnoughMemoryError: If they are not free.
    """
    if free is not None and n_bytes > free:
        raise NotEnoughMemoryError(
            f"{what} needs at least {format_bytes(n_bytes)} of memory, but {format_bytes(free)} are free. {advice}"
        )


@contextlib.contextmanager
def explained_shortage(options: Collection[str]) -> Iterator[None]:
    """Turn whatever libraries raise for want of memory into one error; others pass unchanged.

    Args:
        options: Names of the options of the verb that runs.

    Raises:
        NotEnoughMemoryError: If memory ran out; the message names the options that make the work smaller.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, NotEnoughMemoryError) or not is_shortage(error):
            raise
        smaller = [option for name, option in _SMALLER.items() if name in options]
        advice = f"Try a smaller {' or '.join(smaller)}, or" if smaller else "Try"
        raise NotEnoughMemoryError(
            f"memory ran out ({_describe(error)}). {advice} a machine with more memory; what was finished is kept"
        ) from error


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that there was too little memory, or that a size exceeds any memory."""
    from cytosae.formats.checkpoint import SaeCheckpointError
    from cytosae.formats.foreign import InteropError

    while isinstance(error, SaeCheckpointError | InteropError) and error.__cause__ is not None:
        error = error.__cause__  # readers of files take whatever torch raises for damage
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    if isinstance(error, UserError) or not isinstance(error, RuntimeError | ValueError | TypeError):
        return False
    text = str(error).lower()
    return any(part in text for part in _TEXTS)


def _describe(error: BaseException) -> str:
    """How much was asked for at once if the error says so, else the beginning of its text, or its type."""
    text = str(error).strip()
    if asked := re.search(r"tried to allocate (\d+) bytes", text):
        return f"{format_bytes(int(asked[1]))} were asked for at once"
    return text.splitlines()[0][:160].rstrip(".") if text else type(error).__name__
