"""Where sparse matrices are found and multiplied by kernels of our own: on NVIDIA's GPUs, if Triton is there and works.

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

_TYPES = (torch.float32, torch.bfloat16)
_OLDEST = (8, 0)
"""Compute capability from which Triton supports a device."""
_TOLERANCE = 1e-5

_log = logging.getLogger(__name__)
_is_on = True


def find_kernels(table: torch.Tensor, other: torch.Tensor) -> ModuleType | None:
    """The module of kernels, `cytosae.sae.triton_kernels`, for a product or a search; None where torch does it.

    Autograd does not see what kernels compute, so a factor whose gradient is wanted gets torch's.

    Args:
        table: The dense factor, or one of two, or the matrix that is searched.
        other: The other factor; again the matrix that is searched.
    """
    if table.device.type != "cuda" or table.dtype not in _TYPES or other.dtype not in _TYPES:
        return None
    if torch.is_grad_enabled() and (table.requires_grad or other.requires_grad):
        return None
    return _load(table.device.index) if _is_on else None


def has_kernels(device: torch.device) -> bool:
    """Whether products of float32 and bfloat16 on a device run as kernels of our own."""
    if not _is_on or device.type != "cuda" or not torch.cuda.is_available():
        return False
    return _load(torch.cuda.current_device() if device.index is None else device.index) is not None


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
def _load(number: int) -> ModuleType | None:
    """The kernels, compiled and tried out on a device, once in a process; None with a warning if they do not work."""
    if torch.version.hip is not None or torch.cuda.get_device_capability(number) < _OLDEST:
        return None
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        kernels = importlib.import_module("cytosae.sae.triton_kernels")
        problem = find_problem(kernels, torch.device("cuda", number))
    except Exception as error:  # noqa: BLE001 - a compiler, a linker or a driver may raise anything
        problem = f"{type(error).__name__}: {error}"
    if problem is None:
        return kernels
    first_line = problem.strip().partition("\n")[0]
    _log.warning("Triton does not work here, so its kernels are not used: %.300s", first_line)
    return None


def find_problem(kernels: ModuleType, device: torch.device) -> str | None:
    """Compare products of a small matrix, and its entries, with those of torch on the CPU; what is wrong, or None.

    Args:
        kernels: The module of kernels.
        device: Where they run.
    """
    n, width = 40, 136
    matrix, table = (torch.arange(n * m, device="cpu").view(n, m).sin() for m in (n, width))
    matrix[:, 3:] *= matrix[:, 3:] > 0.9
    rows, columns = matrix.nonzero(as_tuple=True)
    bounds = torch.searchsorted(rows, torch.arange(n + 1, device="cpu"))
    expected = matrix @ table, (table @ table.T)[rows, columns]
    at = rows.to(device), columns.to(device)
    found = (
        kernels.sum_rows(*at, matrix[rows, columns].to(device), bounds.to(device), table.to(device)),
        kernels.multiply_sampled(*at, table.to(device), table.to(device)),
    )
    for name, wanted, product in zip(("matrix", "sampled"), expected, found, strict=True):
        difference = float((product.cpu() - wanted).norm() / wanted.norm())
        if not difference <= _TOLERANCE:
            return f"its {name} product differs from torch's by {difference:.1e}, more than {_TOLERANCE}"
    searched, bound = matrix.to(device), torch.zeros((), device=device)
    ends = kernels.count_above(searched, bound)
    above = (matrix > 0).nonzero(as_tuple=True)
    if int(ends[-1]) != len(above[0]):
        return f"it counts {int(ends[-1])} positive entries, torch {len(above[0])}"
    entries = kernels.take_above(searched, bound, ends, len(above[0]))
    if not all(torch.equal(one.cpu(), other) for one, other in zip(entries, (*above, matrix[above]), strict=True)):
        return "it finds other positive entries than torch"
    return None
