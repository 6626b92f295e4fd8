"""The device that a test runs on: the bodies are the same on the CPU and on a GPU."""

import importlib
import os
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from cytosae.sae import base, coo, kernels
from cytosae.training import adam, block_search, encoder_blocks, fused_elementwise, fused_relu


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> Iterator[torch.device]:
    """Each device in turn, with products of float32 that are not rounded to TF32."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    # `monkeypatch` cannot restore it: it is no attribute of its own, and some versions of torch do not delete it.
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield torch.device(request.param)
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(
    params=[*(["cpu"] if os.environ.get("TRITON_INTERPRET") else []), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def device_of_kernels(request, monkeypatch) -> torch.device:
    """A device on which our kernels run: a GPU, or the CPU in Triton's interpreter.

    Triton decides when it is imported whether it interprets, so the CPU's part runs where `TRITON_INTERPRET` is set;
    `tests/cytosae/sae/test_kernels.py` starts it.
    """
    where = torch.device(request.param)
    if where.type == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        assert kernels.has_kernels(where), "Triton is there and does not work"
        return where

    def find(table: torch.Tensor, other: torch.Tensor, name: str = kernels.PRODUCTS) -> ModuleType | None:
        known = {table.dtype, other.dtype} <= {torch.float32, torch.bfloat16}
        return importlib.import_module(name) if kernels._is_on and known else None

    for module in (base, coo, block_search, encoder_blocks, adam, fused_elementwise, fused_relu):
        monkeypatch.setattr(module, "find_kernels", find)
    return where
