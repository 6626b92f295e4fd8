"""Files that are there whole or not at all, also after a crash or a power cut.

`cytosae_cache.storage.atomic` does the same for stores: neither package knows the other.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

import torch


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file under a temporary name in the same folder, sync it, and rename it.

    Args:
        path: The file.
        write: Writes its bytes.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_torch_atomically(path: Path, value: object) -> None:
    """`torch.save`, but never a half-written file."""
    write_atomically(path, lambda file: torch.save(value, file))


def _sync_folder(folder: Path) -> None:
    """Make a rename inside a folder durable. Windows has no such call and needs none."""
    if os.name == "nt":
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
