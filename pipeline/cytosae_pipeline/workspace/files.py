"""Files of tensors that appear in a workspace only once they are complete."""

from pathlib import Path

from cytosae_cache.storage.atomic import replacing_path


def write_torch(path: Path, value: object) -> None:
    """`torch.save`, atomic and durable.

    Args:
        path: The file; an existing one is replaced.
        value: Tensors and plain values.
    """
    import torch

    # Through a file object: given a path, torch would write its name into the archive.
    with replacing_path(path) as temporary, temporary.open("wb") as file:
        torch.save(value, file)
