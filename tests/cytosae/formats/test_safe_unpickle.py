"""Files that try to execute code, to read outside themselves or to exhaust the memory, through every reader."""

import argparse
import contextlib
import io
import json
import pickle
import random
import struct
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from cytosae.formats import safe_unpickle as restricted_pickle
from cytosae.formats.checkpoint import SaeCheckpointError, load_sae, read_torch
from cytosae.formats.safe_unpickle import Record, RestrictedPickleError, check_archive, read_restricted, to_plain

# --- files that try to execute code


def text(value) -> bytes:
    """BINUNICODE."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def global_(module, name) -> bytes:
    return f"c{module}\n{name}\n".encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    """REDUCE."""
    return function + b"(" + b"".join(arguments) + b"tR"


def make_attacks(marker) -> dict[str, bytes]:
    """Fragments of pickles, each leaving one object on the stack; executed, each creates the folder `marker`."""
    code = text(f"__import__('os').mkdir({str(marker)!r})")
    mkdir, where = global_("os", "mkdir"), text(str(marker))
    stacked = b"\x8c\x02os" + b"\x8c\x05mkdir" + b"\x93"
    dotted = b"\x8c\x05torch" + b"\x8c\x16serialization.os.mkdir" + b"\x93"
    import_os = call(global_("builtins", "__import__"), text("os"))
    mapped = call(global_("builtins", "map"), mkdir, b"]" + where + b"a")
    return {
        "reduce": call(mkdir, where),
        "eval": call(global_("builtins", "eval"), code),
        "exec": call(global_("builtins", "exec"), code),
        "python 2 name": call(global_("__builtin__", "eval"), code),
        "stack global": call(stacked, where),
        "dotted global": call(dotted, where),
        "getattr": call(call(global_("builtins", "getattr"), import_os, text("mkdir")), where),
        "inst": b"(" + where + b"ios\nmkdir\n",
        "obj": b"(" + mkdir + where + b"o",
        "in a list": b"]" + call(global_("builtins", "list"), mapped) + b"a",
        "partial": call(call(global_("functools", "partial"), mkdir, where)),
        "in a tensor": call(global_("torch._utils", "_rebuild_parameter"), call(mkdir, where), b"\x88", b"N"),
        "key": b"}" + call(mkdir, where) + b"K\x01s",
        "state": global_("collections", "OrderedDict") + b")R}" + text("x") + call(mkdir, where) + b"sb",
        "system": call(global_("posix", "system"), text(f"mkdir '{marker}'")),
        "attrgetter": call(
            call(
                call(global_("operator", "attrgetter"), text("os.mkdir")),
                call(global_("builtins", "__import__"), text("shutil")),
            ),
            where,
        ),
        "methodcaller": call(
            call(global_("operator", "methodcaller"), text("mkdir")), call(global_("pathlib", "PosixPath"), where)
        ),
        "copyreg": call(call(global_("copyreg", "__newobj__"), global_("functools", "partial"), mkdir), where),
        "new object": global_("builtins", "object") + b")\x81}" + text("x") + call(mkdir, where) + b"sb",
        "persistent id": b"(" + text("storage") + call(mkdir, where) + text("0") + text("cpu") + b"K\x01tQ",
    }


ATTACKS = sorted(make_attacks(""))
PROTOCOL = {"stack global": b"\x80\x04", "dotted global": b"\x80\x04"}


def write_archive(path, pickled: bytes, *, members=None, prefix="archive", compression=zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        # torch's own reader refuses a file without these two before it looks at the pickle.
        archive.writestr(f"{prefix}/data.pkl", pickled)
        archive.writestr(f"{prefix}/version", b"3\n")
        for name, data in (members or {"data/0": bytes(4 * 24)}).items():
            archive.writestr(f"{prefix}/{name}", data)
    return path


class Unpickler(pickle.Unpickler):
    """What an unrestricted reader does."""

    def persistent_load(self, pid):
        return None


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("place", ["cfg", "state_dict", "root"])
def test_nothing_in_a_file_is_executed(tmp_path, name, place):
    marker = tmp_path / "marker"
    attack, start = make_attacks(marker)[name], PROTOCOL.get(name, b"\x80\x02")
    # The attack works on an unrestricted unpickler.
    with contextlib.suppress(TypeError, AttributeError, pickle.UnpicklingError):
        Unpickler(io.BytesIO(start + attack + b".")).load()
    assert marker.is_dir(), "the attack of this test does not work"
    marker.rmdir()

    other = "state_dict" if place == "cfg" else "cfg"
    inside = b"}(" + text(place) + attack + text(other) + b"}u"
    path = write_archive(tmp_path / "evil.pt", start + (attack if place == "root" else inside) + b".")
    for read in (load_sae, read_torch):
        with pytest.raises(SaeCheckpointError, match="evil"):
            read(path)
    assert not marker.exists()


def tensor(*, key="0", kind="FloatStorage", count=24, offset=0, size=(4, 6), stride=(6, 1)) -> bytes:
    """A tensor as torch pickles it."""

    def number(value):
        return f"I{value}\n".encode()

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(" + text("storage") + global_("torch", kind) + text(key) + text("cpu") + number(count) + b"tQ"
    hooks = global_("collections", "OrderedDict") + b")R"
    layout = number(offset), numbers(size), numbers(stride)
    return call(global_("torch._utils", "_rebuild_tensor_v2"), storage, *layout, b"\x89", hooks)


def write_tensor_file(path, fragment: bytes, **options) -> Path:
    """A file with a foreign config, so that torch's own reader refuses it, and one tensor."""
    record = global_("src.sae_training.config", "ViTSAERunnerConfig") + b")\x81}" + text("a") + b"K\x01sb"
    body = b"\x80\x02}(" + text("cfg") + record + text("state_dict") + b"}" + text("W_enc") + fragment + b"su."
    return write_archive(path, body, **options)


def test_handwritten_tensor_is_read(tmp_path):
    """The control of the tests below: only the other three tensors are missing."""
    with pytest.raises(SaeCheckpointError, match=r"must contain W_enc, .*found \['W_enc'\]"):
        load_sae(write_tensor_file(tmp_path / "sae.pt", tensor()))


@pytest.mark.parametrize(
    "wrong",
    [
        {"offset": 1}, {"size": (4, 7)}, {"stride": (7, 1)}, {"stride": (-6, 1)}, {"offset": -1}, {"size": (-4, 6)},
        {"size": (24,)}, {"count": 25}, {"count": -1}, {"count": 10**15}, {"count": 2**63}, {"key": "1"},
        {"key": "../data.pkl"}, {"key": "/etc/passwd"}, {"kind": "DoubleStorage"}, {"kind": "NoStorage"},
        {"kind": "UntypedStorage"}, {"size": (10**12, 24), "stride": (0, 1)}, {"size": (5, 24), "stride": (0, 1)},
    ],
    ids=str,
)  # fmt: skip
def test_tensor_outside_its_memory_is_refused(tmp_path, wrong):
    with pytest.raises(SaeCheckpointError) as caught:
        load_sae(write_tensor_file(tmp_path / "sae.pt", tensor(**wrong)))
    assert "found ['W_enc']" not in str(caught.value), "it was read as if it were sound"


def test_archives_that_torch_does_not_write_are_refused(tmp_path):
    path = tmp_path / "sae.pt"
    for options in (
        {"compression": zipfile.ZIP_DEFLATED},
        {"prefix": "../../archive"},
        {"members": {"other/0": bytes(96)}},
        {"members": {"data/0": bytes(96), "byteorder": b"big"}},
    ):
        with pytest.raises(SaeCheckpointError) as caught:
            load_sae(write_tensor_file(path, tensor(), **options))
        assert "found ['W_enc']" not in str(caught.value), f"read with {options}"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no checkpoint")
    with pytest.raises(SaeCheckpointError):
        load_sae(path)
    assert [item.name for item in tmp_path.iterdir()] == ["sae.pt"]


def read_body(path, fragment: bytes, **options):
    return read_restricted(write_archive(path, b"\x80\x02" + fragment + b".", **options))


def nested(fragment: bytes, levels: int) -> bytes:
    """A tuple that contains the same tuple twice, and so on: 2**levels values in a few bytes."""
    return fragment + b"q\x01" + b"(h\x01h\x01tq\x01" * levels


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch", "load"), ("torch", "hub"), ("torch", "save"), ("torch", "Tensor"), ("torch", "_inductor"),
        ("torch", "_dynamo"), ("torch", "storage.os.system"), ("torch", "__class__"), ("torch", "float32.__reduce__"),
        ("torch.serialization", "load"), ("torch._utils", "_rebuild_sparse_tensor"),
        ("torch.storage", "_load_from_bytes"), ("", ""),
        ("torch._utils", "_rebuild_tensor_v3"), ("collections", "defaultdict"), ("collections", "namedtuple"),
        ("copyreg", "_reconstructor"), ("builtins", "object"), ("builtins", "type"), ("no_such_module", "x\0y"),
    ],
)  # fmt: skip
def test_names_outside_the_list_are_records_and_import_nothing(tmp_path, monkeypatch, module, name):
    # torch imports some of its modules on attribute access.
    monkeypatch.setattr(torch, "__getattr__", lambda asked: pytest.fail(f"torch was asked for {asked}"))
    path = write_archive(tmp_path / "sae.pt", b"\x80\x02N.")
    with zipfile.ZipFile(path) as archive:
        loaded = set(sys.modules)  # opening an archive imports an encoding
        found = restricted_pickle._RestrictedUnpickler(b"N.", archive, "").find_class(module, name)
    assert found is Record
    assert set(sys.modules) == loaded


def test_records_only_keep_what_they_are_given(tmp_path):
    def find(fragment):
        return read_body(tmp_path / "sae.pt", fragment)

    a, one, two = global_("a", "A"), b"K\x01", b"K\x02"
    made = call(call(a, one), two)
    assert to_plain(find(made)) == 2
    assert to_plain(find(b"(" + one + two + b"ia\nA\n")) == [1, 2]
    assert to_plain(find(b"(" + a + one + b"o")) == 1
    assert to_plain(find(made + b"}" + text("__class__") + text("x") + b"sb")) == {"__class__": "x"}
    assert to_plain(find(made + b"N}" + text("arguments") + one + b"s\x86b")) == [None, {"arguments": 1}]
    assert to_plain(find(call(global_("copyreg", "_reconstructor"), a, global_("builtins", "object"), b"N")))[2] is None
    assert Record.arguments == ()
    assert Record.state is None


def test_pickle_cannot_change_the_reader(tmp_path):
    """BUILD sets attributes; the next file must not see them."""
    state = b"N}" + text("__defaults__") + b"(K\x01K\x02tsK\x07\x86b"
    slots = b"N}" + text("__defaults__") + b"(K\x01K\x02ts\x86b"
    names = [("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"), ("a", "A")]
    names += [("collections", "OrderedDict"), ("torch", "FloatStorage"), ("torch", "device"), ("torch", "float32")]
    for name in names:
        for attack in (state, slots):
            with contextlib.suppress(RestrictedPickleError):
                read_body(tmp_path / "sae.pt", global_(*name) + attack)
    assert restricted_pickle._rebuild_tensor.__defaults__ is None
    assert not hasattr(Record, "__defaults__")
    assert set(vars(restricted_pickle._rebuild_tensor)) == set()


@pytest.mark.parametrize(
    "attack",
    [
        pytest.param(b"(" + tensor() + b"I0\n(I1000000000000\nt(I0\nttb", id="set_ over a stride of 0"),
        pytest.param(b"(" + tensor() + b"I0\n(I1000000000000\nt(I1\nttb", id="set_ beyond the memory"),
        pytest.param(b"(" + tensor() + b"\x90", id="add"),
        pytest.param(b"(" + tensor() + b"e", id="extend"),
        pytest.param(b"I0\nI1\ns", id="set item"),
        pytest.param(b"}" + text("requires_grad") + b"\x88sb", id="attribute"),
    ],
)
def test_tensors_cannot_be_changed_by_the_pickle(tmp_path, attack):
    for made in (
        tensor(),
        b"(" + text("storage") + global_("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x18tQ",
    ):
        with pytest.raises(RestrictedPickleError):
            read_body(tmp_path / "sae.pt", made + attack)
        with pytest.raises(SaeCheckpointError):
            load_sae(write_tensor_file(tmp_path / "sae.pt", made + attack))


def test_one_number_beyond_the_memory_is_refused(tmp_path):
    assert read_body(tmp_path / "sae.pt", tensor(count=25, offset=1), members={"data/0": bytes(100)}).shape == (4, 6)
    with pytest.raises(RestrictedPickleError, match=r"size \(4, 6\) reaches beyond its memory of 24 numbers"):
        read_body(tmp_path / "sae.pt", tensor(offset=1))


def test_many_views_of_one_memory_allocate_nothing(tmp_path):
    """With copies, a file of 4 MB could allocate a hundred thousand times its size."""
    views = b"}(" + b"".join(text(str(n)) + tensor() for n in range(50)) + b"u"
    found = read_body(tmp_path / "sae.pt", views)
    assert len({value.untyped_storage().data_ptr() for value in found.values()}) == 1


@pytest.mark.parametrize(
    "kind",
    [
        b"]", b"N", b"\x89", text("module"), b"I-1\n", b"I99999999999999999999\n", b"(" + text("storage") + b"t",
        b"(" + text("storage") + b"N" + text("0") + text("cpu") + b"K\x01t",
        b"(" + text("storage") + global_("torch", "FloatStorage") + b"K\x00" + text("cpu") + b"K\x01t",
        b"(" + text("storage") + global_("torch", "FloatStorage") + text("0") + text("cpu") + b"I-1\nt",
        b"(" + text("module") + global_("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x01t",
        nested(b"N", 200),
    ],
    ids=range(12),
)  # fmt: skip
def test_invalid_names_of_memory_are_refused(tmp_path, kind):
    with pytest.raises(RestrictedPickleError, match="a kind of memory that torch does not write"):
        read_body(tmp_path / "sae.pt", kind + b"Q")


def test_names_of_memory_as_lines_of_text_are_refused(tmp_path):
    for name in (b"0", b"-1", b"../x", b"99999999999999999999", b"/etc/passwd"):
        with pytest.raises(RestrictedPickleError, match="a kind of memory"):
            read_body(tmp_path / "sae.pt", b"P" + name + b"\n")


@pytest.mark.parametrize("key", ["../x", "../../x", "/x", "..\\x", "0/../0", "", "\0", "data.pkl"])
def test_memory_outside_the_archive_is_never_read(tmp_path, key):
    (tmp_path / "x").write_bytes(bytes(96))
    with pytest.raises(RestrictedPickleError):
        read_body(tmp_path / "sae.pt", tensor(key=key))


@pytest.mark.parametrize("layout", ["size", "stride", "offset", "memory"])
@pytest.mark.parametrize(
    "value", [b"N", b"]", text("abc"), b"(Nt", b"(\x88t", nested(b"(K\x01t", 200), b"(G\x3f\xf0" + bytes(6) + b"t"]
)
def test_layouts_that_are_not_integers_are_refused(tmp_path, layout, value):
    storage = b"(" + text("storage") + global_("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x18tQ"
    parts = {"memory": storage, "offset": b"K\x00", "size": b"(K\x04K\x06t", "stride": b"(K\x06K\x01t"}
    parts[layout] = value
    with pytest.raises(RestrictedPickleError, match=r"tensor"):
        read_body(tmp_path / "sae.pt", call(global_("torch._utils", "_rebuild_tensor_v2"), *parts.values()))


@pytest.mark.parametrize("opcode", [b"r" + struct.pack("<I", 400_000_000), b"p400000000\n"])
def test_memo_indices_beyond_the_pickle_are_refused(tmp_path, opcode):
    """The unpickler's table would have 800 million entries: 6 GB from 5 bytes."""
    with pytest.raises(RestrictedPickleError, match="bytes claim to contain 400000000 values"):
        read_body(tmp_path / "sae.pt", b"N" + opcode)


@pytest.mark.parametrize("opcode", [b"\x8e", b"\x96", b"\x8d", b"\x95"], ids=["bytes", "bytearray", "text", "frame"])
def test_lengths_beyond_the_pickle_are_refused(tmp_path, opcode):
    for n in (1 << 34, (1 << 63) - 1, (1 << 64) - 1):
        with pytest.raises(RestrictedPickleError, match="cannot be read"):
            read_body(tmp_path / "sae.pt", opcode + struct.pack("<Q", n) + b"x")


def test_deep_nesting_neither_crashes_nor_hangs(tmp_path):
    n = 200_000
    with pytest.raises(RestrictedPickleError, match="too deeply"):
        to_plain(read_body(tmp_path / "sae.pt", b"]" * n + b"a" * (n - 1)))
    with pytest.raises(RestrictedPickleError, match="too deeply"):
        to_plain(read_body(tmp_path / "sae.pt", global_("a", "A") + b"N" + b"\x85" * n + b"R"))
    with pytest.raises(RestrictedPickleError, match="more than 100,000 values"):
        to_plain(read_body(tmp_path / "sae.pt", nested(b"N", 49)))


def test_structures_that_contain_themselves_terminate(tmp_path):
    listed = read_body(tmp_path / "sae.pt", b"]q\x00h\x00a")
    keyed = read_body(tmp_path / "sae.pt", b"}q\x00" + text("x") + b"h\x00s")
    recorded = read_body(tmp_path / "sae.pt", global_("a", "A") + b")\x81q\x00}" + text("x") + b"h\x00sb")
    assert listed[0] is listed
    assert keyed["x"] is keyed
    assert recorded.state["x"] is recorded
    for value in (listed, keyed, recorded):
        with pytest.raises(RestrictedPickleError, match="too deeply"):
            to_plain(value)


def test_plain_values_are_always_json():
    record = Record(1, 2)
    bare = Record()
    bare.state = None
    value = {
        7: "int", True: "bool", None: "left out", (1, 2): "left out", 1 << 20000: "huge",
        "record": record, "bare": bare, "type": Record, "bytes": b"x", "set": {1}, "float": -0.5,
        "nan": float("nan"), "tensor": torch.ones(2), "dtype": torch.bfloat16, "device": torch.device("cuda:1"),
        "edge": [-(1 << 63), (1 << 63) - 1, 1 << 63],
    }  # fmt: skip
    plain = to_plain(value)
    assert json.loads(json.dumps(plain)) == plain
    assert plain["<integer of 20001 bits>"] == "huge"
    assert plain["record"] == [1, 2]
    assert plain["bare"] == {}
    assert plain["type"] == "<type>"
    assert plain["bytes"] == "<bytes>"
    assert plain["tensor"] == "<Tensor>"
    assert plain["device"] == "cuda:1"
    assert plain["edge"] == [-(1 << 63), (1 << 63) - 1, "<integer of 64 bits>"]
    assert "left out" not in plain.values()


# --- archives


def test_unpacked_larger_than_packed_is_refused_before_torch_unpacks_it(tmp_path, monkeypatch):
    path = write_archive(tmp_path / "sae.pt", b"\x80\x02N." + bytes(1 << 24), compression=zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch was given the file"))
    with pytest.raises(RestrictedPickleError, match="it is compressed"):
        check_archive(path)
    with pytest.raises(SaeCheckpointError, match="it is compressed"):
        load_sae(path)
    write_archive(path, b"\x80\x02N.", members={"data/0": bytes(77)})
    data = path.read_bytes()
    path.write_bytes(data.replace(struct.pack("<II", 77, 77), struct.pack("<II", 77, 1 << 31)))
    for read in (load_sae, read_restricted):
        with pytest.raises(ValueError, match=r"its members claim 2147483\d* bytes, it has \d"):
            read(path)


def test_members_that_share_their_bytes_are_refused(tmp_path):
    """A hundred names for one member: each would be read into its own memory."""
    path = write_archive(tmp_path / "sae.pt", b"\x80\x02N.", members={"data/0": bytes(100_000)})
    with zipfile.ZipFile(path, "a") as archive:
        first = archive.getinfo("archive/data/0")
        for n in range(1, 100):
            again = zipfile.ZipInfo(f"archive/data/{n}")
            for name in ("header_offset", "CRC", "compress_size", "file_size"):
                setattr(again, name, getattr(first, name))
            archive.filelist.append(again)
            archive.NameToInfo[again.filename] = again
        archive._didModify = True
    with pytest.raises(RestrictedPickleError, match="its members claim"):
        read_restricted(path)


def test_two_pickles_are_refused(tmp_path):
    path = write_archive(tmp_path / "sae.pt", b"\x80\x02N.")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/data.pkl", b"N.")
    with pytest.raises(RestrictedPickleError, match="it contains 2 pickles"):
        read_restricted(path)
    write_archive(path, b"\x80\x02N.")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("archive/data.pkl", b"\x80\x02K\x01.")
    with pytest.raises(RestrictedPickleError, match="it contains 2 pickles"):
        read_restricted(path)


def test_giant_pickle_is_refused(tmp_path):
    with pytest.raises(
        RestrictedPickleError, match=r"'archive/data.pkl' is compressed or has 5000\d{3} bytes, more than"
    ):
        read_body(tmp_path / "sae.pt", bytes(5_000_000))


def test_damaged_member_is_refused(tmp_path):
    path = write_archive(tmp_path / "sae.pt", b"\x80\x02X\x05\0\0\0abcde.")
    path.write_bytes(path.read_bytes().replace(b"abcde", b"abcdf"))
    with pytest.raises(RestrictedPickleError, match="Bad CRC-32"):
        read_restricted(path)


def test_damaged_pickles_are_checkpoint_errors(tmp_path):
    """Bytes changed at random: the result is a value or a checkpoint error."""
    good, rng, path = io.BytesIO(), random.Random(0), tmp_path / "sae.pt"
    torch.save({"cfg": argparse.Namespace(a=1, b=[2.5, "x"]), "state_dict": {"W_enc": torch.ones(4, 6)}}, good)
    with zipfile.ZipFile(good) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        pickled = archive.read(name)
    outcomes = set()
    for _ in range(300):
        data = bytearray(pickled)
        for _ in range(rng.choice([1, 2, 5])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        write_archive(path, bytes(data))
        for read in (load_sae, read_torch):
            with contextlib.suppress(SaeCheckpointError):
                read(path)
        try:
            to_plain(read_restricted(path))
            outcomes.add("value")
        except RestrictedPickleError:
            outcomes.add("error")
    assert outcomes == {"value", "error"}


# --- tensors written by torch


def save_and_read(path, value):
    """Through a file that torch's own safe reader refuses because of a foreign object."""
    torch.save({"foreign": argparse.Namespace(a=1), "value": value}, path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    return read_restricted(path)["value"]


@pytest.mark.parametrize("dtype", sorted(restricted_pickle._STORAGES.values(), key=str), ids=str)
def test_every_kind_of_storage_is_read(tmp_path, dtype):
    value = torch.arange(12).reshape(3, 4).to(dtype)
    found = save_and_read(tmp_path / "x.pt", {"x": value})["x"]
    assert found.dtype == dtype
    assert torch.equal(found, value)


def test_layouts_are_read(tmp_path):
    memory = torch.arange(60.0)
    value = {
        "empty": torch.empty(0), "empty matrix": torch.empty(3, 0, 2), "number": torch.tensor(2.5),
        "half": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T, "transposed": memory.view(6, 10).T,
        "strided": memory[3:50:7], "tail": memory[55:], "empty tail": memory[60:], "whole": memory,
        "parameter": torch.nn.Parameter(memory[:4]), "deeper": {"x": memory[1:3]},
    }  # fmt: skip
    found = save_and_read(tmp_path / "x.pt", value)
    deeper = found.pop("deeper")
    assert torch.equal(deeper["x"], value.pop("deeper")["x"])
    for name, tensor_ in value.items():
        assert type(found[name]) is torch.Tensor, name
        assert found[name].dtype == tensor_.dtype, name
        assert torch.equal(found[name], tensor_), name


def test_root_may_be_a_tensor_and_other_tensors_are_placeholders(tmp_path):
    assert read_body(tmp_path / "x.pt", tensor()).shape == (4, 6)
    assert to_plain(save_and_read(tmp_path / "x.pt", [torch.ones(2)])) == ["<Tensor>"]
