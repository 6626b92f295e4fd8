"""Where activations are kept is decided by what fits and what pays, and every refusal says what to do."""

import dataclasses
import re

import pytest
import torch

from cytosae_cache.store import ActivationStore
from cytosae_pipeline.config import TrainConfig
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.training.matmul import Products
from cytosae_pipeline.training.placement import (
    FreeMemory,
    Needs,
    choose_placement,
    find_free_memory,
    find_needs,
)
from cytosae_pipeline.training.runs import Run
from tests.support.stores import make_activations, make_store

GB = 10**9
NEEDS = Needs(store_bytes=16 * GB, step_bytes=20 * GB, n_epochs=24.0, slow_reads=False)
SLOW = dataclasses.replace(NEEDS, slow_reads=True)
NO_GPU = FreeMemory(ram=64 * GB, gpu=None)


@pytest.mark.parametrize(
    ("needs", "free", "place", "text"),
    [
        (
            NEEDS,
            FreeMemory(ram=64 * GB, gpu=80 * GB),
            "gpu",
            r"activations \(16.0 GB\) are read once and kept on the GPU",
        ),
        (NEEDS, FreeMemory(ram=1 * GB, gpu=45 * GB), "gpu", "on the GPU"),
        (
            NEEDS,
            FreeMemory(ram=64 * GB, gpu=44 * GB),
            "none",
            "read from disk every epoch: an uncompressed store is fast",
        ),
        (SLOW, FreeMemory(ram=64 * GB, gpu=44 * GB), "ram", "kept in memory: fetching or decoding them"),
        (NEEDS, NO_GPU, "none", "an uncompressed store is fast to read"),
        (SLOW, NO_GPU, "ram", "kept in memory"),
        (SLOW, FreeMemory(ram=20 * GB, gpu=None), "ram", "kept in memory"),
        (SLOW, FreeMemory(ram=19 * GB, gpu=None), "none", "they do not fit into memory"),
        (SLOW, FreeMemory(ram=None, gpu=None), "none", "they do not fit into memory"),
        (dataclasses.replace(SLOW, n_epochs=1.0), FreeMemory(64 * GB, 80 * GB), "none", "no image is needed twice"),
    ],
)
def test_auto(needs, free, place, text):
    found = choose_placement("auto", needs, free)
    assert found.place == place
    assert re.search(text, found.text)


def test_an_explicit_choice_is_kept():
    assert choose_placement("none", SLOW, FreeMemory(64 * GB, 80 * GB)).place == "none"
    assert choose_placement("ram", NEEDS, NO_GPU).place == "ram"
    assert choose_placement("ram", NEEDS, FreeMemory(ram=None, gpu=None)).place == "ram"
    assert choose_placement("gpu", dataclasses.replace(NEEDS, n_epochs=0.5), FreeMemory(0, 80 * GB)).place == "gpu"


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"needs 36.0 GB, but 40.0 GB are free, of which 80% may be used. Try --resid"):
        choose_placement("gpu", NEEDS, FreeMemory(ram=64 * GB, gpu=40 * GB))
    with pytest.raises(UserError, match="--resident ram needs 16.0 GB, but 8.0 GB are free"):
        choose_placement("ram", NEEDS, FreeMemory(ram=8 * GB, gpu=None))
    with pytest.raises(UserError, match="--resident gpu needs a CUDA device, but training runs without one"):
        choose_placement("gpu", NEEDS, NO_GPU)


def test_each_of_several_processes_keeps_all_images():
    free = FreeMemory(ram=64 * GB, gpu=None, n_processes=4)
    assert choose_placement("ram", NEEDS, free).text.endswith("kept in memory by each of 4 processes")
    wanted = r"--resident ram needs 16\.0 GB for each of 4 processes, but 8\.0 GB are free for each of 4 processes, of"
    with pytest.raises(UserError, match=wanted):
        choose_placement("ram", NEEDS, FreeMemory(ram=8 * GB, gpu=None, n_processes=4))


def test_needs_are_those_of_all_stores(tmp_path):
    stores = [
        make_store(tmp_path / "a.zarr", make_activations(11), invalid=[2]),
        make_store(tmp_path / "b.zarr", make_activations(7), compression="zstd"),
    ]
    stores = tuple(ActivationStore.open(store.path) for store in stores)
    config = TrainConfig(batch_size=4, total_training_tokens=51, expansion_factor=4, precision="fp32")
    run = Run(config, stores, tmp_path, {}, torch.device("cpu"), Products("fp32", 0.1))
    needs = find_needs([run], samples_seen=17)
    assert needs.store_bytes == 17 * 5 * 8 * 2
    assert needs.n_epochs == 2.0
    assert needs.slow_reads
    assert not find_needs([dataclasses.replace(run, stores=stores[:1])], samples_seen=17).slow_reads
    # Parameters W_enc and W_dec with gradients and two moments, and matrices of (tokens, latents).
    assert needs.step_bytes >= 4 * (4 * 2 * 8 * 32 + 4 * 4 * 5 * 32)
    assert find_needs([run, run], samples_seen=17).step_bytes == 2 * needs.step_bytes
    split = dataclasses.replace(config, max_memory=1e-6)
    small = find_needs([dataclasses.replace(run, config=split)], samples_seen=17)
    assert small.step_bytes < needs.step_bytes


def test_free_memory_on_a_cpu():
    free = find_free_memory(torch.device("cpu"))
    assert free.gpu is None
    assert free.ram is None or free.ram > 0


def test_free_memory_on_a_gpu_is_what_the_driver_says(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GB, 80 * GB))
    assert find_free_memory(torch.device("cuda")).gpu == 5 * GB
