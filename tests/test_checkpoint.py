"""Autoencoder files: round trips, the reference's own files, damage, and files that try to run something."""

import collections
import contextlib
import io
import json
import os
import pickle
import struct
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch

from cytosae.checkpoint import (
    SaeCheckpointError,
    SaeNotFoundError,
    load_sae,
    read_torch,
    save_sae,
    write_torch_atomically,
)
from cytosae.sae import SparseAutoencoder

D, S = 4, 6
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
CFG = {"arch": "relu", "block_layer": -2, "lr": 4e-4, "spec": {"tokens": [1, 0, 16]}, "note": None, "ghost": True}


def make_state(**changed) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D, S), "b_enc": (S,), "W_dec": (S, D), "b_dec": (D,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} | changed


def assert_same(sae, state):
    for name in NAMES:
        assert torch.equal(getattr(sae, name), state[name]), name


def test_round_trip_is_exact_and_opens_with_weights_only(tmp_path):
    sae, path = SparseAutoencoder(D, S, seed=5), tmp_path / "sae.pt"
    save_sae(path, sae, CFG)
    loaded = load_sae(path)
    assert loaded.cfg == CFG
    assert_same(loaded.sae, sae.state_dict())
    x = torch.randn(2, 3, D)
    assert torch.equal(loaded.sae(x).reconstruction, sae(x).reconstruction)
    plain = torch.load(path, weights_only=True)
    assert plain["cfg"] == CFG
    assert_same(loaded.sae, plain["state_dict"])


@pytest.mark.parametrize("value", [Path("x"), torch.ones(1), {1, 2}, object()])
def test_cfg_of_anything_but_json_is_refused_and_nothing_is_written(tmp_path, value):
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_sae(tmp_path / "sae.pt", SparseAutoencoder(D, S), {"value": value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, error):
    path = tmp_path / "sae.pt"
    save_sae(path, SparseAutoencoder(D, S), CFG)
    before = path.read_bytes()

    def fail(value, file):
        file.write(before[:50])
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(type(error)):
        write_torch_atomically(path, {"x": 1})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_file_is_synced_before_it_gets_its_name(tmp_path, monkeypatch):
    seen, sync = [], os.fsync
    path = tmp_path / "value.pt"

    def record(file):
        seen.append(path.exists())
        sync(file)

    monkeypatch.setattr(os, "fsync", record)
    write_torch_atomically(path, torch.arange(3))
    assert seen[0] is False
    assert read_torch(path).tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_float_types_load_as_float32(tmp_path, dtype):
    state = make_state()
    torch.save({"cfg": {}, "state_dict": {name: state[name].to(dtype) for name in NAMES}}, tmp_path / "sae.pt")
    sae = load_sae(tmp_path / "sae.pt").sae
    assert_same(sae, {name: state[name].to(dtype).float() for name in NAMES})
    assert sae.W_enc.dtype == torch.float32


# --- the reference's files: a pickled config object beside the tensors


@pytest.fixture
def write_reference(tmp_path):
    """Writes a checkpoint as the reference does; its config class exists only while writing."""

    def write(cfg, state=None, **options) -> Path:
        name = "src.sae_training.config"
        parts = name.split(".")
        kind = type("ViTSAERunnerConfig", (), {"__module__": name})
        config = kind()
        config.__dict__.update(cfg)
        added = {".".join(parts[: n + 1]): types.ModuleType(parts[n]) for n in range(3)}
        added[name].ViTSAERunnerConfig = kind
        sys.modules.update(added)
        try:
            path = tmp_path / "reference.pt"
            state = collections.OrderedDict(make_state() if state is None else state)
            torch.save({"cfg": config, "state_dict": state}, path, **options)
        finally:
            for module in added:
                del sys.modules[module]
        return path

    return write


def test_reference_file_is_read_without_its_classes(write_reference):
    cfg = {"block_layer": -2, "expansion_factor": 64, "model_name": "dinov2_vitb14", "lr": 4e-4, "x": None}
    path = write_reference(cfg)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    loaded = load_sae(path)
    assert_same(loaded.sae, make_state())
    assert loaded.cfg == cfg
    assert "src.sae_training.config" not in sys.modules


def test_reference_cfg_becomes_json_whatever_it_held(write_reference):
    path = write_reference(
        {
            "device": torch.device("cuda"),
            "dtype": torch.float32,
            "path": Path("a/b"),
            "pair": (1, 2),
            "nested": {"k": [1]},
        }
    )
    cfg = load_sae(path).cfg
    assert json.loads(json.dumps(cfg)) == cfg
    assert cfg["nested"] == {"k": [1]}
    assert cfg["pair"] == [1, 2]
    assert "float32" in str(cfg["dtype"])
    assert "cuda" in str(cfg["device"])


def test_reference_tensors_may_be_views_of_shared_memory(write_reference):
    memory = torch.randn(100)
    state = make_state(
        W_enc=memory[:24].view(S, D).T, b_enc=memory[10:22:2], W_dec=memory[30:54].view(S, D), b_dec=memory[3:7]
    )
    assert_same(load_sae(write_reference({"a": 1}, state)).sae, state)


def test_reference_config_without_any_attribute_is_empty(write_reference):
    assert load_sae(write_reference({})).cfg == {}


def test_reference_parameters_are_read_as_tensors(write_reference):
    state = {name: torch.nn.Parameter(tensor) for name, tensor in make_state().items()}
    assert_same(load_sae(write_reference({"a": 1}, state)).sae, make_state())


def test_old_torch_format_is_a_clear_error(write_reference):
    path = write_reference({"a": 1}, _use_new_zipfile_serialization=False)
    with pytest.raises(SaeCheckpointError, match=r"no torch checkpoint of the zip format"):
        load_sae(path)


def save_raw(path, **parts) -> Path:
    torch.save({"cfg": {}, "state_dict": make_state()} | parts, path)
    return path


def without(name) -> dict[str, torch.Tensor]:
    return {key: value for key, value in make_state().items() if key != name}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (without("b_dec"), r"must hold W_enc, b_enc, W_dec, b_dec, found \['W_dec', 'W_enc', 'b_enc'\]"),
        (make_state(k=torch.ones(1)), r"found \['W_dec', 'W_enc', 'b_dec', 'b_enc', 'k'\]"),
        (make_state(W_dec=torch.zeros(D, S)), r"'W_dec': \(4, 6\).*expected \(D,S\), \(S,\), \(S,D\), \(D,\)"),
        (make_state(b_enc=torch.zeros(S + 1)), r"'b_enc': \(7,\)"),
        (make_state(b_dec=torch.zeros(1, D)), r"'b_dec': \(1, 4\)"),
        (make_state(W_enc=torch.zeros(D * S)), r"'W_enc': \(24,\)"),
        (make_state(b_enc=torch.zeros(S, dtype=torch.int64)), "floating-point"),
        (make_state(b_enc=[0.0] * S), "floating-point"),
        (make_state(b_enc=torch.full((S,), torch.nan), b_dec=torch.full((D,), torch.inf)), "b_enc, b_dec in .* NaN"),
        ([1, 2], "found list"),
    ],
)  # fmt: skip
def test_state_that_does_not_fit_is_refused(tmp_path, state, message):
    with pytest.raises(SaeCheckpointError, match=message):
        load_sae(save_raw(tmp_path / "sae.pt", state_dict=state))


def test_other_files_are_refused_by_what_they_hold(tmp_path):
    path = tmp_path / "sae.pt"
    for value, message in ((torch.ones(2), "found Tensor"), ({"teacher": {}}, r"found \['teacher'\]")):
        torch.save(value, path)
        with pytest.raises(SaeCheckpointError, match=f"must hold 'cfg' and 'state_dict', {message}"):
            load_sae(path)
    with pytest.raises(SaeCheckpointError, match="'cfg' in .* must be a dict, found list"):
        load_sae(save_raw(path, cfg=[1]))
    with pytest.raises(SaeCheckpointError, match="architecture 'topk'; this version knows: relu"):
        load_sae(save_raw(path, cfg={"arch": "topk"}))


@pytest.mark.parametrize("foreign", [True, False])
def test_config_that_grows_without_end_is_refused(tmp_path, write_reference, foreign):
    nested, deep, endless = [1], [], []
    for _ in range(40):
        nested = [nested, nested]  # 2**40 values out of 40 lists
    for _ in range(100):
        deep = [deep]
    endless.append(endless)
    for value, message in ((nested, "more than 100,000 values"), (deep, "too deeply"), (endless, "too deeply")):
        path = write_reference({"x": value}) if foreign else save_raw(tmp_path / "sae.pt", cfg={"x": value})
        with pytest.raises(SaeCheckpointError, match=f"'cfg' in .* cannot be used: .*{message}"):
            load_sae(path)


def test_numbers_that_json_has_not_become_text(write_reference):
    cfg = load_sae(write_reference({"nan": float("nan"), "inf": float("-inf"), "huge": 1 << 20000})).cfg
    assert cfg == {"nan": "nan", "inf": "-inf", "huge": "<integer of 20001 bits>"}


@pytest.mark.parametrize("foreign", [True, False])
def test_encoder_only_leaves_the_decoder_out(tmp_path, write_reference, foreign):
    path = write_reference({"a": 1}) if foreign else save_raw(tmp_path / "sae.pt")
    sae, x = load_sae(path, encoder_only=True).sae, torch.randn(3, D)
    assert torch.equal(sae.encode(x), load_sae(path).sae.encode(x))
    assert sae.W_dec.numel() == 0
    with pytest.raises(RuntimeError, match="encoder_only=True"):
        sae(x)


def test_missing_file_names_the_command(tmp_path):
    with pytest.raises(SaeNotFoundError, match=r"no autoencoder at '.*none\.pt'.*cytosae-cache train") as caught:
        load_sae(tmp_path / "none.pt")
    assert isinstance(caught.value, FileNotFoundError)
    assert isinstance(caught.value, SaeCheckpointError)


@pytest.mark.parametrize("keep", [0, 1, 10, 200, 0.5, 0.99])
def test_cut_off_file_is_an_error_of_ours(tmp_path, write_reference, keep):
    for path in (save_raw(tmp_path / "sae.pt"), write_reference({"a": 1})):
        data = path.read_bytes()
        path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
        with pytest.raises(SaeCheckpointError, match=str(path)):
            load_sae(path)
        with pytest.raises(SaeCheckpointError, match=str(path)):
            read_torch(path)


# --- files that try to run something


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
    """Fragments of pickles, each leaving one object on the stack; run for real, each makes the folder `marker`."""
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
        "new object": global_("builtins", "object") + b")\x81}" + text("x") + call(mkdir, where) + b"sb",
        "persistent id": b"(" + text("storage") + call(mkdir, where) + text("0") + text("cpu") + b"K\x01tQ",
    }


ATTACKS = sorted(make_attacks(""))
PROTOCOL = {"stack global": b"\x80\x04", "dotted global": b"\x80\x04"}


def write_archive(path, pickled: bytes, *, members=None, prefix="archive", compression=zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        # torch's own reader turns a file without these two away before it looks at the pickle.
        archive.writestr(f"{prefix}/data.pkl", pickled)
        archive.writestr(f"{prefix}/version", b"3\n")
        for name, data in (members or {"data/0": bytes(4 * 24)}).items():
            archive.writestr(f"{prefix}/{name}", data)
    return path


class Unpickler(pickle.Unpickler):
    """What an unguarded reader does."""

    def persistent_load(self, pid):
        return None


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("place", ["cfg", "state_dict", "root"])
def test_nothing_in_a_file_is_executed(tmp_path, name, place):
    marker = tmp_path / "marker"
    attack, start = make_attacks(marker)[name], PROTOCOL.get(name, b"\x80\x02")
    # The attack is real: an unguarded unpickler falls for it.
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


def test_attack_beside_sound_tensors_stays_inert(tmp_path, write_reference):
    class Evil:
        def __reduce__(self):
            return (Path.mkdir, (tmp_path / "marker",))

    path = write_reference({"block_layer": -2, "evil": Evil(), "more": [Evil()]})
    loaded = load_sae(path)
    assert_same(loaded.sae, make_state())
    assert loaded.cfg["block_layer"] == -2
    json.dumps(loaded.cfg)
    assert not (tmp_path / "marker").exists()


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
    """A file with a foreign config, so that torch's own reader declines it, and one tensor."""
    record = global_("src.sae_training.config", "ViTSAERunnerConfig") + b")\x81}" + text("a") + b"K\x01sb"
    body = b"\x80\x02}(" + text("cfg") + record + text("state_dict") + b"}" + text("W_enc") + fragment + b"su."
    return write_archive(path, body, **options)


def test_handwritten_tensor_is_read(tmp_path):
    """The control of the tests below: only the other three tensors are missing."""
    with pytest.raises(SaeCheckpointError, match=r"must hold W_enc, .*found \['W_enc'\]"):
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
