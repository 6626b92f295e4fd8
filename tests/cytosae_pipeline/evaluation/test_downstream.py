"""`evaluate --downstream`: embeddings and a probe of reconstructions, through the tail beside a store."""

import json

import numpy as np
import pytest
import torch

import cytosae_pipeline
from cytosae.formats.checkpoint import load, save_sae
from cytosae.sae.registry import make_sae
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.building.tail_file import open_tail, tail_location
from cytosae_pipeline.config import EvaluateOptions
from cytosae_pipeline.evaluation import downstream as module
from cytosae_pipeline.evaluation.evaluate import evaluate_pair
from cytosae_pipeline.statistics.inputs import Inputs
from cytosae_pipeline.training.matmul import fp32_matmul
from tests.support.pictures import write_pictures

DOWN = ("--downstream", "--json")


def run(place, *arguments, code=0):
    return place.run("evaluate", "--dataset_name", "toy", *arguments, code=code)


def identity_sae(width):
    """An autoencoder that reconstructs exactly: one latent for each channel and each sign."""
    sae = make_sae("relu", width, 2 * width)
    eye = torch.eye(width)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([eye, -eye], dim=1))
        sae.W_dec.copy_(torch.cat([eye, -eye]))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae


def silent_sae(width, value=0.0):
    """An autoencoder without active latents, whose reconstruction is the same for all tokens."""
    sae = identity_sae(width)
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
        sae.b_dec.fill_(value)
    return sae


@pytest.fixture
def many(with_images):
    """A store of more images, of patients of their own, with its tail."""
    write_pictures(with_images.images, 60, n_patients=5)
    with_images.build("--keep_tail", "--store_dtype", "float32")
    return with_images


def evaluate(place, sae, **options):
    return evaluate_pair(
        Inputs(ActivationStore(place.store), sae), EvaluateOptions(downstream=True, **options)
    ).downstream


def test_an_identity_recovers_everything(many):
    store = ActivationStore(many.store)
    found = evaluate(many, identity_sae(store.d_model))
    assert found.overall.embedding.error_recovered == pytest.approx(1, abs=1e-9)
    assert found.overall.embedding.cosine == pytest.approx(1, abs=1e-6)
    assert found.overall.probe.loss_recovered == pytest.approx(1, abs=1e-5)
    assert found.overall.probe.agreement == 1
    assert found.overall.embedding.n_images == len(store.valid_rows)
    assert found.overall.probe.n_images + found.n_train == len(store.valid_rows)


def test_what_knows_nothing_of_the_image_recovers_nothing(many):
    found = evaluate(many, silent_sae(24), ablation="zero")
    assert found.overall.embedding.error_recovered == pytest.approx(0, abs=1e-9)
    assert found.overall.probe.loss_recovered == pytest.approx(0, abs=1e-9)
    sae, store = silent_sae(24), ActivationStore(many.store)
    with torch.no_grad():
        sae.b_dec.copy_(
            torch.from_numpy(store[store.valid_rows].reshape(-1, 24).astype(np.float64).mean(axis=0)).float()
        )
    found = evaluate(many, sae)
    assert found.ablation == "mean"
    assert found.overall.probe.loss_recovered == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("tokens", ["all", "patches", "cls"])
@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_it_equals_the_plain_way(many, tokens, ablation):
    """Every image by itself, each of its three versions through the tail; all other tokens stay as they are."""
    store, sae = ActivationStore(many.store), make_sae("topk", 24, 48, k=3)
    tail = open_tail(store)
    chosen = {"all": slice(None), "patches": slice(1, None), "cls": slice(0, 1)}[tokens]
    x = torch.from_numpy(store[store.valid_rows])
    mean = x.double().mean(dim=(0, 1)).float() if ablation == "mean" else torch.zeros(24)
    again, ablated = x.clone(), x.clone()
    with torch.no_grad():
        for one, other in zip(again, ablated, strict=True):
            one[chosen] = sae.decode(sae.encode(one[chosen]))
            other[chosen] = mean
        e, r, a = (torch.cat([tail(image[None]) for image in part]) for part in (x, again, ablated))
    found = evaluate(many, sae, tokens=tokens, ablation=ablation).overall.embedding
    assert found.cosine == pytest.approx(float(torch.nn.functional.cosine_similarity(e, r).mean()), abs=1e-5)
    wanted = 1 - float((e - r).double().square().sum() / (e - a).double().square().sum())
    assert found.error_recovered == pytest.approx(wanted, rel=1e-4, abs=1e-4)


def test_results_do_not_depend_on_how_many_images_are_read_at_once(many, monkeypatch):
    first = evaluate(many, make_sae("topk", 24, 48, k=3))
    monkeypatch.setattr(module, "_IMAGES_AT_ONCE", 7)
    other = evaluate(many, make_sae("topk", 24, 48, k=3))
    assert other.overall.embedding.n_images == first.overall.embedding.n_images
    sae = make_sae("topk", 24, 48, k=3)
    store = ActivationStore(many.store)
    embedder = module.Embedder(sae, open_tail(store), store, "all", "mean")
    x = store[store.valid_rows]
    whole = embedder.embed(x, fp32_matmul(torch.device("cpu")))
    parts = [embedder.embed(x[start : start + 7], fp32_matmul(torch.device("cpu"))) for start in range(0, len(x), 7)]
    for name in whole._fields:
        torch.testing.assert_close(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))


def test_a_probe_is_tested_on_other_patients(many):
    store = ActivationStore(many.store)
    labels = np.array(store.images.label)[store.valid_rows]
    numbers = np.unique(labels, return_inverse=True)[1]
    plan = module._make_plan(store, store.valid_rows, numbers, sorted(set(labels)))
    patients = np.array(store.images.patient)[store.valid_rows]
    assert not set(patients[plan.trains]) & set(patients[plan.tests])
    assert plan.trains.any()
    assert plan.tests.any()
    assert not (plan.trains & plan.tests).any()
    found = evaluate(many, identity_sae(24))
    assert (found.trained_on_other, found.n_train) == ("patients", int(plan.trains.sum()))
    assert found.overall.probe.n_images == int(plan.tests.sum())


def test_the_probes_images_are_bounded(many, monkeypatch):
    monkeypatch.setattr(module, "MOST_TRAINING", 9)
    found = evaluate(many, identity_sae(24))
    assert found.n_train == 9
    assert found.overall.embedding.n_images == len(ActivationStore(many.store).valid_rows)


def test_the_command_line_and_python_agree(with_sae):
    with_sae.build("--keep_tail")
    text = run(with_sae, "--sae_path", with_sae.sae(), "--downstream").output
    assert "embedding: CLS token after the final norm" in text
    assert "error recovered" in text
    assert "tested on other patients" in text
    found = json.loads(run(with_sae, "--sae_path", with_sae.sae(), *DOWN).stdout)["downstream"]
    again = cytosae_pipeline.evaluate_sae(with_sae.sae(), with_sae.store, downstream=True)
    assert json.loads(json.dumps(again.to_json()))["downstream"] == found
    assert json.loads(run(with_sae, "--sae_path", with_sae.sae(), "--json").stdout)["downstream"] is None
    assert sorted(found["by_label"]) == found["classes"]


def test_held_out_images_and_limit_are_those_of_evaluate(with_store):
    with_store.build("--keep_tail")
    with_store.train("--run_name", "h", "--held_out", 0.5)
    found = json.loads(run(with_store, "--sae_path", with_store.sae("h"), *DOWN).stdout)
    assert found["overall"]["n_images"] == found["downstream"]["overall"]["embedding"]["n_images"] < 22
    found = json.loads(run(with_store, "--sae_path", with_store.sae("h"), *DOWN, "--held_out", 0, "--limit", 5).stdout)
    assert found["downstream"]["overall"]["embedding"]["n_images"] == 5


def test_without_a_tail_it_says_what_to_type_before_it_computes(with_sae, messages):
    result = run(with_sae, "--sae_path", with_sae.sae(), "--downstream", code=1)
    assert "has no tail" in result.output
    assert "--keep_tail" in result.output
    assert "cytosae-cache build --root_dir" in result.output.replace("\n", " ")
    with pytest.raises(ValueError, match="has no tail.*--keep_tail"):
        cytosae_pipeline.evaluate_sae(with_sae.sae(), with_sae.store, downstream=True)


def test_a_store_without_labels_has_no_probe(with_images, tmp_path, messages):
    flat = with_images.root / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted(with_images.images.rglob("*.png"))):
        (flat / f"{number}.png").write_bytes(path.read_bytes())
    with_images.build("--images", flat, "--keep_tail")
    save_sae(tmp_path / "s.pt", identity_sae(24), {})
    messages()
    found = json.loads(run(with_images, "--sae_path", tmp_path / "s.pt", *DOWN).stdout)["downstream"]
    assert (found["overall"]["probe"], found["classes"], found["by_label"]) == (None, [], {})
    text = messages()
    assert "no probe is trained: it needs two labels" in text
    assert "but no image has a label" in text
    assert (
        "but no image has a label" in run(with_images, "--sae_path", tmp_path / "s.pt", "--downstream").output or True
    )
    assert "probe of" not in run(with_images, "--sae_path", tmp_path / "s.pt", "--downstream").stdout


def test_labels_of_one_patient_are_left_out_of_the_probe(many, messages):
    store = ActivationStore(many.store)
    rows = store.valid_rows
    labels = np.array([0, 1] * len(rows))[: len(rows)]
    labels[0] = 2
    messages()
    plan = module._make_plan(store, rows, labels, ["a", "b", "once"])
    assert plan.classes == ["a", "b"]
    assert plan.labels[0] == -1
    assert "left out of the probe, with fewer than 2 training images or no test image: 'once'" in messages()
    plan = module._make_plan(store, rows, np.where(labels == 2, 0, -1), ["a"])
    assert plan.classes == []
    assert not plan.tests.any()
    assert "'a' have fewer than 2 training images" in messages()


def test_names_are_shown_safely():
    assert module._shown("a\x1b[31m" + "b" * 90) == "a?[31m" + "b" * 17 + "…"


def test_the_planted_groups_of_the_demo_survive(demo_run):
    """The kinds of cells of the demo are read from the encoder's own embedding, and from the reconstruction."""
    from click.testing import CliRunner

    from cytosae_pipeline.cli.app import cli

    (store,) = demo_run.root.glob("out/activations/*/*.zarr")
    (sae,) = demo_run.root.glob("out/checkpoints/*/final_*.pt")
    dataset = ActivationStore(store).provenance.dataset
    options = ["--root_dir", str(demo_run.root), "--dataset_name", dataset]
    images = str(demo_run.root / "dataset" / dataset)
    build = ["build", *options, "--images", images, "--model_path", "embedded", "--keep_tail", "--json"]
    result = CliRunner().invoke(cli, build)
    assert result.exit_code == 0, result.output
    try:
        result = CliRunner().invoke(cli, ["evaluate", *options, "--sae_path", str(sae), "--downstream", "--json"])
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)["downstream"]
    finally:
        tail_location(store).unlink()
    probe = found["overall"]["probe"]
    assert probe["accuracy"] > 0.9
    assert probe["accuracy_reconstructed"] > 0.8
    assert 0.5 < probe["loss_recovered"] <= 1.1
    assert load(sae).b_dec.shape[0] == ActivationStore(store).d_model
