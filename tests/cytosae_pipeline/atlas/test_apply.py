"""New patients of the demo's cohort find their group, known images are inside, foreign ones outside."""

import csv
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cytosae_pipeline
from cytosae.analysis.outside import known_share
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.atlas import apply as apply_module
from cytosae_pipeline.atlas import new_images
from cytosae_pipeline.atlas.apply import BARCODES, CELLS, PATIENTS, ApplyResult, Neighbour, PlacedPatient
from cytosae_pipeline.atlas.reading import read_atlas
from cytosae_pipeline.demo.cells import Stain
from cytosae_pipeline.demo.cohort import make_cell, plan_cohort, write_cohort
from tests.support.pictures import write_vit

N_KNOWN, N_NEW, N_CELLS = 24, 9, 16


@dataclass
class Place:
    """An atlas of most patients of a cohort, and lists of the cells of both parts."""

    root: Path
    atlas: Path
    new: Path
    groups: dict[str, str]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    cells = plan_cohort(seed=0, n_patients_per_group=(N_KNOWN + N_NEW) // 3, cells_per_patient=N_CELLS)
    write_cohort(root / "cells", cells, size=112)
    for name, kept in (("known", lambda at: at < N_KNOWN), ("new", lambda at: at >= N_KNOWN)):
        lines = [f"{cell.path},{cell.label},{cell.patient}" for cell in cells if kept(int(cell.patient[1:]))]
        (root / "cells" / f"{name}.csv").write_text("\n".join(["path,label,patient", *lines]) + "\n")
    here = {"root_dir": root, "dataset_name": "known"}
    cytosae_pipeline.build_store(**here, images=root / "cells" / "known.csv", model_path="embedded")
    run = cytosae_pipeline.train_sae(
        **here, expansion_factor=4, total_training_tokens=1600, batch_size=16, l1_coefficient=0.0005, lr=0.001,
        lr_warm_up_steps=20, n_checkpoints=0, precision="fp32", held_out=0.65, held_out_by="patient",
    )  # fmt: skip
    made = cytosae_pipeline.export_atlas(
        **here, sae_path=run.sae, out=root / "known.atlas", groups=root / "cells" / "patients.csv"
    )
    assert made.seen == "held out"
    assert made.n_compared >= 200
    groups = {cell.patient: cell.group for cell in cells}
    return Place(root, made.folder, root / "cells" / "new.csv", groups)


@pytest.fixture(scope="module")
def placed(demo):
    return cytosae_pipeline.apply(
        demo.atlas, images=demo.new, model_path="embedded", out=demo.root / "placed", workers=0
    )


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_new_patients_find_their_group(demo, placed):
    assert len(placed.patients) == N_NEW
    right = [max(one.probability, key=one.probability.get) == demo.groups[one.name] for one in placed.patients]
    assert np.mean(right) > 0.6
    near = [other.group == demo.groups[one.name] for one in placed.patients for other in one.nearest]
    assert np.mean(near) > 0.5  # 1/3 by chance
    for one in placed.patients:
        assert sum(one.probability.values()) == pytest.approx(1)
        assert [other.correlation for other in one.nearest] == sorted(
            (o.correlation for o in one.nearest), reverse=True
        )


def test_new_images_of_the_same_kind_are_inside(placed):
    # At most 0.01 is expected, on average over atlases and for images drawn alike; patients differ, too.
    assert placed.n_images == N_NEW * N_CELLS
    assert placed.n_outside / placed.n_images <= 0.05
    assert placed.n_outside == sum(one.n_outside for one in placed.patients)


def test_foreign_images_are_outside(demo, tmp_path):
    rng = np.random.default_rng(0)
    for kind in ("noise", "stripes", "stain"):
        (tmp_path / kind).mkdir()
        for number in range(20):
            if kind == "noise":
                picture = Image.fromarray(rng.integers(0, 256, (112, 112, 3), dtype=np.uint8))
            elif kind == "stripes":
                wave = np.sin(np.arange(112) * rng.uniform(0.2, 2)) * 120 + 128
                picture = Image.fromarray(np.repeat(np.tile(wave, (112, 1))[..., None], 3, 2).astype(np.uint8))
            else:  # inverted colours of the stain
                plain = make_cell("lymphocyte", np.random.default_rng(number), size=112, stain=Stain())
                picture = Image.fromarray(255 - np.asarray(plain))
            picture.save(tmp_path / kind / f"{number}.png")
        found = cytosae_pipeline.apply(
            demo.atlas, images=tmp_path / kind, model_path="embedded", out=tmp_path / f"{kind}-out", workers=0
        )
        assert found.n_outside / found.n_images > 0.7, kind
        assert [one.name for one in found.patients] == ["(all images)"]
        # Paths are shown as the user gave them.
        assert rows_of(tmp_path / f"{kind}-out" / CELLS)[0]["path"] == str(tmp_path / kind / "0.png")
        assert not (tmp_path / f"{kind}-out" / "activations.work").exists()


def test_the_tables_agree_with_the_plain_computation(demo, placed):
    """Everything of cells.csv and patients.csv, computed again in float64 from a store of the same images."""
    store = cytosae_pipeline.build_store(
        root_dir=demo.root, dataset_name="new", images=demo.new, model_path="embedded", workers=0
    )
    atlas = read_atlas(demo.atlas)
    sae, reference = atlas.sae.double(), atlas.reference
    x = torch.from_numpy(store[np.arange(store.n_images)]).double()
    with torch.no_grad():
        acts = sae.encode(x)
        again = sae.decode(acts)
    scores = acts.mean(dim=1).numpy()
    unexplained = ((x - again) ** 2).sum(dim=2).mean(dim=1).numpy() / reference.variance
    highest = np.array([row[-2] for row in reference.quantiles])
    unusual = [(row > np.maximum(highest, 0)).sum() / max(1, (row > 0).sum()) for row in scores]
    rows = rows_of(placed.folder / CELLS)
    assert [row["path"] for row in rows] == list(store.images.path)
    assert [row["patient"] for row in rows] == list(store.images.patient)
    np.testing.assert_allclose([float(row["unexplained"]) for row in rows], unexplained, rtol=1e-4)
    np.testing.assert_allclose([float(row["unusual"]) for row in rows], unusual, atol=0.02)
    written = np.array([[float(row["unexplained"]), float(row["unusual"])] for row in rows])
    share = known_share(np.stack([reference.unexplained, reference.unusual], axis=1), written)
    np.testing.assert_allclose([float(row["known_share"]) for row in rows], share, atol=0.02)
    assert [row["outside"] == "yes" for row in rows] == [float(row["known_share"]) <= 0.01 for row in rows]
    for row, own in zip(rows[:20], scores[:20], strict=True):
        best = [int(row[f"latent_{at}"]) for at in range(1, 6)]
        np.testing.assert_allclose(own[best], np.sort(own)[::-1][:5], rtol=1e-4)
        np.testing.assert_allclose([float(row[f"score_{at}"]) for at in range(1, 6)], own[best], rtol=1e-4)
    found = cytosae_pipeline.patient_counts(demo.atlas / "sae.safetensors", store)
    barcodes = rows_of(placed.folder / BARCODES)
    for at, name in enumerate(found.names):
        counts = np.zeros(atlas.n_latents, dtype=np.int64)
        for row in barcodes:
            if row["patient"] == name:
                counts[int(row["latent"])] = int(row["tokens"])
        np.testing.assert_array_equal(counts, found.counts[0][at])
        per_image = counts / found.n_images[at]
        every = np.corrcoef(np.log1p(np.concatenate([per_image[None], atlas.barcodes.per_image])))[0, 1:]
        row = rows_of(placed.folder / PATIENTS)[at]
        assert row["patient"] == name
        assert row["nearest_1"] == atlas.barcodes.names[int(every.argmax())]
        assert float(row["correlation_1"]) == pytest.approx(every.max(), rel=1e-4)


def test_a_store_gives_the_same_as_its_images(demo, placed, tmp_path):
    store = cytosae_pipeline.build_store(
        root_dir=demo.root, dataset_name="new", images=demo.new, model_path="embedded", workers=0
    )
    found = cytosae_pipeline.apply(demo.atlas, store=str(store.path), out=tmp_path / "a", batch_size=8)
    assert found.patients == placed.patients
    for name in (CELLS, PATIENTS, BARCODES):
        assert (tmp_path / "a" / name).read_bytes() == (placed.folder / name).read_bytes()


def place(with_sae, *arguments, code=0):
    return with_sae.run_plain("apply", with_sae.root / "toy.atlas", *arguments, code=code)


@pytest.fixture
def toy(with_sae):
    with_sae.run(
        "export", "--dataset_name", "toy", "--sae_path", with_sae.sae(), "--format", "atlas", "--out",
        with_sae.root / "toy.atlas",
    )  # fmt: skip
    return with_sae


def test_the_command_writes_tables_and_says_what_they_mean(toy):
    arguments = ("--images", toy.images, "--layout", "class/patient", "--model_path", toy.vit, "--workers", 0)
    output = place(toy, *arguments, "--outside", 0.2).output
    assert "are outside of what the atlas knows; of images like its own, 20.0% are expected" in output
    assert "1 image could not be read" in output
    assert "the autoencoder of the atlas was trained on the images with which new ones are compared" in output
    folder = toy.root / "dataset" / "toy.placed"
    rows = rows_of(folder / CELLS)
    assert len(rows) == 23
    (unread,) = (row for row in rows if row["outside"] == "unreadable")
    assert unread["path"].endswith("broken.png")
    assert (
        "exists already. Give another --out, or --overwrite" in place(toy, *arguments, "--outside", 0.2, code=1).output
    )
    output = place(toy, *arguments, "--outside", 0.2, "--overwrite", "--json", "--top", 0, "--nearest", 9).stdout
    found = json.loads(output)
    assert [len(one["nearest"]) for one in found["patients"]] == [4] * 4
    assert found["n_unreadable"] == 1
    assert "latent_1" not in rows_of(folder / CELLS)[0]
    # Each patient is nearest to itself.
    assert all(one["nearest"][0]["correlation"] == pytest.approx(1) for one in found["patients"])


def test_groups_come_with_a_warning(toy):
    groups = toy.root / "groups.csv"
    groups.write_text("patient,group\np0,ill\np1,well\np2,ill\np3,well\n")
    toy.run(
        "export", "--dataset_name", "toy", "--sae_path", toy.sae(), "--format", "atlas", "--out",
        toy.root / "toy.atlas", "--groups", groups, "--overwrite",
    )  # fmt: skip
    output = place(toy, "--store", toy.store, "--outside", 0.3).output
    assert "Percentages of groups are of a model of the atlas' patients, no diagnosis" in output
    row = rows_of(Path(f"{toy.store}.placed") / PATIENTS)[0]
    assert float(row["probability ill"]) + float(row["probability well"]) == pytest.approx(1, abs=1e-4)


def test_activations_of_another_kind_are_refused(toy, tmp_path):
    write_vit(tmp_path / "other.pth", seed=5)
    output = place(
        toy, "--images", toy.images, "--layout", "class/patient", "--model_path", tmp_path / "other.pth", "--out",
        tmp_path / "a", "--outside", 0.3, "--workers", 0, code=1,
    ).output  # fmt: skip
    assert "does not give the activations that atlas" in output
    assert "weights_sha256: " in output
    assert not (tmp_path / "a" / "activations.work").exists()  # nothing was computed
    toy.run("build", "--dataset_name", "b", "--images", toy.images, "--layout", "class", "--model_path", toy.vit,
            "--block_layer", -3, "--workers", 0)  # fmt: skip
    (store,) = (toy.root / "out/activations/b").glob("*.zarr")
    arguments = ("--store", store, "--outside", 0.3, "--out", tmp_path / "b")
    output = place(toy, *arguments, code=1).output
    assert "does not give the activations that atlas" in output
    assert "block: 1, 2" in output
    assert "ignoring a mismatch (found, atlas): block: 1, 2" in place(toy, *arguments, "--allow-mismatch").output


def test_options_are_checked(toy, tmp_path):
    assert "found neither" in place(toy, code=2).output
    assert "found both" in place(toy, "--images", toy.images, "--store", "x", code=2).output
    assert "images needs model_path" in place(toy, "--images", toy.images, code=2).output
    assert "model_path is for images" in place(toy, "--store", "x", "--model_path", "y", code=2).output
    assert "layout is for images" in place(toy, "--store", "x", "--layout", "class", code=2).output
    with pytest.raises(cytosae_pipeline.UserError, match="name the atlas: a folder that was written by"):
        cytosae_pipeline.apply(None, store="x")
    output = place(toy, "--store", toy.store, "--out", tmp_path / "o", code=1).output
    assert "is smaller than any share that 11 reference images can show" in output
    assert "give at least 0.0833" in output
    output = place(toy, "--store", "s3://bucket/new.zarr", "--outside", 0.5, code=1).output
    assert "name the folder to write into with --out: 's3://bucket/new.zarr' is a URL" in output
    output = toy.run_plain("apply", tmp_path, "--store", toy.store, code=1).output
    assert "is not an atlas: expected a folder with manifest.json" in output


def test_patients_are_named_where_there_are_some(toy, tmp_path):
    pictures = sorted(path for path in toy.images.rglob("*.png") if path.name != "broken.png")[:6]
    listed = toy.images / "some.csv"
    listed.write_text(
        "path,label,patient\n"
        + "\n".join(f"{path.relative_to(toy.images)},,{'=new' if at < 4 else ''}" for at, path in enumerate(pictures))
    )
    arguments = ("--images", listed, "--model_path", toy.vit, "--outside", 0.3, "--workers", 0, "--out", tmp_path / "o")
    assert "2 images have no patient: in cells.csv alone" in place(toy, *arguments).output
    assert [row["patient"] for row in rows_of(tmp_path / "o" / PATIENTS)] == ["'=new"]
    assert [row["patient"] for row in rows_of(tmp_path / "o" / CELLS)].count("") == 2
    shutil.rmtree(tmp_path / "o")
    (toy.images / "bad.csv").write_text("path\nneutrophil/p2/broken.png\n")
    output = place(
        toy, "--images", toy.images / "bad.csv", "--model_path", toy.vit, "--outside", 0.3, "--workers", 0,
        "--out", tmp_path / "o", code=1,
    ).output  # fmt: skip
    assert "could be read" in output
    assert not (tmp_path / "o" / CELLS).exists()


def test_imported_embeddings_need_a_store(toy, tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(12, 24)).astype(np.float32))
    toy.run("import", tmp_path / "x.npy", "--dataset_name", "vectors")
    toy.run(
        "export", "--dataset_name", "vectors", "--sae_path", toy.sae(), "--format", "atlas", "--allow_mismatch",
        "--out", tmp_path / "v.atlas",
    )  # fmt: skip
    arguments = ("apply", tmp_path / "v.atlas", "--outside", 0.5, "--out", tmp_path / "o")
    output = toy.run_plain(*arguments, "--images", toy.images, "--model_path", toy.vit, code=1).output
    assert "is of embeddings that another program computed" in output
    (store,) = (toy.root / "out/activations/vectors").glob("*.zarr")
    assert "outside of what the atlas knows" in toy.run_plain(*arguments, "--store", store).output
    assert ActivationStore.open(store).spec.imported


def test_what_was_built_is_kept_until_the_tables_are_written(toy, tmp_path, monkeypatch):
    arguments = ("--images", toy.images, "--layout", "class/patient", "--model_path", toy.vit, "--workers", 0,
                 "--outside", 0.3, "--out", tmp_path / "o")  # fmt: skip

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(apply_module, "place_patients", fail)
        assert "o" in place(toy, *arguments, code=1).output
    (store,) = (tmp_path / "o" / "activations.work").rglob("*.zarr")
    assert not (tmp_path / "o" / CELLS).exists()
    before, removed = (store / "zarr.json").stat().st_mtime_ns, []
    monkeypatch.setattr(new_images.shutil, "rmtree", lambda path, **_: removed.append(path))
    place(toy, *arguments)
    assert removed == [tmp_path / "o" / "activations.work"]
    assert (store / "zarr.json").stat().st_mtime_ns == before  # not built again
    assert (tmp_path / "o" / CELLS).exists()


def test_names_of_a_foreign_atlas_cannot_control_a_terminal():
    near = Neighbour("patient-1", "a\x1b[2J\nb", 0.5)
    patient = PlacedPatient("p\n", 1, 0, [near], {"c\n": 1.0})
    result = ApplyResult(Path("o"), [], 1, 0, 0, 0.01, "patient", 0.5, [patient])
    assert len(result.describe().splitlines()) == 4
    assert "\x1b" not in result.describe()
