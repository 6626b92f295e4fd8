"""What a manifest says about the images appears beside their names in every exported table."""

import csv

import anndata
import numpy as np
import pytest
import torch
from pyarrow import parquet

from cytosae.formats.checkpoint import save_sae
from cytosae.sae.relu import ReluSae
from cytosae_cache.creation import create_store
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.export.tables import make_image_texts
from tests.conftest import Workplace
from tests.support.stores import PROVENANCE, fill_store, make_activations, make_spec, make_table

COLUMNS = {
    "site": np.array(["A", "", "=1+1", "ü", "A", "B"], dtype=np.dtypes.StringDType()),
    "x": np.array([1, 2, 3, 4, 5, 6]),
    "age": np.array([1.5, np.nan, 3, 4, 5, 6]),
    "score": np.arange(6),
    "a/b": np.arange(6),
    "a_b": np.arange(6) * 2,
    "=cmd": np.arange(6),
    "_index": np.arange(6),
    "..": np.arange(6),
}
NAMES = ["site", "x", "age", "image_score", "a_b", "a_b_2", "=cmd", "image__index", "image_.."]


@pytest.fixture
def store(tmp_path) -> ActivationStore:
    path = tmp_path / "own.zarr"
    empty = create_store(path, make_spec(), make_table(6), PROVENANCE, shard_images=4, columns=COLUMNS)
    return fill_store(empty, make_activations(6), invalid=[3])


@pytest.fixture
def export(tmp_path, store):
    sae = ReluSae(8, 12)
    with torch.no_grad():
        sae.W_enc.normal_()
    save_sae(tmp_path / "own.pt", sae, {})

    def run(kind, *arguments):
        place = ["--store", store.path, "--sae_path", tmp_path / "own.pt", "--out", tmp_path / "tables"]
        Workplace(tmp_path).run("export", *place, "--format", kind, *arguments)
        return tmp_path / "tables"

    return run


def test_names_that_a_format_would_refuse_are_changed(store):
    images = make_image_texts(store)
    assert list(images.further) == NAMES
    assert images.row.tolist() == [0, 1, 2, 4, 5]
    assert images.further["site"] == ["A", None, "=1+1", "A", "B"]
    np.testing.assert_array_equal(images.further["x"], [1, 2, 3, 5, 6])


def test_csv(export):
    with (export("csv") / "table_images.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    shown = [name if name != "=cmd" else "'=cmd" for name in NAMES]
    assert list(rows[0]) == ["row", "path", "label", "patient", *shown, "latent", "score"]
    for row in rows:
        number = int(row["row"])
        assert row["x"] == str(number + 1)
        assert row["site"] == {2: "'=1+1"}.get(number, str(COLUMNS["site"][number]))
        assert row["age"] == str(COLUMNS["age"][number])


def test_parquet(export):
    table = parquet.read_table(export("parquet") / "table_images.parquet")
    assert table.column_names == ["row", "path", "label", "patient", *NAMES, "latent", "score"]
    assert [str(table.schema.field(name).type) for name in ("site", "x", "age")] == ["string", "int64", "double"]
    for row in table.to_pylist():
        assert row["x"] == row["row"] + 1
        assert row["site"] == (str(COLUMNS["site"][row["row"]]) or None)


@pytest.mark.parametrize(("container", "read"), [("h5ad", anndata.read_h5ad), ("zarr", anndata.read_zarr)])
def test_anndata(export, container, read):
    obs = read(export("anndata", "--anndata_as", container) / f"images.{container}").obs
    assert list(obs.columns) == ["path", "label", "patient", *NAMES]
    assert obs["x"].tolist() == [1, 2, 3, 5, 6]
    assert obs["site"].astype(object).where(obs["site"].notna(), None).tolist() == ["A", None, "=1+1", "A", "B"]
    np.testing.assert_array_equal(obs["age"], COLUMNS["age"][[0, 1, 2, 4, 5]])
