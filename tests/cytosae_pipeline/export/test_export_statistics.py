"""Statistics for scanpy, spreadsheets and data frames: the right numbers, streamed, whole or not there at all."""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy
import torch
from anndata.io import read_elem
from pyarrow import parquet

from cytosae.formats.checkpoint import load_sae, save_sae
from cytosae.sae.relu import ReluSae
from cytosae_cache.format.layout import ImageTable
from cytosae_cache.reading.reader import StoreReader
from cytosae_cache.storage.atomic import replacing_path
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.export import table_files
from cytosae_pipeline.export.anndata_files import CsrScores, open_group
from cytosae_pipeline.export.table_files import LongScores, escape_formula
from cytosae_pipeline.export.tables import ImageTexts
from cytosae_pipeline.statistics.notes import FILE_NAME, write_notes
from tests.support.nursery import SOURCES
from tests.support.patience import patience
from tests.support.stores import make_activations, make_store

HARD_NAMES = ("=1+1", "a,b", 'say "so"', "two\nlines", "-x", "@y", "'z", "naïve ü", "a\rb", "plain")


def dense_scores(path, sae_path):
    """Scores by the plain encoder in float64, shape (N, S), and which images could be read."""
    store = ActivationStore.open(path)
    sae = load_sae(sae_path).sae.double()
    with StoreReader(store) as reader:
        x = torch.from_numpy(np.nan_to_num(reader.read(np.arange(store.n_images)))).double()
    return sae.encode(x).mean(dim=1).numpy()[store.valid], store


def read_anndata(path):
    return anndata.read_h5ad(path) if path.suffix == ".h5ad" else anndata.read_zarr(path)


def export(place, kind, *arguments, code=0):
    return place.run(
        "export", "--dataset_name", "toy", "--sae_path", place.sae(), "--format", kind, *arguments, code=code
    )


@pytest.fixture
def own(tmp_path):
    """Makes a store of random activations with names of one's choice, and an autoencoder; runs `export` on them."""

    class Own:
        store = tmp_path / "own.zarr"
        sae = tmp_path / "own.pt"
        out = tmp_path / "tables"

        def make(self, n, *, labels=("a", "b"), patients=("p", "q", "r"), n_latents=12, invalid=()):
            rows = range(n)
            table = ImageTable(
                [f"{row:05d}.png" for row in rows],
                [labels[row % len(labels)] for row in rows],
                [patients[row % len(patients)] for row in rows],
            )
            make_store(self.store, make_activations(n), table=table, invalid=invalid, shard_images=256)
            torch.manual_seed(0)
            sae = ReluSae(8, n_latents)
            with torch.no_grad():
                sae.W_enc.normal_()
                sae.b_enc.fill_(-1.0)
            save_sae(self.sae, sae, {})
            return self

        def arguments(self, kind, *more):
            parts = ("export", "--root_dir", tmp_path, "--store", self.store, "--sae_path", self.sae)
            return [str(part) for part in (*parts, "--format", kind, "--out", self.out, *more)]

    return Own()


def test_names_of_latents_and_groups_of_patients_reach_every_export(with_sae):
    with_sae.run("features", "--dataset_name", "toy", "--sae_path", with_sae.sae())
    write_notes(with_sae.features() / FILE_NAME, {5: {"name": "nucleoli", "note": "see there"}})
    path = with_sae.root / "groups.csv"
    path.write_text("patient;group\np0;ill\np1;well\np2;ill\n")
    output = export(with_sae, "anndata", "--groups", path).output
    assert "has no group for 1 of 4 patients, such as 'p3'" in output
    images, patients = (read_anndata(with_sae.features() / f"{name}.h5ad") for name in ("images", "patients"))
    expected = {"p0": "ill", "p1": "well", "p2": "ill", "p3": None}
    for found in (images, patients):
        names = found.var["name"]
        assert names["latent_5"] == "nucleoli"
        assert names.isna().sum() == 95
    assert [group if isinstance(group, str) else None for group in patients.obs["group"]] == list(expected.values())
    for patient, group in zip(images.obs["patient"], images.obs["group"], strict=True):
        assert (group if isinstance(group, str) else None) == expected[patient]
    for kind, read in (("csv", pd.read_csv), ("parquet", pd.read_parquet)):
        export(with_sae, kind, "--groups", path)
        latents, patients, images = (
            read(with_sae.features() / f"table_{name}.{kind}") for name in ("latents", "patients", "images")
        )
        assert latents["name"][5] == "nucleoli"
        assert patients["group"].fillna("").tolist() == ["ill", "well", "ill", ""]
        assert set(images["group"].dropna()) == {"ill", "well"}


def test_groups_that_cannot_be_used_are_refused(with_sae, own):
    output = with_sae.run("export", "--sae_path", with_sae.sae(), "--groups", "g.csv", code=2).output
    assert "groups needs format anndata, csv, parquet or atlas, found format saelens" in output
    path = with_sae.root / "groups.csv"
    path.write_text("patient,group\nnobody,ill\n")
    assert "names none of the 4 patients" in export(with_sae, "csv", "--groups", path, code=1).output
    own.make(5, patients=("",))
    result = with_sae.run_plain(*own.arguments("csv", "--groups", path), code=1)
    assert "cannot be used: no image of store" in result.output


# --- anndata


@pytest.mark.parametrize("container", ["h5ad", "zarr"])
def test_anndata_holds_what_the_plain_computation_gives(with_sae, container):
    with_sae.run("features", "--dataset_name", "toy", "--sae_path", with_sae.sae(), "--top_k", 4)
    thresholds = ["--threshold", 0.5, "--threshold", 0.1]
    with_sae.run("patients", "--dataset_name", "toy", "--sae_path", with_sae.sae(), *thresholds)
    result = json.loads(export(with_sae, "anndata", "--anndata_as", container, "--json").stdout)
    folder = with_sae.features()
    assert result["files"] == [str(folder / f"{name}.{container}") for name in ("patients", "images")]
    assert (result["n_images"], result["n_patients"], result["n_latents"]) == (22, 4, 96)
    images, patients = (read_anndata(folder / f"{name}.{container}") for name in ("images", "patients"))

    scores, store = dense_scores(with_sae.store, with_sae.sae())
    assert images.X.format == "csr"
    assert (images.X.dtype, images.X.indices.dtype, images.X.indptr.dtype) == (np.float32, np.int32, np.int32)
    assert images.X.nnz == (scores > 0).sum()
    assert images.X.has_sorted_indices
    np.testing.assert_allclose(images.X.toarray(), scores, rtol=1e-4, atol=1e-6)
    assert list(images.obs_names) == [str(row) for row in store.valid_rows]
    for column in ("path", "label", "patient"):
        assert list(images.obs[column]) == [getattr(store.images, column)[row] for row in store.valid_rows]
    assert "broken" not in "".join(images.obs["path"])

    with np.load(folder / "patient_counts.npz") as raw:
        np.testing.assert_array_equal(patients.layers["counts"].toarray(), raw["counts"][0])
        assert patients.layers["counts"].dtype == np.int64
        assert list(patients.obs_names) == raw["patients"].tolist()
        assert patients.obs["n_images"].tolist() == raw["n_images"].tolist()
    np.testing.assert_array_equal(patients.X.toarray(), np.load(folder / "cls_sae_cnt.npy"))
    with (folder / "patients.csv").open(newline="") as file:
        assert patients.obs["labels"].tolist() == [row["labels"] for row in csv.DictReader(file)]

    for data in (images, patients):
        assert list(data.var_names) == [f"latent_{latent}" for latent in range(96)]
        for name in ("sparsity", "mean_acts"):
            wanted = torch.load(folder / f"sae_{name}.pt", weights_only=True).numpy()
            np.testing.assert_array_equal(data.var[name], wanted)
        assert data.var["dead"].dtype == bool
        assert data.var["dead"].tolist() == (scores == 0).all(axis=0).tolist()
        provenance = data.uns["cytosae_cache"]
        assert provenance["thresholds"].tolist() == [0.5, 0.1]
        assert (provenance["threshold"], provenance["normalize"], provenance["top_k"]) == (0.5, "image", 4)
        assert provenance["store_spec_hash"] == store.spec.hash
        assert provenance["sae_sha256"] == json.loads((folder / "features.json").read_text())["sae_sha256"]
        assert str(with_sae.root) not in str(dict(data.uns))


def test_what_is_missing_is_computed_first_and_only_then(with_sae):
    said = export(with_sae, "anndata").output
    assert "no results of `features`" in said
    assert "no results of `patients`" in said
    assert f"22 images and 4 patients x 96 latents as anndata\nwrote in {with_sae.features()}" in said
    assert "no results" not in export(with_sae, "anndata", "--overwrite").output


def test_scanpy_finds_planted_groups(own):
    """Patients of two groups, whose cells differ along one direction, fall apart along the first component."""
    n, patients = 240, [f"p{number:02d}" for number in range(12)]
    activations = make_activations(n).astype(np.float32)
    group = np.arange(n) % 12 % 2
    activations[:, :, 0] += 4 * group[:, None]
    table = ImageTable(
        [f"{row:05d}.png" for row in range(n)],
        [f"group{value}" for value in group],
        [patients[row % 12] for row in range(n)],
    )
    make_store(own.store, activations.astype(np.float16), table=table, shard_images=64)
    torch.manual_seed(1)
    sae = ReluSae(8, 40)
    with torch.no_grad():
        sae.W_enc.normal_()
    save_sae(own.sae, sae, {})
    run(own, "anndata")
    for name, column in (("patients", "labels"), ("images", "label")):
        data = anndata.read_h5ad(own.out / f"{name}.h5ad")
        scanpy.pp.log1p(data)
        scanpy.pp.pca(data, n_comps=3)
        first = data.obsm["X_pca"][:, 0]
        sides = pd.Series(first > 0).groupby(data.obs[column].to_numpy()).mean()
        assert abs(sides["group0"] - sides["group1"]) > 0.95, name


def run(own, kind, *more, code=0):
    """`export` in this process."""
    from click.testing import CliRunner

    from cytosae_pipeline.cli.app import cli

    result = CliRunner().invoke(cli, own.arguments(kind, *more))
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize("container", ["h5ad", "zarr"])
def test_images_without_patients_or_labels_are_missing_values(own, container):
    own.make(20, labels=("", "x"), patients=("only", "", "", ""), invalid=[5])
    run(own, "anndata", "--anndata_as", container)
    images = read_anndata(own.out / f"images.{container}")
    assert images.obs["patient"].isna().sum() == 19 - 5
    assert images.obs["label"].isna().sum() == 10
    assert "5" not in images.obs_names
    patients = read_anndata(own.out / f"patients.{container}")
    assert patients.obs["n_images"].to_dict() == {"only": 5}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables_say_what_they_were_made_from(with_sae, kind):
    export(with_sae, kind)
    about = json.loads((with_sae.features() / f"table_about_{kind}.json").read_text())
    record = json.loads((with_sae.features() / "patients.json").read_text())
    assert about["store_contents"] == record["store_contents"] == ActivationStore(with_sae.store).contents
    assert about["sae_sha256"] == record["sae_sha256"]
    assert about["thresholds"] == record["thresholds"]


@pytest.mark.parametrize("kind", ["anndata", "csv", "parquet"])
def test_a_store_without_any_patient_or_label_has_no_file_of_patients(own, kind):
    own.make(9, labels=("",), patients=("",))
    assert "has a patient: no file of patients is written" in run(own, kind).output
    tables = {f"table_latents.{kind}", f"table_images.{kind}", f"table_about_{kind}.json"}
    names = {"anndata": {"images.h5ad"}}.get(kind, tables)
    assert {path.name for path in own.out.iterdir()} == names
    if kind == "anndata":
        assert anndata.read_h5ad(own.out / "images.h5ad").obs["label"].isna().all()
    if kind == "csv":
        assert (pd.read_csv(own.out / "table_latents.csv")["label_entropy"] == -1).all()


@pytest.mark.parametrize("container", ["h5ad", "zarr"])
def test_more_than_two_billion_scores_find_room(tmp_path, container):
    with open_group(tmp_path / f"x.{container}", container) as (group, _):
        matrix = CsrScores(group, 2**16, 2**15)
        matrix.append(np.eye(3, 2**15, dtype=np.float32))
        matrix.append(np.eye(2, 2**15, dtype=np.float32))
        found = read_elem(group["X"])
    assert (found.indices.dtype, found.indptr.dtype) == (np.int64, np.int64)
    assert found.indptr.tolist() == [0, 1, 2, 3, 4, 5]
    assert found.indices.tolist() == [0, 1, 2, 0, 1]


def test_memory_does_not_grow_with_the_images(own, monkeypatch):
    """Whatever the writers are given at once is bounded by the batch, however many images there are."""
    given = {"entries": 0, "images": 0, "lines": 0}
    append, write = CsrScores.append, table_files.CsvTable.write

    def count_scores(self, scores):
        given["entries"] = max(given["entries"], scores.size)
        given["images"] += len(scores)
        append(self, scores)

    def count_lines(self, table):
        given["lines"] = max(given["lines"], *map(len, table.values()))
        write(self, table)

    monkeypatch.setattr(CsrScores, "append", count_scores)
    monkeypatch.setattr(table_files.CsvTable, "write", count_lines)
    own.make(1500)
    run(own, "anndata", "--batch_size", 8)
    run(own, "csv", "--batch_size", 8)
    assert given["images"] == 1500
    assert 8 <= given["entries"] <= 8 * 12
    assert 12 <= given["lines"] <= 8 * 12
    with h5py.File(own.out / "images.h5ad") as file:
        assert file["X/data"].shape[0] > 1500
        assert read_elem(file["X"]).shape == (1500, 12)


# --- csv and parquet


def read_csv(path):
    """A table with the sign against formulas taken off again."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = [[cell.removeprefix("'") for cell in line] for line in csv.reader(file, strict=True)]
    return pd.DataFrame(lines[1:], columns=lines[0])


def test_csv_and_parquet_hold_the_same(with_sae):
    export(with_sae, "csv")
    export(with_sae, "parquet")
    folder = with_sae.features()
    for name in ("latents", "patients", "images"):
        plain, frame = read_csv(folder / f"table_{name}.csv"), parquet.read_table(folder / f"table_{name}.parquet")
        assert list(plain.columns) == frame.column_names
        assert len(plain) == len(frame) > 0
        for column, values in frame.to_pandas().items():
            if values.dtype == object:
                assert list(plain[column]) == list(values.fillna("")), (name, column)
            elif values.dtype == bool:
                assert list(plain[column]) == list(map(str, values)), (name, column)
            else:
                np.testing.assert_array_equal(plain[column].astype(values.dtype), values, err_msg=f"{name} {column}")


def test_tables_hold_what_the_plain_computation_gives(with_sae):
    export(with_sae, "parquet")
    folder = with_sae.features()
    scores, store = dense_scores(with_sae.store, with_sae.sae())
    images = pd.read_parquet(folder / "table_images.parquet")
    assert list(images.columns) == ["row", "path", "label", "patient", "latent", "score"]
    assert images["score"].dtype == np.float32
    at, latents = scores.nonzero()
    np.testing.assert_array_equal(images["row"], store.valid_rows[at])
    np.testing.assert_array_equal(images["latent"], latents)
    np.testing.assert_allclose(images["score"], scores[at, latents], rtol=1e-3, atol=1e-6)
    for column in ("path", "label", "patient"):
        assert list(images[column]) == [getattr(store.images, column)[row] for row in images["row"]]
    patients = pd.read_parquet(folder / "table_patients.parquet")
    assert list(patients.columns[:4]) == ["patient", "n_images", "labels", "latent_0"]
    np.testing.assert_array_equal(patients.iloc[:, 3:], np.load(folder / "cls_sae_cnt.npy"))
    latents = pd.read_parquet(folder / "table_latents.parquet")
    assert list(latents["latent"]) == list(range(96))
    assert not latents["dead"].any()


def test_top_labels_are_weighed_by_activation(own):
    own.make(60, labels=("a", "", "c"))
    run(own, "parquet", "--dataset_name", "toy")
    scores, store = dense_scores(own.store, own.sae)
    table = pd.read_parquet(own.out / "table_latents.parquet")
    for latent in range(12):
        top = np.argsort(-scores[:, latent])[:10]
        mass = {name: sum(scores[row, latent] for row in top if store.images.label[row] == name) for name in "ac"}
        names = sorted((name for name in "ac" if mass[name] > 0), key=lambda name: -mass[name])
        line = table.iloc[latent]
        assert line["top_labels"].split(";") == names
        assert line["top_label"] == names[0]
        np.testing.assert_allclose(line["top_label_share"], mass[names[0]] / scores[top, latent].sum(), rtol=1e-4)


def test_names_of_any_kind_come_back(own):
    own.make(40, labels=HARD_NAMES, patients=HARD_NAMES)
    for kind in ("anndata", "csv", "parquet"):
        run(own, kind)
    tops = pd.read_parquet(own.out / "table_latents.parquet")["top_label"]
    assert set(tops) <= set(HARD_NAMES)
    run(own, "anndata", "--anndata_as", "zarr")
    store = ActivationStore.open(own.store)
    for container in ("h5ad", "zarr"):
        images = read_anndata(own.out / f"images.{container}")
        assert list(images.obs["label"]) == store.images.label
        assert list(images.obs["patient"]) == store.images.patient
        assert list(read_anndata(own.out / f"patients.{container}").obs_names) == sorted(HARD_NAMES)
    for frame in (pd.read_parquet(own.out / "table_images.parquet"), read_csv(own.out / "table_images.csv")):
        assert list(frame["label"]) == [store.images.label[int(row)] for row in frame["row"]]
    for frame in (pd.read_parquet(own.out / "table_patients.parquet"), read_csv(own.out / "table_patients.csv")):
        assert list(frame["patient"]) == list(frame["labels"]) == sorted(HARD_NAMES)


def test_no_text_of_a_csv_is_a_formula(own):
    own.make(40, labels=HARD_NAMES, patients=HARD_NAMES)
    run(own, "csv")
    for path in own.out.iterdir():
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file, strict=True))
        for line in lines:
            for column in ("path", "label", "patient", "labels", "top_label", "top_labels"):
                assert not line.get(column, "").startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
    with (own.out / "table_patients.csv").open(newline="", encoding="utf-8") as file:
        patients = {line["patient"] for line in csv.DictReader(file)}
    assert patients >= {"'=1+1", "'-x", "'@y", "''z", "plain"}


@pytest.mark.parametrize(
    "text", ["=1", "+1", "-1", "@a", "'a", "\ta", "\ra", "\na", "\uff1d1", "\uff0b1", "\uff0d1", "\uff20a"]
)
def test_formulas_are_escaped(text):
    assert escape_formula(text) == "'" + text
    assert escape_formula("a" + text) == "a" + text
    assert escape_formula("") == ""


def test_long_tables_are_handed_over_in_pieces():
    rng = np.random.default_rng(0)
    scores = np.maximum(rng.normal(size=(50, 7)), 0).astype(np.float32)
    names = [str(row) for row in range(50)]
    images = ImageTexts(np.arange(50) * 2, names, list(names), [None] * 50)
    pieces = []

    class Sink:
        def write(self, table):
            pieces.append(table)

    lines = LongScores(images, Sink(), lines_at_once=9)
    for start in range(0, 50, 16):
        lines.append(scores[start : start + 16])
    assert max(len(piece["row"]) for piece in pieces) == 9
    at, latents = scores.nonzero()
    np.testing.assert_array_equal(np.concatenate([piece["row"] for piece in pieces]), at * 2)
    np.testing.assert_array_equal(np.concatenate([piece["latent"] for piece in pieces]), latents)
    np.testing.assert_array_equal(np.concatenate([piece["score"] for piece in pieces]), scores[at, latents])
    assert [path for piece in pieces for path in piece["path"]] == [str(row) for row in at]


def test_parquet_is_written_in_row_groups(own, monkeypatch):
    monkeypatch.setattr(table_files, "LINES_AT_ONCE", 500)
    own.make(700)
    run(own, "parquet")
    file = parquet.ParquetFile(own.out / "table_images.parquet")
    sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
    assert len(sizes) > 3
    assert max(sizes) < 500 + 64 * 12


# --- whole or not at all


@pytest.mark.parametrize(("kind", "more"), [("anndata", ()), ("anndata", ("--anndata_as", "zarr")), ("parquet", ())])
def test_a_killed_export_leaves_nothing_under_its_names(own, kind, more):
    own.make(4000, n_latents=64)
    run(own, kind, *more)
    finals = sorted(own.out.iterdir())
    before = {path: modified(path) for path in finals}
    arguments = own.arguments(kind, *more, "--overwrite", "--batch_size", 8)
    child = subprocess.Popen(
        [sys.executable, "-c", "from cytosae_pipeline.cli.app import main; main()", *arguments],
        env={"PYTHONPATH": SOURCES, "OMP_NUM_THREADS": "1", "PATH": ""},
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + patience()
        while len(strays := sorted(own.out.glob("*images*.partial"))) < 1 and child.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        child.kill()
        code = child.wait()
    assert code == -signal.SIGKILL, "it ended before it could be killed"
    assert strays
    assert {path: modified(path) for path in finals} == before
    for path in finals:
        if path.is_file():
            path.unlink()
    run(own, kind, *more, "--overwrite")
    assert sorted(own.out.iterdir()) == finals


def modified(path):
    """When a file, or any in a folder, was changed."""
    return {item: item.stat().st_mtime_ns for item in [path, *path.rglob("*")]}


@pytest.mark.parametrize("kind", ["anndata", "csv", "parquet"])
def test_a_failing_export_leaves_nothing(own, monkeypatch, kind):
    own.make(40)

    def fail(*_):
        raise OSError("full")

    monkeypatch.setattr(CsrScores, "append", fail)
    monkeypatch.setattr(LongScores, "append", fail)
    assert "full" in run(own, kind, code=1).output
    assert not list(own.out.iterdir())


def test_a_folder_is_replaced_whole_and_strays_of_the_dead_go(tmp_path):
    path = tmp_path / "a.zarr"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f"a.zarr.{dead.pid}.partial").mkdir()
    (tmp_path / f"a.zarr-old.{dead.pid}.partial").mkdir()
    others = ["a.zarr.1.partial", f"a.zarr.b.{dead.pid}.partial", "a.zarr.x.partial", f"b.{dead.pid}.partial"]
    for name in others:
        (tmp_path / name).touch()
    path.mkdir()
    (path / "old").touch()

    def fail():
        with replacing_path(path) as temporary:
            temporary.mkdir()
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert [item.name for item in path.iterdir()] == ["old"]
    with replacing_path(path) as temporary:
        temporary.mkdir()
        (temporary / "new").touch()
        assert [item.name for item in path.iterdir()] == ["old"]
    assert [item.name for item in path.iterdir()] == ["new"]
    assert sorted(item.name for item in tmp_path.iterdir()) == sorted(["a.zarr", *others])


# --- what is refused


@pytest.mark.parametrize("kind", ["anndata", "csv", "parquet"])
def test_nothing_is_replaced_without_an_option(with_sae, kind):
    export(with_sae, kind)
    before = {path: path.stat().st_mtime_ns for path in with_sae.features().iterdir()}
    assert "Give another --out, or --overwrite" in export(with_sae, kind, code=1).output
    assert {path: path.stat().st_mtime_ns for path in with_sae.features().iterdir()} == before
    with_sae.run("features", "--dataset_name", "toy", "--sae_path", with_sae.sae())
    export(with_sae, kind, "--overwrite")
    with (with_sae.features() / "images.csv").open() as file:
        assert file.readline() == "row,path,label,patient,valid\n"


def test_folders_of_others_are_not_replaced(with_sae, tmp_path):
    out = tmp_path / "mine"
    (out / "images.zarr").mkdir(parents=True)
    (out / "images.zarr" / "zarr.json").write_text("{}")
    arguments = ["--anndata_as", "zarr", "--out", out, "--overwrite"]
    assert "is not what --format anndata writes" in export(with_sae, "anndata", *arguments, code=1).output
    (out / "table_images.csv").mkdir()
    assert "is not what --format csv writes" in export(with_sae, "csv", "--out", out, "--overwrite", code=1).output
    file = tmp_path / "x.h5ad"
    file.touch()
    assert "is a file; --format anndata writes several" in export(with_sae, "anndata", "--out", file, code=1).output


def test_options_that_contradict_each_other_are_refused(with_sae):
    sae = ["--sae_path", with_sae.sae()]
    output = with_sae.run("export", *sae, "--format", "anndata", code=1).output
    assert "name it with --dataset_name NAME or --store PATH" in " ".join(output.split())
    assert "format saelens writes the autoencoder alone" in export(with_sae, "saelens", code=2).output
    output = with_sae.run("export", *sae, "--store", with_sae.store, "--format", "reference", code=2).output
    assert "but store was given" in output
    assert "anndata_as zarr needs format anndata" in export(with_sae, "csv", "--anndata_as", "zarr", code=2).output
    output = with_sae.run("export", "--dataset_name", "toy", "--format", "csv", code=1).output
    assert "name the autoencoder" in output


@pytest.mark.parametrize(("kind", "package"), [("anndata", "h5py"), ("anndata", "anndata"), ("parquet", "pyarrow")])
def test_a_missing_package_is_named(with_sae, monkeypatch, kind, package):
    monkeypatch.setitem(sys.modules, package, None)
    output = export(with_sae, kind, code=1).output
    assert f'--format {kind} needs {package}: pip install ".[{kind}]"' in output
    assert not with_sae.features().exists()


def test_csv_needs_no_extra(with_sae, monkeypatch):
    for package in ("anndata", "h5py", "pandas", "pyarrow", "scipy"):
        monkeypatch.setitem(sys.modules, package, None)
    export(with_sae, "csv")
    assert Path(with_sae.features() / "table_images.csv").stat().st_size > 1000


def test_names_with_a_nul_are_refused(own):
    own.make(6, labels=("a\0b",))
    assert "contains a NUL byte" in run(own, "csv", code=1).output
