"""Why files that a manifest lists do not exist: another folder, other capitals, another ending."""

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from cytosae_pipeline.errors import quote
from cytosae_pipeline.images.folders import SUFFIXES

_TRIED = 5  # missing files that are looked for
_MAX_ENTRIES = 2000  # names of one folder that are read
_MAX_FOLDERS = 500  # folders that are tried before the paths


def explain_missing(root: Path, paths: Sequence[str]) -> str:
    """A hint where missing files may lie, as the end of a message; '' if nothing like them is found.

    Only a few files are looked for, in a bounded number of folders below the root. Links are not followed.

    Args:
        root: Folder that the paths start from.
        paths: Missing files, relative to it.
    """
    folders = list(itertools.islice(_iter_folders(root), _MAX_FOLDERS))
    for path in paths[:_TRIED]:
        if found := _find_spelling(root, path):
            return f". {quote(found)} exists: write capitals and ending as the file has them"
        for folder in folders:
            if os.path.isfile(root / folder / path):  # noqa: PTH113 - false also for names that are too long
                return (
                    f". {quote(f'{folder}/{path}')} exists: write '{folder}/' before the paths, or move the CSV there"
                )
        parts = PurePosixPath(path).parts
        for n in range(1, len(parts)):
            if os.path.isfile(root.joinpath(*parts[n:])):  # noqa: PTH113
                return f". {quote('/'.join(parts[n:]))} exists: leave out {quote('/'.join(parts[:n]) + '/')} before it"
    return ""


def _iter_folders(root: Path) -> Iterator[str]:
    """Folders below a folder as relative paths, the upper ones first."""
    pending = [""]
    while pending:
        above = pending.pop(0)
        for name in sorted(_list(root / above, is_folder=True)):
            relative = f"{above}/{name}" if above else name
            yield relative
            pending.append(relative)


def _find_spelling(root: Path, path: str) -> str:
    """The file that a path names in other capitals, or without its ending; '' if there is none or more than one."""
    parts = PurePosixPath(path).parts
    place = ""
    for n, part in enumerate(parts):
        is_last = n == len(parts) - 1
        names = _list(root / place, is_folder=not is_last)
        fitting = [name for name in names if name == part] or [
            name for name in names if name.casefold() == part.casefold()
        ]
        if not fitting and is_last:
            has_ending = PurePosixPath(part).suffix.lower() in SUFFIXES
            stem = (PurePosixPath(part).stem if has_ending else part).casefold()
            fitting = [name for name in names if PurePosixPath(name).stem.casefold() == stem]
        if len(fitting) != 1:
            return ""
        place = f"{place}/{fitting[0]}" if place else fitting[0]
    return place


def _list(folder: Path, *, is_folder: bool) -> list[str]:
    """Names of the folders, or of the files, in a folder; none if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return [
                entry.name
                for entry in itertools.islice(entries, _MAX_ENTRIES)
                if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False) == is_folder
            ]
    except OSError:
        return []
