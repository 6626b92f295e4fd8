"""An atlas contains what it says and nothing that names a person; what is damaged or made up is refused."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

import cytosae_pipeline
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.atlas import reading
from cytosae_pipeline.atlas.contents import FILES, LEVELS, MANIFEST, NOTES, REFERENCE, SAE, AtlasError
from cytosae_pipeline.atlas.export import clean_note
from cytosae_pipeline.atlas.reading import read_atlas
from cytosae_pipeline.atlas.reference import score_quantiles, token_variance
from cytosae_pipeline.atlas.writing import sign
from cytosae_pipeline.statistics.notes import FILE_NAME, write_notes
from tests.support.nursery import SOURCES
from tests.support.patience import patience


def export(place, *arguments, code=0):
    return place.run(
        "export", "--dataset_name", "toy", "--sae_path", place.sae(), "--format", "atlas",
        "--out", place.root / "toy.atlas", *arguments, code=code,
    )  # fmt: skip


@pytest.fixture
def groups(with_sae):
    path = with_sae.root / "groups.csv"
    path.write_text("patient,group\np0,ill\np1,well\np2,ill\np3,well\n")
    return path


def test_an_atlas_contains_what_was_found(with_sae, groups):
    with_sae.run("features", "--dataset_name", "toy", "--sae_path", with_sae.sae())
    write_notes(with_sae.features() / FILE_NAME, {5: {"name": "nucleoli", "note": "dark\x1b[31m"}})
    output = export(with_sae, "--groups", groups).output
    folder = with_sae.root / "toy.atlas"
    assert "atlas of 22 images, 4 patients and 96 latents (1 with a name or note)" in output
    assert "the autoencoder was trained on images of the atlas" in output
    assert f"key of the pseudonyms (not part of the atlas; keep it secret): {folder}.key" in output
    assert {path.name for path in folder.iterdir()} == {MANIFEST, *FILES}
    atlas, store = read_atlas(folder), ActivationStore.open(with_sae.store)
    assert atlas.spec == store.spec
    assert atlas.notes == {5: {"name": "nucleoli", "note": "dark[31m"}}
    assert atlas.name_of(5) == "nucleoli"
    assert atlas.name_of(6) == ""
    stats = cytosae_pipeline.feature_stats(with_sae.sae(), store)
    np.testing.assert_array_equal(atlas.reference.sparsity, stats.sparsity)
    np.testing.assert_array_equal(atlas.reference.mean_acts, stats.mean_acts)
    np.testing.assert_array_equal(atlas.reference.label_means, stats.specificity.label_means)
    np.testing.assert_array_equal(atlas.reference.label_active, stats.specificity.label_active)
    assert atlas.reference.labels == ("blast", "lymphocyte", "neutrophil")
    found = cytosae_pipeline.patient_counts(with_sae.sae(), store)
    assert sorted(map(tuple, atlas.barcodes.counts.tolist())) == sorted(map(tuple, found.counts[0].tolist()))
    assert sorted(atlas.barcodes.n_images.tolist()) == sorted(found.n_images.tolist())
    assert atlas.barcodes.names == tuple(sorted(atlas.barcodes.names))
    assert atlas.barcodes.group_names == ("ill", "well")
    assert atlas.quality is not None
    # The images that new ones are compared with are not those that quantiles are of.
    assert (atlas.reference.n_scored, len(atlas.reference.unexplained)) == (11, 11)
    assert atlas.reference.seen == "trained on"
    assert (with_sae.root / "toy.atlas.key").stat().st_size == 32


def test_quantiles_and_variance_are_those_of_numpy(with_sae):
    rng = np.random.default_rng(0)
    scores = rng.exponential(size=(50, 600)).astype(np.float32)
    found = score_quantiles(scores)
    assert found.shape == (600, len(LEVELS))
    for latent in (0, 255, 256, 599):
        np.testing.assert_allclose(found[latent], np.quantile(scores[:, latent].astype(np.float64), LEVELS), rtol=1e-6)
    store = ActivationStore.open(with_sae.store)
    tokens = store[store.valid_rows].astype(np.float64).reshape(-1, store.d_model)
    expected = ((tokens - tokens.mean(axis=0)) ** 2).sum(axis=1).mean()
    assert token_variance(store.moments) == pytest.approx(expected, rel=1e-9)


def test_no_file_of_an_atlas_names_a_person_an_image_or_a_place(with_sae, tmp_path):
    manifest = tmp_path / "cells.csv"
    names = ["Ada Lovelace", "Grace Hopper", "Mary Somerville", "Emmy Noether"]
    pictures = sorted(path for path in with_sae.images.rglob("*.png") if path.name != "broken.png")
    lines = [f"{path},{path.parts[-3]},{names[at % 4]}" for at, path in enumerate(pictures)]
    listed = with_sae.images / "listed.csv"
    relative = [line.replace(f"{with_sae.images}/", "") for line in lines]
    listed.write_text("path,label,patient\n" + "\n".join(relative) + "\n")
    manifest.unlink(missing_ok=True)
    source = ("--dataset_name", "secret-study", "--images", listed)
    with_sae.run("build", *source, "--model_path", with_sae.vit, "--workers", 0)
    with_sae.run("export", *source[:2], "--sae_path", with_sae.sae(), "--format", "atlas", "--out", tmp_path / "a")
    secrets = [*names, *(word for name in names for word in name.split()), "secret-study", "listed.csv", "toy",
               str(with_sae.root), with_sae.root.name + "/", "dataset", *(path.name for path in pictures)]  # fmt: skip
    secrets = [word for word in secrets if word != "toy"]
    for path in (tmp_path / "a").iterdir():
        data = path.read_bytes()
        for secret in secrets:
            for text in (secret.encode(), secret.encode("utf-16-le"), hashlib.sha256(secret.encode()).digest()):
                assert text not in data, (path.name, secret)
        for magic in (b"\x89PNG", b"\xff\xd8\xff\xe0", b"JFIF", b"GIF8", (tmp_path / "a.key").read_bytes()):
            assert magic not in data
        for picture in pictures:
            assert picture.read_bytes()[40:80] not in data
            assert hashlib.sha256(picture.read_bytes()).digest() not in data
    store = ActivationStore.open(next((with_sae.root / "out/activations/secret-study").glob("*.zarr")))
    manifest = (tmp_path / "a" / MANIFEST).read_text()
    assert store.provenance.list_digest not in manifest
    assert store.contents not in manifest
    with (tmp_path / "a" / SAE).open("rb") as file:
        assert store.provenance.list_digest.encode() not in file.read()


def test_subjects_are_pooled(with_sae):
    table = with_sae.root / "people.csv"
    table.write_text("patient,subject\np0,x\np1,x\np2,y\np3,z\n")
    export(with_sae, "--covariates", table)
    atlas = read_atlas(with_sae.root / "toy.atlas")
    assert atlas.barcodes.unit == "subject"
    assert all(name.startswith("subject-") for name in atlas.barcodes.names)
    found = cytosae_pipeline.patient_counts(with_sae.sae(), with_sae.store)
    pooled = [found.counts[0][:2].sum(axis=0), found.counts[0][2], found.counts[0][3]]
    assert sorted(map(tuple, atlas.barcodes.counts.tolist())) == sorted(tuple(one.tolist()) for one in pooled)
    assert atlas.barcodes.n_images.sum() == found.n_images.sum()


def test_names_of_persons_and_images_in_texts_are_warned_of(with_sae):
    with_sae.run("features", "--dataset_name", "toy", "--sae_path", with_sae.sae())
    notes = {
        3: {"name": "as in p1, very", "note": ""},
        4: {"name": "", "note": "see 003.png"},
        5: {"name": "p10", "note": ""},
    }
    write_notes(with_sae.features() / FILE_NAME, notes)
    output = export(with_sae).output
    assert (
        "names of patients go into the atlas, 1 time: the note of latent 3 contains 'p1'. Change these texts" in output
    )
    assert "names of image files go into the atlas, 1 time: the note of latent 4 contains" in output
    assert clean_note({"name": "a\nb\u202e", "note": "c\n\td\x00"}) == {"name": "ab", "note": "c\n\td"}


def test_an_atlas_is_replaced_only_if_asked_and_only_an_atlas(with_sae):
    export(with_sae)
    key = (with_sae.root / "toy.atlas.key").read_bytes()
    names = read_atlas(with_sae.root / "toy.atlas").barcodes.names
    assert "exists already. Give another --out, or --overwrite" in export(with_sae, code=1).output
    export(with_sae, "--overwrite")
    assert (with_sae.root / "toy.atlas.key").read_bytes() == key
    assert read_atlas(with_sae.root / "toy.atlas").barcodes.names == names
    (with_sae.root / "toy.atlas" / "thesis.txt").write_text("mine")
    assert "is not an atlas, and is not replaced. Give another --out" in export(with_sae, "--overwrite", code=1).output
    assert (with_sae.root / "toy.atlas" / "thesis.txt").exists()


def test_options_that_an_atlas_needs(with_sae, groups):
    output = with_sae.run("export", "--sae_path", with_sae.sae(), "--format", "atlas", code=1).output
    assert "--format atlas needs the data set: name it with --dataset_name NAME or --store PATH" in output
    with pytest.raises(cytosae_pipeline.UserError, match="export_atlas writes format atlas, found format csv"):
        cytosae_pipeline.export_atlas(sae_path=with_sae.sae(), store=with_sae.store, format="csv")
    with_sae.run(
        "build", "--dataset_name", "flat", "--images", with_sae.images, "--layout", "class", "--model_path",
        with_sae.vit, "--workers", 0,
    )  # fmt: skip
    arguments = ("export", "--dataset_name", "flat", "--sae_path", with_sae.sae(), "--format", "atlas")
    assert "cannot be used: no image of store" in with_sae.run(*arguments, "--groups", groups, code=1).output
    result = cytosae_pipeline.export_atlas(
        root_dir=with_sae.root, dataset_name="flat", sae_path=with_sae.sae(), out=with_sae.root / "flat.atlas"
    )
    assert (result.n_patients, result.key, result.seen) == (0, None, "not recorded")
    assert read_atlas(result.folder).barcodes.names == ()


def test_a_killed_export_leaves_no_half_atlas(with_sae):
    export(with_sae)
    folder = with_sae.root / "toy.atlas"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    hold = (
        "import time; from cytosae_pipeline.atlas import writing, export\n"
        "whole = writing.write_notes\n"
        "def slow(path, notes):\n    whole(path, notes); time.sleep(600)\n"
        "writing.write_notes = slow\n"
        "from cytosae_pipeline.cli.app import main; main()"
    )
    arguments = ["export", "--root_dir", with_sae.root, "--dataset_name", "toy", "--sae_path", with_sae.sae(),
                 "--format", "atlas", "--out", folder, "--overwrite"]  # fmt: skip
    child = subprocess.Popen(
        [sys.executable, "-c", hold, *map(str, arguments)],
        env={"PYTHONPATH": SOURCES, "OMP_NUM_THREADS": "1", "PATH": ""}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + patience()
        while not list(with_sae.root.glob(f"toy.atlas.*.partial/{NOTES}")) and child.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        child.kill()
        code = child.wait()
    assert code == -signal.SIGKILL
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    export(with_sae, "--overwrite")
    assert not list(with_sae.root.glob("*.partial"))
    read_atlas(folder)


@pytest.fixture
def atlas(with_sae):
    export(with_sae)
    return with_sae.root / "toy.atlas"


def forge(folder, change=lambda manifest: None, *, arrays=None, **files):
    """A made-up atlas whose digests are right."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    if arrays is not None:
        found = load_arrays((folder / REFERENCE).read_bytes())
        arrays(found)
        files[REFERENCE] = save_arrays(found)
    for name, data in files.items():
        (folder / name).write_bytes(data)
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(sign(manifest)))


def setting(**values):
    return lambda manifest: manifest.update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (setting(format="other"), "is not the manifest of an atlas: its format is not"),
        (setting(version=2), "has version 2 of the format, this program reads version 1"),
        (setting(n_latents=1 << 50), "n_latents must be a whole number above 0, found 1125899906842624"),
        (setting(n_latents=True), "n_latents must be a whole number above 0, found True"),
        (setting(n_images=0), "n_images must be a whole number above 0, found 0"),
        (setting(n_latents=1 << 30), "quantiles of reference.safetensors must be float32 of shape"),
        (setting(threshold=-1), "threshold must be a number of at least 0, found -1"),
        (setting(variance="x"), "variance must be a number above 0, found 'x'"),
        (setting(patients=["a", "a"]), "patients must be different names of at most"),
        (setting(labels=["x" * 5000]), "labels must be different names of at most"),
        (setting(groups=[1]), "groups must be different names of at most"),
        (setting(levels=[0.5]), "its quantiles are of other levels"),
        (setting(tokens="some"), "tokens must be one of all, patches, cls, found 'some'"),
        (setting(seen=None), "seen must be one of held out, trained on, not recorded, found None"),
        (setting(groups=["g"], predicted_groups=["g"], balanced_accuracy=9), "balanced_accuracy must lie between"),
        (setting(groups=["g"], predicted_groups=["g", "h"], balanced_accuracy=1), "groups that are not in groups"),
        (
            setting(groups=["g", "h"], predicted_groups=["g", "h"], balanced_accuracy=1),
            "is predicted, but has fewer than two patients",
        ),
        (setting(files={}), "files must be sae.safetensors, reference.safetensors, latent_notes.json"),
        (setting(files={name: None for name in FILES}), "bytes, expected None: it is damaged"),
        (setting(spec={}), "the store's spec cannot be read"),
    ],
)  # fmt: skip
def test_made_up_manifests_are_refused(atlas, change, message):
    forge(atlas, change)
    with pytest.raises(AtlasError, match=".*") as error:
        read_atlas(atlas)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("unusual"), "contains other arrays than an atlas has"),
        (lambda a: a.update(sparsity=a["sparsity"].astype(np.float64)), "sparsity of reference.safetensors must be f"),
        (lambda a: a["sparsity"].fill(np.nan), "sparsity of reference.safetensors must be finite and lie in 0 to 1"),
        (lambda a: a["patient_groups"].fill(7), "patient_groups of reference.safetensors must be finite and lie in -1"),
        (lambda a: a["patient_images"].fill(0), "patient_images of reference.safetensors must be finite and lie in 1"),
        (lambda a: a.update(quantiles=a["quantiles"][:, ::-1].copy()), "quantiles of reference.safetensors must rise"),
    ],
)  # fmt: skip
def test_made_up_arrays_are_refused(atlas, change, message):
    forge(atlas, arrays=change)
    with pytest.raises(AtlasError) as error:
        read_atlas(atlas)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (NOTES, b"[", "latent_notes.json is not a file of latent notes"),
        (NOTES, b"[" * 100_000, "latent_notes.json is not a file of latent notes"),
        (NOTES, b'{"notes": {"0": {"name": 1}}}', "latent_notes.json is not a file of latent notes"),
        (NOTES, b'{"notes": {"96": {"name": "x"}}}', "latent_notes.json names latents outside 0..95"),
        (REFERENCE, b"\xff" * 64, "reference.safetensors cannot be read"),
        (REFERENCE, b"", "reference.safetensors cannot be read"),
    ],
)
def test_made_up_files_are_refused(atlas, name, data, message):
    forge(atlas, **{name: data})
    with pytest.raises(AtlasError) as error:
        read_atlas(atlas)
    assert message in str(error.value)


def test_an_autoencoder_of_other_shapes_or_no_autoencoder_is_refused(atlas):
    from cytosae.formats.checkpoint import SaeCheckpointError
    from cytosae.formats.tensor_file import write_safetensors
    from cytosae.sae.relu import ReluSae

    write_safetensors(atlas.parent / "small.safetensors", ReluSae(24, 5), {})
    forge(atlas, **{SAE: (atlas.parent / "small.safetensors").read_bytes()})
    with pytest.raises(AtlasError, match="its autoencoder has 5 latents of width 24, expected 96 of width 24"):
        read_atlas(atlas)
    forge(atlas, **{SAE: b"no tensors"})
    with pytest.raises(SaeCheckpointError, match="sae.safetensors"):
        read_atlas(atlas)


@pytest.mark.parametrize("name", [MANIFEST, *FILES])
def test_damage_is_noticed(atlas, name):
    data = bytearray((atlas / name).read_bytes())
    at = len(data) // 2 if name != MANIFEST else data.index(b'"n_images": ') + 12
    data[at] ^= 1
    (atlas / name).write_bytes(data)
    with pytest.raises(AtlasError, match="was changed or damaged after it was written"):
        read_atlas(atlas)
    (atlas / name).write_bytes(data[:-9])
    with pytest.raises(AtlasError, match=r"is not JSON|it is damaged"):
        read_atlas(atlas)


@pytest.mark.parametrize("name", [MANIFEST, *FILES])
def test_links_and_pipes_are_not_followed(atlas, name):
    path = atlas / name
    path.rename(atlas.parent / "elsewhere")
    path.symlink_to(atlas.parent / "elsewhere")
    with pytest.raises(AtlasError, match="must be a file, found a link or something else"):
        read_atlas(atlas)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(AtlasError, match="must be a file, found a link or something else"):
        read_atlas(atlas)
    path.unlink()
    message = "is not an atlas: expected a folder with manifest.json" if name == MANIFEST else "cannot be read: No such"
    with pytest.raises(AtlasError, match=message):
        read_atlas(atlas)


def test_sizes_are_checked_before_memory_is_taken(atlas, monkeypatch):
    with (atlas / REFERENCE).open("r+b") as file:
        file.truncate(1 << 40)  # a sparse file of a terabyte
    with pytest.raises(AtlasError, match="has 1,099,511,627,776 bytes, expected"):
        read_atlas(atlas)

    def tell(manifest):
        manifest["files"][REFERENCE]["bytes"] = 1 << 40

    forge(atlas, tell)
    with pytest.raises(cytosae_pipeline.UserError, match="reading the atlas .* needs at least 1.1 TB of memory"):
        read_atlas(atlas)
    monkeypatch.setattr(reading, "_MOST_MANIFEST", 100)
    with pytest.raises(AtlasError, match="has more than 100 bytes: it is not a manifest of an atlas"):
        read_atlas(atlas)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": NaN}', "{", "\xff"])
def test_manifests_that_are_no_json_are_refused(atlas, text):
    (atlas / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(AtlasError, match="is not JSON"):
        read_atlas(atlas)
