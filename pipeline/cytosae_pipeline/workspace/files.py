"""Files of tensors of a workspace."""

from pathlib import Path

from cytosae_cache.storage.atomic import replacing_path


def write_torch(path: Path, value: object) -> None:
    """`torch.save`, atomic and durable.

    Args:
        path: The file; an existing one is replaced.
        value: Tensors and plain values.
    """
    with replacing_path(path) as temporary:
        save_torch(temporary, value)


def save_torch(path: Path, value: object) -> None:
    """`torch.save` of a file whose bytes do not depend on its name. A plain write: not atomic."""
    import torch

    # Through a file object: given a path, torch would write its name into the archive.
    with path.open("wb") as file:
        torch.save(value, file)
