"""Several files or folders that appear together: after a kill at any instant, the next call undoes what was begun."""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cytosae_cache.errors import StoreBusyError
from cytosae_cache.storage.atomic import (
    aside_name,
    discard,
    keep_mode,
    remove,
    remove_strays,
    replacing_path,
    sync_folder,
    sync_tree,
    temporary_name,
    write_file,
)
from cytosae_cache.storage.disk import writing

_MARK = "cytosae-cache files"
_MOST_BYTES = 1 << 16


@contextlib.contextmanager
def replacing_set(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Replace files or folders together with what the caller writes to temporary paths beside them.

    Nothing changes until the end of the `with` block. Then all are complete and on disk; a journal names them, the old
    ones are moved aside, the new ones get their names, and the journal is removed. Old and new are never seen together.
    What a killed or failing process began is undone: here, or by `undo_set`.

    Args:
        paths: The files or folders; they appear in this order. The caller holds a lock on them.

    Yields:
        Temporary paths to write to.

    Raises:
        WriteError: If the disk is full, read-only or fails; everything is as before.
        StoreBusyError: If the journal's name belongs to a file of another program.
    """
    undo_set(paths)
    if len(paths) == 1:
        with replacing_path(paths[0]) as temporary:
            yield [temporary]
        return
    temporaries = [temporary_name(path) for path in paths]
    with writing(_place(paths)):
        for path in paths:
            remove_strays(path)
        try:
            yield temporaries
            _commit(paths, temporaries)
        except BaseException:
            with contextlib.suppress(OSError):  # where the disk fails altogether, the next call undoes it
                undo_set(paths)
            if not _journal(paths).exists():
                for temporary in temporaries:
                    discard(temporary)
            raise


def undo_set(paths: Sequence[Path]) -> None:
    """Put everything back as it was before a killed process began to give a set of files its names.

    If all had got their names already, what is left of the old ones is removed.

    Args:
        paths: As for `replacing_set`. The caller holds a lock on them.

    Raises:
        WriteError: If the disk is full, read-only or fails.
        StoreBusyError: If the journal's name belongs to a file of another program.
    """
    journal = _journal(paths)
    remove_strays(journal)
    record = _read_journal(journal)
    if record is None:
        return
    with writing(_place(paths)):
        if record.get("named"):
            for path in paths:
                remove(aside_name(path, record["pid"]))
            journal.unlink()
            return
        for path in paths:
            temporary, aside = (name(path, record["pid"]) for name in (temporary_name, aside_name))
            wanted = record["files"].get(path.name)
            if wanted is not None and not os.path.lexists(temporary) and _identity(path) == wanted:
                path.rename(temporary)
            if os.path.lexists(aside) and not os.path.lexists(path):
                aside.rename(path)
            remove(temporary)
        _sync_folders(paths)
        journal.unlink()


def is_half_named(last: Path) -> bool:
    """Whether a process was killed while it gave a set of files its names, until `undo_set` is called.

    Args:
        last: The last path of the set.
    """
    return _journal([last]).exists()


def _commit(paths: Sequence[Path], temporaries: Sequence[Path]) -> None:
    """Give the temporaries their names."""
    for path, temporary in zip(paths, temporaries, strict=True):
        sync_tree(temporary)
        keep_mode(path, temporary)
    journal, files = _journal(paths), {path.name: _identity(new) for path, new in zip(paths, temporaries, strict=True)}
    record = {"mark": _MARK, "pid": os.getpid(), "files": files}
    write_file(journal, json.dumps(record).encode())
    for path in reversed(paths):
        if os.path.lexists(path):
            path.rename(aside_name(path))
    for path, temporary in zip(paths, temporaries, strict=True):
        temporary.rename(path)
    _sync_folders(paths)
    write_file(journal, json.dumps({**record, "named": True}).encode())
    with contextlib.suppress(OSError):  # everything is in place and on disk: too late to fail
        undo_set(paths)


def _journal(paths: Sequence[Path]) -> Path:
    """The file that is there while names are given."""
    return paths[-1].with_name(f"{paths[-1].name}.journal")


def _place(paths: Sequence[Path]) -> Path:
    """What an error names."""
    return paths[0] if len(paths) == 1 else paths[0].parent


def _identity(path: Path) -> list[int] | None:
    """What tells a file from any other that had or will have its name; None if there is none."""
    try:
        there = path.lstat()
    except FileNotFoundError:
        return None
    return [there.st_ino, there.st_mtime_ns]


def _read_journal(path: Path) -> dict[str, Any] | None:
    """What a killed process was doing; None if nothing.

    Raises:
        StoreBusyError: If the file is not ours.
    """
    if not os.path.lexists(path):
        return None
    value: Any = None
    if path.is_file() and not path.is_symlink():
        with path.open("rb") as file, contextlib.suppress(ValueError, RecursionError):
            value = json.loads(file.read(_MOST_BYTES))
    is_ours = isinstance(value, dict) and value.get("mark") == _MARK
    if not (is_ours and type(value.get("pid")) is int and isinstance(value.get("files"), dict)):
        raise StoreBusyError(
            f"'{path}' is not a file of cytosae-cache, but a set of files needs that name. Move it away"
        )
    return dict(value)


def _sync_folders(paths: Sequence[Path]) -> None:
    """Make renames durable."""
    for folder in {path.parent for path in paths}:
        sync_folder(folder)
