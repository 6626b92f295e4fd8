"""Autoencoder files: round trips, the reference's own files, damage, and files that try to execute code."""

import collections
import json
import pickle
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from cytosae.formats.checkpoint import (
    SaeCheckpointError,
    SaeNotFoundError,
    load_sae,
    read_torch,
    save_sae,
)
from cytosae.sae.registry import ARCHITECTURES, make_sae
from cytosae.sae.relu import ReluSae

D, S = 4, 6
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
CFG = {"arch": "relu", "block_layer": -2, "lr": 4e-4, "spec": {"tokens": [1, 0, 16]}, "note": None, "ghost": True}


def make_state(**changed) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D, S), "b_enc": (S,), "W_dec": (S, D), "b_dec": (D,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} | changed


def assert_same(sae, state):
    assert list(sae.state_dict()) == list(state)
    for name, tensor in state.items():
        assert torch.equal(sae.state_dict()[name], tensor), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_round_trip_is_exact_and_opens_with_weights_only(tmp_path, architecture):
    sae, path = make_sae(architecture, D, S, seed=5, k=2, prefixes=(0.5, 1.0), bandwidth=0.3), tmp_path / "sae.pt"
    for tensor in sae.state_dict().values():
        tensor.add_(torch.rand(tensor.shape))
    save_sae(path, sae, CFG)
    loaded = load_sae(path)
    assert loaded.cfg == {**CFG, "arch": architecture, "settings": sae.settings}
    assert type(loaded.sae) is type(sae)
    assert loaded.sae.settings == sae.settings
    assert_same(loaded.sae, sae.state_dict())
    x = torch.randn(2, 3, D)
    assert torch.equal(loaded.sae(x).reconstruction, sae(x).reconstruction)
    encoder = load_sae(path, encoder_only=True).sae
    assert torch.equal(encoder.encode(x), sae.encode(x))
    plain = torch.load(path, weights_only=True)
    assert plain["cfg"] == loaded.cfg
    assert_same(loaded.sae, plain["state_dict"])


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("topk", {"k": 0}, "k must be a whole number from 1 to the 6 latents, found 0"),
        ("topk", {"k": 1.5}, "k must be a whole number"),
        ("topk", {"k": "many"}, "k must be a whole number"),
        ("topk", {"k": True}, "k must be a whole number from 1 to the 6 latents, found True"),
        ("matryoshka", {"k": 2, "prefixes": []}, "prefixes must be shares that ascend"),
        ("matryoshka", {"k": 2, "prefixes": [0.5, float("nan"), 1]}, "prefixes must be shares that ascend"),
        ("matryoshka", {"k": 2, "prefixes": [10**400]}, "could not convert"),
        ("batchtopk", {"k": 7}, "k must be a whole number"),
        ("matryoshka", {"k": 2, "prefixes": [0.5, 0.5, 1]}, "prefixes must be shares that ascend"),
        ("matryoshka", {"k": 2, "prefixes": "abc"}, "could not convert"),
        ("jumprelu", {"k": -1}, "must be above 0"),
    ],
)
def test_invalid_settings_are_refused(tmp_path, architecture, settings, message):
    state = make_sae(architecture, D, S, k=2).state_dict()
    path = save_raw(tmp_path / "sae.pt", cfg={"arch": architecture, "settings": settings}, state_dict=state)
    with pytest.raises(SaeCheckpointError, match=f"'settings' in .* cannot be used: .*{message}"):
        load_sae(path)


@pytest.mark.parametrize("settings", [None, {}, 3, {"bandwidth": 1}])
def test_topk_without_k_is_not_given_the_default(tmp_path, settings):
    state = make_sae("topk", D, S, k=2).state_dict()
    path = save_raw(tmp_path / "sae.pt", cfg={"arch": "topk", "settings": settings}, state_dict=state)
    with pytest.raises(SaeCheckpointError, match="'settings' in .* must contain k for architecture topk, found "):
        load_sae(path)


def test_a_whole_number_may_have_a_decimal_point(tmp_path):
    state = make_sae("topk", D, S, k=2).state_dict()
    path = save_raw(tmp_path / "sae.pt", cfg={"arch": "topk", "settings": {"k": 2.0}}, state_dict=state)
    assert load_sae(path).sae.encode(torch.randn(3, D)).count_nonzero() <= 6
    assert load_sae(path).sae.settings == {"k": 2}


@pytest.mark.parametrize("encoder_only", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_tensor_may_be_nan_or_infinite(tmp_path, architecture, bad, encoder_only):
    sae = make_sae(architecture, D, S, k=2)
    for name in sae.state_dict():
        state = {other: part.clone() for other, part in sae.state_dict().items()}
        state[name].view(-1)[-1] = bad
        path = save_raw(tmp_path / "sae.pt", cfg={"arch": architecture, "settings": sae.settings}, state_dict=state)
        with pytest.raises(SaeCheckpointError, match=f"^{name} in .* contain NaN or infinity"):
            load_sae(path, encoder_only=encoder_only)


def test_a_gate_whose_factor_overflows_is_refused(tmp_path):
    sae = make_sae("gated", D, S)
    for r_mag, fits in ((88.0, True), (89.0, False)):
        sae.r_mag.data[1] = r_mag
        save_sae(tmp_path / "sae.pt", sae, CFG)
        if fits:
            load_sae(tmp_path / "sae.pt")
            continue
        with pytest.raises(SaeCheckpointError, match=r"^exp\(r_mag\) in .* too large for float32"):
            load_sae(tmp_path / "sae.pt")


def test_settings_cannot_reach_other_arguments(tmp_path):
    settings = {"k": 2, "device": "nowhere", "seed": "x", "dtype": 3}
    state = make_sae("topk", D, S, k=2).state_dict()
    loaded = load_sae(save_raw(tmp_path / "sae.pt", cfg={"arch": "topk", "settings": settings}, state_dict=state))
    assert loaded.sae.W_enc.device.type == "cpu"


@pytest.mark.parametrize("value", [Path("x"), torch.ones(1), {1, 2}, object()])
def test_cfg_of_anything_but_json_is_refused_and_nothing_is_written(tmp_path, value):
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_sae(tmp_path / "sae.pt", ReluSae(D, S), {"value": value})
    assert not list(tmp_path.iterdir())


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


def test_any_reference_cfg_becomes_json(write_reference):
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


def test_reference_config_without_attributes_is_empty(write_reference):
    assert load_sae(write_reference({})).cfg == {}


def test_reference_parameters_are_read_as_tensors(write_reference):
    state = {name: torch.nn.Parameter(tensor) for name, tensor in make_state().items()}
    assert_same(load_sae(write_reference({"a": 1}, state)).sae, make_state())


def test_old_torch_format_is_a_clear_error(write_reference):
    path = write_reference({"a": 1}, _use_new_zipfile_serialization=False)
    with pytest.raises(SaeCheckpointError, match=r"not a torch checkpoint in zip format"):
        load_sae(path)


def save_raw(path, **parts) -> Path:
    torch.save({"cfg": {}, "state_dict": make_state()} | parts, path)
    return path


def without(name) -> dict[str, torch.Tensor]:
    return {key: value for key, value in make_state().items() if key != name}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (without("b_dec"), r"must contain W_enc, b_enc, W_dec, b_dec, found \['W_dec', 'W_enc', 'b_enc'\]"),
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


def test_other_files_are_refused_with_their_contents(tmp_path):
    path = tmp_path / "sae.pt"
    for value, message in ((torch.ones(2), "found Tensor"), ({"teacher": {}}, r"found \['teacher'\]")):
        torch.save(value, path)
        with pytest.raises(SaeCheckpointError, match=f"it is not an autoencoder: {message}, expected 'cfg' and"):
            load_sae(path)
    with pytest.raises(SaeCheckpointError, match="'cfg' in .* must be a dict, found list"):
        load_sae(save_raw(path, cfg=[1]))
    for name in ("gru", ["relu"], None):
        with pytest.raises(SaeCheckpointError, match="has architecture .*; this version knows: relu, topk, batchtopk"):
            load_sae(save_raw(path, cfg={"arch": name}))
    with pytest.raises(SaeCheckpointError, match="must contain W_enc, b_enc, W_dec, b_dec, threshold, found"):
        load_sae(save_raw(path, cfg={"arch": "batchtopk"}))


@pytest.mark.parametrize("foreign", [True, False])
def test_config_that_expands_exponentially_is_refused(tmp_path, write_reference, foreign):
    nested, deep, endless = [1], [], []
    for _ in range(40):
        nested = [nested, nested]  # 2**40 values from 40 lists
    for _ in range(100):
        deep = [deep]
    endless.append(endless)
    for value, message in ((nested, "more than 100,000 values"), (deep, "too deeply"), (endless, "too deeply")):
        path = write_reference({"x": value}) if foreign else save_raw(tmp_path / "sae.pt", cfg={"x": value})
        with pytest.raises(SaeCheckpointError, match=f"'cfg' in .* cannot be used: .*{message}"):
            load_sae(path)


def test_numbers_without_a_json_form_become_text(write_reference):
    cfg = load_sae(write_reference({"nan": float("nan"), "inf": float("-inf"), "huge": 1 << 20000})).cfg
    assert cfg == {"nan": "nan", "inf": "-inf", "huge": "<integer of 20001 bits>"}


@pytest.mark.parametrize("foreign", [True, False])
def test_encoder_only_omits_the_decoder(tmp_path, write_reference, foreign):
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
def test_truncated_file_is_a_checkpoint_error(tmp_path, write_reference, keep):
    for path in (save_raw(tmp_path / "sae.pt"), write_reference({"a": 1})):
        data = path.read_bytes()
        path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
        with pytest.raises(SaeCheckpointError, match=str(path)):
            load_sae(path)
        with pytest.raises(SaeCheckpointError, match=str(path)):
            read_torch(path)


def test_attack_beside_valid_tensors_stays_inert(tmp_path, write_reference):
    class Evil:
        def __reduce__(self):
            return (Path.mkdir, (tmp_path / "marker",))

    path = write_reference({"block_layer": -2, "evil": Evil(), "more": [Evil()]})
    loaded = load_sae(path)
    assert_same(loaded.sae, make_state())
    assert loaded.cfg["block_layer"] == -2
    json.dumps(loaded.cfg)
    assert not (tmp_path / "marker").exists()


def test_tensors_larger_than_their_file_are_refused(tmp_path):
    """One number with strides of 0; as a dense tensor it would exhaust any memory."""
    wide = {name: torch.zeros(1).expand(shape) for name, shape in (("W_enc", (4000, 9000)), ("W_dec", (9000, 4000)))}
    path = save_raw(tmp_path / "sae.pt", state_dict=wide | {"b_enc": torch.zeros(9000), "b_dec": torch.zeros(4000)})
    assert path.stat().st_size < 100_000
    with pytest.raises(SaeCheckpointError, match=r"larger than the file: found .*\(4000, 9000\)"):
        load_sae(path)


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(S, device="meta"), torch.zeros(S).to_sparse(), torch.zeros(S, dtype=torch.float8_e4m3fn),
        torch.zeros(S, dtype=torch.complex64), torch.zeros(S, dtype=torch.bool),
    ],
    ids=["meta", "sparse", "float8", "complex", "bool"],
)  # fmt: skip
def test_tensors_of_other_kinds_are_refused(tmp_path, value):
    with pytest.raises(SaeCheckpointError, match="dense floating-point tensors of 16 to 64 bits"):
        load_sae(save_raw(tmp_path / "sae.pt", state_dict=make_state(b_enc=value)))


def test_numbers_beyond_float32_are_refused(tmp_path):
    state = make_state(b_dec=torch.full((D,), 1e300, dtype=torch.float64))
    with pytest.raises(SaeCheckpointError, match="b_dec in .* NaN or infinity"):
        load_sae(save_raw(tmp_path / "sae.pt", state_dict=state))


def test_keys_that_are_not_strings_are_shown_by_type(tmp_path):
    torch.save({1 << 20000: 1, (1, 2): 2, "x" * 1000: 3}, tmp_path / "sae.pt")
    with pytest.raises(SaeCheckpointError, match=r"found \['<int>', '<tuple>', 'x{40}'\]"):
        load_sae(tmp_path / "sae.pt")


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_reading_a_file_imports_no_symbolic_mathematics(tmp_path, name):
    """Some operations on the meta device import sympy, which takes as long as torch itself."""
    save_sae(tmp_path / "sae.pt", make_sae(name, 4, 8, k=2), {})
    code = (
        "import sys; from pathlib import Path; from cytosae.formats.checkpoint import load_sae; "
        f"load_sae(Path({str(tmp_path / 'sae.pt')!r})); assert 'sympy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
