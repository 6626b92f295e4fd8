"""`features`, `classes` and `patients` through the command line: the files of the contract, with the right numbers."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch

from cytosae.formats.checkpoint import load_sae, save_sae
from cytosae.sae.relu import ReluSae
from cytosae_cache.reading.reader import StoreReader
from cytosae_cache.store import ActivationStore
from tests.support.pictures import BROKEN, write_vit

FEATURE_FILES = {
    "max_activating_image_indices.pt",
    "max_activating_image_label_indices.pt",
    "max_activating_image_values.pt",
    "sae_mean_acts.pt",
    "sae_sparsity.pt",
    "top_entropy.pt",
    "sae_specificity.pt",
    "images.csv",
    "labels.txt",
    "features.json",
}


def _acts(place):
    """Latent activations in float64, shape (N, T, S); zeros for the unreadable image."""
    store = ActivationStore.open(place.store)
    sae = load_sae(place.sae()).sae.double()
    with StoreReader(store) as reader:
        x = torch.from_numpy(np.nan_to_num(reader.read(np.arange(store.n_images)))).double()
    acts = sae.encode(x).numpy()
    acts[~store.valid] = 0
    return acts, store


def _npz(path):
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def _load(place, name):
    return torch.load(place.features() / f"{name}.pt", weights_only=True)


def test_features(with_sae):
    output = with_sae.run("features", "--dataset_name", "toy", "--sae_path", with_sae.sae(), "--top_k", 5).output
    folder = with_sae.features()
    assert {path.name for path in folder.iterdir()} == FEATURE_FILES
    assert str(folder) in output
    where = f"--root_dir {with_sae.root} --dataset_name toy --sae_path {with_sae.sae()}"
    assert f"look at it: cytosae-cache report {where}" in output
    acts, store = _acts(with_sae)
    scores = acts.mean(axis=1)
    n_active = (scores > 0).sum(axis=0)
    assert f"{(n_active > 0).sum()} of 96 latents are active" in output
    np.testing.assert_allclose(_load(with_sae, "sae_sparsity").numpy(), n_active / 22, rtol=1e-6)
    np.testing.assert_allclose(
        _load(with_sae, "sae_mean_acts").numpy(), scores.sum(axis=0) / np.maximum(n_active, 1), rtol=1e-4
    )
    indices, values = _load(with_sae, "max_activating_image_indices"), _load(with_sae, "max_activating_image_values")
    labels = _load(with_sae, "max_activating_image_label_indices")
    assert indices.shape == values.shape == labels.shape == (96, 5)
    assert indices.dtype == labels.dtype == torch.int64
    names = (folder / "labels.txt").read_text().splitlines()
    assert names == ["blast", "lymphocyte", "neutrophil"]
    bad = store.images.path.index(BROKEN)
    for latent in range(96):
        expected = np.sort(scores[scores[:, latent] > 0, latent])[::-1][:5]
        np.testing.assert_allclose(values[latent][: len(expected)].numpy(), expected, rtol=1e-4)
        for row, label, value in zip(indices[latent], labels[latent], values[latent], strict=True):
            if row < 0:
                assert label == -1
                assert value == 0
            else:
                assert row != bad
                assert names[label] == store.images.label[row]
                np.testing.assert_allclose(scores[row, latent], value, rtol=1e-4)
    with (folder / "images.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == store.images.path
    assert [row["valid"] for row in rows] == [str(int(value)) for value in store.valid]


def test_patients_and_classes_lie_side_by_side(with_sae):
    arguments = ["--dataset_name", "toy", "--sae_path", with_sae.sae(), "--threshold", 0.5, "--threshold", 0.1]
    assert "4 patients x 96 latents from 22 images" in with_sae.run("patients", *arguments).output
    assert "3 classes x 96 latents from 22 images" in with_sae.run("classes", *arguments).output
    folder = with_sae.features()
    acts, store = _acts(with_sae)
    for names, verb, column, npy, npz in (
        (["p0", "p1", "p2", "p3"], "patients", store.images.patient, "cls_sae_cnt.npy", "patient_counts.npz"),
        (["blast", "lymphocyte", "neutrophil"], "classes", store.images.label, "class_sae_cnt.npy", "class_counts.npz"),
    ):
        raw = _npz(folder / npz)
        assert raw[verb].tolist() == names
        assert raw["thresholds"].tolist() == [0.5, 0.1]
        assert raw["counts"].dtype == np.int64
        for number, threshold in enumerate((0.5, 0.1)):
            near = np.abs(acts - threshold).min()
            assert near > 1e-5  # no activation so close to the threshold that rounding decides
            expected = np.stack([(acts[np.array(column) == name] > threshold).sum(axis=(0, 1)) for name in names])
            assert raw["counts"][number].tolist() == expected.tolist()
        n_images = [sum(column[row] == name for row in store.valid_rows) for name in names]
        assert raw["n_images"].tolist() == n_images
        normalised = np.load(folder / npy, allow_pickle=False)
        assert normalised.dtype == np.float64
        np.testing.assert_array_equal(normalised, raw["counts"][0] / np.array(n_images)[:, None])
    with (folder / "patients.csv").open(newline="") as file:
        assert [(row["patient"], row["row"]) for row in csv.DictReader(file)] == [(f"p{n}", str(n)) for n in range(4)]


@pytest.mark.parametrize("how", ["token", "none", "latents"])
def test_normalisations(with_sae, how):
    with_sae.run("patients", "--dataset_name", "toy", "--sae_path", with_sae.sae(), "--normalize", how)
    raw = _npz(with_sae.features() / "patient_counts.npz")
    counts = raw["counts"][0].astype(np.float64)
    expected = {"token": counts / (raw["n_images"][:, None] * 5), "none": counts, "latents": counts / 96}[how]
    np.testing.assert_array_equal(np.load(with_sae.features() / "cls_sae_cnt.npy", allow_pickle=False), expected)
    record = json.loads((with_sae.features() / "patients.json").read_text())
    assert record["normalize"] == how


def test_outputs_do_not_depend_on_the_batch_size(with_sae):
    outputs = []
    for batch_size in (1, 7, 64):
        arguments = ["--dataset_name", "toy", "--sae_path", with_sae.sae(), "--batch_size", batch_size]
        with_sae.run("features", *arguments)
        with_sae.run("patients", *arguments)
        outputs.append(
            {path.name: path.read_bytes() for path in with_sae.features().iterdir() if path.suffix in (".npy", ".npz")}
            | {name: _load(with_sae, name) for name in ("max_activating_image_indices", "max_activating_image_values")}
        )
    for other in outputs[1:]:
        for name, value in outputs[0].items():
            assert torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name], name


def test_a_store_without_patients_is_explained(with_images):
    shutil.rmtree(with_images.images / "blast")
    flat = with_images.images / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted(with_images.images.rglob("*.png"))):
        path.rename(flat / f"{number}.png")
    for name in ("lymphocyte", "neutrophil"):
        shutil.rmtree(with_images.images / name)
    with_images.build()
    with_images.train("--run_name", "r")
    output = with_images.run("patients", "--dataset_name", "toy", "--sae_path", with_images.sae(), code=1).output
    assert "no image of store" in output
    assert "'patient' column" in output


def test_a_store_of_another_kind_is_refused_unless_allowed(with_sae):
    write_vit(with_sae.vit, seed=1)
    shutil.rmtree(with_sae.store)
    with_sae.build()
    arguments = ["--dataset_name", "toy", "--sae_path", with_sae.sae()]
    output = with_sae.run("features", *arguments, code=1).output
    assert "differs from the one" in output
    assert "weights_sha256" in output
    assert "--allow-mismatch" in output
    output = with_sae.run("features", *arguments, "--allow-mismatch").output
    assert "ignoring a mismatch (store, autoencoder): weights_sha256" in output


def test_the_autoencoders_own_store_is_chosen_among_several(with_sae):
    write_vit(with_sae.vit, seed=1)
    with_sae.build()
    with_sae.run("features", "--dataset_name", "toy", "--sae_path", with_sae.sae())


def test_an_autoencoder_of_another_width_is_refused(with_sae, tmp_path):
    save_sae(tmp_path / "sae.pt", ReluSae(8, 16), {})
    output = with_sae.run("features", "--dataset_name", "toy", "--sae_path", tmp_path / "sae.pt", code=1).output
    assert "takes activations of width 8" in output
    assert "width 24" in output


def test_an_autoencoder_outside_a_run_is_named_after_its_file(with_sae, tmp_path):
    shutil.copy(with_sae.sae(), tmp_path / "8jsxk3co.pt")
    with_sae.run("features", "--dataset_name", "toy", "--sae_path", tmp_path / "8jsxk3co.pt")
    assert (with_sae.root / "out/feature_data/sae_8jsxk3co/custom/toy/sae_sparsity.pt").exists()


def test_missing_options_are_reported(with_sae):
    output = with_sae.run("features", "--dataset_name", "toy", code=1).output
    assert "name the autoencoder: --sae_path" in output
    output = with_sae.run("features", "--dataset_name", "toy", "--sae_path", "gone.pt", code=1).output
    assert "no autoencoder at 'gone.pt'" in output
    output = with_sae.run("patients", "--dataset_name", "toy", "--sae_path", "x", "--threshold", "nan", code=2).output
    assert "threshold must be at least 0, found nan" in output
    output = with_sae.run("patients", "--dataset_name", "toy", "--sae_path", "x", "--normalize", "sum", code=2).output
    assert "'image', 'token', 'none', 'latents'" in output


def test_images_without_a_patient_count_nowhere(with_images):
    names = sorted(path.relative_to(with_images.images).as_posix() for path in with_images.images.rglob("0*.png"))
    rows = [f"{name},x,{'' if number % 2 else 'only'}" for number, name in enumerate(names)]
    (with_images.images / "manifest.csv").write_text("\n".join(["path,label,patient", *rows]) + "\n")
    with_images.build()
    with_images.train("--run_name", "r")
    output = with_images.run("patients", "--dataset_name", "toy", "--sae_path", with_images.sae()).output
    assert "1 patient x 96 latents from 11 images" in output
    assert "11 images have no patient and are not counted" in output


def test_a_patient_without_a_readable_image_is_named(with_images):
    (with_images.images / "manifest.csv").write_text(f"path,label,patient\nblast/p0/000.png,x,a\n{BROKEN},x,b\n")
    with_images.build()
    with_images.train("--run_name", "r")
    output = with_images.run("patients", "--dataset_name", "toy", "--sae_path", with_images.sae()).output
    assert "1 patient has no readable image, and so 0 in all columns: b" in output
    assert np.load(with_images.features() / "cls_sae_cnt.npy")[1].tolist() == [0] * 96
