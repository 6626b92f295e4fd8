"""How a training step computes its matrix products: number type, memory, and when to use active latents only."""

from typing import Literal

import torch

from cytosae.training.matmul import MatmulConfig
from cytosae_pipeline.runtime.devices import DTYPES

TrainingPrecision = Literal["fp32", "bf16"]

_MAX_GIB_CPU, _MAX_GIB_GPU = 0.5, 4.0
_SPARSE_BELOW: dict[TrainingPrecision, float] = {"fp32": 0.12, "bf16": 0.04}
"""Share of active latents below which products over those alone were faster on a CPU (docs/training.md)."""


def choose_training_precision(precision: Literal["auto", "fp32", "bf16"], device: torch.device) -> TrainingPrecision:
    """The type of an autoencoder's matrix products in training; `auto` is bf16 where the hardware multiplies it."""
    if precision != "auto":
        return precision
    return "bf16" if _multiplies_bfloat16(device) else "fp32"


def choose_matmul(precision: TrainingPrecision, device: torch.device, max_gib: float | None) -> MatmulConfig:
    """How a training step computes its matrix products.

    Args:
        precision: Type of their factors.
        device: Where they run.
        max_gib: GiB of the largest tensor of tokens times latents; by the kind of device if None.
    """
    on_gpu = device.type != "cpu"
    gib = max_gib if max_gib is not None else _MAX_GIB_GPU if on_gpu else _MAX_GIB_CPU
    return MatmulConfig(DTYPES[precision], int(gib * 2**30), 0.0 if on_gpu else _SPARSE_BELOW[precision])


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the hardware has bfloat16 products that are faster than float32 ones."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # Not in torch's public interface; where it is missing, float32 is right as well.
    known = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in known)
