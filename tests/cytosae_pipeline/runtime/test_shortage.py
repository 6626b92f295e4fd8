"""Whatever libraries raise for want of memory is one error that names what to make smaller."""

import errno

import numpy as np
import pytest
import torch

import cytosae_pipeline
from cytosae.formats.checkpoint import SaeCheckpointError
from cytosae_pipeline.config import StatisticsConfig, TrainConfig
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.runtime.shortage import NotEnoughMemoryError, explained_shortage, is_shortage, require_memory


def _wrapped():
    try:
        torch.empty(1 << 60)
    except RuntimeError as error:
        raise SaeCheckpointError("'x' cannot be read") from error


def _raise(error):
    raise error


@pytest.mark.parametrize(
    "call",
    [
        lambda: torch.empty(1 << 60),
        lambda: torch.empty(1 << 62, 1 << 62),
        lambda: torch.empty(10**30),
        lambda: np.empty(1 << 60, np.uint8),
        lambda: np.empty(1 << 62, np.float64),
        lambda: np.empty((1 << 40, 1 << 40)),
        lambda: bytearray(1 << 60),
        lambda: _raise(OSError(errno.ENOMEM, "Cannot allocate memory")),
        lambda: _raise(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
        lambda: _raise(RuntimeError("std::bad_alloc")),
        _wrapped,
    ],
)
def test_each_kind_is_explained(call):
    with pytest.raises(
        NotEnoughMemoryError, match=r"^memory ran out \(.*\)\. Try a smaller --batch_size or --top_k, or"
    ):
        with explained_shortage(vars(StatisticsConfig())):
            call()
    with pytest.raises(NotEnoughMemoryError, match="Try a smaller --expansion_factor or --batch_size or --max_memory"):
        with explained_shortage(vars(TrainConfig())):
            call()


@pytest.mark.parametrize(
    "error",
    [ValueError("other"), RuntimeError("size mismatch"), UserError("out of memory"), KeyError("x"), OSError(2, "")],
)
def test_other_errors_pass_unchanged(error):
    assert not is_shortage(error)
    with pytest.raises(type(error)) as caught, explained_shortage(()):
        raise error
    assert caught.value is error


def test_it_is_an_error_of_the_user_and_of_memory():
    assert issubclass(NotEnoughMemoryError, UserError)
    assert issubclass(NotEnoughMemoryError, MemoryError)
    with pytest.raises(
        NotEnoughMemoryError, match="^it needs at least 2.0 kB of memory, but 1.0 kB are free. Do less$"
    ):
        require_memory(2000, 1000, "it", "Do less")
    require_memory(2000, 2000, "it", "Do less")
    require_memory(2000, None, "it", "Do less")


def test_python_gets_the_same_errors(with_sae):
    with pytest.raises(NotEnoughMemoryError, match="Lower --expansion_factor or --batch_size"):
        cytosae_pipeline.train_sae(store=with_sae.store, root_dir=with_sae.root, expansion_factor=10**8)
    asked = r"memory ran out \(768000.0 TB were asked for at once\)\. Try a smaller --batch_size or --top_k"
    with pytest.raises(NotEnoughMemoryError, match=asked):
        cytosae_pipeline.feature_stats(with_sae.sae(), with_sae.store, top_k=10**15)
    stats = cytosae_pipeline.feature_stats(with_sae.sae(), with_sae.store, batch_size=10**12)
    assert stats.record["n_images"] == 22


def test_a_batch_that_does_not_fit_is_refused(with_sae, monkeypatch):
    from cytosae_pipeline.statistics import encode

    monkeypatch.setattr(encode, "available_ram", lambda: 10_000)
    output = with_sae.run("features", "--dataset_name", "toy", "--sae_path", "r", code=1).output
    assert "reading 24 images at once needs at least" in output
    assert "Lower --batch_size: results stay the same" in output
