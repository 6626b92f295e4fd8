"""Metrics as JSON lines, which every run writes."""

import contextlib
import errno
import json
import math
import os
import stat
from pathlib import Path
from typing import BinaryIO

from cytosae_cache.storage.atomic import write_all
from cytosae_cache.storage.disk import writing
from cytosae_pipeline.training.loggers.base import Histograms, Metrics

_MOST_LINE_BYTES = 1 << 20


class JsonlLogger:
    """Appends one JSON object per line; a resumed run continues the same file.

    The file is never rewritten: lines that no longer count are cut off its end.

    Args:
        path: The file.
        after_step: Lines of later steps are dropped: the resumed run writes them again.

    Raises:
        WriteError: If the file cannot be written.
    """

    def __init__(self, path: Path, *, after_step: int = 0) -> None:
        self._path = path
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
        self._file = os.open(path, flags, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                raise OSError(errno.EINVAL, "it is not a file; move it away", str(path))
            with open(self._file, "rb", closefd=False) as file:
                end, is_closed = _find_end(file, after_step)
            with writing(path):
                os.ftruncate(self._file, end)
            if not is_closed:
                self._append(b"\n")
        except BaseException:
            self.close()
            raise

    def log(self, step: int, metrics: Metrics, histograms: Histograms | None = None) -> None:
        """Write a line, without histograms; NaN and infinity become null, since JSON has neither.

        Raises:
            WriteError: If there is no room for it; the lines before it stay, and no part of it does.
        """
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._append((json.dumps({"step": step, **values}) + "\n").encode())

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _append(self, line: bytes) -> None:
        """Write a line as a whole or not at all."""
        end = os.fstat(self._file).st_size
        with writing(self._path):
            try:
                write_all(self._file, line)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, end)
                raise


def _find_end(file: BinaryIO, after_step: int) -> tuple[int, bool]:
    """Length up to the last line that counts, and whether that line ends with a line break.

    Lines that were damaged on disk stay where they are, unless no line that counts follows.
    """
    end, is_closed = 0, True
    while line := file.readline(_MOST_LINE_BYTES):
        step = _read_step(line)
        if step is not None and step > after_step:
            break
        if step is not None:
            end, is_closed = file.tell(), line.endswith(b"\n")
    return end, is_closed


def _read_step(line: bytes) -> int | None:
    """The step of a line; None if it is damaged, as the one that a killed run was writing."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if type(step) is int else None
