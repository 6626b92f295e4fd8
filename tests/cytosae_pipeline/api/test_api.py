"""The verbs as functions: the same numbers, checks and names as on the command line, objects in and out."""

import inspect
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import cytosae
import cytosae_cache
import cytosae_pipeline
from cytosae.sae.registry import make_sae
from cytosae_cache.store import ActivationStore
from cytosae_pipeline import UserError
from cytosae_pipeline.config import BuildConfig, EvaluateOptions, StatisticsOptions
from cytosae_pipeline.statistics.counts import read_counts
from cytosae_pipeline.statistics.features import TENSORS, read_features
from tests.support.pictures import LAYOUT


@pytest.fixture
def pair(with_sae):
    return cytosae.load(with_sae.sae()), cytosae_cache.open(with_sae.store)


def test_public_names_exist_and_import_nothing_heavy_before_they_are_used():
    for package in (cytosae, cytosae_cache, cytosae_pipeline):
        assert all(getattr(package, name) is not None for name in package.__all__)
        assert set(package.__all__) <= set(dir(package))
    code = (
        "import sys, cytosae, cytosae_cache, cytosae_pipeline\n"
        "assert not {'torch', 'zarr', 'numpy', 'wandb', 'click'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_wandb_and_matplotlib_are_imported_only_when_asked_for():
    code = (
        "import sys, cytosae_pipeline as p\n"
        "p.train_sae, p.feature_stats, p.plot, p.make_report\n"
        "assert not {'wandb', 'matplotlib', 'anndata', 'click'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_functions_have_the_options_of_the_verbs():
    for function, record in (
        (cytosae_pipeline.build_store, BuildConfig),
        (cytosae_pipeline.feature_stats, StatisticsOptions),
        (cytosae_pipeline.evaluate_sae, EvaluateOptions),
    ):
        parameters = inspect.signature(function).parameters
        options = {name: field.default for name, field in record.__dataclass_fields__.items()}
        assert {name: one.default for name, one in parameters.items() if name not in ("sae", "store")} == options or (
            record is BuildConfig
        )
        for name in options:
            assert f"\n    {name}: " in function.__doc__
        assert "Returns:" in function.__doc__


def test_feature_stats_are_those_of_the_verb(with_sae, pair, tmp_path):
    with_sae.run("features", "--dataset_name", "toy", "--sae_path", with_sae.sae(), "--top_k", 3)
    stats, written = cytosae_pipeline.feature_stats(*pair, top_k=3), read_features(with_sae.features())
    for name in TENSORS:
        np.testing.assert_array_equal(getattr(stats, name), getattr(written, name))
    files = stats.save(tmp_path / "deep" / "saved")
    assert {file.name for file in files} == {file.name for file in with_sae.features().iterdir()}
    for file in files:
        assert file.read_bytes() == (with_sae.features() / file.name).read_bytes(), file.name
    assert f"{stats.n_active:,} of 96 latents are active on any of 22 images; top 3" in repr(stats)


def test_paths_do_as_well_as_objects(with_sae, pair):
    stats = cytosae_pipeline.feature_stats(*pair)
    again = cytosae_pipeline.feature_stats(str(with_sae.sae()), str(with_sae.store))
    np.testing.assert_array_equal(stats.top_rows, again.top_rows)
    assert again.record == stats.record


def test_nothing_is_written_unless_asked(with_sae, pair):
    before = sorted(with_sae.root.rglob("*"))
    cytosae_pipeline.feature_stats(*pair)
    cytosae_pipeline.patient_counts(*pair)
    cytosae_pipeline.evaluate_sae(*pair)
    assert sorted(with_sae.root.rglob("*")) == before


@pytest.mark.parametrize(("verb", "kind"), [("patients", "patient"), ("classes", "label")])
def test_counts_are_those_of_the_verb(with_sae, pair, tmp_path, verb, kind):
    with_sae.run(
        verb, "--dataset_name", "toy", "--sae_path", with_sae.sae(), "--threshold", 0.1, "--normalize", "token"
    )
    count = {"patient": cytosae_pipeline.patient_counts, "label": cytosae_pipeline.class_counts}[kind]
    found, written = count(*pair, threshold=0.1, normalize="token"), read_counts(with_sae.features(), kind)
    assert found.names == written.names
    np.testing.assert_array_equal(found.counts, written.counts)
    np.testing.assert_array_equal(found.normalised, written.normalised)
    for file in found.save(tmp_path):
        assert file.read_bytes() == (with_sae.features() / file.name).read_bytes(), file.name
    np.testing.assert_array_equal(found.to_pandas().to_numpy(), written.normalised)
    data = found.to_anndata()
    assert data.obs_names.tolist() == list(written.names)
    np.testing.assert_array_equal(data.layers["counts"].toarray(), written.counts[0])
    assert f"<GroupStats: {len(written.names)} " in repr(found)


def test_anndata_in_memory_equals_the_file(with_sae, pair, tmp_path):
    anndata = pytest.importorskip("anndata")
    place = {"root_dir": with_sae.root, "dataset_name": "toy", "sae_path": with_sae.sae(), "out": tmp_path}
    result = cytosae_pipeline.export_stats(**place, format="anndata")
    assert {file.name for file in result.files} == {"images.h5ad", "patients.h5ad"}
    theirs = anndata.read_h5ad(tmp_path / "images.h5ad")
    ours = cytosae_pipeline.feature_stats(*pair).to_anndata()
    np.testing.assert_array_equal(ours.X.toarray(), theirs.X.toarray())
    assert ours.obs.equals(theirs.obs)
    assert ours.var.equals(theirs.var)
    assert cytosae_pipeline.feature_stats(*pair).to_pandas().equals(theirs.var)


def test_evaluation_is_that_of_the_verb(with_sae, pair):
    output = with_sae.run("evaluate", "--dataset_name", "toy", "--sae_path", with_sae.sae(), "--json").stdout
    assert cytosae_pipeline.evaluate_sae(*pair).to_json() == json.loads(output)


def test_an_autoencoder_in_memory_is_identified_by_its_tensors(pair):
    sae, other = make_sae("topk", 24, 48, k=4, seed=1), make_sae("topk", 24, 48, k=4, seed=2)
    records = [cytosae_pipeline.feature_stats(one, pair[1]).record["sae_sha256"] for one in (sae, other, sae)]
    assert records[0] == records[2] != records[1]


def test_build_train_verify_and_report(with_images):
    place = {"root_dir": with_images.root, "dataset_name": "toy"}
    store = cytosae_pipeline.build_store(**place, model_path=with_images.vit, layout=LAYOUT, workers=0)
    assert isinstance(store, ActivationStore)
    assert cytosae_pipeline.verify_store(store=store).sound
    result = cytosae_pipeline.train_sae(
        **place, arch="topk", k=4, expansion_factor=4, total_training_tokens=40, precision="fp32"
    )
    sae = result.load()
    assert sae.source.path == result.sae
    assert not any(part.requires_grad for part in sae.parameters())
    page = cytosae_pipeline.make_report(**place, sae_path=result.sae, masking_images=0)
    assert page.index.is_file()
    exported = cytosae_pipeline.export_sae(sae_path=result.sae, format="safetensors")
    assert torch.equal(cytosae.load(exported.path).W_enc, sae.W_enc)
    blocks = cytosae_pipeline.build_stores(
        **place, model_path=with_images.vit, layout=LAYOUT, workers=0, block_layer=(-1, -2)
    )
    assert [one.spec.block - one.spec.n_blocks for one in blocks] == [-1, -2]
    assert blocks[1].path == store.path


def test_embeddings_are_imported(tmp_path):
    np.save(tmp_path / "cells.npy", np.random.default_rng(0).normal(size=(9, 6)).astype(np.float32))
    store = cytosae_pipeline.import_embeddings(source=tmp_path / "cells.npy", dataset_name="c", root_dir=tmp_path)
    assert store[0].shape == (1, 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda sae, store: cytosae_pipeline.feature_stats(sae, store, top_k=0), "top_k must be at least 1, found 0"),
        (lambda sae, store: cytosae_pipeline.patient_counts(sae, store, normalize="x"), "normalize must be image"),
        (lambda sae, store: cytosae_pipeline.feature_stats(make_sae("relu", 3, 6), store), "of width 3"),
        (lambda sae, store: cytosae_pipeline.feature_stats("none.pt", store), "no autoencoder at 'none.pt'"),
        (lambda sae, store: cytosae_pipeline.feature_stats(sae, "none.zarr"), "no activation store"),
        (
            lambda sae, store: cytosae_pipeline.build_store(dataset_name="x", images="none", model_path="embedded"),
            "none",
        ),
    ],
)
def test_the_same_checks_as_on_the_command_line(pair, call, message):
    with pytest.raises(ValueError, match=message):
        call(*pair)


def test_a_store_of_another_spec_is_refused_unless_it_is_accepted(with_sae, pair):
    with_sae.build("--block_layer", "-1")
    (other,) = (path for path in pair[1].path.parent.glob("*.zarr") if path != pair[1].path)
    with pytest.raises(cytosae_cache.StoreMismatchError, match="differs from the one that"):
        cytosae_pipeline.feature_stats(pair[0], other)
    assert cytosae_pipeline.feature_stats(pair[0], other, allow_mismatch=True).n_active >= 0


def test_an_unknown_option_is_a_type_error(pair):
    with pytest.raises(TypeError, match="topk"):
        cytosae_pipeline.feature_stats(*pair, topk=3)


def test_the_module_is_the_command_line():
    done = subprocess.run([sys.executable, "-m", "cytosae_pipeline", "--version"], capture_output=True, check=True)
    assert cytosae_pipeline.__version__ in done.stdout.decode()
    assert issubclass(UserError, ValueError)
