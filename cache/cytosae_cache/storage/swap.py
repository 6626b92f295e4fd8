"""A store that takes the place of an older one: at a kill or power cut one of them is there, whole.

The new store is written beside the old one. Then a note (`NAME.swap`) states which of the two is new, they exchange
their names in one step where the system can do that, and the old one is removed. A note that is found later says what
is left to do.
"""

import hashlib
from pathlib import Path

from cytosae_cache.storage.atomic import exchange, replacing_path, sync_folder
from cytosae_cache.storage.local import LocalStorage

_KEY_FILE = "zarr.json"
"""File without which a folder is no store."""


def place_beside(path: Path) -> Path:
    """Where the store that will take the place of the one at `path` is written."""
    return path.with_name(f"{path.name}.replacing")


def swap(path: Path) -> None:
    """Put the complete store beside `path` in its place, and remove the old one.

    Args:
        path: The place, where an old store may be; no link.

    Raises:
        OSError: If the file system refuses; both stores are kept, and `finish_swap` tries again.
    """
    with replacing_path(_note(path)) as note:
        note.write_text(_identify(place_beside(path)))
    finish_swap(path)


def finish_swap(path: Path) -> None:
    """Finish a swap that was interrupted, if there is one.

    Args:
        path: The place.

    Raises:
        OSError: If the file system refuses.
    """
    note, new, aside = _note(path), place_beside(path), path.with_name(f"{path.name}.replaced")
    try:
        wanted = note.read_text()
    except FileNotFoundError:
        return
    if _identify(path) != wanted == _identify(new):
        if path.exists() and not exchange(path, new):
            path.rename(aside)
        if not path.exists():
            new.rename(path)
        sync_folder(path.parent)
    if _identify(path) == wanted:
        for old in (new, aside):
            LocalStorage(old).delete()
    elif aside.exists() and not path.exists():
        aside.rename(path)
    note.unlink()


def _note(path: Path) -> Path:
    """The file that states which store is new."""
    return path.with_name(f"{path.name}.swap")


def _identify(path: Path) -> str:
    """What tells a store from another one, even if both state the same; '' if there is none."""
    try:
        digest = hashlib.sha256((path / _KEY_FILE).read_bytes()).hexdigest()
        return f"{path.stat().st_ino} {digest}"
    except (FileNotFoundError, NotADirectoryError):
        return ""
