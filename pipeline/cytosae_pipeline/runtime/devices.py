"""Devices and number types."""

import contextlib
from typing import Any

import torch

from cytosae_cache.format.spec import Precision
from cytosae_pipeline.config.store import Device, PrecisionChoice
from cytosae_pipeline.errors import UserError

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Torch types of the precisions."""


def choose_device(device: Device) -> torch.device:
    """The requested device; `auto` takes cuda, then mps, then cpu.

    Raises:
        UserError: If this machine does not have it.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return torch.device(next(name for name, available in there.items() if available))
    if not there[device]:
        found = ", ".join(name for name, available in there.items() if available)
        raise UserError(f"--device {device} was given, but this machine has: {found}. Try --device auto")
    return torch.device(device)


def accumulator_device(device: torch.device) -> torch.device:
    """Where statistics are summed: beside the encoder, but on the CPU for Apple's GPUs, which have no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def choose_precision(precision: PrecisionChoice, device: torch.device) -> Precision:
    """The network's number type; `auto` is fp16 on cuda (its rounding is the store's own) and fp32 elsewhere."""
    if precision == "auto":
        return "fp16" if device.type == "cuda" else "fp32"
    return precision


def autocast(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Context in which the network computes in the given type."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])
