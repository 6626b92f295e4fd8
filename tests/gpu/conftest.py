"""The device that a test runs on: the bodies are the same on the CPU and on a GPU."""

from collections.abc import Iterator

import pytest
import torch


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
