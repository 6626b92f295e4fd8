"""The map of cells: the right scores in files of limited size, by principal components or UMAP."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from cytosae.analysis.cell_map import principal_components
from cytosae.formats.checkpoint import load_sae
from cytosae_cache.reading.reader import StoreReader
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.config.report import PageConfig
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.report.data.report_data import open_report_data
from cytosae_pipeline.report.records import cell_map
from cytosae_pipeline.report.records.cell_map import choose_map_latents, measure_map, require_umap
from tests.support.reports import read_data, unpack


def _report(place, *arguments):
    out = place.root / "page"
    place.run(
        "report", "--dataset_name", "toy", "--sae_path", place.sae(), "--out", out, "--masking_images", 0, *arguments
    )
    return out


def test_the_map_has_the_scores_and_components_of_plain_numpy(with_sae):
    report = _report(with_sae)
    store, sae = ActivationStore.open(with_sae.store), load_sae(with_sae.sae()).sae
    rows = np.flatnonzero(store.valid)
    with StoreReader(store) as reader:
        scores = sae.encode(torch.from_numpy(reader.read(rows)).float()).mean(dim=1).detach().numpy()
    record = read_data(report, "map")
    latents = unpack(record["latents"])
    assert latents.tolist() == np.flatnonzero((scores > 0).any(axis=0)).tolist()
    assert unpack(record["numbers"]).tolist() == rows.tolist()
    names = [label["name"] for label in read_data(report, "overview")["labels"]]
    assert [names[at] for at in unpack(record["labels"])] == [store.images.label[row] for row in rows]
    expected = principal_components(scores[:, latents], 2)
    np.testing.assert_allclose(unpack(record["x"]), expected.positions[:, 0], rtol=1e-3, atol=1e-4)
    assert record["axes"][0] == f"PC 1 ({expected.shares[0]:.1%} of the variance)"
    assert record["method"].startswith(
        f"Principal components, exact: 22 of 22 readable images by the scores of {len(latents)}"
    )
    for number in range(2):
        part = read_data(report, f"mapped/{number}")
        found = unpack(part["levels"]) / 255 * unpack(part["peaks"])[:, None]
        here = scores[:, latents[64 * number : 64 * (number + 1)]].T
        assert (found >= here - 1e-6).all(), "rounded up, so that every active cell is seen"
        np.testing.assert_allclose(found, here, atol=here.max() / 250)
    assert (report / "data" / "overview.js").read_text().count('"has_map":true') == 1


def test_the_map_can_be_left_out_and_limited(with_sae):
    report = _report(with_sae, "--map_images", 0)
    assert read_data(report, "overview")["has_map"] is False
    assert not (report / "data" / "map.js").exists()
    report = _report(with_sae, "--map_images", 7)
    assert len(unpack(read_data(report, "map")["numbers"])) == 7


def test_the_latents_of_a_large_map_are_the_featured_ones_and_those_that_vary_most(monkeypatch):
    monkeypatch.setattr(cell_map, "MAP_LATENTS", 4)
    sparsity, mean = np.array([0.5, 1, 0.1, 0, 0.5, 0.5]), np.array([1, 9, 0.1, 0, 2, 3.0])
    assert choose_map_latents(sparsity, mean, np.array([2])).tolist() == [0, 2, 4, 5]
    monkeypatch.setattr(cell_map, "MAP_LATENTS", 10)
    assert choose_map_latents(sparsity, mean, np.array([2])).tolist() == [0, 1, 2, 4, 5]


def test_umap_is_reproducible_and_says_what_it_is(with_sae):
    pytest.importorskip("umap", reason='needs umap-learn: pip install ".[map]"')
    config = PageConfig(root_dir=with_sae.root, dataset_name="toy", sae_path=with_sae.sae(), map="umap")
    data = open_report_data(config)
    one, other = (measure_map(data, np.array([0])) for _ in range(2))
    assert np.array_equal(one.positions, other.positions)
    assert one.axes == ("UMAP 1", "UMAP 2")
    assert one.method.startswith("UMAP of the first ")
    few = measure_map(replace(data, config=replace(config, map_images=10)), np.array([0]))
    assert few.method.startswith("Principal components"), "fewer images than UMAP's neighbours"


def test_a_missing_umap_is_named(monkeypatch):
    monkeypatch.setattr(cell_map.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'--map umap needs umap-learn: pip install "\.\[map\]"'):
        require_umap(PageConfig(map="umap"))
    require_umap(PageConfig())


def test_umap_leaves_the_threads_of_products_alone():
    pytest.importorskip("umap")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cell_map._umap(principal_components(np.random.default_rng(0).random((40, 8)), 8), seed=0)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
