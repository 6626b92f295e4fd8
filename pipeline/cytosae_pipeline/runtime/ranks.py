"""The processes that torchrun starts for one training: found in the environment, joined, and which of them speaks."""

import contextlib
import datetime
import logging
import os
import platform
import signal
from typing import TYPE_CHECKING, Any, NamedTuple

from cytosae_pipeline.errors import UserError

if TYPE_CHECKING:  # a plain run imports no torch for this
    from collections.abc import Iterator

    from cytosae.sae.world import World

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_LONGEST = datetime.timedelta(days=30)
"""How long ranks wait for each other: rank 0 may build the store first. torchrun ends them all if one ends."""
_LAUNCH = "torchrun --nproc-per-node N -m cytosae_pipeline train ..."

_store: Any = None
"""The store through which the joined ranks met; None before."""


class Launched(NamedTuple):
    """What torchrun tells a process of itself."""

    rank: int
    """Its number among all processes."""
    size: int
    """Number of processes."""
    local_rank: int
    """Its number on its machine, which is that of its GPU."""
    local_size: int
    """Processes on its machine."""


class RankStoppedError(UserError):
    """Another process of the training has stopped and says why."""


def launched() -> Launched | None:
    """What torchrun tells this process; None if it is alone. Imports nothing heavy.

    Raises:
        UserError: If the environment is that of several processes, but incomplete.
    """
    values = {name: os.environ.get(name, "") for name in _NAMES}
    if values["WORLD_SIZE"] in ("", "1"):
        return None
    values["LOCAL_WORLD_SIZE"] = os.environ.get("LOCAL_WORLD_SIZE") or values["WORLD_SIZE"]
    numbers = {name: int(value) for name, value in values.items() if value.isascii() and value.isdecimal()}
    is_complete = len(numbers) == len(values)
    if not (
        is_complete
        and numbers["RANK"] < numbers["WORLD_SIZE"]
        and numbers["LOCAL_RANK"] < numbers["LOCAL_WORLD_SIZE"] <= numbers["WORLD_SIZE"]
    ):
        found = ", ".join(f"{name}={value!r:.40}" for name, value in values.items())
        raise UserError(
            f"WORLD_SIZE is set as for several processes, but the rest does not fit ({found}). Start with: {_LAUNCH}; "
            "or unset WORLD_SIZE"
        )
    return Launched(*(numbers[name] for name in (*_NAMES, "LOCAL_WORLD_SIZE")))


def is_several() -> bool:
    """Whether this is one of several processes; an incomplete environment is that of a single one."""
    try:
        return launched() is not None
    except UserError:
        return False


def is_first() -> bool:
    """Whether this process shows results: the only one, or rank 0."""
    place = launched()
    return place is None or not place.rank


def n_processes_here() -> int:
    """Processes of the training on this machine, which share its memory."""
    place = launched()
    return 1 if place is None else place.local_size


def require_one_process(verb: str) -> None:
    """Refuse several processes that would all do the same.

    Raises:
        UserError: If torchrun started several.
    """
    place = launched()
    if place is not None:
        raise UserError(
            f"{verb} runs in one process, but torchrun started {place.size}, which would all do the same. Start it "
            f"without torchrun: cytosae-cache {verb} ..."
        )


def speaks() -> bool:
    """Whether this process tells of an error or interrupt. Of several, the one that asks first does."""
    if not is_several():
        return True
    with contextlib.suppress(RuntimeError, ValueError):
        # torchrun keeps the store itself: it outlives rank 0, and may be asked before the ranks have joined.
        if _store is not None or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return bool(_open_store().add("spoken", 1) == 1)
    return is_first()


def end_quietly() -> None:
    """Ignore further Ctrl-C and SIGTERM of several processes: torchrun sends on what the terminal has sent already."""
    if is_several():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def joined(*, on_gpus: bool, level: int = logging.CRITICAL) -> "Iterator[World]":
    """Join the processes that torchrun started; a world of one in a plain run.

    A process group that the caller has made already is used and kept.

    Args:
        on_gpus: Whether tensors on GPUs are exchanged, if there are any.
        level: From which level on ranks other than 0 log.

    Raises:
        UserError: If they cannot meet.
    """
    from cytosae.sae.world import ALONE, RankWorld

    place = launched()
    if place is None:
        yield ALONE
        return
    import torch.distributed as dist

    is_ours = not dist.is_initialized()
    if is_ours:
        _meet(on_gpus=on_gpus)
    logger = logging.getLogger("cytosae_pipeline")
    before = logger.level
    if place.rank:
        logger.setLevel(level)
    try:
        yield RankWorld()
    finally:
        logger.setLevel(before)
    if is_ours:  # not after an error: the others may be gone
        dist.destroy_process_group()


def _meet(*, on_gpus: bool) -> None:
    """Make torch's default process group, through the store that torchrun keeps.

    Raises:
        UserError: If that fails.
    """
    import torch
    import torch.distributed as dist

    place = launched()
    assert place is not None
    on_gpus = on_gpus and torch.cuda.is_available() and dist.is_nccl_available()
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpus else "gloo", store=_open_store(), rank=place.rank, world_size=place.size,
            timeout=_LONGEST,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        at = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"the processes of this training cannot meet at {at} (from {platform.node()}): {str(error)[:200]}. Start "
            f"them with: {_LAUNCH}"
        ) from error


def _open_store() -> Any:  # noqa: ANN401 - torch's
    """The store through which the processes meet. torchrun may keep it over restarts, with addresses of dead ones."""
    from torch.distributed import PrefixStore  # type: ignore[attr-defined] # it is public
    from torch.distributed.rendezvous import rendezvous

    global _store
    if _store is None:
        store, _, _ = next(rendezvous("env://"))
        _store = PrefixStore(f"cytosae_cache/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    return _store
