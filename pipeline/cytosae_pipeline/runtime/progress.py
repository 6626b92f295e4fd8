"""Progress of long work: a bar with rate and time left on a terminal, a plain line now and then elsewhere."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts units of work; use as a context manager.

    Args:
        what: What is done, for example `build`.
        total: Units in all.
        unit: Name of a unit, in the plural.
        done: Units done before this start.
        quiet: Say nothing.
    """

    def __init__(self, what: str, total: int, unit: str, *, done: int = 0, quiet: bool = False) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = self._done_before = done
        self._quiet = quiet
        self._start = self._said = time.monotonic()
        self._said_done = -1
        self._bar: RichProgress | None = None

    def __enter__(self) -> Self:
        if not self._quiet and sys.stderr.isatty():
            self._bar = _make_bar()
            self._task = self._bar.add_task(self.what, total=self.total, completed=self.done, note="", rate="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif not self._quiet and kind is None and self._said_done < self.total:
            self._say("")

    @property
    def rate(self) -> float:
        """Units a second since the start."""
        return (self.done - self._done_before) / max(time.monotonic() - self._start, 1e-9)

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count finished units.

        Args:
            n: How many.
            note: A few words that describe the state, shown beside the rate.
        """
        self.done += n
        if self._bar is not None:
            rate = f"{self.rate:.4g} {self.unit}/s"
            self._bar.update(self._task, completed=self.done, note=note, rate=rate)
        elif not self._quiet and time.monotonic() - self._said >= _SECONDS_BETWEEN_LINES:
            self._say(note)

    def _say(self, note: str) -> None:
        """One plain line."""
        self._said, self._said_done = time.monotonic(), self.done
        left = (self.total - self.done) / self.rate if self.rate > 0 else 0.0
        share = 100 * self.done / max(self.total, 1)
        text = (
            f"{self.what}: {self.done:,} of {self.total:,} {self.unit} ({share:.0f} %), {self.rate:.4g} {self.unit}/s"
        )
        text += (
            f", {format_seconds(left)} left"
            if self.done < self.total
            else f", {format_seconds(self._said - self._start)}"
        )
        sys.stderr.write(text + (f", {note}" if note else "") + "\n")
        sys.stderr.flush()


def format_seconds(seconds: float) -> str:
    """A duration for people: `42 s`, `3 min 05 s`, `2 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_bytes(n_bytes: float) -> str:
    """A size for people, in powers of 1000: `16.4 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "bytes" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"


def _make_bar() -> "RichProgress":
    """A bar on stderr, so that stdout holds results only."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    )


class Reporter:
    """Tells people what is going on, on stderr; results go to stdout elsewhere.

    Args:
        quiet: Say nothing and show no progress.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet

    def say(self, text: str) -> None:
        """One message."""
        if not self.quiet:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def progress(self, what: str, total: int, unit: str, *, done: int = 0) -> Progress:
        """Progress of long work."""
        return Progress(what, total, unit, done=done, quiet=self.quiet)
