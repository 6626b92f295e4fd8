"""`report` and `export` of results that another program published: no images, no store, no autoencoder."""

import csv
import dataclasses
import re

import numpy as np
import pytest
import torch

from cytosae_pipeline.config import StatisticsConfig
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.statistics.features import read_features
from cytosae_pipeline.statistics.published import find_published, read_published
from tests.support.browser import Visit, browser_or_skip, file_url
from tests.support.published import publish
from tests.support.reports import read_data
from tests.support.stores import read_files


@pytest.fixture
def published(with_sae, tmp_path):
    """A workspace that contains nothing but published feature data; and our feature data that they were made from."""
    with_sae.run("features", "--dataset_name", "toy", "--sae_path", with_sae.sae(), "--top_k", 4)
    root = tmp_path / "published"
    folder = root / "out" / "feature_data" / "sae_8jsxk3co" / "custom" / "acevedo"
    ours = read_features(with_sae.features())
    arrays = {name: array.copy() for name, array in vars(ours).items() if isinstance(array, np.ndarray)}
    # One latent that is never active, and one that is active on two images.
    for name, empty in (("top_rows", -1), ("top_labels", -1), ("top_values", 0), ("mean_acts", 0), ("sparsity", 0)):
        arrays[name][5] = empty
        if arrays[name].ndim == 2:
            arrays[name][6, 2:] = empty
    ours = dataclasses.replace(ours, **arrays)
    publish(ours, folder)
    return type(with_sae)(root), folder, ours


OPTIONS = ("--dataset_name", "acevedo", "--sae_path", "out/checkpoints/8jsxk3co/final_sae.pt")


def _edit(folder, name, change):
    path = folder / f"{name}.pt"
    torch.save(change(torch.load(path, weights_only=True)), path)


def test_published_data_become_ours(published):
    _, folder, ours = published
    assert torch.load(folder / "max_activating_image_indices.pt", weights_only=True).dtype == torch.float32
    assert (ours.top_rows < 0).any()
    assert (ours.sparsity == 0).any()
    found = read_published(folder)
    for name in ("top_rows", "top_labels", "top_values", "mean_acts", "sparsity"):
        here, there = getattr(found, name), getattr(ours, name)
        assert here.dtype == there.dtype
        np.testing.assert_array_equal(here, there)
    assert found.labels == ("label 0", "label 1", "label 2")
    (folder / "labels.txt").write_text("blast\nlymphocyte\nneutrophil\nnever seen\n")
    assert read_published(folder).labels == ("blast", "lymphocyte", "neutrophil", "never seen")


def test_published_data_without_labels_are_read(published):
    _, folder, ours = published
    (folder / "max_activating_image_label_indices.pt").unlink()
    found = read_published(folder)
    np.testing.assert_array_equal(found.top_rows, ours.top_rows)
    assert found.labels == ()
    assert (found.top_labels == -1).all()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sae_sparsity", lambda x: x[:-1], "shapes do not fit together"),
        ("sae_sparsity", lambda x: 99 * x, "between 0 and 1"),
        ("sae_sparsity", lambda x: x[None], "shapes do not fit together"),
        ("max_activating_image_values", lambda x: x - 9, "scores must be finite and at least 0"),
        ("sae_mean_acts", lambda x: x * torch.nan, "scores must be finite"),
        ("max_activating_image_indices", lambda x: x + 0.5, "must contain whole numbers"),
        ("max_activating_image_indices", lambda x: x + 2**25, "are not exact, as they are stored as float32"),
        ("max_activating_image_label_indices", lambda x: x + 5000, "lie between 0 and 4095"),
        ("sae_sparsity", lambda x: {"a": x}, "must contain a tensor of numbers, found dict"),
    ],
)
def test_other_contents_are_refused(published, name, change, message):
    _, folder, _ = published
    _edit(folder, name, change)
    with pytest.raises(UserError, match=message):
        read_published(folder)


def test_too_few_names_are_refused(published):
    _, folder, _ = published
    (folder / "labels.txt").write_text("blast\n")
    with pytest.raises(UserError, match="names 1 label, but the feature data refer to 3"):
        read_published(folder)


def test_results_of_ours_are_not_taken_for_published_ones(with_sae):
    with_sae.run("features", "--dataset_name", "toy", "--sae_path", with_sae.sae())
    config = StatisticsConfig(root_dir=with_sae.root, dataset_name="toy", sae_path=with_sae.sae())
    assert find_published(config) is None
    (with_sae.features() / "features.json").unlink()
    assert find_published(config) == with_sae.features()


def test_the_report_shows_latents_and_says_what_it_cannot_show(published):
    place, folder, ours = published
    before = read_files(folder)
    output = place.run("report", *OPTIONS).output
    assert f"'{folder}' contains results of another program" in output
    assert "give another --vit_type" in output
    after = read_files(folder)
    assert before.items() <= after.items()
    overview = read_data(folder / "report", "overview")
    assert overview["title"] == "acevedo"
    assert overview["image_pages"] is False
    assert "need a store of the activations" in overview["messages"][0]
    assert overview["counts"]["active"] == ours.n_active
    place.run("report", *OPTIONS)
    for option in (("--figures",), ("--pseudonymize",), ("--groups", "p.csv")):
        assert "needs a store, but" in place.run("report", *OPTIONS, *option, code=1).output


def test_the_page_of_published_results_in_a_browser(published):
    place, folder, ours = published
    (folder / "labels.txt").write_text("blast\nlymphocyte\nneutrophil\n")
    place.run("report", *OPTIONS)
    latent = 6
    with browser_or_skip() as browser:
        visit = Visit(browser, file_url(folder / "report"))
        page = visit.page
        assert "were not written by cytosae-cache" in page.locator(".notice").first.inner_text()
        assert "blast, lymphocyte, neutrophil" in page.locator("#view").inner_text()
        visit.go("latents")
        page.wait_for_selector(".card")
        visit.go(f"latent/{latent}")
        page.wait_for_selector(".top-image")
        texts = page.locator(".top-image").all_inner_texts()
        rows = [int(re.search(r"row (\d+)", text)[1]) for text in texts]
        assert rows == ours.top_rows[latent, :2].tolist()
        assert page.locator("canvas").count() == 0
        assert "do not contain it" in page.locator("#view").inner_text()
        visit.go("image/0")
        assert "came without images" in page.locator("#view").inner_text()
        visit.go("patients")
        assert "came without the images' patients" in page.locator("#view").inner_text()
        visit.close()


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_latents_are_exported(published, kind, tmp_path):
    place, _, ours = published
    out = tmp_path / "tables"
    result = place.run("export", *OPTIONS, "--format", kind, "--out", out)
    assert "the latents alone are written" in result.output
    (path,) = out.iterdir()
    if kind == "csv":
        with path.open(newline="") as file:
            sparsity = [float(row["sparsity"]) for row in csv.DictReader(file)]
    else:
        import pyarrow.parquet

        sparsity = pyarrow.parquet.read_table(path)["sparsity"].to_pylist()
    np.testing.assert_allclose(sparsity, ours.sparsity, rtol=1e-6)
    assert "exists already" in place.run("export", *OPTIONS, "--format", kind, "--out", out, code=1).output
    output = place.run("export", *OPTIONS, "--format", "anndata", "--out", out, code=1).output
    assert "name neither images nor patients" in output


def test_own_results_are_computed_beside_published_ones(with_sae):
    options = ("--dataset_name", "toy", "--sae_path", with_sae.sae())
    with_sae.run("features", *options, "--vit_type", "ours")
    publish(read_features(with_sae.features().parents[1] / "ours" / "toy"), with_sae.features())
    output = with_sae.run("explore", *options, code=1).output
    assert "was not written by `cytosae-cache features`" in output
    with_sae.run("report", *options, "--vit_type", "ours", "--masking_images", 0)
    with_sae.run("report", *options, "--replace_foreign", "--masking_images", 0)
    assert read_features(with_sae.features()).record["verb"] == "features"
