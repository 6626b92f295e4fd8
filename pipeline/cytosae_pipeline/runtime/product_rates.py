"""How fast this machine multiplies matrices: measured in about a second, and remembered for the processor and torch."""

import contextlib
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from cytosae.sae.coo import CooMatrix
from cytosae.sae.int8_weights import LARGEST, Int8Weights, has_int8_products
from cytosae_cache.storage.atomic import write_file
from cytosae_pipeline.runtime.memory import limit_primitive_cache

_ROUNDS = 3
_TOKENS, _LATENTS = 1024, 4096
"""A fraction of a run's sizes, large enough for the rates of whole ones."""
_FEW_TOKENS, _FEW_LATENTS = 64, 256
"""Sizes of a first product of 8-bit numbers: some kernels take a thousand times as long as others."""
_ENTRIES_PER_TOKEN = 32
_MAX_BYTES = 1 << 20
_N_SPARSE = 4
"""Products over active latents in a step: reconstruction, gradient of the activations, and of both matrices."""


@dataclass(frozen=True)
class ProductRates:
    """Rates of the products of a training step."""

    fp32: float
    """Float32 products, in operations per second."""
    bf16: float
    """Bfloat16 products."""
    sparse: float
    """Float32 products over active latents alone; operations per second, counted over those."""
    int8: float = 0.0
    """Products of 8-bit numbers; 0 if this machine has none that are exact."""

    def rate(self, precision: str) -> float:
        """Dense products of a precision, in operations per second."""
        return self.bf16 if precision == "bf16" else self.fp32

    def crossover(self, precision: str) -> float:
        """Share of active latents below which products over those alone take less time than over all."""
        return min(1.0, self.sparse / self.rate(precision))


def find_rates(d_in: int) -> ProductRates:
    """Rates of this machine's processor for activations of width D: remembered ones, or measured now."""
    key = _describe_machine(d_in)
    known = _read()
    if key in known:
        return known[key]
    rates = measure_rates(d_in)
    # Nothing depends on the file: a home that cannot be written to is measured again.
    with contextlib.suppress(OSError, ValueError):
        path = rates_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({name: asdict(value) for name, value in {**known, key: rates}.items()}, indent=1)
        write_file(path, text.encode())
    return rates


def measure_rates(d_in: int, *, n_tokens: int = _TOKENS, n_latents: int = _LATENTS) -> ProductRates:
    """Measure the rates of products of `(n_tokens, d_in)` with `(d_in, n_latents)`; the fastest round counts."""
    limit_primitive_cache()
    generator = torch.Generator().manual_seed(0)
    x, weights = (torch.randn(rows, d_in, generator=generator) for rows in (n_tokens, n_latents))
    n_active = min(_ENTRIES_PER_TOKEN, n_latents)
    columns = torch.stack([torch.randperm(n_latents, generator=generator)[:n_active] for _ in range(n_tokens)])
    rows = torch.arange(n_tokens).repeat_interleave(n_active)
    active = CooMatrix(rows, columns.sort(dim=1).values.flatten(), torch.ones(len(rows)), (n_tokens, n_latents))

    def multiply_dense(dtype: torch.dtype) -> Callable[[], object]:
        left, right = x.to(dtype), weights.to(dtype).t()
        out = torch.empty(n_tokens, n_latents, dtype=dtype)
        return lambda: torch.mm(left, right, out=out)

    def multiply_sparse() -> None:
        by_latent = active.transpose()
        g = active.matmul(weights)
        by_latent.sampled_matmul(weights, g)
        by_latent.matmul(g)
        by_latent.matmul(x)

    dense_operations = 2 * n_tokens * d_in * n_latents
    trials = {
        "fp32": (multiply_dense(torch.float32), dense_operations),
        "bf16": (multiply_dense(torch.bfloat16), dense_operations),
        "sparse": (multiply_sparse, 2 * _N_SPARSE * len(rows) * d_in),
    }
    best = dict.fromkeys(trials, math.inf)
    with torch.inference_mode():
        for number in range(_ROUNDS + 1):
            for name, (multiply, _) in trials.items():
                start = time.perf_counter()
                multiply()
                if number:  # the first round loads libraries and fills caches
                    best[name] = min(best[name], time.perf_counter() - start)
    rates = {name: trials[name][1] / max(best[name], 1e-9) for name in trials}
    return ProductRates(**rates, int8=_measure_int8(x, weights, rates["fp32"]))


def _measure_int8(x: torch.Tensor, weights: torch.Tensor, enough: float) -> float:
    """Rate of 8-bit products, or that of small ones if it is below another rate."""
    if not has_int8_products():
        return 0.0
    rate = 0.0
    for tokens, rows in ((x[:_FEW_TOKENS], weights[:_FEW_LATENTS]), (x, weights)):
        step = float(tokens.abs().amax()) / LARGEST
        rounded, bias = (tokens / step).round_().to(torch.int8), torch.full((len(rows),), -torch.inf)
        packed = Int8Weights(rows, fast=True)
        best = math.inf
        for _ in range(_ROUNDS + 1):
            start = time.perf_counter()
            packed.above_zero(rounded, step, bias)
            best = min(best, time.perf_counter() - start)
        rate = 2 * tokens.numel() * len(rows) / max(best, 1e-9)
        if rate < enough / 2:
            return rate
    return rate


def rates_path() -> Path:
    """The file in which rates are remembered, in the user's folder for such files."""
    folder = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(folder).expanduser() / "cytosae-cache" / "product_rates.json"


def _read() -> dict[str, ProductRates]:
    """Remembered rates; what is damaged is left out."""
    try:
        with rates_path().open("rb") as file:
            found = json.loads(file.read(_MAX_BYTES))
        names = [field.name for field in fields(ProductRates)]
        values = {key: {name: float(item[name]) for name in names} for key, item in found.items()}
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError, RuntimeError):
        return {}
    return {
        key: ProductRates(**item)
        for key, item in values.items()
        if all(math.isfinite(rate) and (rate > 0 or (name == "int8" and rate == 0)) for name, rate in item.items())
    }


def _describe_machine(d_in: int) -> str:
    """What rates depend on, as a digest: processor, its instructions, torch, threads and width."""
    lines: list[str] = []
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        lines = sorted({line for line in text.splitlines() if line.startswith(("model name", "flags", "Features"))})
    known = [platform.machine(), platform.processor(), *lines, torch.__version__, torch.get_num_threads(), d_in]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]
