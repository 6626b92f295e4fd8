"""Batches are the same bit for bit, wherever the activations are kept."""

import numpy as np
import pytest
import torch

from cytosae.sae.world import World
from cytosae_cache.reading.concat import ConcatReader
from cytosae_cache.reading.reader import StoreReader
from cytosae_cache.reading.sampler import Sampler
from cytosae_pipeline.config import TrainConfig
from cytosae_pipeline.training.batches import DeviceBatches, copy_chosen, open_batches
from tests.support.stores import make_activations, make_store
from tests.support.worlds import run_ranks

CPU = torch.device("cpu")


def every_token(x):
    return x


def patches(x):
    return x[:, 1:]


def cls(x):
    return x[:, :1]


@pytest.fixture
def readers(tmp_path):
    first = make_store(tmp_path / "0.zarr", make_activations(23, seed=1), invalid=[0, 9])
    second = make_store(tmp_path / "1.zarr", make_activations(9, seed=2))
    with StoreReader(first) as one, StoreReader(second) as two:
        yield [one, two]


def _collect(batches):
    return [(batch.activations.clone(), batch.samples_seen) for batch in batches]


@pytest.mark.parametrize("shuffle", ["global", "windowed"])
@pytest.mark.parametrize("batch_of", ["images", "tokens"])
@pytest.mark.parametrize("samples_seen", [0, 12])
def test_every_place_gives_the_same_batches(readers, shuffle, batch_of, samples_seen):
    config = TrainConfig(batch_size=4, total_training_tokens=70, seed=3, shuffle=shuffle, batch_of=batch_of)
    # The place called gpu is a tensor on any device; here it lies on the CPU.
    found = [
        _collect(
            open_batches(ConcatReader(readers), config, every_token, samples_seen=samples_seen, device=CPU, place=place)
        )
        for place in ("none", "ram", "gpu")
    ]
    assert len(found[0]) == -(-(70 - samples_seen) // 4)
    assert found[0][-1][1] == 70
    for other in found[1:]:
        for (expected, expected_position), (values, other_position) in zip(found[0], other, strict=True):
            assert torch.equal(values, expected)
            assert values.dtype == torch.float16
            assert other_position == expected_position


def test_a_tensor_on_the_device_is_filled_block_by_block(readers, monkeypatch):
    monkeypatch.setattr("cytosae_cache.reading.concat._BLOCK_IMAGES", 7)
    images = ConcatReader(readers)
    sampling = Sampler(images.layout, 5, 30, 0)
    (batch,) = DeviceBatches(images, sampling, every_token, samples_seen=0, stop=30, device=CPU)
    (order,) = sampling.iter_batches(samples_seen=0, stop=30)
    assert np.array_equal(batch.activations.numpy(), images.read_all()[order])


@pytest.mark.parametrize("place", ["none", "ram", "gpu"])
@pytest.mark.parametrize("choose", [patches, cls])
def test_batches_are_of_the_chosen_tokens(readers, place, choose):
    config = TrainConfig(batch_size=4, total_training_tokens=30, seed=3)
    whole, chosen = (
        _collect(open_batches(ConcatReader(readers), config, which, samples_seen=0, device=CPU, place=place))
        for which in (every_token, choose)
    )
    for (values, _), (expected, _) in zip(chosen, whole, strict=True):
        assert torch.equal(values, choose(expected))


@pytest.mark.parametrize("choose", [every_token, patches, cls])
def test_tokens_are_chosen_before_or_after_the_copy(choose):
    images = torch.randn(3, 5, 2)
    assert torch.equal(copy_chosen(images, choose, CPU), choose(images))


@pytest.mark.parametrize("batch_of", ["images", "tokens"])
def test_ranks_take_their_parts_of_batches_on_the_device(tmp_path, batch_of):
    store = make_store(tmp_path / "s.zarr", make_activations(11))
    with StoreReader(store) as reader:
        images = ConcatReader([reader])
        sampling = Sampler(images.layout, images.image_shape[0], 4, 1, "global", batch_of)

        def collect(world):
            served = DeviceBatches(images, sampling, every_token, samples_seen=0, stop=9, device=CPU, world=world)
            return [(batch.activations.clone(), batch.samples_seen) for batch in served]

        whole, parts = collect(World()), run_ranks(3, collect)
    for number, (activations, samples_seen) in enumerate(whole):
        assert torch.equal(torch.cat([part[number][0] for part in parts]), activations)
        assert all(part[number][1] == samples_seen for part in parts)
    assert [len(part[-1][0]) for part in parts] == [0, 0, 1], "a batch of one image, of three ranks"
