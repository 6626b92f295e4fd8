"""Output of a verb: its result as text or JSON, messages on stderr, and expected errors as one message."""

import dataclasses
import errno
import json
import logging
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from cytosae_pipeline.errors import UserError, escape
from cytosae_pipeline.runtime.ranks import RankStoppedError, end_quietly, is_first, is_several, speaks

INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM, as shells expect it."""


def print_result(result: Any, text: str, as_json: bool) -> None:  # noqa: ANN401 - a record or a dict
    """Print a result on stdout: the text, or the values as JSON. Of several processes, rank 0 does.

    Raises:
        UserError: If stdout is a file on a full disk.
    """
    if not is_first():
        return
    if as_json:
        values = dataclasses.asdict(result) if dataclasses.is_dataclass(result) else result  # type: ignore[arg-type]
        text = json.dumps(values, default=str)
    else:
        text = _printable(text)
    try:
        click.echo(text)
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise  # the reader, such as head, has closed the pipe
        raise UserError(f"the result cannot be written to standard output: {error.strerror}") from error


@contextmanager
def log_to_stderr() -> Iterator[None]:
    """Print the package's messages on stderr, beside its progress bars: stdout contains the result alone."""
    logger, handler = logging.getLogger("cytosae_pipeline"), _StderrHandler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _StderrHandler(logging.Handler):
    """Prints messages above a progress bar that is being shown."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        from tqdm.std import tqdm

        tqdm.write(_printable(self.format(record)), file=sys.stderr)


@contextmanager
def messages() -> Iterator[None]:
    """Turn expected errors into one message and an exit code; bugs keep their traceback.

    Of several processes that are interrupted, one prints the message.
    """
    try:
        yield
    except KeyboardInterrupt:
        end_quietly()
        if is_several():
            text = "Run the same torchrun command again to resume, also with another number of processes"
        else:
            text = f"Resume with:\n  {shlex.join(['cytosae-cache', *sys.argv[1:]])}"
        if speaks():
            click.echo(f"\ninterrupted; finished work is kept. {text}", err=True)
        raise SystemExit(INTERRUPTED) from None
    except (ValueError, OSError, RuntimeError) as error:
        if not _is_expected(error):
            raise
        if isinstance(error, RankStoppedError):
            raise SystemExit(1) from None
        raise click.ClickException(_printable(_describe(error))) from error


@contextmanager
def one_message() -> Iterator[None]:
    """Have one of several processes print the message with which they all end; click prints that of a single one."""
    try:
        yield
    except click.ClickException as error:
        if speaks():
            error.show()
        raise SystemExit(error.exit_code) from None
    except click.Abort:
        raise SystemExit(INTERRUPTED) from None


def _describe(error: Exception) -> str:
    """An error's message; those of the system itself become one that names the file."""
    if not (isinstance(error, OSError) and error.errno is not None and error.filename is not None and error.strerror):
        return str(error)
    from cytosae_cache.storage.disk import WRITING_ONLY, explain

    name = os.fsdecode(error.filename)
    if error.errno in WRITING_ONLY:
        return explain(f"'{name}'", Path(name), error.errno)
    return f"'{name}' cannot be used: {error.strerror}"


def _printable(text: str) -> str:
    """Lines for a terminal. Names in them may come from files and folders of anyone, and could control it."""
    return escape(text, keep="\n\t")


def _is_expected(error: Exception) -> bool:
    """Whether an error is one that a user can fix."""
    from cytosae_cache.errors import StoreError
    from cytosae_pipeline.images.image_list import DatasetError
    from cytosae_pipeline.images.isolation import DecodingError

    if isinstance(error, UserError | StoreError | DatasetError | DecodingError | OSError):
        return True
    from cytosae.backbones.errors import BackboneError
    from cytosae.formats.checkpoint import SaeCheckpointError
    from cytosae.formats.foreign import InteropError
    from cytosae.sae.world import RankLostError

    return isinstance(error, SaeCheckpointError | InteropError | BackboneError | RankLostError)
