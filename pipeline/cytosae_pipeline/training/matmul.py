"""How a training step computes its matrix products: number type, memory, and when to use active latents only."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from cytosae.sae.kernels import has_kernels
from cytosae.training.matmul import MatmulConfig
from cytosae_pipeline.runtime.devices import DTYPES
from cytosae_pipeline.runtime.product_rates import ProductRates, find_rates

TrainingPrecision = Literal["fp32", "bf16"]
TRAINING_PRECISIONS: tuple[TrainingPrecision, ...] = ("fp32", "bf16")

_MAX_GIB_CPU, _MAX_GIB_GPU = 0.5, 4.0
_SPARSE_BELOW: dict[TrainingPrecision, float] = {"fp32": 0.12, "bf16": 0.04}
"""Share of active latents below which products over those alone are faster on a CPU, where nothing was measured."""
_SPARSE_BELOW_GPU: dict[TrainingPrecision, float] = {"fp32": 0.06, "bf16": 0.0}
"""The same on a GPU with kernels of our own: for `relu`, `jumprelu` and `gated` on an H200 (docs/benchmarks.md)."""
_WORTHWHILE = 1.15
"""How many times as fast bf16 must be: it rounds."""


@dataclass(frozen=True)
class Products:
    """How the products of a run are computed. A resumed run keeps them, so that its numbers are the same to the bit."""

    precision: TrainingPrecision
    """Type of their factors."""
    sparse_below: float
    """Share of active latents below which products use those alone; 0 for never."""
    rates: ProductRates | None = None
    """What was measured of the machine; None if nothing was."""

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def explain(self) -> str:
        """The choice and its reason, as one line."""
        if self.rates is None:
            return f"matrix products in {self.precision}"
        rates = ", ".join(f"{name} {getattr(self.rates, name) / 1e9:,.0f}" for name in ("fp32", "bf16", "sparse"))
        return (
            f"matrix products in {self.precision}, over active latents alone below {self.sparse_below:.1%}: measured "
            f"here in GFLOP/s: {rates}"
        )


def choose_products(asked: Literal["auto", "fp32", "bf16"], device: torch.device, d_in: int) -> Products:
    """Decide how the products of a run are computed; `auto` on a CPU measures it, once.

    Args:
        asked: The type that was asked for.
        device: Where they run.
        d_in: Width D of the activations.
    """
    precision = choose_training_precision(asked, device)
    if device.type != "cpu" or asked != "auto":
        return Products(precision, _unmeasured_share(precision, device))
    rates = find_rates(d_in)
    if precision == "bf16" and rates.bf16 < _WORTHWHILE * rates.fp32:
        precision = "fp32"
    return Products(precision, rates.crossover(precision), rates)


def read_products(value: object, unmeasured: Products) -> Products:
    """What a run recorded of its products; earlier versions recorded nothing and measured nothing.

    Args:
        value: What was recorded; None for nothing.
        unmeasured: The products of a run on this device that nothing was measured for.

    Raises:
        ValueError: If it is something else.
    """
    if value is None:
        return unmeasured
    below = value.get("sparse_below") if isinstance(value, dict) else None
    if not isinstance(below, int | float) or isinstance(below, bool) or not 0 <= below <= 1 or math.isnan(below):
        raise ValueError(f"products.sparse_below must be a number from 0 to 1, found {below!r:.80}")
    return Products(unmeasured.precision, float(below))


def choose_training_precision(precision: Literal["auto", "fp32", "bf16"], device: torch.device) -> TrainingPrecision:
    """The type of an autoencoder's matrix products in training; `auto` is bf16 where the hardware multiplies it."""
    if precision != "auto":
        return precision
    return "bf16" if _multiplies_bfloat16(device) else "fp32"


def choose_matmul(products: Products, device: torch.device, max_gib: float | None) -> MatmulConfig:
    """The configuration of a step.

    Args:
        products: How its products are computed.
        device: Where they run.
        max_gib: GiB of the largest tensor of tokens times latents; by the kind of device if None.
    """
    gib = max_gib if max_gib is not None else _MAX_GIB_CPU if device.type == "cpu" else _MAX_GIB_GPU
    return MatmulConfig(DTYPES[products.precision], int(gib * 2**30), products.sparse_below)


def fp32_matmul(device: torch.device, max_gib: float | None = None) -> MatmulConfig:
    """The configuration of products in float32 that nothing was measured for, as in evaluation."""
    return choose_matmul(Products("fp32", _unmeasured_share("fp32", device)), device, max_gib)


def _unmeasured_share(precision: TrainingPrecision, device: torch.device) -> float:
    """Share of active latents below which products use those alone where nothing was measured; 0 for never."""
    if device.type == "cpu":
        return _SPARSE_BELOW[precision]
    return _SPARSE_BELOW_GPU[precision] if has_kernels(device) else 0.0


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the hardware has bfloat16 products, which may be faster than float32 ones."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # Not in torch's public interface; where it is missing, float32 is right as well.
    known = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in known)
