"""Configs of any contents are read or refused in one short message; nothing else leaves `load_sae`."""

import json

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from cytosae.formats.checkpoint import SaeCheckpointError, load_sae

D, S = 4, 6

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 8)
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["topk", "relu", "standard", "jumprelu", "gated", "none", "batchtopk", "AutoEncoderTopK", 10**400]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["k", "arch", "settings", ""]), inner),
    max_leaves=6,
)
COMMON = {
    "W_enc": torch.ones(D, S), "b_enc": torch.zeros(S), "W_dec": torch.ones(S, D), "b_dec": torch.zeros(D),
}  # fmt: skip
LINEAR = {"encoder.weight": torch.ones(S, D), "encoder.bias": torch.zeros(S), "b_dec": torch.zeros(D)}
SAELENS_KEYS = (
    "architecture", "k", "d_in", "d_sae", "dtype", "activation_fn", "activation_fn_str", "activation_fn_kwargs",
    "apply_b_dec_to_input", "normalize_activations", "reshape_activations", "hook_name", "rescale_acts_by_decoder_norm",
    "finetuning_scaling_factor", "metadata",
)  # fmt: skip
SPARSIFY_KEYS = ("k", "d_in", "num_latents", "expansion_factor", "activation", "signed", "transcode", "multi_topk")
DICTIONARY_KEYS = ("dict_class", "k", "activation_dim", "dict_size", "trainer_class")


def assert_is_read_or_refused(path):
    try:
        sae = load_sae(path).sae
    except SaeCheckpointError as error:
        text = str(error)
        assert len(text.splitlines()) <= 2, text
        assert len(text) < 800, text
        assert str(path) in text, text
        return
    assert sae.encode(torch.ones(2, D)).shape == (2, S)


def changed(keys, base):
    """A config with some keys changed and others missing."""
    some = st.dictionaries(st.sampled_from(keys), VALUES, max_size=3)
    return st.tuples(some, st.sets(st.sampled_from(keys), max_size=2)).map(
        lambda drawn: {key: value for key, value in {**base, **drawn[0]}.items() if key not in drawn[1]}
    )


fuzzed = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzzed
@given(
    changed(SAELENS_KEYS, {"architecture": "topk", "k": 3, "d_in": D, "d_sae": S}),
    st.booleans(),
    st.dictionaries(st.sampled_from(["arch", "settings", "spec"]), VALUES),
)
def test_saelens(tmp_path, config, is_ours, ours):
    if is_ours:
        config = {**config, "metadata": {"cytosae_cache": {"arch": "topk", "settings": {"k": 3}, **ours}}}
    save_file({**COMMON, "scaling_factor": torch.ones(S)}, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    assert_is_read_or_refused(tmp_path)


@fuzzed
@given(changed(SPARSIFY_KEYS, {"k": 3, "d_in": D}) | VALUES)
def test_sparsify(tmp_path, config):
    save_file({**LINEAR, "W_dec": torch.ones(S, D)}, tmp_path / "sae.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    assert_is_read_or_refused(tmp_path)


@fuzzed
@given(changed(DICTIONARY_KEYS, {"dict_class": "AutoEncoderTopK", "k": 3}).map(lambda one: {"trainer": one}) | VALUES)
@example({"trainer": {"dict_class": {"k": 1}, "k": 3}})
def test_dictionary_learning(tmp_path, config):
    torch.save({**LINEAR, "decoder.weight": torch.ones(D, S)}, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_is_read_or_refused(tmp_path)


@fuzzed
@given(changed(("arch", "settings", "block_layer", "spec"), {"arch": "topk", "settings": {"k": 3}}) | VALUES)
@example({"arch": "matryoshka", "settings": {"k": 3, "prefixes": []}})
def test_our_own_files(tmp_path, cfg):
    path = tmp_path / "sae.safetensors"
    save_file(COMMON, path, metadata={"cytosae_cache": json.dumps(cfg)})
    assert_is_read_or_refused(path)


@pytest.mark.parametrize("text", ['{"k": 1e999}', '{"k": -1e999}', '{"k": NaN}', '{"k": ' + "9" * 5000 + "}"])
def test_numbers_that_json_cannot_represent(tmp_path, text):
    save_file({**LINEAR, "W_dec": torch.ones(S, D)}, tmp_path / "sae.safetensors")
    (tmp_path / "cfg.json").write_text(text)
    with pytest.raises(SaeCheckpointError, match=r"cfg\.json"):
        load_sae(tmp_path)
