"""`evaluate`: what training printed at its end, for any autoencoder on any store, by label, and where it refuses."""

import json

import numpy as np
import pytest
import torch

from cytosae.formats.checkpoint import load, save_sae
from cytosae.sae.registry import make_sae
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.config import EvaluateConfig, EvaluateOptions
from cytosae_pipeline.evaluation.evaluate import evaluate_pair, run_evaluate
from cytosae_pipeline.statistics.inputs import Inputs
from tests.support.stores import make_activations, make_store, make_table


def run(place, *arguments, code=0):
    return place.run("evaluate", "--dataset_name", "toy", *arguments, code=code)


@torch.no_grad()
def plain(sae, x):
    """The metrics of tokens by the formulas, in float64."""
    x = torch.from_numpy(x).float().flatten(0, 1)
    acts = sae.encode(x)
    again, wide = sae.decode(acts).double(), x.double()
    return {
        "explained_variance": float(1 - (wide - again).square().sum() / (wide - wide.mean(dim=0)).square().sum()),
        "l0": float((acts > 0).sum()) / len(x),
        "dead_share": float((acts == 0).all(dim=0).double().mean()),
        "cosine": float(torch.nn.functional.cosine_similarity(wide, again).mean()),
    }


def check(found, expected, n_images):
    assert found["n_images"] == n_images
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name


def test_it_equals_the_formulas_overall_and_by_label(with_sae):
    found = json.loads(run(with_sae, "--sae_path", with_sae.sae(), "--json").stdout)
    sae, store = load(with_sae.sae()), ActivationStore(with_sae.store)
    check(found["overall"], plain(sae, store[store.valid_rows]), len(store.valid_rows))
    labels = np.array(store.images.label)
    assert sorted(found["by_label"]) == sorted(set(labels[store.valid]))
    for name, values in found["by_label"].items():
        rows = np.flatnonzero(store.valid & (labels == name))
        check(values, plain(sae, store[rows]), len(rows))
    assert (found["tokens"], found["held_out"]) == ("all", 0)


def test_it_says_that_the_images_were_trained_on(with_sae, messages):
    output = run(with_sae, "--sae_path", with_sae.sae()).output
    assert "relu, 96 latents, on 22 images of the store, all tokens" in output
    assert "the autoencoder was trained on these images: it may reconstruct new ones less well" in messages()


def test_it_repeats_the_end_of_training(with_store):
    with_store.train("--run_name", "h", "--held_out", 0.3, "--arch", "topk", "--k", 3, "--tokens", "patches")
    sae = load(with_store.sae("h"))
    trained = sae.source.cfg["evaluation"]
    found = json.loads(run(with_store, "--sae_path", with_store.sae("h"), "--json").stdout)
    assert (found["held_out"], found["held_out_by"], found["tokens"]) == (0.3, "image", "patches")
    check(
        found["overall"], {name: trained[name] for name in ("explained_variance", "l0", "cosine")}, trained["n_images"]
    )
    whole = json.loads(run(with_store, "--sae_path", with_store.sae("h"), "--held_out", 0, "--json").stdout)
    assert whole["overall"]["n_images"] == 22


def test_another_data_set_is_evaluated_as_a_whole(with_sae, tmp_path):
    store = ActivationStore(with_sae.store)
    other = make_store(tmp_path / "o.zarr", store[:6].copy(), spec=store.spec, table=make_table(6))
    options = {"root_dir": with_sae.root, "sae_path": with_sae.sae(), "store": str(other.path)}
    found = run_evaluate(EvaluateConfig(**options))
    check(vars(found.overall), plain(load(with_sae.sae()), store[:6]), 6)
    assert list(found.by_label) == ["a", "b"]


def test_an_autoencoder_in_memory_and_some_images(tmp_path):
    activations = make_activations(12)
    store = make_store(tmp_path / "s.zarr", activations, invalid=(3,))
    sae = make_sae("topk", 8, 16, k=2)
    found = evaluate_pair(Inputs(store, sae), EvaluateOptions(limit=4, tokens="cls"))
    rows = store.valid_rows[[1, 4, 6, 9]]
    check(vars(found.overall), plain(sae, store[rows][:, :1]), 4)
    assert sum(part.n_images for part in found.by_label.values()) == 4


def test_names_are_shown_safely_and_cut(tmp_path):
    table = make_table(4, labels=("a\x1b[31m", "b" * 90))
    store = make_store(tmp_path / "s.zarr", make_activations(4), table=table)
    text = evaluate_pair(Inputs(store, make_sae("relu", 8, 16)), EvaluateOptions()).describe()
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) < 120


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--held_out", "0.000001"], "is held out with held_out 1e-06 by image: give held_out 0"),
        (["--tokens", "class"], "tokens"),
        (["--limit", "0"], "limit must be at least 1"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(with_sae, arguments, message):
    result = run(with_sae, "--sae_path", with_sae.sae(), *arguments, code=1 if "held_out" in arguments[0] else 2)
    assert message in result.output


def test_tokens_that_images_lack_are_refused(tmp_path):
    activations = make_activations(4)[:, :1]
    store = make_store(tmp_path / "s.zarr", np.ascontiguousarray(activations))
    with pytest.raises(ValueError, match="have no patches tokens: give another value of tokens"):
        evaluate_pair(Inputs(store, make_sae("relu", 8, 16)), EvaluateOptions(tokens="patches"))


def test_another_width_is_refused(with_sae, tmp_path):
    save_sae(tmp_path / "w.pt", make_sae("relu", 3, 6), {})
    result = run(with_sae, "--sae_path", tmp_path / "w.pt", code=1)
    assert "takes activations of width 3" in result.output
