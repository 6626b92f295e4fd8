"""Where the files do not decide what is meant, `import` stops or says so; an option or the user decides."""

import os
import re
import shlex

import numpy as np
import pytest
import torch

from cytosae_cache.store import ActivationStore
from cytosae_pipeline.config import ImportConfig
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.importing.source import open_source
from cytosae_pipeline.importing.store import import_embeddings
from tests.conftest import Workplace

N, WIDTH = 6, 4


def _values(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape or (N, WIDTH)).astype(np.float32)


def _import(root, source, **options):
    options = {"dataset_name": "toy", "store_dtype": "float32", "root_dir": root, "source": source, **options}
    result = import_embeddings(ImportConfig(**options))
    return ActivationStore.open(result.store), result


def _write_h5(path, **arrays):
    import h5py

    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file[name] = values


def _write_table(path, columns):
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet

        rows = pa.array(list(_values()), type=pa.list_(pa.float32()))
        pyarrow.parquet.write_table(pa.table({**columns, "embedding": rows}), path)
    else:
        import anndata
        import pandas as pd

        frame = pd.DataFrame(columns, index=[f"c{row}" for row in range(N)])
        anndata.AnnData(_values(), obs=frame).write_h5ad(path)


ENDINGS = pytest.mark.parametrize("ending", ["parquet", "h5ad"])


@ENDINGS
@pytest.mark.parametrize(("label", "patient"), [("Label", "Patient"), ("cell_type", "patient_id"), ("LABEL", "Donor")])
def test_columns_are_recognised_as_in_a_manifest(tmp_path, caplog, ending, label, patient):
    caplog.set_level("INFO")
    _write_table(tmp_path / f"a.{ending}", {label: list("aabbcc"), patient: [7.0, None, 8.0, 8.0, 7.0, 7.0]})
    store, _ = _import(tmp_path, tmp_path / f"a.{ending}")
    assert store.images.label == list("aabbcc")
    assert store.images.patient == ["7", "", "8", "8", "7", "7"]
    assert f"column {label!r} is read as the label" in caplog.text
    assert f"column {patient!r} is read as the patient" in caplog.text
    assert "3 labels; 2 patients (1 rows without)" in caplog.text


@ENDINGS
def test_two_columns_that_may_be_the_label_need_an_option(tmp_path, ending):
    _write_table(tmp_path / f"a.{ending}", {"class": list("aabbcc"), "cell_type": list("xxxyyy")})
    with pytest.raises(
        UserError, match="'class' and 'cell_type' of .* may both be the label: choose one with --label_"
    ):
        _import(tmp_path, tmp_path / f"a.{ending}")
    store, _ = _import(tmp_path, tmp_path / f"a.{ending}", label_column="cell_type")
    assert store.images.label == list("xxxyyy")


def test_a_column_that_repeats_does_not_name_the_rows(tmp_path, caplog):
    caplog.set_level("INFO")
    _write_table(tmp_path / "a.parquet", {"image_name": list("aabbcc")})
    store, _ = _import(tmp_path, tmp_path / "a.parquet")
    assert store.images.path[0] == "a/0"
    assert "column 'image_name' repeats its values, so that it does not name the rows" in caplog.text


def test_rows_with_and_without_a_name_are_refused(tmp_path):
    _write_table(tmp_path / "a.parquet", {"path": ["a", "b", None, "c", "d", None]})
    with pytest.raises(UserError, match="2 of 6 rows of .* have no name: name all of them"):
        _import(tmp_path, tmp_path / "a.parquet")
    _write_table(tmp_path / "b.parquet", {"path": [None] * N})
    assert _import(tmp_path, tmp_path / "b.parquet")[0].images.path[0] == "b/0"


@ENDINGS
def test_words_that_mean_unknown_are_no_labels(tmp_path, caplog, ending):
    _write_table(tmp_path / f"a.{ending}", {"label": ["NA", "NaN", "nan", "None", "x", None], "patient": ["null"] * N})
    store, _ = _import(tmp_path, tmp_path / f"a.{ending}")
    assert (store.images.label, store.images.patient) == ([""] * 4 + ["x", ""], [""] * N)
    assert "labels read as unknown: 1 'NA', 1 'NaN'" in caplog.text
    assert "patients read as unknown: 6 'null'. Rename them if they are meant" in caplog.text


def test_labels_with_line_breaks_and_escapes_are_data_on_one_line(tmp_path):
    place = Workplace(tmp_path)
    _write_table(tmp_path / "a.parquet", {"label": ["a\nb", "a b", "\x1b[31mred", "x", "x", "x"]})
    output = place.run("import", tmp_path / "a.parquet", "--dataset_name", "toy").output
    assert "\x1b" not in output
    (tmp_path / "\x1b[31m.npy").write_bytes(b"x")
    output = place.run("import", tmp_path / "\x1b[31m.npy", "--dataset_name", "toy", code=1).output
    assert r"/\x1b[31m.npy' cannot be read as an array of numpy" in output
    (path,) = tmp_path.rglob("*.zarr")
    assert ActivationStore.open(path).images.label[:3] == ["a b", "a b", "\x1b[31mred"]


@pytest.mark.parametrize("dtype", ["Int64", "boolean", "string", "category"])
def test_types_of_pandas_with_gaps(tmp_path, dtype):
    import pandas as pd

    values = {"boolean": [True, None] * 3, "string": ["p", None] * 3, "category": ["p", None] * 3}.get(
        dtype, [1, None] * 3
    )
    _write_table(tmp_path / "a.h5ad", {"patient": pd.array(values, dtype=dtype)})
    store, _ = _import(tmp_path, tmp_path / "a.h5ad")
    assert store.images.patient == [str(values[0]), ""] * 3


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("label,age\na,1\n,\n\nb,2\nc,3\nd,4\ne,5\n", "line 4 is blank, and lines are counted against rows"),
        ("label\na\n\nb\nc\nd\ne\nf\n", "line 3 is blank"),
        ("label,age\na,1\n,\nb,2\nc,3\nd,4\ne,5\n", ["a", "", "b", "c", "d", "e"]),
        ('label\na\n""\nb\nc\nd\ne\n', ["a", "", "b", "c", "d", "e"]),
        ("\nlabel,age\na,1\nb,2\nc,3\nd,4\ne,5\nf,6\n,\n,\n\n", list("abcdef")),
        ("label,age\na,1\nb,2\nc,3\nd,4\ne,5\n,\n,\n", [*"abcde", ""]),
        ("label,age\na,1\nb,2\nc,3\nd,4\ne,5\n,6\n,7\n", "has 7 lines, but .* has 6 rows"),
        ("label\n", "has 0 lines, but .* has 6 rows"),
    ],
)
def test_every_line_of_a_csv_counts(tmp_path, text, labels):
    np.save(tmp_path / "a.npy", _values())
    (tmp_path / "l.csv").write_text(text)
    if isinstance(labels, str):
        with pytest.raises(UserError, match=labels):
            _import(tmp_path, tmp_path / "a.npy", labels=tmp_path / "l.csv")
    else:
        assert _import(tmp_path, tmp_path / "a.npy", labels=tmp_path / "l.csv")[0].images.label == labels


def test_slides_and_files_are_compared(tmp_path, caplog):
    for name in "abc":
        _write_h5(tmp_path / "h5" / f"{name}.h5", features=_values(0 if name == "b" else N, WIDTH))
    labels = tmp_path / "l.csv"
    labels.write_text("slide,label\na,x\nb,x\nc,y\nd,z\ne,z\n")
    store, _ = _import(tmp_path, tmp_path / "h5", labels=labels)
    assert store.n_images == 2 * N
    assert "2 of 5 slides have no file: 'd', 'e'" in caplog.text
    assert "1 file without rows, which the store will not mention: 'b.h5'" in caplog.text
    labels.write_text("slide,label\na,x\n")
    with pytest.raises(UserError, match="has no line for 2 of 3 files: slides 'b', 'c'"):
        _import(tmp_path, tmp_path / "h5", labels=labels)


def test_numbers_that_float16_cannot_hold_are_counted_or_refused(tmp_path):
    values = _values()
    values[0, 0], values[1] = 1e-9, 1e-6
    np.save(tmp_path / "a.npy", values)
    _, result = _import(tmp_path, tmp_path / "a.npy", store_dtype="float16")
    assert result.notes == (
        "in float16 1 of 24 values is so small that it became 0, and 1 row is below 6e-05 throughout, where few "
        "digits are left. To keep them, use --store_dtype float32",
    )
    assert not _import(tmp_path, tmp_path / "a.npy", store_dtype="float32")[1].notes
    np.save(tmp_path / "b.npy", 1e6 * np.ones((3, 4), np.float32))
    with pytest.raises(
        UserError, match=r"row 'b/0' of '.*b.npy' contains 1e\+06, beyond the range of float16 .*--store_"
    ):
        _import(tmp_path, tmp_path / "b.npy", store_dtype="float16")
    np.save(tmp_path / "c.npy", np.full((3, 4), np.nan, np.float32))
    with pytest.raises(UserError, match="no row of '.*c.npy' can be used, of 3 rows: each contains NaN or infinity"):
        _import(tmp_path, tmp_path / "c.npy")


def test_several_arrays_of_known_names_need_a_key(tmp_path):
    np.savez(tmp_path / "a.npz", features=_values(), feats=_values(seed=1))
    with pytest.raises(
        UserError, match=r"found: features \(6, 4\) float32, feats \(6, 4\) float32. Name it with --key"
    ):
        _import(tmp_path, tmp_path / "a.npz")
    np.testing.assert_array_equal(_import(tmp_path, tmp_path / "a.npz", key="feats")[0][:][:, 0], _values(seed=1))


def test_a_leading_axis_of_one_needs_coordinates_or_an_option(tmp_path):
    _write_h5(tmp_path / "a.h5", features=_values(1, N, WIDTH))
    with pytest.raises(
        UserError, match=r"shape \(1, 6, 4\) may be one row of 6 tokens or 6 rows: give --grid .*--grid rows"
    ):
        _import(tmp_path, tmp_path / "a.h5")
    rows, _ = _import(tmp_path, tmp_path / "a.h5", grid="rows")
    tokens, _ = _import(tmp_path, tmp_path / "a.h5", grid="2x3", n_cls=0)
    assert (rows.n_images, rows.n_tokens, tokens.n_images, tokens.n_tokens) == (6, 1, 1, 6)
    np.testing.assert_array_equal(rows[:][:, 0], tokens[:][0])
    _write_h5(tmp_path / "b.h5", features=_values(1, N, WIDTH), coords=np.arange(2 * N).reshape(1, N, 2))
    assert _import(tmp_path, tmp_path / "b.h5")[0].images.path[1] == "b/1_x2_y3"
    with pytest.raises(UserError, match="has 6 coordinates, .*--grid 2x3 makes it one row of 6 tokens. Leave out"):
        _import(tmp_path, tmp_path / "b.h5", grid="2x3", n_cls=0)


def test_vectors_and_tables_are_not_mixed(tmp_path):
    _write_h5(tmp_path / "h5" / "a.h5", features=_values(WIDTH))
    _write_h5(tmp_path / "h5" / "b.h5", features=_values())
    with pytest.raises(UserError, match=r"a.h5' contains one vector, as of a whole slide, and '.*b.h5' 6 rows: move"):
        _import(tmp_path, tmp_path / "h5")


def test_only_the_files_of_a_folder_itself_are_read(tmp_path, caplog):
    caplog.set_level("INFO")
    folder = tmp_path / "npy"
    (folder / "sub").mkdir(parents=True)
    np.save(folder / "a.npy", _values())
    np.save(tmp_path / "outside.npy", _values())
    (folder / "b.npy").symlink_to(tmp_path / "outside.npy")
    (folder / "notes.txt").write_text("x")
    assert _import(tmp_path, folder)[0].n_images == N
    for text in (
        "1 link out of the folder not followed: 'b.npy'. Copy the files instead",
        "1 folder passed over: 'sub'",
        "other files passed over: 1 '.txt'",
    ):
        assert text in caplog.text
    np.save(folder / "A.npy", _values())
    (folder / "A.npy").rename(folder / "a.NPY")
    with pytest.raises(UserError, match="would be one slide, 'a': rename or remove one"):
        _import(tmp_path, folder)
    (folder / "a.NPY").rename(folder / os.fsdecode(b"\xff.npy"))
    with pytest.raises(UserError, match="is not UTF-8; rename it"):
        _import(tmp_path, folder)


def test_a_file_that_changes_during_the_import_is_refused(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, _values())
    source = open_source(ImportConfig(source=path, dataset_name="toy"))
    source.hash()
    np.save(path, _values(seed=1))
    os.utime(path, ns=(0, 0))
    with pytest.raises(UserError, match="a.npy' changed while it was imported. Run the command again"):
        list(source.read_rows(2))
    with pytest.raises(UserError, match="changed while it was imported"):
        source.hash()


def test_tensors_that_are_views(tmp_path):
    torch.save(torch.from_numpy(_values(WIDTH, N)).T, tmp_path / "a.pt")
    np.testing.assert_array_equal(_import(tmp_path, tmp_path / "a.pt")[0][:][:, 0], _values(WIDTH, N).T)
    torch.save({0: torch.from_numpy(_values())}, tmp_path / "b.pt")
    np.testing.assert_array_equal(_import(tmp_path, tmp_path / "b.pt")[0][:][:, 0], _values())
    torch.save(torch.ones(WIDTH).expand(10**9, WIDTH), tmp_path / "c.pt")
    with pytest.raises(UserError, match="repeats its numbers: its shape .* takes 16,000,000,000 bytes, the file has"):
        _import(tmp_path, tmp_path / "c.pt")
    torch.save([torch.ones(WIDTH)], tmp_path / "d.pt")
    with pytest.raises(UserError, match="found list of Tensor. Save one tensor with a row each"):
        _import(tmp_path, tmp_path / "d.pt")
    torch.save({f"{row}.png": torch.ones(WIDTH) for row in range(20)}, tmp_path / "e.pt")
    with pytest.raises(UserError, match="found 20 vectors: 0.png .* and 10 more. Stack them into one array"):
        _import(tmp_path, tmp_path / "e.pt")


def test_arrays_that_were_not_written_to_their_end(tmp_path):
    import h5py

    with h5py.File(tmp_path / "a.h5", "w") as file:
        data = file.create_dataset("features", shape=(100, WIDTH), dtype="f4", chunks=(10, WIDTH))
        data[:30] = 1
    with pytest.raises(UserError, match="'features' in .* has 3 of 10 chunks: it was not written to its end"):
        _import(tmp_path, tmp_path / "a.h5")
    with (tmp_path / "a.npy").open("wb") as out:
        np.save(out, _values())
        np.save(out, _values())
    with pytest.raises(UserError, match="goes on for .* bytes after its array of shape .* saved to twice"):
        _import(tmp_path, tmp_path / "a.npy")


def test_tables_without_a_column_of_lists_say_how_to_make_one(tmp_path):
    import pandas as pd

    pd.DataFrame(_values(), columns=list("abcd")).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="has 4 columns of numbers, 'a' to 'd', but no column of lists. Make them one"):
        _import(tmp_path, tmp_path / "a.parquet")
    pd.DataFrame({"e": [[1.0, 2.0], [1.0]]}).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(UserError, match="row 1 of column 'e' in .* has 1 numbers, expected 2 as in the first row"):
        _import(tmp_path, tmp_path / "b.parquet")


def test_sparse_and_linked_parts_of_an_anndata_are_named(tmp_path):
    import anndata
    import h5py
    import scipy.sparse

    anndata.AnnData(scipy.sparse.csr_matrix(_values())).write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(UserError, match=r"found: X \(6, 4\) csr_matrix"):
        _import(tmp_path, tmp_path / "a.h5ad")
    _write_table(tmp_path / "b.h5ad", {"label": list("aabbcc")})
    with h5py.File(tmp_path / "b.h5ad", "r+") as file:
        del file["obs"]
        file["obs"] = h5py.ExternalLink(str(tmp_path / "a.h5ad"), "/obs")
    with pytest.raises(UserError, match="'obs' in .* lies in another file: links are not followed"):
        _import(tmp_path, tmp_path / "b.h5ad")


def test_the_next_command_trains_on_the_store_that_was_made(tmp_path):
    place = Workplace(tmp_path / "my root")

    def run_next(output, *options):
        words = shlex.split(re.search("next: cytosae-cache (.*)", output)[1])
        return words, place.run(*words, "--n_checkpoints", "0", "--device", "cpu", "--expansion_factor", "2", *options)

    np.save(tmp_path / "cells.npy", _values())
    words, trained = run_next(place.run("import", tmp_path / "cells.npy", "--dataset_name", "toy").output)
    assert words[-2:] == ["--total_training_tokens", "600"]
    assert "--store" not in words
    assert "final_sparse_autoencoder_cells_imported_resid_8.pt" in trained.output
    np.save(tmp_path / "cells.npy", _values(seed=1))
    output = place.run("import", tmp_path / "cells.npy", "--dataset_name", "toy").output
    assert "data set 'toy' has another store that was imported under the name 'cells' from other files" in output
    words, _ = run_next(output)
    assert words[words.index("--store") + 1].endswith(".zarr")


def test_a_run_of_an_earlier_version_keeps_its_file_name(tmp_path):
    place = Workplace(tmp_path)
    np.save(tmp_path / "cells.npy", _values())
    place.run("import", tmp_path / "cells.npy", "--dataset_name", "toy")
    place.train("--run_name", "r")
    (path,) = tmp_path.rglob("final_*_imported_*.pt")
    path.rename(path.with_name(path.name.replace("_imported_", "_-2_")))
    assert "already trained" in place.train("--run_name", "r").output
    assert not list(tmp_path.rglob("final_*_imported_*.pt"))
