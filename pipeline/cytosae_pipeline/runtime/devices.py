"""Devices and number types."""

import contextlib
from typing import Any

import torch

from cytosae_cache.format.spec import Precision
from cytosae_pipeline.config.store import Device, PrecisionChoice
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.runtime.ranks import Launched, launched

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Torch types of the precisions."""


def choose_device(device: Device) -> torch.device:
    """The requested device; `auto` takes cuda, then mps, then cpu. Processes of torchrun take a GPU each.

    Raises:
        UserError: If this machine does not have it, or has too few for its processes.
    """
    place = launched()
    if place is not None:
        return _choose_for_rank(device, place)
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return torch.device(next(name for name, available in there.items() if available))
    if not there[device]:
        found = ", ".join(name for name, available in there.items() if available)
        raise UserError(f"--device {device} was given, but this machine has: {found}. Try --device auto")
    return torch.device(device)


def _choose_for_rank(device: Device, place: Launched) -> torch.device:
    """The device of one of several processes."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if device == "mps" or not torch.cuda.is_available():
        raise UserError(
            f"--device {device} was given to {place.size} processes, but they run on cuda or cpu, and "
            f"{'mps is one device' if device == 'mps' else 'this machine has no cuda'}. Try --device cpu"
        )
    n_gpus = torch.cuda.device_count()
    if place.local_rank >= n_gpus:
        raise UserError(
            f"torchrun started {place.local_size} processes on this machine, which has {n_gpus} GPUs. Give torchrun "
            f"--nproc-per-node {n_gpus}, or train --device cpu"
        )
    torch.cuda.set_device(place.local_rank)
    return torch.device("cuda", place.local_rank)


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
