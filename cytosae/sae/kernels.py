"""Where kernels of our own take the place of torch's: on NVIDIA's GPUs, if Triton is there and works.

torch's builds for CUDA bring Triton. It is imported when the first tensor on such a device arrives, never on a CPU.
"""

import contextlib
import functools
import importlib
import importlib.util
import logging
from collections.abc import Iterator
from types import ModuleType

import torch

PRODUCTS = "cytosae.sae.triton_kernels"
"""The module of sparse products and searches. Others are named by who uses them: they belong to other rooms."""

WIDEST_ROW = 8192
"""Numbers of a row of weights up to which one program of our kernels holds it."""

_TYPES = (torch.float32, torch.bfloat16)
_OLDEST = (8, 0)
"""Compute capability from which Triton supports a device."""

_log = logging.getLogger(__name__)
_is_on = True
_said: set[str] = set()
"""Problems that were logged."""


def find_kernels(table: torch.Tensor, other: torch.Tensor, name: str = PRODUCTS) -> ModuleType | None:
    """The module of kernels, for a product or a search unless another one is named; None where torch does it.

    Autograd does not see what kernels compute, so a factor whose gradient is wanted gets torch's.

    Args:
        table: The dense factor, or one of two, or the matrix that is searched.
        other: The other factor; again the matrix that is searched.
        name: The module. It has a function `find_problem(device)`, which says what is wrong there, or gives None.
    """
    if table.device.type != "cuda" or table.dtype not in _TYPES or other.dtype not in _TYPES:
        return None
    if torch.is_grad_enabled() and (table.requires_grad or other.requires_grad):
        return None
    return _load(table.device.index, name) if _is_on else None


def has_kernels(device: torch.device) -> bool:
    """Whether products of float32 and bfloat16 on a device run as kernels of our own."""
    if not _is_on or device.type != "cuda" or not torch.cuda.is_available():
        return False
    return _load(torch.cuda.current_device() if device.index is None else device.index, PRODUCTS) is not None


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Within it, all products are torch's own, in every thread."""
    global _is_on
    before, _is_on = _is_on, False
    try:
        yield
    finally:
        _is_on = before


@functools.cache
def _load(number: int, name: str) -> ModuleType | None:
    """A module of kernels, compiled and tried out on a device, once; None with a warning if they do not work."""
    if torch.version.hip is not None or torch.cuda.get_device_capability(number) < _OLDEST:
        return None
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        kernels = importlib.import_module(name)
        problem = kernels.find_problem(torch.device("cuda", number))
    except Exception as error:  # noqa: BLE001 - a compiler, a linker or a driver may raise anything
        problem = f"{type(error).__name__}: {error}"
    if problem is None:
        return kernels
    first_line = problem.strip().partition("\n")[0][:300]
    if first_line not in _said:  # what all modules need may be missing
        _said.add(first_line)
        _log.warning("Triton kernels of %s do not work here, so torch's own functions are used: %s", name, first_line)
    return None
