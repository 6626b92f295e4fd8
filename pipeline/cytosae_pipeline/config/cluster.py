"""The option that says on which cluster work is done."""

import re
from dataclasses import dataclass
from pathlib import Path

from cytosae_pipeline.config.fields import Config, option
from cytosae_pipeline.errors import UserError

MAX_LOCAL_WORKERS = 1024
"""Most worker processes that are started on this machine."""

_ADDRESS = re.compile(r"(tcp|tls|ucx|ws|wss)://(\[[\w:.%]+\]|[\w.-]+):\d{1,5}")


@dataclass(frozen=True, kw_only=True)
class ClusterChoice(Config):
    """Options of every verb that can share its work among the workers of a cluster: which one."""

    dask: str | None = option(
        None,
        "Share the work among the workers of a cluster: local:N starts N processes on this machine; tcp://HOST:PORT is "
        "the address of a running dask scheduler; a path that ends in .json is its scheduler file. Workers must reach "
        "the same files. Results are the same (docs/clusters.md).",
    )

    def __post_init__(self) -> None:
        """Check what the option names."""
        super().__post_init__()
        if self.dask is not None:
            parse_dask(self.dask)


def parse_dask(text: str) -> int | str | Path:
    """What `--dask` names: a number of local workers, the address of a scheduler, or a scheduler file.

    Raises:
        UserError: If it names none of them.
    """
    local = re.fullmatch(r"local:(\d{1,6})", text)
    if local and 1 <= int(local[1]) <= MAX_LOCAL_WORKERS:
        return int(local[1])
    if _ADDRESS.fullmatch(text):
        return text
    if text.endswith(".json"):
        return Path(text)
    raise UserError(
        f"dask must be local:N with N from 1 to {MAX_LOCAL_WORKERS:,}, the address of a scheduler such as "
        f"tcp://10.0.0.1:8786, or the path of a scheduler file that ends in .json, found {text!r}"
    )
