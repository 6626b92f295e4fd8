"""Autoencoders in other programs' formats: layouts, round trips, what is refused, and the verb."""

import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cytosae.formats.checkpoint import SaeCheckpointError, load_sae, save_sae
from cytosae.formats.foreign import InteropError
from cytosae.formats.reference import reference_checkpoint
from cytosae.formats.saelens import SAELENS_CONFIG, SAELENS_WEIGHTS, to_saelens, write_saelens
from cytosae.sae.registry import ARCHITECTURES, make_sae
from cytosae_pipeline.config import ExportConfig
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.export.run import run_export
from cytosae_pipeline.export.sae import export_sae

D, S, K = 6, 20, 3
CFG = {"model_name": "dinov2_vitb14", "block_layer": -2, "l1_coefficient": 8e-5, "seed": 3, "spec_hash": "ab"}


def make_random(name: str):
    """Nothing zero; thresholds above 0."""
    sae = make_sae(name, D, S, k=K, prefixes=(0.5, 1.0), bandwidth=0.5)
    generator = torch.Generator().manual_seed(0)
    for key, tensor in sae.state_dict().items():
        tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
        if key == "threshold":
            tensor.abs_()
    return sae


def assert_same(loaded, sae):
    assert type(loaded.sae) is type(sae)
    assert loaded.sae.settings == sae.settings
    for name, tensor in sae.state_dict().items():
        assert torch.equal(loaded.sae.state_dict()[name], tensor), name
    x = torch.randn(7, D)
    assert torch.equal(loaded.sae.encode(x), sae.encode(x))


# --- layouts

EXPECTED = {
    "relu": ("standard", {"W_enc", "b_enc", "W_dec", "b_dec"}),
    "topk": ("topk", {"W_enc", "b_enc", "W_dec", "b_dec"}),
    "batchtopk": ("jumprelu", {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}),
    "matryoshka": ("jumprelu", {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}),
    "jumprelu": ("jumprelu", {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}),
    "gated": ("gated", {"W_enc", "b_gate", "b_mag", "r_mag", "W_dec", "b_dec"}),
}


def test_python_has_the_same_door_for_every_format(with_sae, tmp_path):
    config = ExportConfig(root_dir=with_sae.root, sae_path=str(with_sae.sae()), out=tmp_path / "sae.safetensors")
    assert run_export(replace(config, format="safetensors")).path == tmp_path / "sae.safetensors"
    tables = run_export(replace(config, format="csv", dataset_name="toy", out=str(tmp_path / "tables")))
    assert tables.folder == tmp_path / "tables"
    with pytest.raises(UserError, match="format csv is for statistics, not for an autoencoder: use run_export"):
        export_sae(replace(config, format="csv"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_saelens_folders_have_the_documented_layout(tmp_path, name):
    sae = make_random(name)
    write_saelens(tmp_path / "out", sae, CFG)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {SAELENS_CONFIG, SAELENS_WEIGHTS}
    config = json.loads((tmp_path / "out" / SAELENS_CONFIG).read_text())
    state = load_file(tmp_path / "out" / SAELENS_WEIGHTS)
    architecture, names = EXPECTED[name]
    assert config["architecture"] == architecture
    assert (config["d_in"], config["d_sae"], config["dtype"], config["device"]) == (D, S, "float32", "cpu")
    assert config["apply_b_dec_to_input"] is True
    assert config["normalize_activations"] == config["reshape_activations"] == "none"
    assert int(config["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    assert config["metadata"]["model_name"] == "dinov2_vitb14"
    assert config.get("k") == (K if name == "topk" else None)
    assert set(state) == names
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    shapes = {"W_enc": (D, S), "W_dec": (S, D), "b_dec": (D,)}
    assert all(tuple(state[key].shape) == shapes.get(key, (S,)) for key in names)


@pytest.mark.parametrize("name", ["batchtopk", "matryoshka", "jumprelu"])
def test_thresholds_go_out_as_they_act(name):
    sae = make_random(name)
    with torch.no_grad():
        sae.threshold.view(-1)[0] = -1.0
    threshold = to_saelens(sae, CFG)[1]["threshold"]
    assert threshold.shape == (S,)
    assert torch.equal(threshold, torch.relu(sae.threshold).expand(S))


def test_the_reference_finds_its_class_and_fields(with_sae):
    with_sae.run_plain("export", "--sae_path", with_sae.sae(), "--format", "reference")
    (path,) = with_sae.root.glob("out/checkpoints/r/final_*.reference.pt")
    assert not any(name.startswith("src") for name in sys.modules if name.split(".")[0] == "src")
    with pytest.raises(pickle.UnpicklingError, match="src.sae_training.config.ViTSAERunnerConfig"):
        torch.load(path, weights_only=True)
    seen = {}

    class Unpickler(pickle.Unpickler):
        """What the reference's environment does, with a class of its own under the name."""

        def find_class(self, module, name):
            if (module, name) == ("src.sae_training.config", "ViTSAERunnerConfig"):
                return type("ViTSAERunnerConfig", (), {"__setstate__": lambda self, state: seen.update(state)})
            return super().find_class(module, name)

    module = type("Module", (), {"Unpickler": Unpickler, "load": pickle.load, "__name__": "pickle"})
    value = torch.load(path, weights_only=False, pickle_module=module)
    assert set(value["state_dict"]) == {"W_enc", "b_enc", "W_dec", "b_dec"}
    assert (seen["d_in"], seen["d_sae"], seen["expansion_factor"]) == (24, 96, 4)
    assert seen["dtype"] is torch.float32
    assert seen["block_layer"] == -2
    assert seen["l1_coefficient"] == 8e-5


# --- round trips


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["saelens", "safetensors", "reference"])
def test_every_format_comes_back_the_same(tmp_path, with_images, name, kind):
    sae, path = make_random(name), tmp_path / "sae.pt"
    save_sae(path, sae, CFG)
    arguments = ["export", "--sae_path", path, "--format", kind, "--out", tmp_path / f"out.{kind}", "--json"]
    if kind == "reference" and name != "relu":
        output = with_images.run_plain(*arguments, code=1).output
        assert f"the reference has no {name} autoencoders: use --format saelens" in output
        assert not (tmp_path / "out.reference").exists()
        return
    result = json.loads(with_images.run_plain(*arguments).stdout)
    assert (result["format"], result["architecture"], result["d_in"], result["n_latents"]) == (kind, name, D, S)
    loaded = load_sae(Path(result["path"]))
    assert_same(loaded, sae)
    assert loaded.cfg == {**CFG, "arch": name, "settings": sae.settings}
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("kind", ["saelens", "safetensors", "reference"])
def test_verbs_take_every_format(with_sae, kind):
    out = with_sae.root / {"saelens": "x.saelens", "safetensors": "x.safetensors", "reference": "x.pt"}[kind]
    with_sae.run_plain("export", "--sae_path", with_sae.sae(), "--format", kind, "--out", out)
    with_sae.run("features", "--dataset_name", "toy", "--sae_path", with_sae.sae())
    with_sae.run("features", "--dataset_name", "toy", "--sae_path", out)
    folder = with_sae.root / "out" / "feature_data" / "sae_x" / "custom" / "toy"
    name = "max_activating_image_values.pt"
    found, wanted = (torch.load(place / name, weights_only=True) for place in (folder, with_sae.features()))
    assert torch.equal(found, wanted)


def test_folders_of_other_people_are_read(tmp_path):
    sae = make_random("topk")
    write_saelens(tmp_path, sae, CFG)
    config = json.loads((tmp_path / SAELENS_CONFIG).read_text())
    config["metadata"] = {"sae_lens_version": "6.30.0"}
    (tmp_path / SAELENS_CONFIG).write_text(json.dumps(config))
    loaded = load_sae(tmp_path)
    assert_same(loaded, sae)
    assert loaded.cfg["saelens"] == config


# --- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalize_activations": "layer_norm"}, "normalize_activations 'layer_norm', not 'none'"),
        ({"architecture": "transcoder"}, "architecture 'transcoder'; known are standard, topk, jumprelu, gated"),
        ({"architecture": ["topk"]}, "architecture \\['topk'\\]"),
        ({"metadata": None, "k": 10**9}, "k must be a whole number"),
        ({"metadata": {"cytosae_cache": {"arch": "topk", "settings": 3}}}, "k must be a whole number"),
    ],
)
def test_configs_that_cannot_be_used_are_explained(tmp_path, change, message):
    write_saelens(tmp_path, make_random("topk"), CFG)
    config = json.loads((tmp_path / SAELENS_CONFIG).read_text())
    (tmp_path / SAELENS_CONFIG).write_text(json.dumps({**config, **change}))
    with pytest.raises(SaeCheckpointError, match=message):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "topk",
            {"k": 4},
            "k 4, but metadata.cytosae_cache.settings.k 3. Correct the wrong one, or delete metadata",
        ),
        (
            "topk",
            {"architecture": "standard"},
            "architecture standard, but .*arch topk, which is exported as topk. Cor",
        ),
        ("batchtopk", {"architecture": "standard"}, "standard, but .*arch batchtopk, which is exported as jumprelu"),
        ("relu", {"activation_fn": "topk", "activation_fn_kwargs": {"k": 3}}, "architecture topk, but .*arch relu"),
    ],
)
def test_a_config_that_contradicts_our_metadata_is_refused(tmp_path, name, change, message):
    write_saelens(tmp_path, make_random(name), CFG)
    config = json.loads((tmp_path / SAELENS_CONFIG).read_text())
    (tmp_path / SAELENS_CONFIG).write_text(json.dumps({**config, **change}))
    with pytest.raises(SaeCheckpointError, match=f"cfg.json has.* {message}"):
        load_sae(tmp_path)


@pytest.mark.parametrize("encode", [lambda text: b"\xef\xbb\xbf" + text.encode(), lambda text: text.encode("utf-16")])
def test_configs_that_an_editor_saved_are_read(tmp_path, encode):
    sae = make_random("topk")
    write_saelens(tmp_path, sae, CFG)
    text = (tmp_path / SAELENS_CONFIG).read_text().replace('"k": 3', '"k": 3.0')
    (tmp_path / SAELENS_CONFIG).write_bytes(encode(text))
    assert_same(load_sae(tmp_path), sae)


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, '{"architecture": NaN}'])
def test_broken_configs_are_one_message(tmp_path, text):
    write_saelens(tmp_path, make_random("relu"), CFG)
    (tmp_path / SAELENS_CONFIG).write_text(text)
    with pytest.raises(SaeCheckpointError, match="cfg.json"):
        load_sae(tmp_path)


def test_configs_of_any_length_are_not_read(tmp_path):
    write_saelens(tmp_path, make_random("relu"), CFG)
    with (tmp_path / SAELENS_CONFIG).open("ab") as file:
        file.truncate(1 << 23)
    with pytest.raises(SaeCheckpointError, match="more than 4,194,304 bytes"):
        load_sae(tmp_path)


def test_weights_that_are_damaged_missing_or_no_numbers_are_explained(tmp_path):
    write_saelens(tmp_path, make_random("relu"), CFG)
    weights = tmp_path / SAELENS_WEIGHTS
    data = weights.read_bytes()
    state = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    for broken in (data[:100], data[:-4], b"\xff" * 8 + data[8:], b""):
        weights.write_bytes(broken)
        with pytest.raises(SaeCheckpointError, match="sae_weights.safetensors cannot be read"):
            load_sae(tmp_path)
    save_file({**state, "W_enc": state["W_enc"] * float("nan")}, weights)
    with pytest.raises(SaeCheckpointError, match="W_enc in .* contain NaN or infinity"):
        load_sae(tmp_path)
    save_file({name: tensor for name, tensor in state.items() if name != "b_dec"}, weights)
    with pytest.raises(SaeCheckpointError, match="must contain W_enc, b_enc, W_dec, b_dec, found"):
        load_sae(tmp_path)
    weights.unlink()
    with pytest.raises(SaeCheckpointError, match="cannot be read"):
        load_sae(tmp_path)


def test_several_thresholds_are_no_batchtopk(tmp_path):
    write_saelens(tmp_path, make_random("batchtopk"), CFG)
    state = {name: tensor.clone() for name, tensor in load_file(tmp_path / SAELENS_WEIGHTS).items()}
    save_file({**state, "threshold": torch.arange(float(S))}, tmp_path / SAELENS_WEIGHTS)
    with pytest.raises(SaeCheckpointError, match="batchtopk has one threshold for all latents, found several"):
        load_sae(tmp_path)


def test_tensors_of_others_have_no_config(tmp_path):
    save_file({"W_enc": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(SaeCheckpointError, match=r"its tensors are those of no known autoencoder: found \['W_enc'\]"):
        load_sae(tmp_path / "x.safetensors")
    save_file({"W_enc": torch.ones(2, 2)}, tmp_path / "y.safetensors", metadata={"cytosae_cache": "{"})
    with pytest.raises(SaeCheckpointError, match="the config in the metadata of y.safetensors cannot be read"):
        load_sae(tmp_path / "y.safetensors")


def test_only_relu_has_a_place_in_the_reference():
    with pytest.raises(InteropError, match="the reference has no gated autoencoders"):
        reference_checkpoint(make_random("gated"), CFG)


@pytest.mark.parametrize("kind", ["saelens", "safetensors", "reference"])
def test_a_failed_write_leaves_nothing(with_sae, monkeypatch, kind):
    def fail(number):
        raise OSError("full")

    out = with_sae.root / {"saelens": "x.saelens", "safetensors": "x.safetensors", "reference": "x.pt"}[kind]
    monkeypatch.setattr("cytosae_cache.storage.atomic.os.fsync", fail)
    arguments = ["export", "--sae_path", with_sae.sae(), "--format", kind, "--out", out]
    assert "full" in with_sae.run_plain(*arguments, code=1).output
    assert not [path for path in with_sae.root.glob("x.*") if path.is_file()]
    assert not list(with_sae.root.glob("x.*/*"))


def test_other_files_of_a_saelens_folder_stay(with_sae):
    out = with_sae.root / "x.saelens"
    arguments = ["export", "--sae_path", with_sae.sae(), "--out", out]
    with_sae.run_plain(*arguments)
    (out / "README.md").write_text("mine")
    with_sae.run_plain(*arguments, "--overwrite")
    assert (out / "README.md").read_text() == "mine"


# --- the verb


def test_the_verb_names_what_it_wrote_and_replaces_only_with_overwrite(with_sae):
    output = with_sae.run_plain("export", "--sae_path", with_sae.sae()).output
    out = with_sae.sae().with_name(with_sae.sae().stem + ".saelens")
    assert f"wrote relu autoencoder 24 -> 96 as saelens: {out}" in output
    assert f"SAE.load_from_disk('{out}')" in output
    assert (
        "Give another --out, or --overwrite"
        in with_sae.run_plain("export", "--sae_path", with_sae.sae(), code=1).output
    )
    with_sae.run_plain("export", "--sae_path", with_sae.sae(), "--overwrite")
    more = ["--format", "safetensors", "--overwrite", "--out"]
    output = with_sae.run_plain("export", "--sae_path", with_sae.sae(), *more, out, code=1).output
    assert "must end in .safetensors" in output
    file = with_sae.root / "file.pt"
    file.write_text("mine")
    arguments = ["export", "--sae_path", with_sae.sae(), "--overwrite", "--out", file]
    assert "is not what --format saelens writes" in with_sae.run_plain(*arguments, code=1).output
    assert file.read_text() == "mine"
    assert "name the autoencoder" in with_sae.run_plain("export", code=1).output
    assert "no autoencoder at" in with_sae.run_plain("export", "--sae_path", "nothing.pt", code=1).output


# --- autoencoders of other programs


def test_verbs_take_what_the_user_states(with_store):
    path = with_store.root / "plain.pt"
    torch.save(make_sae("relu", 24, 96).state_dict(), path)
    arguments = ["features", "--dataset_name", "toy", "--sae_path", path]
    output = with_store.run(*arguments, code=1).output
    assert (
        "do not contain the activation function. State it with --sae_arch relu or --sae_arch topk --sae_k K" in output
    )
    assert "sae_k needs sae_arch" in with_store.run(*arguments, "--sae_k", 3, code=2).output
    record = with_store.root / "out" / "feature_data" / "sae_plain" / "custom" / "toy" / "features.json"
    digests = set()
    for k in (3, 4):
        with_store.run(*arguments, "--sae_arch", "topk", "--sae_k", k, "--replace_foreign")
        digests.add(json.loads(record.read_text())["sae_sha256"])
    assert len(digests) == 2


def test_an_autoencoder_without_activation_becomes_one_with_it(with_images, tmp_path):
    torch.save({f"module.{name}": value for name, value in make_random("relu").state_dict().items()}, tmp_path / "a.pt")
    arguments = ["export", "--sae_path", tmp_path / "a.pt", "--format", "safetensors"]
    with_images.run_plain(*arguments, "--sae_arch", "topk", "--sae_k", 3)
    assert load_sae(tmp_path / "a.safetensors").sae.settings == {"k": 3}


def test_folders_with_a_dot_in_their_names_are_kept_apart(with_images, tmp_path):
    for number in (5, 6):
        folder = tmp_path / f"layers.{number}"
        folder.mkdir()
        state = make_random("topk").state_dict()
        tensors = {"encoder.weight": state["W_enc"].T.contiguous(), "encoder.bias": state["b_enc"]}
        save_file({**tensors, "W_dec": state["W_dec"], "b_dec": state["b_dec"]}, folder / "sae.safetensors")
        (folder / "cfg.json").write_text(json.dumps({"k": number, "d_in": D}))
        with_images.run_plain("export", "--sae_path", folder, "--format", "safetensors")
    assert load_sae(tmp_path / "layers.5.safetensors").sae.settings == {"k": 5}
    assert load_sae(tmp_path / "layers.6.safetensors").sae.settings == {"k": 6}


@pytest.mark.parametrize(
    ("cfg", "name"),
    [({"block_layer": -2}, "blocks.-2.hook_resid_post"), ({"block_layer": -2, "spec": {"imported": "x"}}, "imported")],
)
def test_exports_name_the_place_of_the_activations(cfg, name):
    assert to_saelens(make_sae("relu", 4, 8), cfg)[0]["metadata"]["hook_name"] == name
