"""Torch files that appear only once complete, also after a crash or a power cut."""

from pathlib import Path

import torch

from cytosae_cache.storage.atomic import replacing_path


def write_torch(path: Path, value: object) -> None:
    """Save tensors and plain values atomically and durably."""
    # Through a file object: given a path, torch would record the temporary name in the archive.
    with replacing_path(path) as temporary, temporary.open("wb") as file:
        torch.save(value, file)
