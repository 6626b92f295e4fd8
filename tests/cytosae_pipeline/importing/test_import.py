"""`import`: embeddings of every kind of file become a store with the same numbers, on which all verbs work."""

import csv
import errno
import json
import os

import numpy as np
import pytest
import torch

from cytosae_cache.errors import StoreError, StoreMismatchError
from cytosae_cache.store import ActivationStore
from cytosae_cache.verify import verify_store
from cytosae_cache.writer import StoreWriter
from cytosae_pipeline.config import ImportConfig
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.importing.store import NOT_FINITE, import_embeddings
from tests.conftest import Workplace
from tests.support.browser import Visit, browser_or_skip, file_url
from tests.support.stores import read_files

N, WIDTH = 23, 12


def _values(n=N, *tokens, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, *tokens, WIDTH)).astype(np.float32)


def _write_h5(path, values, coords=True, key="features") -> None:
    import h5py

    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file[key] = values
        if coords:
            n = values.shape[-2]
            file["coords"] = np.stack([256 * np.arange(n), np.full(n, 512)], axis=1)


def _write_npy(path, values) -> None:
    np.save(path, values)


def _write_npz(path, values) -> None:
    np.savez_compressed(path, features=values, coordinates=np.zeros((len(values), 2), int))


def _write_pt(path, values) -> None:
    torch.save(torch.from_numpy(values), path)


def _write_pt_dict(path, values) -> None:
    torch.save({"features": torch.from_numpy(values), "note": "uni"}, path)


def _write_parquet(path, values) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    rows = pa.array(list(values), type=pa.list_(pa.float32()))
    pyarrow.parquet.write_table(pa.table({"embedding": rows}), path, row_group_size=5)


def _write_h5ad(path, values) -> None:
    import anndata

    anndata.AnnData(values).write_h5ad(path)


WRITERS = [
    ("h5", _write_h5), ("npy", _write_npy), ("npz", _write_npz), ("pt", _write_pt), ("pt", _write_pt_dict),
    ("parquet", _write_parquet), ("h5ad", _write_h5ad),
]  # fmt: skip


def _import(root, source, **options):
    options = {"dataset_name": "toy", "store_dtype": "float32", "shard_images": 5, **options}
    result = import_embeddings(ImportConfig(root_dir=root, source=source, **options))
    return ActivationStore.open(result.store), result


@pytest.mark.parametrize(("ending", "write"), WRITERS)
def test_every_kind_of_file_gives_its_numbers(tmp_path, ending, write):
    source, values = tmp_path / f"cells.{ending}", _values()
    write(source, values)
    store, result = _import(tmp_path, source)
    assert (result.status, result.n_images, result.n_tokens, result.d_model) == ("imported", N, 1, WIDTH)
    assert verify_store(store).sound
    assert store.spec.imported
    assert store.spec.model_name == "cells"
    # Names are in the order of the file, except for those of obs, which are sorted as texts.
    order = np.argsort([str(row) for row in range(N)], kind="stable") if ending == "h5ad" else np.arange(N)
    np.testing.assert_array_equal(store[:][:, 0], values[order])
    assert _import(tmp_path, source)[1].status == "already complete"


@pytest.mark.parametrize("kind", ["float16", "int8"])
def test_stores_of_other_types(tmp_path, kind):
    _write_npy(tmp_path / "a.npy", _values())
    store, _ = _import(tmp_path, tmp_path / "a.npy", store_dtype=kind)
    np.testing.assert_allclose(store[:][:, 0], _values(), atol=0.05)
    assert verify_store(store).sound


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_sources_of_other_types(tmp_path, dtype):
    _write_npy(tmp_path / "a.npy", _values().astype(dtype))
    store, _ = _import(tmp_path, tmp_path / "a.npy")
    np.testing.assert_array_equal(store[:][:, 0], _values().astype(dtype).astype(np.float32))


def test_bfloat16_tensors(tmp_path):
    torch.save(torch.from_numpy(_values()).bfloat16(), tmp_path / "a.pt")
    store, _ = _import(tmp_path, tmp_path / "a.pt")
    np.testing.assert_array_equal(store[:][:, 0], torch.from_numpy(_values()).bfloat16().float().numpy())


def test_a_folder_of_slides_is_one_store_with_the_slides_labels(tmp_path):
    folder, sizes = tmp_path / "h5", {"s10": 4, "s2": 9, "s2b": 0, "t": 7}
    for seed, (name, n) in enumerate(sizes.items()):
        values = _values(n, seed=seed)
        # TRIDENT's older files have a leading axis of one slide.
        _write_h5(folder / f"{name}.h5", values[None] if name == "t" else values)
    (folder / ".hidden.h5").write_text("x")
    (tmp_path / "labels.csv").write_text(
        "slide,label,patient,ignored\n" + "".join(f"{name},L{len(name)},P-{name},1\n" for name in sizes)
    )
    store, _ = _import(tmp_path, folder, labels=tmp_path / "labels.csv")
    assert store.n_images == 20
    assert store.images.path[0] == "s10/0_x0_y512"
    assert store.images.path[4] == "s2/0_x0_y512"
    assert store.images.patient[:5] == ["P-s10"] * 4 + ["P-s2"]
    assert set(store.images.label) == {"L3", "L2", "L1"}
    expected = np.concatenate([_values(n, seed=seed) for seed, n in enumerate(sizes.values())])
    np.testing.assert_array_equal(store[:][:, 0], expected)


@pytest.mark.parametrize("ending", ["h5", "pt", "npz"])
def test_embeddings_of_whole_slides_are_one_row_each(tmp_path, ending):
    folder = tmp_path / "slides"
    folder.mkdir()
    for row, values in enumerate(_values(3)):
        path = folder / f"s{row}.{ending}"
        if ending == "h5":
            import h5py

            with h5py.File(path, "w") as file:
                file["features"], file["coords"] = values, np.zeros((50, 2), int)
        else:
            (_write_pt if ending == "pt" else lambda path, values: np.savez(path, features=values))(path, values)
        (folder / f"s{row}.meta.json").write_text("{}")
    store, _ = _import(tmp_path, folder)
    assert store.images.path == ["s0/0", "s1/0", "s2/0"]
    np.testing.assert_array_equal(store[:][:, 0], _values(3))


def test_rows_are_named_and_sorted_by_a_csv(tmp_path):
    _write_npy(tmp_path / "a.npy", _values())
    names = [f"cell {(7 * row) % N}" for row in range(N)]
    with (tmp_path / "cells.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["path", "patient", "label"], *([name, f"p{row % 3}", f"l{row % 2}"] for row, name in enumerate(names))]
        )
    store, _ = _import(tmp_path, tmp_path / "a.npy", labels=tmp_path / "cells.csv")
    assert store.images.path == sorted(names)
    for place, name in enumerate(store.images.path):
        row = names.index(name)
        np.testing.assert_array_equal(store[place][0], _values()[row])
        assert (store.images.label[place], store.images.patient[place]) == (f"l{row % 2}", f"p{row % 3}")
    assert verify_store(store).sound
    assert not [path for path in store.path.parent.iterdir() if path.suffix not in (".zarr", ".lock")]


@pytest.mark.parametrize("ending", ["parquet", "h5ad"])
def test_labels_patients_and_names_are_columns_of_the_file(tmp_path, ending):
    names, kinds = [f"c{row:02d}" for row in range(N)], ["x" if row % 2 else None for row in range(N)]
    columns = {"path": names, "cell_type": kinds, "donor": [row % 4 for row in range(N)]}
    if ending == "parquet":
        import pyarrow as pa
        import pyarrow.parquet

        rows = pa.FixedSizeListArray.from_arrays(pa.array(_values().ravel()), WIDTH)
        pyarrow.parquet.write_table(pa.table({**columns, "uni": rows, "other": rows}), tmp_path / "a.parquet")
    else:
        import anndata
        import pandas as pd

        frame = pd.DataFrame(columns, index=names)
        frame["cell_type"] = frame["cell_type"].astype("category")
        obsm = {"uni": _values(), "other": _values(seed=1)}
        anndata.AnnData(obs=frame, obsm=obsm).write_h5ad(tmp_path / "a.h5ad")
    source = tmp_path / f"a.{ending}"
    with pytest.raises(UserError, match="must contain one array of embeddings, found: .*Name it with --key"):
        _import(tmp_path, source)
    store, _ = _import(tmp_path, source, key="uni", label_column="cell_type", patient_column="donor")
    assert store.images.path == names
    assert store.images.label == ["x" if row % 2 else "" for row in range(N)]
    assert store.images.patient == [str(row % 4) for row in range(N)]
    np.testing.assert_array_equal(store[:][:, 0], _values())


def test_tokens_need_a_grid(tmp_path):
    _write_npy(tmp_path / "a.npy", _values(6, 7))
    with pytest.raises(UserError, match="each row of .* has 7 tokens: say what they are, for example --grid 2x2"):
        _import(tmp_path, tmp_path / "a.npy")
    with pytest.raises(UserError, match="make 5 tokens, but each row of .* has 7"):
        _import(tmp_path, tmp_path / "a.npy", grid="2x2")
    with pytest.raises(UserError, match="grid must be ROWSxCOLUMNS"):
        _import(tmp_path, tmp_path / "a.npy", grid="4")
    store, _ = _import(tmp_path, tmp_path / "a.npy", grid="2x3")
    assert (store.spec.tokens.n_cls, store.spec.tokens.grid) == (1, (2, 3))
    np.testing.assert_array_equal(store[:], _values(6, 7))


def test_rows_that_are_not_finite_are_set_aside(tmp_path):
    values = _values()
    values[3, 2], values[8, 0] = np.nan, np.inf
    _write_npy(tmp_path / "a.npy", values)
    store, result = _import(tmp_path, tmp_path / "a.npy")
    assert result.n_skipped == 2
    assert np.flatnonzero(~store.valid).tolist() == [3, 8]
    assert str(store.column("images/reason")[3]) == NOT_FINITE
    assert verify_store(store).sound


def test_a_killed_import_resumes_and_ends_with_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1767225600")
    _write_npy(tmp_path / "a.npy", _values())
    whole, _ = _import(tmp_path / "whole", tmp_path / "a.npy")
    submit, n_submitted = StoreWriter.submit, []

    def kill(self, data):
        if len(n_submitted) == 2:
            raise KeyboardInterrupt
        n_submitted.append(1)
        submit(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "submit", kill)
        with pytest.raises(KeyboardInterrupt):
            _import(tmp_path / "killed", tmp_path / "a.npy")
    (path,) = (tmp_path / "killed").rglob("*.zarr")
    assert ActivationStore(path).n_finished_shards == 2
    place = Workplace(tmp_path / "killed")
    message = place.run("train", "--dataset_name", "toy", code=1).output
    assert "unfinished" in message
    assert "same `cytosae-cache import` command" in message
    resumed, result = _import(tmp_path / "killed", tmp_path / "a.npy")
    assert result.status == "resumed"
    assert read_files(resumed.path) == read_files(whole.path)


def test_a_source_or_labels_that_changed_are_never_taken_for_the_old_ones(tmp_path):
    _write_npy(tmp_path / "a.npy", _values())
    options = {"model_name": "uni"}
    before, _ = _import(tmp_path, tmp_path / "a.npy", **options)
    _write_npy(tmp_path / "a.npy", _values(seed=1))
    with pytest.raises(StoreMismatchError, match="was made from something else"):
        _import(tmp_path, tmp_path / "a.npy", **options)
    after, _ = _import(tmp_path, tmp_path / "a.npy", overwrite=True, **options)
    assert after.path == before.path
    np.testing.assert_array_equal(ActivationStore.open(after.path)[:][:, 0], _values(seed=1))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "cannot be written: No space left on device .* free some space, then run the command again"),
        (errno.EROFS, "cannot be written: Read-only file system. Make the folder writable, or use another --root_dir"),
    ],
)
def test_errors_of_the_disk_name_the_store(tmp_path, monkeypatch, code, message):
    def fail(file, data):
        raise OSError(code, os.strerror(code))

    _write_npy(tmp_path / "a.npy", _values())
    monkeypatch.setattr("cytosae_cache.storage.local.write_all", fail)
    with pytest.raises(StoreError, match=f"store '{tmp_path}/out/activations/toy/.*' {message}"):
        _import(tmp_path, tmp_path / "a.npy")


def test_a_disk_that_is_too_small_is_reported_before_anything_is_written(tmp_path, monkeypatch):
    _write_npy(tmp_path / "a.npy", _values())
    whole, _ = _import(tmp_path, tmp_path / "a.npy")
    monkeypatch.setattr("cytosae_pipeline.building.store_place.free_bytes", lambda store: 100)
    with pytest.raises(StoreError, match=r"the store needs .*, but only 100 .*free at .*use another --root_dir"):
        _import(tmp_path, tmp_path / "a.npy", dataset_name="other")
    assert not list((tmp_path / "out" / "activations" / "other").rglob("*.json"))
    store, result = _import(tmp_path, tmp_path / "a.npy")
    assert (store.path, result.status) == (whole.path, "already complete")


def test_one_network_is_recognised_by_its_name_alone(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        _write_npy(tmp_path / f"{name}.npy", _values(seed=seed))
    named = [_import(tmp_path, tmp_path / f"{x}.npy", dataset_name=x, model_name="uni")[0] for x in "ab"]
    unnamed = [_import(tmp_path, tmp_path / f"{x}.npy", dataset_name=x)[0] for x in "ab"]
    assert named[0].spec == named[1].spec
    assert unnamed[0].spec.weights_sha256 != unnamed[1].spec.weights_sha256


def test_all_verbs_work_on_the_store(tmp_path):
    place = Workplace(tmp_path / "my root")
    source = tmp_path / "slides"
    for seed, name in enumerate(("s1", "s2", "s3", "s4")):
        _write_h5(source / f"{name}.h5", _values(6, seed=seed))
    (tmp_path / "l.csv").write_text("slide,label,patient\n" + "".join(f"s{i},L{i % 2},P{i}\n" for i in (1, 2, 3, 4)))
    output = place.run("import", source, "--dataset_name", "toy", "--labels", tmp_path / "l.csv").output
    assert f"next: cytosae-cache train --root_dir '{place.root}' --dataset_name toy" in output
    place.train("--run_name", "r")
    options = ("--dataset_name", "toy", "--sae_path", place.sae())
    for verb in ("features", "patients", "classes"):
        place.run(verb, *options)
    place.run("report", *options, "--figures", "--masking_images", 20)
    place.run("export", *options, "--format", "csv")
    assert "imported" in place.run("list").output
    shown = json.loads(place.run("info", "--dataset_name", "toy", "--json").stdout)
    assert shown["spec"]["imported"] is True
    text = place.run("info", "--dataset_name", "toy").output
    assert "imported: True" in text
    assert not {"preprocessing", "n_blocks", "device"} & {line.strip().split(":")[0] for line in text.splitlines()}
    assert "sound" in place.run("verify", "--dataset_name", "toy").output
    output = place.run("verify", "--dataset_name", "toy", "--deep", "--model_path", "embedded", code=1).output
    assert "there is no network to ask" in output
    output = place.train("--run_name", "p", "--tokens", "patches", code=1).output
    assert "have no patches" in output
    with browser_or_skip() as browser:
        visit = Visit(browser, file_url(place.features() / "report"))
        page = visit.page
        notices = " ".join(page.locator(".notice").all_inner_texts())
        assert "it has no pictures" in notices
        assert "there are no heat maps" in notices
        latent = page.evaluate("() => state.overview.featured[0]")
        visit.go(f"latent/{latent}")
        page.wait_for_selector(".top-image")
        assert "single token" in page.locator("#view").inner_text()
        assert page.locator("text=Heat map").count() == 0
        page.locator(".top-image").first.click()
        page.wait_for_selector(".image-page")
        assert page.locator(".patch").count() == 0
        assert page.locator(".latent-row").count() > 0
        visit.close()


def test_the_explorer_serves_it(tmp_path):
    from cytosae_pipeline.config import ExploreConfig
    from cytosae_pipeline.report.data.report_data import open_report_data
    from cytosae_pipeline.report.explore.service import ExploreService
    from cytosae_pipeline.report.measures.extras import find_extras
    from cytosae_pipeline.report.records.choice import choose_latents, image_rows
    from cytosae_pipeline.report.records.images import make_image_book
    from cytosae_pipeline.report.records.overview import overview_record

    place = Workplace(tmp_path)
    _write_npy(tmp_path / "a.npy", _values())
    place.run("import", tmp_path / "a.npy", "--dataset_name", "toy")
    place.train("--run_name", "r")
    data = open_report_data(ExploreConfig(root_dir=tmp_path, dataset_name="toy", sae_path=place.sae()), profiles=False)
    latents, reason = choose_latents(data, explore=True)
    rows = image_rows(data, latents)
    book, extras = make_image_book(data), find_extras(data)
    overview = overview_record(
        data,
        latents,
        reason,
        rows,
        thumbnails=False,
        masking=None,
        messages=[],
        book=book,
        has_map=False,
        explore=True,
        extras=extras,
    )
    assert overview["store"]["grid"] == [0, 0]
    with ExploreService(data, latents, overview, None, None, book, extras) as service:
        assert service is not None


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: np.save(path, _values().astype(int)), "expected floating-point numbers"),
        (lambda path: np.save(path, np.asfortranarray(_values())), "is in Fortran order"),
        (lambda path: np.save(path, _values()[0, 0]), r"must have shape \(rows, D\), \(rows, tokens, D\) or \(D,\)"),
        (lambda path: np.save(path, _values()[None, None]), "must have shape"),
        (lambda path: np.save(path, np.array([{}], dtype=object)), "expected floating-point numbers"),
        (lambda path: path.write_bytes(b"x" * 100), "cannot be read as an array of numpy: the magic string"),
        (lambda path: (np.save(path, _values()), path.write_bytes(path.read_bytes()[:-50])), "it was truncated"),
    ],
)
def test_other_arrays_are_refused(tmp_path, write, message):
    write(tmp_path / "a.npy")
    with pytest.raises(UserError, match=message):
        _import(tmp_path, tmp_path / "a.npy")


def test_nothing_in_a_file_is_executed_or_followed(tmp_path):
    import h5py

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"features": Bomb()}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="contains Python objects, which are never executed. Expected tensors alone"):
        _import(tmp_path, tmp_path / "a.pt")
    assert not (tmp_path / "executed").exists()
    _write_h5(tmp_path / "secret.h5", _values())
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"] = h5py.ExternalLink("secret.h5", "/features")
    with pytest.raises(UserError, match="must contain one array of embeddings, .*found: none"):
        _import(tmp_path, tmp_path / "a.h5")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize(
    "names", [("slide", "label", "patient", "age"), ("slide_id", "Cell type", "Patient ID", "case, or age")]
)
def test_labels_are_read_as_other_programs_write_them(tmp_path, caplog, encoding, separator, names):
    with (tmp_path / "l.csv").open("w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter=separator).writerows([names, [" a", "größer ", "P 1", "7"]])
    _write_npy(tmp_path / "a.npy", _values(2))
    caplog.set_level("INFO")
    store, _ = _import(tmp_path, tmp_path / "a.npy", labels=tmp_path / "l.csv")
    assert (store.images.label, store.images.patient) == (["größer"] * 2, ["P 1"] * 2)
    assert f"columns that are not read: {names[3]!r}" in caplog.text
    assert ("column 'slide_id' is read as the slide" in caplog.text) == (names[0] == "slide_id")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04\x14\0\x06\0", "is an Excel workbook or a ZIP archive: --labels takes a CSV"),
        (b"label\n\xe4\n", "is not UTF-8: .* Save it as UTF-8"),
        (b"", "must have the columns label or patient"),
        (b"class,celltype\nx,y\n", "columns 'class' and 'celltype' of .* may both be the label: rename the right one"),
        (b"label,label\nx,y\n", "must have the columns label or patient, each once"),
        (None, "cannot be read: Is a directory. --labels takes a CSV"),
    ],
)
def test_other_files_are_no_labels(tmp_path, data, message):
    _write_npy(tmp_path / "a.npy", _values())
    if data is None:
        (tmp_path / "l.csv").mkdir()
    else:
        (tmp_path / "l.csv").write_bytes(data)
    with pytest.raises(UserError, match=message):
        _import(tmp_path, tmp_path / "a.npy", labels=tmp_path / "l.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label\nx\n", "has 1 lines, but '.*' has 23 rows: expected one line per row"),
        ("slide,label\nother,x\n", "has no line for 1 of 1 files: slides 'a'"),
        ("slide,label\na,x\na,y\n", "has two different lines for slide 'a'"),
        ("name\nx\n", "must have the columns label or patient"),
        ("path,label\n" + "same,x\n" * N, "two rows of .* are named 'same'"),
        ("slide,label\na\n", "line 2: expected 2 cells, found 1"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, text, message):
    _write_npy(tmp_path / "a.npy", _values())
    (tmp_path / "l.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        _import(tmp_path, tmp_path / "a.npy", labels=tmp_path / "l.csv")


def test_sources_that_do_not_fit_are_refused(tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for source, message in (
        (None, "name the embeddings"),
        (tmp_path / "none.h5", "does not exist: expected a file ending in .h5"),
        (folder, "must contain files of one kind, .*found none"),
    ):
        with pytest.raises(UserError, match=message):
            _import(tmp_path, source)
    _write_npy(folder / "a.npy", _values())
    np.save(folder / "b.npy", _values()[:, :5])
    with pytest.raises(UserError, match="one store has one shape"):
        _import(tmp_path, folder)
    _write_pt(folder / "c.pt", _values())
    with pytest.raises(UserError, match=r"several kinds \(.npy, .pt\)"):
        _import(tmp_path, folder)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="is of an unknown kind"):
        _import(tmp_path, tmp_path / "a.txt")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    for ending, package, extra in (
        ("h5", "h5py", "h5"),
        ("parquet", "pyarrow", "parquet"),
        ("h5ad", "anndata", "anndata"),
    ):
        (tmp_path / f"a.{ending}").write_bytes(b"x")
        with monkeypatch.context() as patch:
            patch.setitem(__import__("sys").modules, package, None)
            with pytest.raises(UserError, match=rf'needs {package}: pip install "\.\[{extra}\]"'):
                _import(tmp_path, tmp_path / f"a.{ending}")


def test_shards_have_about_one_size_whatever_the_rows_are(tmp_path, monkeypatch):
    monkeypatch.setattr("cytosae_pipeline.importing.store._SHARD_BYTES", 1000)
    _write_npy(tmp_path / "a.npy", _values())
    _write_npy(tmp_path / "b.npy", _values(6, 4))
    assert _import(tmp_path, tmp_path / "a.npy", shard_images=None)[0].shard_images == 1000 // (4 * WIDTH)
    store, _ = _import(tmp_path, tmp_path / "b.npy", dataset_name="b", shard_images=None, grid="2x2", n_cls=0)
    assert store.shard_images == 1000 // (16 * WIDTH)
    np.testing.assert_array_equal(store[:], _values(6, 4))


def test_labels_of_rows_that_both_files_name_are_joined_by_name(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    values = _values(3)
    rows = pa.array(list(values), type=pa.list_(pa.float32()))
    pyarrow.parquet.write_table(pa.table({"path": ["c0", "c1", "c2"], "embedding": rows}), tmp_path / "a.parquet")
    (tmp_path / "l.csv").write_text("path,label\nc2,two\nc0,zero\nc1,one\n")
    config = ImportConfig(
        root_dir=tmp_path, dataset_name="cells", source=tmp_path / "a.parquet", labels=tmp_path / "l.csv",
        store_dtype="float32",
    )  # fmt: skip
    store = ActivationStore.open(import_embeddings(config).store)
    assert store.images.path == ["c0", "c1", "c2"]
    assert store.images.label == ["zero", "one", "two"]
    np.testing.assert_array_equal(np.stack([store[row] for row in range(3)])[:, 0], values)
    for text, message in (("c2,two\nc0,zero\nc3,one", "no line for row 'c1'"), ("c0,a\nc1,b\nc1,c", "row 'c2'")):
        (tmp_path / "l.csv").write_text(f"path,label\n{text}\n")
        with pytest.raises(UserError, match=f"both name the rows, but the CSV has .*{message}"):
            import_embeddings(config)


def test_a_column_that_was_named_must_exist(tmp_path):
    _write_parquet(tmp_path / "a.parquet", _values(3))
    config = {"root_dir": tmp_path, "dataset_name": "cells", "source": tmp_path / "a.parquet"}
    with pytest.raises(UserError, match=r"has no column 'celltype' \(label_column\); found 'embedding'"):
        import_embeddings(ImportConfig(**config, label_column="celltype"))
