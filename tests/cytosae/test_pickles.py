"""Files of torch are looked through before torch's loader runs: what torch writes passes, bombs do not."""

import argparse
import collections
import contextlib
import functools
import io
import pickle
import tracemalloc
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cytosae.pickles import UnsafePickleError, check_pickle, load_torch

GIB = 1 << 30


def _ordinary():
    linear = torch.nn.Linear(3, 4)
    optimizer = torch.optim.Adam(linear.parameters())
    linear(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    shared = torch.arange(12.0)
    return {
        "model": linear.state_dict(),
        "optimizer": optimizer.state_dict(),
        "parameter": linear.weight,
        "types": [torch.ones(2, dtype=kind) for kind in (
            torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
            torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn,
        )],
        "views": (shared[::2], shared.view(3, 4).T, shared[:0], torch.zeros(())),
        "counter": collections.Counter("aab"), "set": {1, 2}, "size": torch.Size([2, 3]), "device": torch.device("cpu"),
        "text": "ünï\n", "bytes": b"abc", "none": None, "big": 1 << 80,
        "tuple": ((1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "nested": [[[[]]]], "dtype": torch.float16, "sparse": torch.eye(3).to_sparse(),
    }  # fmt: skip


def _equal(a, b):
    if isinstance(a, torch.Tensor):
        a, b = a.to_dense(), b.to_dense()
        return (
            torch.equal(a.detach().float().abs(), b.detach().float().abs()) if not a.is_complex() else torch.equal(a, b)
        )
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b


@pytest.mark.parametrize("new", [True, False])
def test_what_torch_writes_is_read(tmp_path, new):
    value = _ordinary()
    if not new:
        del value["types"][-1]  # torch itself cannot read float8 from old files
    torch.save(value, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
    assert _equal(load_torch(tmp_path / "a.pt"), value)
    if new:
        assert _equal(load_torch(tmp_path / "a.pt", mmap=True), value)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_other_protocols_are_followed(tmp_path, protocol):
    torch.save({"x": torch.arange(3)}, tmp_path / "a.pt", pickle_protocol=protocol)
    check_pickle(tmp_path / "a.pt")


def test_arguments_of_a_training_script_are_left_to_torch(tmp_path):
    torch.save({"args": argparse.Namespace(lr=1), "x": torch.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(pickle.UnpicklingError, match="argparse.Namespace"):
        load_torch(tmp_path / "a.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        assert load_torch(tmp_path / "a.pt")["args"].lr == 1


def _text(text):
    return b"X" + len(text).to_bytes(4, "little") + text.encode()


def _number(n):
    data = pickle.encode_long(n)
    return b"\x8a" + bytes([len(data)]) + data


def _call(module, name, *arguments):
    return f"c{module}\n{name}\n(".encode() + b"".join(arguments) + b"tR"


def _storage(kind, key, count):
    return b"(" + _text("storage") + f"ctorch\n{kind}\n".encode() + _text(key) + _text("cpu") + _number(count) + b"tQ"


def _write(path, body, *, members=(), compress=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compress) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + body + b".")
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/version", b"3\n")
        for name, data in members:
            archive.writestr(f"archive/data/{name}", data)


BOMBS = {
    "bytearray": _call("builtins", "bytearray", _number(6 * GIB)),
    "bytearray by its old name": _call("__builtin__", "bytearray", _number(6 * GIB)),
    "bytearray from a memo": b"cbuiltins\nbytearray\nq\x000h\x00(" + _number(6 * GIB) + b"tR",
    "bytearray twice on the stack": b"cbuiltins\nbytearray\n2(" + _number(6 * GIB) + b"tR",
    "new object": b"ctorch\nFloatTensor\n(" + _number(6 * GIB) + b"t\x81",
    "tensor": _call("torch", "FloatTensor", _number(6 * GIB)),
    "storage": _call("torch", "FloatStorage", _number(6 * GIB)),
    "untyped storage": _call("torch.storage", "UntypedStorage", _number(6 * GIB)),
    "encoding": _call("_codecs", "encode", _text("x" * 99), _text("cp437")),
    "quantised": _call("torch._utils", "_rebuild_qtensor", b"N"),
    "memory that the file lacks": _storage("FloatStorage", "0", 6 * GIB),
    "more memory than the member": _storage("FloatStorage", "1", 3),
    "negative memory": _storage("FloatStorage", "1", -1),
    "memory of no type": _storage("Size", "1", 1),
    "instance": b"(" + _number(6 * GIB) + b"ibuiltins\nbytearray\n",
    "persistent text": b"P1\n",
    "value that is called": b"N(" + _number(1) + b"tR",
    "too few values": b"a",
    "no mark": b"t",
    "unknown memo": b"h\x07",
}


@pytest.mark.parametrize("name", BOMBS)
def test_pickles_that_take_memory_are_refused_cheaply(tmp_path, name):
    _write(tmp_path / "a.pt", BOMBS[name], members=[("1", b"\0" * 8)])
    tracemalloc.start()
    with pytest.raises(UnsafePickleError):
        load_torch(tmp_path / "a.pt")
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()


def test_the_error_names_what_is_called(tmp_path):
    _write(tmp_path / "a.pt", BOMBS["bytearray"])
    with pytest.raises(UnsafePickleError, match=r"GLOBAL builtins\.bytearray is called"):
        check_pickle(tmp_path / "a.pt")


def test_memory_as_large_as_its_member_is_read(tmp_path):
    _write(tmp_path / "a.pt", _storage("FloatStorage", "1", 2), members=[("1", b"\0" * 8)])
    check_pickle(tmp_path / "a.pt")


def test_compressed_members_are_refused(tmp_path):
    _write(
        tmp_path / "a.pt",
        _storage("FloatStorage", "1", GIB),
        members=[("1", bytes(1 << 20))],
        compress=zipfile.ZIP_DEFLATED,
    )
    with pytest.raises(UnsafePickleError, match="it is compressed, which torch never does"):
        check_pickle(tmp_path / "a.pt")


def test_old_files_claim_no_more_memory_than_they_have(tmp_path):
    torch.save({"x": torch.zeros(4)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "a.pt").read_bytes()
    # The number of entries follows the device's name.
    at = data.index(b"cpu") + 3
    at = data.index(b"K\x04", at)
    (tmp_path / "a.pt").write_bytes(data[:at] + _number(6 * GIB) + data[at + 2 :])
    with pytest.raises(UnsafePickleError, match="a tensor's memory of 25,769,803,776 bytes is claimed"):
        load_torch(tmp_path / "a.pt")


@pytest.mark.parametrize("data", [b"", b"not a pickle", b"PK\x03\x04 no archive", b"\x80\x02"])
def test_damaged_files_are_refused(tmp_path, data):
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(UnsafePickleError, match="the pickle is damaged"):
        check_pickle(tmp_path / "a.pt")


@functools.cache
def _saved(*, new: bool) -> bytes:
    """A file of torch. The old format contains addresses, so that every call would write another one."""
    file = io.BytesIO()
    torch.save({"x": torch.arange(5.0), "y": ["a", (1, 2)]}, file, _use_new_zipfile_serialization=new)
    return file.getvalue()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), new=st.booleans())
def test_mutated_files_raise_nothing_else(tmp_path, data, new):
    content = bytearray(_saved(new=new))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "b.pt").write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(UnsafePickleError):
        check_pickle(tmp_path / "b.pt")


def test_damaged_weights_fail_their_checksum(tmp_path):
    torch.save({"x": torch.arange(64.0)}, tmp_path / "a.pt")
    data = bytearray((tmp_path / "a.pt").read_bytes())
    data[data.index(torch.arange(64.0).numpy().tobytes()) + 100] ^= 1
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(UnsafePickleError, match="Bad CRC-32 for file .*data/0"):
        load_torch(tmp_path / "a.pt")


def test_files_without_checksums_are_read(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"x": torch.arange(64.0)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert load_torch(tmp_path / "a.pt")["x"][63] == 63
