"""Progress of long work through tqdm: a bar on a terminal and in a notebook, a plain line now and then elsewhere."""

import logging
import sys
import threading
import time
import warnings
from types import TracebackType
from typing import Any, Self, TextIO

from cytosae_cache.storage.disk import format_bytes as format_bytes

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_UNTIL_FIRST_LINE = 10.0
_LINE = (
    "{desc}: {n:,} of {total:,} {plural} ({percentage:.0f} %), {rate_fmt}, {elapsed} elapsed, {remaining} left{postfix}"
)


class Progress:
    """Counts units of work; use as a context manager.

    It is shown unless the level of the logger `cytosae_pipeline` is set above INFO: one switch for messages and bars.

    Args:
        what: Name of the work, for example `build`.
        total: Number of units.
        unit: Name of a unit, in the plural.
        done: Units finished before this start.
    """

    def __init__(self, what: str, total: int, unit: str, *, done: int = 0) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = self._done_before = done
        self._start = time.monotonic()
        self._bar: Any = None
        self._advanced = threading.Event()
        self._waiting: threading.Thread | None = None

    def __enter__(self) -> Self:
        if logging.getLogger("cytosae_pipeline").level <= logging.INFO:
            shows_bar = sys.stderr.isatty() or "ipykernel" in sys.modules
            lines = None if shows_bar else _Lines(sys.stderr)
            self._bar = _make_bar(self.what, self.total, self.unit, self.done, lines)
            if lines is not None:
                self._waiting = threading.Thread(target=self._say_that_it_runs, args=(lines,), daemon=True)
                self._waiting.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._advanced.set()
        if self._waiting is not None:
            self._waiting.join()
        if self._bar is not None:
            self._bar.delay = 0.0  # else tqdm would say nothing at all of short work
            self._bar.close()

    @property
    def rate(self) -> float:
        """Units per second since the start."""
        return (self.done - self._done_before) / max(time.monotonic() - self._start, 1e-9)

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count finished units.

        Args:
            n: How many.
            note: A few words that describe the state, shown behind the rate.
        """
        self.done += n
        self._advanced.set()
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(n)

    def _say_that_it_runs(self, lines: "_Lines") -> None:
        """Write a line once, if the first batch takes long; ends with the first batch, or with the bar."""
        if not self._advanced.wait(_SECONDS_UNTIL_FIRST_LINE):
            lines.write(f"{self.what}: {self.done:,} of {self.total:,} {self.unit}, the first batch is running")


def format_seconds(seconds: float) -> str:
    """A duration as text: `42 s`, `3 min 05 s`, `2 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _make_bar(what: str, total: int, unit: str, done: int, lines: "_Lines | None") -> Any:  # noqa: ANN401 - untyped
    """A tqdm bar on stderr, so that stdout contains results only; or plain lines, if there is a stream for them."""
    from tqdm import TqdmWarning

    with warnings.catch_warnings():
        # In a notebook without ipywidgets tqdm draws with text, which needs no warning.
        warnings.simplefilter("ignore", TqdmWarning)
        from tqdm.auto import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        """Starts no thread of its own, and averages over the whole time."""

        monitor_interval = 0

    options: dict[str, Any] = {"desc": what, "total": total, "initial": done, "unit": f" {unit}", "smoothing": 0}
    if lines is None:
        return Bar(**options, miniters=1, dynamic_ncols=True)
    line = _LINE.replace("{plural}", unit)
    wait = _SECONDS_BETWEEN_LINES
    return Bar(**options, miniters=1, mininterval=wait, delay=wait, bar_format=line, file=lines)


class _Lines:
    """A text stream that turns what tqdm draws over and over in one place into lines.

    Args:
        stream: Where the lines go.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._last = stream, ""

    def write(self, text: str) -> None:
        """Write a line, unless it is empty or repeats the one before."""
        line = text.strip("\r\n ")
        if line and line != self._last:
            self._stream.write(line + "\n")
            self._last = line

    def flush(self) -> None:
        """Pass on what is pending."""
        self._stream.flush()
