"""What a worker of a cluster runs: it is prepared once, then calls functions of ranges and merges their results."""

import copy
import ctypes
import functools
import importlib
import os
import platform
import re
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from cytosae_pipeline.errors import UserError

T = TypeVar("T")

COMPARED = ("cytosae_pipeline", "dask", "distributed", "numpy", "torch")
"""Packages whose versions must be the same everywhere, beside Python itself."""

_TRIM = "MALLOC_TRIM_THRESHOLD_"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MMAP_BYTES = 32 << 20


class ClusterError(UserError):
    """The cluster cannot be used; the message says why and what to do."""


def run_task(function: Callable[[range], T], part: range, expected: Mapping[str, str]) -> T:
    """Call a function on a worker that was prepared for it.

    Args:
        function: Function of a range.
        part: The range.
        expected: Versions of the program that asks, as from `find_versions`.

    Raises:
        ClusterError: If this worker has other versions.
    """
    check_worker(expected)
    _prepare_process()
    choose_cuda_device(_worker_name())
    return function(part)


def check_worker(expected: Mapping[str, str], *needed: object) -> None:
    """Refuse a worker that has other versions.

    Args:
        expected: As for `run_task`.
        *needed: Functions that it will be asked to call: they can be imported if this is called at all.

    Raises:
        ClusterError: If this worker has other versions.
    """
    require_versions(find_versions(), expected, f"worker on {socket.gethostname()}")


def merge_parts(merge: Callable[[T, T], T], *parts: T) -> T:
    """Merge results without changing them: after a worker died, dask may need the same ones again."""
    merged = copy.deepcopy(parts[0])
    for part in parts[1:]:
        merged = merge(merged, part)
    return merged


def find_versions() -> dict[str, str]:
    """Versions of Python and of the packages that must be the same everywhere."""
    found = {name: str(importlib.import_module(name).__version__) for name in COMPARED}
    return {"python": ".".join(platform.python_version_tuple()[:2]), **found}


def require_versions(found: Mapping[str, str], expected: Mapping[str, str], where: str) -> None:
    """Refuse another program of the cluster that has other versions.

    Args:
        found: Its versions.
        expected: The versions of this one; those that `found` does not name are not compared.
        where: Which it is.

    Raises:
        ClusterError: If a version differs.
    """
    wrong = {name: version for name, version in found.items() if version != expected.get(name, version)}
    if wrong:
        differences = ", ".join(f"{name} {version} (here {expected[name]})" for name, version in wrong.items())
        raise ClusterError(
            f"the {where} has other versions than this program: {differences}. Start scheduler and workers from the "
            "environment in which you type this command"
        )


def choose_cuda_device(name: object) -> None:
    """Have this thread use the GPU that belongs to a worker; GPUs are given out by the number that its name ends in.

    Args:
        name: Name of the worker.
    """
    import torch

    if n_devices := torch.cuda.device_count():
        torch.cuda.set_device(number_of(name) % n_devices)


def number_of(name: object) -> int:
    """The number that a worker's name ends in; 0 if it ends in none, or if the name is its address, as by default."""
    found = re.search(r"^(?!.*://).*?(\d{1,9})$", str(name))
    return int(found[1]) if found else 0


@functools.cache
def _prepare_process() -> None:
    """Give the process the threads and the memory management that our work needs."""
    import torch
    from distributed import get_worker

    if "OMP_NUM_THREADS" not in os.environ:  # otherwise torch has followed it
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // get_worker().state.nthreads))
    # The nanny has the allocator return memory at once. It does so for our buffers of some megabytes, too, which
    # are then cleared by the system each time they are allocated, and a pass takes twice the processor's time.
    libc = ctypes.CDLL(None) if sys.platform == "linux" and _TRIM in os.environ else None
    if hasattr(libc, "mallopt"):
        assert libc is not None
        libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _MMAP_BYTES)


def _worker_name() -> Any:  # noqa: ANN401 - text or a number
    from distributed import get_worker

    return get_worker().name
