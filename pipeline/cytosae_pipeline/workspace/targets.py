"""Where a result goes that the user may have placed elsewhere by a link."""

import os
from pathlib import Path

from cytosae_pipeline.errors import UserError


def resolve_target(path: Path) -> Path:
    """The place that is written: where a link leads, so that the link itself stays.

    Args:
        path: A file or folder that need not exist.

    Raises:
        UserError: If it is a link into a folder that does not exist, such as that of a disk that is not mounted.
    """
    if not path.is_symlink():
        return path
    target = Path(os.path.realpath(path))
    if target.is_symlink() or not target.parent.is_dir():
        raise UserError(
            f"'{path}' is a link to '{target}', whose folder does not exist. Create or mount it, or remove the link"
        )
    return target
