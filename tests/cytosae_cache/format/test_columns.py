"""Small arrays: the sizes that they state are checked against the file before memory is allocated."""

import json
import struct

import numpy as np
import pytest
from numcodecs import Zstd

from cytosae_cache.errors import StoreCorruptError
from cytosae_cache.format.codec import decode_into, make_codec, zstd_content_size
from cytosae_cache.format.columns import encode_hierarchy, read_table
from tests.support.hostile_files import make_zstd_of_zeros

TEXTS = np.array(["a", "", "ünï", "x" * 3000, "b"] * 2, dtype=np.dtypes.StringDType())
PLACES = {
    "images/label": TEXTS,
    "images/valid": np.ones(10, dtype=bool),
    "images/crc32c": np.arange(10, dtype=np.uint32),
}


def _read(files, place, length=10):
    return read_table(files, place, lengths=[length], widths=[32], where="s")


@pytest.fixture
def files():
    return encode_hierarchy(PLACES)


@pytest.mark.parametrize("place", PLACES)
def test_arrays_come_back(files, place):
    assert _read(files, place).tolist() == PLACES[place].tolist()


@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 70_000, 1 << 20])
def test_the_size_in_a_frame_is_read(n):
    assert zstd_content_size(bytes(Zstd().encode(bytes(n)))) == n
    assert zstd_content_size(make_zstd_of_zeros(n)) == n


@pytest.mark.parametrize(
    "data", [b"", b"\x28\xb5\x2f\xfd", b"\x28\xb5\x2f\xfd\x00", b"\x28\xb5\x2f\xfd\xe0\x01", b"lz4!lz4!"]
)
def test_a_frame_without_a_size_has_none(data):
    assert zstd_content_size(data) is None


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("size", [6 << 30, 1 << 31])
def test_chunks_that_would_unpack_to_gigabytes_are_refused(files, place, size):
    files[f"{place}/c/0"] = make_zstd_of_zeros(size)
    with pytest.raises(
        StoreCorruptError, match=f"states that it unpacks to {size:,} bytes, which 10 entries cannot have"
    ):
        _read(files, place)


def test_texts_that_are_fewer_than_stated_are_refused(files):
    files["images/label/c/0"] = bytes(Zstd().encode(struct.pack("<I", 0xFFFFFFFF)))
    with pytest.raises(StoreCorruptError, match="'images/label/c/0' of store 's' does not contain 10 texts"):
        _read(files, "images/label")


@pytest.mark.parametrize(
    "change",
    [
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [6 << 30]}}},
        {"codecs": [{"name": "bytes"}, {"name": "gzip", "configuration": {"level": 1}}]},
        {"codecs": [{"name": "bytes"}]},
    ],
)
def test_other_chunks_and_codecs_than_ours_are_refused(files, change):
    name = "images/valid/zarr.json"
    files[name] = json.dumps(json.loads(files[name]) | change).encode()
    with pytest.raises(StoreCorruptError, match="which this format does not use"):
        _read(files, "images/valid")


@pytest.mark.parametrize("field", [4, 12])
@pytest.mark.parametrize("value", [0, 24, 1 << 20, 0xFFFFFFFF])
def test_blosc_headers_that_state_other_sizes_are_refused(field, value):
    codec, image = make_codec("lz4", 2), np.arange(400, dtype=np.float16)
    data = bytearray(codec.encode(image))
    data[field : field + 4] = struct.pack("<I", value)
    with pytest.raises(StoreCorruptError, match="image 0 cannot be decoded: its header does not state its own"):
        decode_into(codec, memoryview(data), memoryview(bytearray(image.nbytes)), "image 0")
    with pytest.raises(StoreCorruptError, match="its header does not state"):
        decode_into(codec, memoryview(data)[:9], memoryview(bytearray(image.nbytes)), "image 0")
