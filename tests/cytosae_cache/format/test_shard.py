"""Checksums of shards are those of their bytes, however they are computed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cytosae_cache.format.shard import (
    as_bytes,
    checksum,
    digest_file,
    digest_parts,
    digest_raw,
    join_checksums,
    make_index,
    shard_name,
)
from tests.support.stores import make_activations, make_store


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 9), st.integers(1, 700), st.integers(0, 2**32))
def test_joined_checksums_are_those_of_the_whole(n, n_bytes, seed):
    data = np.random.default_rng(seed).integers(0, 256, size=(n, n_bytes), dtype=np.uint8)
    assert join_checksums([checksum(piece.tobytes()) for piece in data], n_bytes) == checksum(data.tobytes())


def test_pieces_without_bytes_change_nothing():
    assert join_checksums([0, 0], 0) == 0


@pytest.mark.parametrize("n", [1, 7])
def test_the_digest_of_raw_images_is_that_of_their_file(n):
    activations = make_activations(n)
    index = make_index([activations[0].nbytes] * n, 8)
    found = digest_raw([checksum(as_bytes(image)) for image in activations], activations[0].nbytes, index)
    assert found == digest_parts([as_bytes(activations), index])


@pytest.mark.parametrize("compression", ["none", "lz4"])
def test_recorded_digests_are_those_of_the_files(tmp_path, compression):
    store = make_store(tmp_path / "s.zarr", make_activations(11), invalid=[2], compression=compression)
    recorded = zip(store.column("shards/n_bytes").tolist(), store.column("shards/crc32c").tolist(), strict=True)
    assert [digest_file(store.storage.open(shard_name(shard))) for shard in range(3)] == list(recorded)
