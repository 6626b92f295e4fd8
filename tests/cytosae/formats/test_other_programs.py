"""Autoencoders of other programs: the numbers of their formulas, what must be stated, and what is refused.

The formulas are written out here; `scripts/check_saelens.py` and `scripts/check_other_programs.py` compare with the
programs themselves.
"""

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cytosae.formats.checkpoint import SaeCheckpointError, digest_sae, load_sae, save_sae
from cytosae.formats.foreign import Activation
from cytosae.formats.tensor_file import write_safetensors
from cytosae.sae.registry import make_sae

D, S, K = 6, 20, 3
GENERATOR = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(shape, generator=GENERATOR)


X = draw(50, D)


@pytest.fixture(autouse=True)
def _same_numbers_in_any_order():
    GENERATOR.manual_seed(1)


def write_folder(folder: Path, names, config, tensors) -> Path:
    folder.mkdir(exist_ok=True)
    if config is not None:
        (folder / names[1]).write_text(json.dumps(config))
    if names[0].endswith(".pt"):
        torch.save(OrderedDict(tensors), folder / names[0])
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / names[0])
    return folder


def write_saelens(folder, config, tensors):
    return write_folder(folder, ("sae_weights.safetensors", "cfg.json"), config, tensors)


def write_sparsify(folder, config, tensors):
    return write_folder(folder, ("sae.safetensors", "cfg.json"), config, tensors)


def write_dictionary(folder, config, tensors):
    return write_folder(folder, ("ae.pt", "config.json"), config, tensors)


def keep_k(pre, k=K):
    """The k largest of every row, those below 0 as 0."""
    values, at = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, at, values.relu())


def assert_computes(path, acts, rebuilt, architecture, activation=None):
    sae = load_sae(path, activation=activation).sae
    assert sae.architecture == architecture
    found = sae.encode(X)
    assert (found - acts).abs().max() <= 1e-6 * acts.abs().max()
    assert (sae.decode(found) - rebuilt).abs().max() <= 1e-6 * rebuilt.abs().max()
    encoder = load_sae(path, activation=activation, encoder_only=True).sae
    assert torch.equal(encoder.encode(X), found)
    assert not encoder.W_dec.numel()


# --- SAELens

SAELENS = {"d_in": D, "d_sae": S, "dtype": "float32", "normalize_activations": "none"}


def make_common(**more):
    return {"W_enc": draw(D, S), "b_enc": draw(S), "W_dec": draw(S, D), "b_dec": draw(D), **more}


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        ({}, "relu"),
        ({"activation_fn": "relu", "normalize_activations": False}, "relu"),
        ({"activation_fn_str": "relu", "activation_fn_kwargs": {}}, "relu"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}, "topk"),
        ({"architecture": "standard", "activation_fn": "topk", "activation_fn_kwargs": {"k": K}}, "topk"),
        ({"architecture": "topk", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}, "topk"),
        ({"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": False}, "topk"),
        ({"architecture": "jumprelu", "activation_fn_str": "relu"}, "jumprelu"),
        ({"architecture": "gated"}, "gated"),
    ],
)
def test_saelens_of_every_version(tmp_path, config, architecture, centred):
    t = make_common()
    x = X - t["b_dec"] if centred else X
    pre = x @ t["W_enc"] + t["b_enc"]
    acts = pre.relu()
    if architecture == "topk":
        acts = keep_k(pre)
    elif architecture == "jumprelu":
        t["threshold"] = draw(S).abs()
        acts = acts * (pre > t["threshold"])
    elif architecture == "gated":
        t |= {"b_gate": t.pop("b_enc"), "b_mag": draw(S), "r_mag": draw(S)}
        acts = (x @ (t["W_enc"] * t["r_mag"].exp()) + t["b_mag"]).relu() * (x @ t["W_enc"] + t["b_gate"] > 0)
    # The default is to subtract it.
    config = {**SAELENS, **config, **({} if centred else {"apply_b_dec_to_input": False})}
    folder = write_saelens(tmp_path / "sae", config, t)
    assert_computes(folder, acts, acts @ t["W_dec"] + t["b_dec"], architecture)
    assert load_sae(folder / "sae_weights.safetensors").cfg["saelens"] == config


@pytest.mark.parametrize("entry", [{}, {"finetuning_scaling_factor": True}])
@pytest.mark.parametrize("name", ["scaling_factor", "finetuning_scaling_factor"])
def test_the_factor_of_saelens_is_part_of_the_decoder(tmp_path, entry, name):
    t = make_common(**{name: 1 + draw(S).abs()})
    acts = ((X - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
    folder = write_saelens(tmp_path / "sae", {**SAELENS, "activation_fn": "relu", **entry}, t)
    assert_computes(folder, acts, (acts * t[name]) @ t["W_dec"] + t["b_dec"], "relu")


def test_a_factor_of_1_needs_no_permission(tmp_path):
    config = {**SAELENS, "finetuning_scaling_factor": False}
    load_sae(write_saelens(tmp_path / "one", config, make_common(scaling_factor=torch.ones(S))))
    with pytest.raises(SaeCheckpointError, match="scaling_factor is not 1, but cfg.json has finetuning_scaling_fac"):
        load_sae(write_saelens(tmp_path / "two", config, make_common(scaling_factor=torch.full((S,), 2.0))))


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka_batchtopk"])
def test_saelens_rescales_by_the_norms_of_the_decoder(tmp_path, architecture):
    t = make_common()
    norms = t["W_dec"].norm(dim=1)
    pre = ((X - t["b_dec"]) @ t["W_enc"] + t["b_enc"]) * norms
    acts = keep_k(pre)
    if architecture != "topk":
        t["topk_threshold"] = torch.tensor(1.5, dtype=torch.float64)
        acts = pre.relu() * (pre > 1.5)
    config = {**SAELENS, "architecture": architecture, "k": K, "rescale_acts_by_decoder_norm": True}
    folder = write_saelens(tmp_path / "sae", config, t)
    rebuilt = (acts / norms) @ t["W_dec"] + t["b_dec"]
    assert_computes(folder, acts, rebuilt, "topk" if architecture == "topk" else "jumprelu")


def test_saelens_saves_one_kind_of_thresholds(tmp_path):
    t = make_common(log_threshold=draw(S), threshold=draw(S))
    with pytest.raises(SaeCheckpointError, match="contain both threshold and log_threshold"):
        load_sae(write_saelens(tmp_path / "sae", {**SAELENS, "architecture": "jumprelu"}, t))


def test_saelens_trains_the_logarithm_of_thresholds(tmp_path):
    t = make_common(log_threshold=draw(S))
    pre = (X - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    acts = pre.relu() * (pre > t["log_threshold"].exp())
    folder = write_saelens(tmp_path / "sae", {**SAELENS, "architecture": "jumprelu"}, t)
    assert_computes(folder, acts, acts @ t["W_dec"] + t["b_dec"], "jumprelu")


def test_a_legacy_checkpoint_with_its_config(tmp_path):
    t = make_common(scaling_factor=1 + draw(S).abs())
    acts = (X @ t["W_enc"] + t["b_enc"]).relu()
    config = {**SAELENS, "activation_fn": "relu", "apply_b_dec_to_input": False}
    torch.save({"cfg": config, "state_dict": t}, tmp_path / "sae.pt")
    assert_computes(tmp_path / "sae.pt", acts, (acts * t["scaling_factor"]) @ t["W_dec"] + t["b_dec"], "relu")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"normalize_activations": True}, "normalize_activations 'expected_average_only_in', not 'none': the scale of"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations 'layer_norm', not 'none': it rescales every"),
        ({"normalize_activations": "constant_norm_rescale"}, "'constant_norm_rescale', not 'none'"),
        ({"normalize_activations": "covariance_whitening"}, "'covariance_whitening', not 'none'"),
        ({"activation_fn_str": "tanh-relu"}, "activation_fn_str 'tanh-relu' .* supported is relu or topk"),
        ({"activation_fn": "identity"}, "activation_fn 'identity' and architecture 'standard'"),
        ({"activation_fn": "relu", "activation_fn_str": "topk"}, "activation_fn 'relu'"),
        ({"architecture": "topk", "activation_fn_str": "relu"}, "'relu' and architecture 'topk'; supported is topk"),
        ({"architecture": "gated", "activation_fn_str": "topk"}, "'topk' and architecture 'gated'; supported is relu"),
        ({"activation_fn": "topk", "activation_fn_kwargs": {"k": 3, "postact_fn": "x"}}, "only k is supported"),
        ({"activation_fn": "topk"}, "k must be a whole number from 1 to the 20 latents, found None"),
        ({"activation_fn": "topk", "activation_fn_kwargs": {"k": 21}}, "k must be a whole number .* found 21"),
        ({"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm True, which architecture standard does"),
        ({"rescale_acts_by_decoder_norm": "yes"}, "'yes'; expected true or false"),
        ({"apply_b_dec_to_input": 0.5}, "apply_b_dec_to_input 0.5; expected true or false"),
        ({"reshape_activations": "hook_z"}, "reshape_activations 'hook_z'; only 'none'"),
        ({"hook_name": "blocks.1.attn.hook_z"}, "reshape_activations 'hook_z'; only 'none'"),
        ({"d_sae": S + 1}, r"cfg.json has d_sae 21, but the tensors have 20"),
        ({"d_in": D + 1, "d_sae": None}, r"cfg.json has d_in 7, but the tensors have 6"),
        ({"d_in": "6"}, r"cfg.json: d_in must be a whole number above 0, found '6'"),
        ({"architecture": "topk", "k": True}, "cfg.json: k must be a whole number from 1 to the 20 latents, found Tr"),
        ({"architecture": "topk", "k": "3"}, "cfg.json: k must be a whole number from 1 to the 20 latents, found '3'"),
        ({"architecture": "topk", "k": 2.5}, "cfg.json: k must be a whole number .* found 2.5"),
        ({"architecture": "topk", "k": float("nan")}, "cfg.json: k must be a whole number .* found 'NaN'"),
        ({"architecture": "topk", "k": 10**400}, "cfg.json: k must be a whole number .* found 10{30,80}…$"),
        ({"architecture": "topk", "k": 3, "activation_fn_kwargs": {"k": 5}}, "has k 3 and activation_fn_kwargs.k 5: c"),
        ({"activation_fn_kwargs": []}, r"activation_fn_kwargs \[\]; only k is supported"),
        ({"normalize_activations": 0}, "normalize_activations 0, not 'none'"),
        ({"metadata": {"cytosae_cache": 1}}, "metadata.cytosae_cache 1; expected an object"),
        ({"architecture": "skip_transcoder"}, "architecture 'skip_transcoder'; known are standard, topk, jumprelu"),
        ({"architecture": "batchtopk"}, "a training checkpoint needs topk_threshold"),
    ],
)  # fmt: skip
def test_what_saelens_can_do_and_we_cannot_is_refused_by_name(tmp_path, config, message):
    with pytest.raises(SaeCheckpointError, match=message):
        load_sae(write_saelens(tmp_path / "sae", {**SAELENS, **config}, make_common()))


# --- dictionary_learning


def make_linear(**more):
    return {"encoder.weight": draw(S, D), "encoder.bias": draw(S), "decoder.weight": draw(D, S), **more}


def dictionary_config(name, **more):
    return {"trainer": {"dict_class": name, **more}, "buffer": {}}


def pre_of(t, centre=None):
    return (X if centre is None else X - centre) @ t["encoder.weight"].T + t.get("encoder.bias", 0)


def test_dictionary_learning_relu_has_a_normalised_decoder(tmp_path):
    t = make_linear(bias=draw(D))
    norms = t["decoder.weight"].norm(dim=0)
    acts = pre_of(t, t["bias"]).relu()
    rebuilt = acts @ t["decoder.weight"].T + t["bias"]
    folder = write_dictionary(tmp_path / "a", dictionary_config("AutoEncoder"), t)
    assert_computes(folder, acts * norms, rebuilt, "relu")
    torch.testing.assert_close(load_sae(folder).sae.W_dec.norm(dim=1), torch.ones(S))
    alone = write_dictionary(tmp_path / "b", None, t) / "ae.pt"
    assert_computes(alone, acts * norms, rebuilt, "relu", Activation("relu"))


@pytest.mark.parametrize("stated", [None, Activation("relu")])
def test_dictionary_learning_new_does_not_centre(tmp_path, stated):
    t = make_linear(**{"decoder.bias": draw(D)})
    acts = pre_of(t).relu()
    config = dictionary_config("AutoEncoderNew") if stated is None else None
    folder = write_dictionary(tmp_path / "sae", config, t)
    assert_computes(folder, acts, acts @ t["decoder.weight"].T + t["decoder.bias"], "relu", stated)


def test_dictionary_learning_jumprelu_does_not_centre(tmp_path):
    t = make_common(threshold=draw(S).abs())
    pre = X @ t["W_enc"] + t["b_enc"]
    acts = pre.relu() * (pre > t["threshold"])
    folder = write_dictionary(tmp_path / "sae", dictionary_config("JumpReluAutoEncoder"), t)
    assert_computes(folder, acts, acts @ t["W_dec"] + t["b_dec"], "jumprelu")


@pytest.mark.parametrize("config", [dictionary_config("GatedAutoEncoder"), None])
def test_dictionary_learning_gated(tmp_path, config):
    t = make_linear(decoder_bias=draw(D), r_mag=draw(S), gate_bias=draw(S), mag_bias=draw(S))
    del t["encoder.bias"]
    pre = pre_of(t, t["decoder_bias"])
    acts = (pre * t["r_mag"].exp() + t["mag_bias"]).relu() * (pre + t["gate_bias"] > 0)
    folder = write_dictionary(tmp_path / "sae", config, t)
    assert_computes(folder, acts, acts @ t["decoder.weight"].T + t["decoder_bias"], "gated")


@pytest.mark.parametrize("name", ["AutoEncoderTopK", "BatchTopKSAE"])
def test_dictionary_learning_topk_and_batchtopk_differ_only_in_the_config(tmp_path, name):
    t = make_linear(b_dec=draw(D), k=torch.tensor(K, dtype=torch.int32), threshold=torch.tensor(0.75))
    pre = pre_of(t, t["b_dec"])
    acts = keep_k(pre) if name == "AutoEncoderTopK" else pre.relu() * (pre > 0.75)
    architecture = "topk" if name == "AutoEncoderTopK" else "batchtopk"
    rebuilt = acts @ t["decoder.weight"].T + t["b_dec"]
    folder = write_dictionary(tmp_path / "a", dictionary_config(name, k=K), t)
    assert_computes(folder, acts, rebuilt, architecture)
    assert load_sae(folder).sae.settings == {"k": K}
    alone = write_dictionary(tmp_path / "b", None, t) / "ae.pt"
    with pytest.raises(SaeCheckpointError) as caught:
        load_sae(alone)
    assert str(caught.value) == (
        f"'{alone}' cannot be used: its tensors are those of dictionary_learning's AutoEncoderTopK and BatchTopKSAE, "
        "which do not contain the activation function. Put its config.json beside it, or state it with --sae_arch topk "
        "or --sae_arch batchtopk"
    )
    assert_computes(alone, acts, rebuilt, architecture, Activation(architecture))


def test_dictionary_learning_keeps_intermediate_ones_below_the_config(tmp_path):
    t = make_linear(b_dec=draw(D), k=torch.tensor(K))
    folder = write_dictionary(tmp_path / "trainer_0", dictionary_config("AutoEncoderTopK"), t)
    (folder / "checkpoints").mkdir()
    torch.save(t, folder / "checkpoints" / "ae_100.pt")
    assert load_sae(folder / "checkpoints" / "ae_100.pt").sae.architecture == "topk"


def test_dictionary_learning_matryoshka(tmp_path):
    t = make_common(k=torch.tensor(K), threshold=torch.tensor(0.5), group_sizes=torch.tensor([5, S - 5]))
    pre = (X - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    acts = pre.relu() * (pre > 0.5)
    folder = write_dictionary(tmp_path / "sae", None, t)
    assert_computes(folder, acts, acts @ t["W_dec"] + t["b_dec"], "batchtopk")


def test_a_threshold_that_was_never_set_is_not_taken_for_0(tmp_path):
    t = make_linear(b_dec=draw(D), k=torch.tensor(K), threshold=torch.tensor(-1.0))
    folder = write_dictionary(tmp_path / "sae", dictionary_config("BatchTopKSAE", k=K), t)
    with pytest.raises(
        SaeCheckpointError, match="BatchTopKSAE whose threshold was never set.* batchtopk --sae_thresho"
    ):
        load_sae(folder)
    pre = pre_of(t, t["b_dec"])
    for stated, acts in (
        (Activation("batchtopk", threshold=0.25), pre.relu() * (pre > 0.25)), (Activation("topk"), keep_k(pre)),
    ):  # fmt: skip
        assert_computes(folder, acts, acts @ t["decoder.weight"].T + t["b_dec"], stated.architecture, stated)


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        (dictionary_config("CrossCoder"), make_linear(), "dict_class 'CrossCoder'; known are AutoEncoder, "),
        (dictionary_config("AutoEncoder"), make_linear(b_dec=draw(D)), "AutoEncoder, which saves encoder.weight, .*"),
        (dictionary_config("AutoEncoderTopK", k=4), make_linear(b_dec=draw(D), k=torch.tensor(K)), "k 3, but .* k 4"),
        (dictionary_config("AutoEncoderTopK"), make_linear(b_dec=draw(D)), "k must be a whole number .* found None"),
        (dictionary_config("AutoEncoderTopK", k=True), make_linear(b_dec=draw(D)), "json: k must be .* found True"),
        (dictionary_config("AutoEncoder", dict_size=5), make_linear(bias=draw(D)), "dict_size 5, but the tens"),
        (dictionary_config("AutoEncoderTopK"), make_linear(b_dec=draw(D), k=draw(2)), "tensor k must be one whole num"),
        (None, make_linear(bias=draw(D)), "dictionary_learning's AutoEncoder, .* or state it with --sae_arch relu$"),
        (None, make_common(threshold=draw(S)), "If dictionary_learning wrote them, put its config.json beside"),
    ],
)  # fmt: skip
def test_what_dictionary_learning_leaves_open_is_refused(tmp_path, config, tensors, message):
    with pytest.raises(SaeCheckpointError, match=message):
        load_sae(write_dictionary(tmp_path / "sae", config, tensors))


# --- sparsify


def make_coder(**more):
    return {"encoder.weight": draw(S, D), "encoder.bias": draw(S), "W_dec": draw(S, D), "b_dec": draw(D), **more}


@pytest.mark.parametrize("config", [{"activation": "topk", "multi_topk": True, "signed": False}, {}])
def test_sparsify(tmp_path, config):
    t = make_coder()
    acts = keep_k((X - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"])
    folder = write_sparsify(tmp_path / "layers.5", {"d_in": D, "k": K, "normalize_decoder": True, **config}, t)
    assert_computes(folder, acts, acts @ t["W_dec"] + t["b_dec"], "topk")
    alone = write_sparsify(tmp_path / "b", None, t)
    with pytest.raises(
        SaeCheckpointError, match="Put its cfg.json beside it, or state it with --sae_arch topk --sae_k K"
    ):
        load_sae(alone)
    assert_computes(alone, acts, acts @ t["W_dec"] + t["b_dec"], "topk", Activation("topk", K))


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"activation": "groupmax"}, {}, "activation 'groupmax'; only 'topk' is supported"),
        ({"transcode": True}, {}, "transcode True, which no architecture here has"),
        ({"skip_connection": True}, {}, "skip_connection True"),
        ({"signed": True}, {}, "signed True"),
        ({"batch_topk": True}, {}, "batch_topk True"),
        ({"d_in": 7}, {}, "cfg.json has d_in 7, but the tensors have 6"),
        ({"k": 99}, {}, "k must be a whole number from 1 to the 20 latents, found 99"),
        ({"k": None}, {}, "cfg.json: k must be a whole number from 1 to the 20 latents, found None"),
        ({"num_latents": 21}, {}, "cfg.json has num_latents 21, but the tensors have 20"),
        ({"expansion_factor": 4}, {}, "cfg.json has expansion_factor 4, but the tensors have 3"),
        ({}, {"W_skip": draw(D, D)}, "it has a skip connection, W_skip"),
        ({}, {"more": draw(1)}, "sparsify saves W_dec, b_dec, encoder.bias, encoder.weight, found"),
        ([], {}, "cfg.json must contain an object, found list"),
    ],
)  # fmt: skip
def test_what_sparsify_can_do_and_we_cannot_is_refused_by_name(tmp_path, config, tensors, message):
    config = {"d_in": D, "k": K, **config} if isinstance(config, dict) else config
    with pytest.raises(SaeCheckpointError, match=message):
        load_sae(write_sparsify(tmp_path / "sae", config, make_coder(**tensors)))


# --- overcomplete


def unit(tensor):
    return tensor / tensor.norm(dim=1, keepdim=True)


def make_overcomplete(**more):
    return {
        "encoder.final_block.0.weight": draw(S, D), "encoder.final_block.0.bias": draw(S),
        "dictionary._weights": unit(draw(S, D)), "dictionary.multiplier": torch.tensor(0.3), **more,
    }  # fmt: skip


def save(path, value):
    torch.save(value, path)
    return path


@pytest.mark.parametrize("drift", [0.0, 0.02])
def test_overcomplete(tmp_path, drift):
    t = make_overcomplete()
    dictionary = t["dictionary._weights"] * torch.tensor(0.3).exp()
    t["dictionary._weights"] = t["dictionary._weights"] * (1 + drift)
    pre = X @ t["encoder.final_block.0.weight"].T + t["encoder.final_block.0.bias"]
    path = save(tmp_path / "sae.pt", t)
    with pytest.raises(
        SaeCheckpointError, match="--sae_arch relu or --sae_arch topk --sae_k K or --sae_arch batchtopk"
    ):
        load_sae(path)
    for stated, acts, architecture in (
        (Activation("relu"), pre.relu(), "relu"),
        (Activation("topk", K), keep_k(pre), "topk"),
        (Activation("batchtopk", threshold=0.5), pre * (pre > 0.5), "jumprelu"),
    ):
        assert_computes(path, acts, acts @ dictionary, architecture, stated)
    t["thresholds"] = draw(S)
    acts = pre.relu() * (pre.relu() >= t["thresholds"].exp())
    assert_computes(save(path, t), acts, acts @ dictionary, "jumprelu")


def test_a_value_at_the_threshold_of_overcomplete_is_active(tmp_path):
    t = make_overcomplete(thresholds=torch.zeros(S))
    t["encoder.final_block.0.weight"].zero_()
    t["encoder.final_block.0.bias"].fill_(1)
    assert (load_sae(save(tmp_path / "sae.pt", t)).sae.encode(X) == 1).all()


def test_batch_normalisation_is_folded(tmp_path):
    place = "encoder.final_block.1."
    norm = {"weight": draw(S), "bias": draw(S), "running_mean": draw(S), "running_var": draw(S).abs() + 0.1}
    t = make_overcomplete(**{f"{place}{name}": tensor for name, tensor in norm.items()})
    t[f"{place}num_batches_tracked"] = torch.tensor(7)
    pre = X @ t["encoder.final_block.0.weight"].T + t["encoder.final_block.0.bias"]
    mean, variance = norm["running_mean"], norm["running_var"]
    acts = torch.nn.functional.batch_norm(pre, mean, variance, norm["weight"], norm["bias"]).relu()
    rebuilt = acts @ t["dictionary._weights"] * torch.tensor(0.3).exp()
    assert_computes(save(tmp_path / "sae.pt", t), acts, rebuilt, "relu", Activation("relu"))


def test_a_tied_encoder_and_archetypes(tmp_path):
    shares = torch.rand(S, 4, generator=GENERATOR)
    t = {
        "dictionary.W": shares / shares.sum(dim=1, keepdim=True), "dictionary.C": draw(4, D),
        "dictionary.Relax": draw(S, D), "dictionary.multiplier": torch.tensor(-0.2), "encoder.bias": draw(S),
    }  # fmt: skip
    tied = {name.replace("dictionary", "encoder.tied_to"): value for name, value in t.items() if "dictionary" in name}
    dictionary = (t["dictionary.W"] @ t["dictionary.C"] + t["dictionary.Relax"]) * torch.tensor(-0.2).exp()
    acts = (X @ dictionary.T + t["encoder.bias"]).relu()
    assert_computes(save(tmp_path / "sae.pt", t | tied), acts, acts @ dictionary, "relu", Activation("relu"))
    with pytest.raises(SaeCheckpointError, match="it has no encoder"):
        load_sae(save(tmp_path / "sae.pt", t), activation=Activation("relu"))
    with pytest.raises(SaeCheckpointError, match=r"are not shares that add up to 1: call sae.eval\(\)"):
        load_sae(save(tmp_path / "sae.pt", t | {"dictionary.W": shares}), activation=Activation("relu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dictionary._weights": draw(S, D)}, r"norms from .* to .*, not 1.* only 'l2' is supported. .*sae.eval\(\)"),
        ({"dictionary._weights": draw(S)}, "must have two dimensions"),
        ({"encoder.final_block.1.weight": draw(S), "encoder.final_block.1.bias": draw(S)}, "layer normalisation"),
        ({"encoder.mlp_blocks.0.0.weight": draw(D, D)}, r"only linear encoders are read, found \['encoder.mlp_blocks"),
        ({"Q": draw(4)}, r"only linear encoders are read, found \['Q'\]"),
        ({"encoder.final_block.0.bias": draw(S + 1)}, r"tensor bias has shape \(21,\), expected \(20,\)"),
        ({"thresholds": draw(2)}, r"tensor thresholds has shape \(2,\)"),
        ({"dictionary.multiplier": draw(2)}, "dictionary.multiplier must be one number"),
    ],
)  # fmt: skip
def test_what_overcomplete_can_do_and_we_cannot_is_refused_by_name(tmp_path, change, message):
    path = save(tmp_path / "sae.pt", make_overcomplete(**change))
    with pytest.raises(SaeCheckpointError, match=message):
        load_sae(path, activation=Activation("relu"))


# --- plain state dicts, prefixes, and what a user states


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "sae."])
def test_plain_state_dicts(tmp_path, wrapper, prefix):
    t = make_common()
    pre = (X - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    value = {f"{prefix}{name}": tensor for name, tensor in t.items()}
    path = save(tmp_path / "sae.pt", value if wrapper is None else {wrapper: value, "epoch": 3})
    with pytest.raises(SaeCheckpointError, match="a plain state dict, which do not contain the activation function"):
        load_sae(path)
    for stated, acts in (
        (Activation("relu"), pre.relu()), (Activation("topk", K), keep_k(pre)),
        (Activation("batchtopk", K, 1), pre * (pre > 1)),
    ):  # fmt: skip
        assert_computes(path, acts, acts @ t["W_dec"] + t["b_dec"], stated.architecture, stated)


def test_plain_state_dicts_with_more_tensors(tmp_path):
    t = make_common(threshold=draw(S).abs())
    pre = (X - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    acts = pre.relu() * (pre > t["threshold"])
    path = save(tmp_path / "sae.pt", t)
    assert_computes(path, acts, acts @ t["W_dec"] + t["b_dec"], "jumprelu", Activation("jumprelu"))
    gated = make_common(b_mag=draw(S), r_mag=draw(S))
    assert load_sae(save(path, gated), activation=Activation("gated")).sae.architecture == "gated"
    with pytest.raises(SaeCheckpointError, match="no architecture here has exactly its tensors"):
        load_sae(save(path, make_common(gain=draw(S))))


def test_a_parallel_prefix_in_our_own_file(tmp_path):
    t = make_common()
    path = save(tmp_path / "sae.pt", {"cfg": {}, "state_dict": {f"module.{name}": value for name, value in t.items()}})
    acts = ((X - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
    assert_computes(path, acts, acts @ t["W_dec"] + t["b_dec"], "relu")


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        (
            Activation("relu"),
            "contain its activation function, topk with k 3: omit --sae_arch, .* found --sae_arch relu",
        ),
        (Activation("topk", K + 1), "topk with k 3: omit"),
        (Activation("topk", K, 0.5), "topk with k 3: omit"),
    ],
)
def test_what_the_files_say_cannot_be_overruled(tmp_path, stated, message):
    folder = write_sparsify(tmp_path / "sae", {"k": K}, make_coder())
    assert load_sae(folder, activation=Activation("topk", K)).sae.settings == {"k": K}
    with pytest.raises(SaeCheckpointError, match=message):
        load_sae(folder, activation=stated)
    own = save(tmp_path / "own.pt", {"cfg": {"arch": "topk", "settings": {"k": K}}, "state_dict": make_common()})
    with pytest.raises(SaeCheckpointError, match=message):
        load_sae(own, activation=stated)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        (Activation("topk"), "--sae_arch topk needs --sae_k K, which its files do not contain"),
        (Activation("batchtopk", K), "--sae_arch batchtopk needs --sae_threshold T"),
        (Activation("gated"), "which can be relu or topk or batchtopk; found --sae_arch gated"),
        (Activation("topk", S + 1), "k must be a whole number from 1 to the 20 latents, found 21"),
    ],
)
def test_what_is_stated_must_be_enough_and_possible(tmp_path, stated, message):
    path = save(tmp_path / "sae.pt", make_common())
    with pytest.raises(SaeCheckpointError, match=message):
        load_sae(path, activation=stated)


def test_what_is_stated_must_agree_with_the_files(tmp_path):
    t = make_linear(b_dec=draw(D), k=torch.tensor(K), threshold=torch.tensor(0.1))
    path = save(tmp_path / "ae.pt", t)
    assert load_sae(path, activation=Activation("batchtopk", K, 0.1)).sae.threshold == torch.tensor(0.1)
    with pytest.raises(SaeCheckpointError, match="its files contain k 3, but --sae_k 4 was given: omit --sae_k"):
        load_sae(path, activation=Activation("topk", 4))
    with pytest.raises(SaeCheckpointError, match="files contain threshold 0.1.*, but --sae_threshold 0.2.* was given"):
        load_sae(path, activation=Activation("batchtopk", K, 0.2))


class Whole(torch.nn.Module):
    """Saved with its class, as old programs did."""


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Whole(), r"found a whole pickled object \(save its state_dict\(\) instead\), expected 'cfg' and 'state_dict'"),
        ({}, r"it is not an autoencoder: found \[\]"),
        ({"W": draw(2), "other": draw(2)}, r"those of no known autoencoder: found \['W', 'other'\]"),
        (make_common(W_dec=torch.zeros(1).expand(4000, 6000)), "'W_dec' of shape .* is larger than the file"),
        (make_common(b_enc=draw(S).to(torch.complex64)), "'b_enc' is not a dense tensor of whole or floating-point"),
        (make_common(b_enc=draw(S).to_sparse()), "'b_enc' is not a dense tensor"),
        (make_common(**{"\x1b[2J": draw(1)}), r"its tensors: \['\\x1b\[2J', 'W_dec', 'W_enc', 'b_dec', 'b_enc'\]"),
        (make_common(b_enc=draw(S + 1)), r"do not fit together: found .*'b_enc': \(21,\)"),
        (make_common(b_enc=torch.full((S,), torch.nan)), "b_enc in .* contain NaN or infinity"),
    ],
)  # fmt: skip
def test_strangers_files_are_one_message(tmp_path, value, message):
    path = save(tmp_path / "sae.pt", value)
    with pytest.raises(SaeCheckpointError, match=message):
        load_sae(path, activation=Activation("relu"))


def test_a_header_that_states_more_is_not_ignored(tmp_path):
    path = save(tmp_path / "saev.pt", make_common())
    path.write_bytes(b'{"schema": 2}\n' + path.read_bytes())
    with pytest.raises(SaeCheckpointError, match="begins with a JSON header, as saev writes it"):
        load_sae(path, activation=Activation("relu"))


def test_arithmetic_waits_until_the_shapes_are_checked(tmp_path):
    """Vectors that would broadcast to a matrix of any size."""
    t = make_common(scaling_factor=1 + draw(S + 1).abs())
    with pytest.raises(SaeCheckpointError, match=r"scaling_factor has shape \(21,\), expected \(20,\)"):
        load_sae(write_saelens(tmp_path / "a", {**SAELENS, "activation_fn": "relu"}, t))
    t = make_common(topk_threshold=draw(1), W_dec=draw(S + 1, D))
    with pytest.raises(SaeCheckpointError, match=r"b_enc has shape \(20,\), expected \(21,\)"):
        load_sae(write_saelens(tmp_path / "b", {**SAELENS, "architecture": "batchtopk"}, t))


def test_tensors_that_share_memory_are_folded_once(tmp_path):
    weight = draw(S, D)
    t = {"encoder.weight": weight, "encoder.bias": draw(S), "decoder.weight": weight.T, "bias": draw(D)}
    acts = pre_of(t, t["bias"]).relu()
    folder = write_dictionary(tmp_path / "sae", dictionary_config("AutoEncoder"), t)
    assert_computes(folder, acts * weight.norm(dim=1), acts @ weight + t["bias"], "relu")


def identity(path, activation=None):
    return load_sae(path, activation=activation, encoder_only=True).sae.source.sha256


def test_the_identity_covers_everything_that_decides_the_numbers(tmp_path):
    t = make_coder()
    folder = write_sparsify(tmp_path / "sae", {"k": K}, t)
    before = identity(folder)
    assert identity(folder, Activation("topk", K)) == before
    (folder / "cfg.json").write_text(json.dumps({"k": K + 1}))
    assert identity(folder) != before
    path = save(tmp_path / "sae.pt", t)
    found = {identity(path, Activation("topk", k)) for k in (1, 2)}
    t["encoder.bias"][0] += 1
    found.add(identity(save(tmp_path / "other.pt", t), Activation("topk", 1)))
    assert len(found) == 3


def test_the_identity_does_not_depend_on_the_file(tmp_path):
    sae = make_sae("topk", D, S, k=K)
    save_sae(tmp_path / "a.pt", sae, {"run_name": "a"})
    save_sae(tmp_path / "b.pt", sae, {"run_name": "b"})
    write_safetensors(tmp_path / "c.safetensors", sae, {"run_name": "a"})
    found = {identity(tmp_path / name) for name in ("a.pt", "b.pt", "c.safetensors")}
    assert found == {digest_sae(sae)}
