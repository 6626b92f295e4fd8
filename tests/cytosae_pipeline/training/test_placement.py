"""Where activations are kept is decided by what fits and what pays, and every refusal says what to do."""

import dataclasses
import re

import pytest
import torch

from cytosae_cache.store import ActivationStore
from cytosae_pipeline.config import TrainConfig
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.training.placement import (
    Needs,
    Room,
    choose_placement,
    exceeds_page_cache,
    find_free_memory,
    find_needs,
)
from cytosae_pipeline.training.runs import Run
from tests.support.stores import make_activations, make_store

GB = 10**9
NEEDS = Needs(store_bytes=16 * GB, step_bytes=20 * GB, n_epochs=24.0, dear=False)
DEAR = dataclasses.replace(NEEDS, dear=True)
NO_GPU = Room(ram=64 * GB, gpu=None)


@pytest.mark.parametrize(
    ("needs", "room", "place", "text"),
    [
        (NEEDS, Room(ram=64 * GB, gpu=80 * GB), "gpu", r"activations \(16.0 GB\) are read once and kept on the GPU"),
        (NEEDS, Room(ram=1 * GB, gpu=45 * GB), "gpu", "on the GPU"),
        (NEEDS, Room(ram=64 * GB, gpu=44 * GB), "none", "read from disk every epoch: an uncompressed store is quick"),
        (DEAR, Room(ram=64 * GB, gpu=44 * GB), "ram", "kept in memory: fetching or decoding them"),
        (NEEDS, NO_GPU, "none", "an uncompressed store is quick to read"),
        (DEAR, NO_GPU, "ram", "kept in memory"),
        (DEAR, Room(ram=20 * GB, gpu=None), "ram", "kept in memory"),
        (DEAR, Room(ram=19 * GB, gpu=None), "none", "no room for them in memory"),
        (DEAR, Room(ram=None, gpu=None), "none", "no room for them in memory"),
        (dataclasses.replace(DEAR, n_epochs=1.0), Room(64 * GB, 80 * GB), "none", "no image is needed twice"),
    ],
)
def test_auto(needs, room, place, text):
    found = choose_placement("auto", needs, room)
    assert found.place == place
    assert re.search(text, found.text)


def test_what_was_asked_for_is_done():
    assert choose_placement("none", DEAR, Room(64 * GB, 80 * GB)).place == "none"
    assert choose_placement("ram", NEEDS, NO_GPU).place == "ram"
    assert choose_placement("ram", NEEDS, Room(ram=None, gpu=None)).place == "ram"
    assert choose_placement("gpu", dataclasses.replace(NEEDS, n_epochs=0.5), Room(0, 80 * GB)).place == "gpu"


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"needs 36.0 GB, but 40.0 GB are free, of which 80% may be taken. Try --resid"):
        choose_placement("gpu", NEEDS, Room(ram=64 * GB, gpu=40 * GB))
    with pytest.raises(UserError, match="--resident ram needs 16.0 GB, but 8.0 GB are free"):
        choose_placement("ram", NEEDS, Room(ram=8 * GB, gpu=None))
    with pytest.raises(UserError, match="--resident gpu needs a CUDA device, and training runs on none"):
        choose_placement("gpu", NEEDS, NO_GPU)


def test_needs_are_those_of_all_stores(tmp_path):
    stores = [
        make_store(tmp_path / "a.zarr", make_activations(11), invalid=[2]),
        make_store(tmp_path / "b.zarr", make_activations(7), compression="zstd"),
    ]
    stores = tuple(ActivationStore.open(store.path) for store in stores)
    config = TrainConfig(batch_size=4, total_training_tokens=51, expansion_factor=4, precision="fp32")
    run = Run(config, stores, tmp_path, {}, torch.device("cpu"))
    needs = find_needs([run], samples_seen=17)
    assert needs.store_bytes == 17 * 5 * 8 * 2
    assert needs.n_epochs == 2.0
    assert needs.dear
    assert not find_needs([dataclasses.replace(run, stores=stores[:1])], samples_seen=17).dear
    # Parameters W_enc and W_dec with gradients and two moments, and matrices of (tokens, latents).
    assert needs.step_bytes >= 4 * (4 * 2 * 8 * 32 + 4 * 4 * 5 * 32)
    assert find_needs([run, run], samples_seen=17).step_bytes == 2 * needs.step_bytes
    split = dataclasses.replace(config, max_memory=1e-6)
    small = find_needs([dataclasses.replace(run, config=split)], samples_seen=17)
    assert small.step_bytes < needs.step_bytes


def test_the_room_on_a_cpu():
    room = find_free_memory(torch.device("cpu"))
    assert room.gpu is None
    assert room.ram is None or room.ram > 0


def test_stores_larger_than_memory_are_read_past_the_page_cache(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(6))
    n_bytes = 6 * store.image_bytes
    assert exceeds_page_cache([store, store], 2 * n_bytes - 1)
    assert not exceeds_page_cache([store, store], 2 * n_bytes)
    assert not exceeds_page_cache([store], None)


def test_the_room_on_a_gpu_is_what_the_driver_says(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GB, 80 * GB))
    assert find_free_memory(torch.device("cuda")).gpu == 5 * GB
