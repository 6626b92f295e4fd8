"""What `features` and `patients` wrote is read back as it is, checked, and made where it is missing or of others."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from cytosae.formats.checkpoint import load_sae, save_sae
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.config import StatisticsConfig
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.statistics.counts import read_counts
from cytosae_pipeline.statistics.features import TENSORS, read_features, save_features
from cytosae_pipeline.statistics.inputs import open_inputs
from cytosae_pipeline.statistics.results import ensure_statistics
from tests.support.stores import read_files


def config(place, **more):
    return StatisticsConfig(**{"root_dir": place.root, "dataset_name": "toy", "sae_path": place.sae(), **more})


def ensure_features(options):
    return ensure_statistics(open_inputs(options), options).features


def ensure_counts(options, kind):
    return ensure_statistics(open_inputs(options), options, counts=[kind]).counts[kind]


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.fixture
def filled(with_sae):
    arguments = ["--dataset_name", "toy", "--sae_path", with_sae.sae()]
    with_sae.run("features", *arguments, "--top_k", 3)
    with_sae.run("patients", *arguments, "--threshold", 0.5, "--threshold", 0.1, "--normalize", "token")
    return with_sae


def test_files_come_back_as_they_are_and_are_not_made_again(filled, messages):
    folder, before = filled.features(), stamps(filled.features())
    features = ensure_features(config(filled))
    counts = ensure_counts(config(filled), "patient")
    assert stamps(folder) == before
    assert messages() == ""
    assert features.top_values.shape == (96, 3)
    assert features.labels == ("blast", "lymphocyte", "neutrophil")
    assert features.record["top_k"] == 3
    for field, (name, _) in TENSORS.items():
        array = getattr(features, field)
        np.testing.assert_array_equal(array, torch.load(folder / f"{name}.pt", weights_only=True).numpy())
    assert counts.names == ("p0", "p1", "p2", "p3")
    assert counts.thresholds.tolist() == [0.5, 0.1]
    np.testing.assert_array_equal(counts.normalised, counts.counts[0] / (counts.n_images[:, None] * 5))
    assert counts.record["normalize"] == "token"


def test_options_that_come_too_late_are_named(filled, messages):
    late = config(filled, top_k=7, threshold=(0.9, 0.8), normalize="none")
    assert ensure_features(late).top_values.shape == (96, 3)
    ensure_counts(late, "patient")
    said = messages()
    assert (
        f"--top_k 7 has no effect: existing results of `features` in '{filled.features()}' are reused, made with 3."
        in said
    )
    assert "--threshold 0.9 0.8 has no effect" in said
    assert "made with 0.5 0.1. To recompute them: cytosae-cache patients" in said
    assert "--threshold 0.9 --threshold 0.8 --normalize none\n" in said
    assert "--normalize none has no effect" in said
    ensure_counts(config(filled, threshold=(0.5, 0.1), normalize="token"), "patient")
    assert messages() == ""


def test_what_is_missing_is_made_first(with_sae, messages):
    features = ensure_features(config(with_sae, top_k=4))
    assert "no results of `features`" in messages()
    assert features.top_values.shape == (96, 4)
    counts = ensure_counts(config(with_sae, threshold=(0.3,)), "label")
    assert "no results of `classes`" in messages()
    assert counts.names == features.labels
    assert counts.thresholds.tolist() == [0.3]


def test_results_of_another_autoencoder_are_computed_again(filled, messages):
    sae, cfg = load_sae(filled.sae())
    sae.b_enc += 1
    save_sae(filled.sae(), sae, cfg)
    old = read_features(filled.features())
    features = ensure_features(config(filled))
    counts = ensure_counts(config(filled), "patient")
    said = messages()
    assert "the results of `features`" in said
    assert "the results of `patients`" in said
    assert "belong to another autoencoder: recomputing them" in said
    assert features.record["sae_sha256"] == counts.record["sae_sha256"] != old.record["sae_sha256"]
    assert (features.mean_acts * features.sparsity > old.mean_acts * old.sparsity).all()


def test_results_of_other_readable_images_are_computed_again(filled, messages):
    shutil.copy(next(filled.images.rglob("000.png")), filled.images / "neutrophil/p2/broken.png")
    filled.build("--overwrite")
    counts = ensure_counts(config(filled), "patient")
    assert counts.n_images.sum() == ensure_features(config(filled)).record["n_images"] == 23
    assert "belong to a store with other contents, which was made again since" in messages()


def test_a_failing_write_leaves_the_older_results(filled, monkeypatch):
    before = read_files(filled.features())

    def interrupted(*_):
        raise KeyboardInterrupt

    found = read_features(filled.features())
    monkeypatch.setattr("cytosae_pipeline.statistics.features.save_specificity", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_features(filled.features(), found, ActivationStore(filled.store))
    assert read_files(filled.features()) == before


def _damage(name, value):
    def change(folder):
        torch.save(value, folder / f"{name}.pt")

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "sae_sparsity.pt").unlink(), "sae_sparsity.pt' is missing. Compute them again with"),
        (lambda folder: (folder / "sae_sparsity.pt").write_bytes(b"x"), "sae_sparsity.pt' cannot be read"),
        (lambda folder: (folder / "features.json").write_text("["), "features.json' cannot be read"),
        (lambda folder: (folder / "features.json").write_text("[" * 99_999), "features.json' cannot be read"),
        (lambda folder: (folder / "features.json").write_text("[]"), "must be a JSON object, found list"),
        (lambda folder: (folder / "images.csv").write_text("row\n1\n"), "images.csv' cannot be read"),
        (lambda folder: (folder / "images.csv").write_text("row,label\n1,a\n"), "indices lie outside the 1 image or"),
        (_damage("sae_sparsity", {"a": 1}), "must contain a tensor of torch.float32, found dict"),
        (_damage("sae_sparsity", torch.zeros(96).double()), "found torch.float64"),
        (_damage("sae_sparsity", torch.zeros(95)), "shapes do not fit together"),
        (_damage("sae_sparsity", torch.full((96,), 1.5)), "between 0 and 1"),
        (_damage("sae_mean_acts", torch.full((96,), float("nan"))), "finite and at least 0"),
        (_damage("max_activating_image_values", torch.zeros(96, 4)), "shapes do not fit together"),
        (_damage("max_activating_image_indices", torch.full((96, 3), 23)), "outside the 23 images"),
    ],
)
def test_damaged_features_are_one_message(filled, change, message):
    change(filled.features())
    with pytest.raises(UserError, match=message):
        read_features(filled.features())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": np.zeros((2, 4, 96))}, "types must be int64"),
        ({"patients": np.zeros(4)}, "types must be int64"),
        ({"counts": np.zeros((2, 4, 95), dtype=np.int64)}, "shapes do not fit together: counts \\(2, 4, 95\\)"),
        ({"n_images": np.zeros(3, dtype=np.int64)}, "n_images \\(3,\\)"),
        ({"counts": np.full((2, 4, 96), -1)}, "at least 0"),
        ({"patients": np.array([["p0"], [{}]], dtype=object)}, "patient_counts.npz' cannot be read"),
    ],
)
def test_damaged_counts_are_one_message(filled, change, message):
    path = filled.features() / "patient_counts.npz"
    with np.load(path) as archive:
        values = dict(archive)
    np.savez(path, **{**values, **change})
    with pytest.raises(UserError, match=message):
        read_counts(filled.features(), "patient")


def test_nothing_in_the_files_is_executed(filled):
    class Bomb:
        def __reduce__(self):
            return (filled.root.joinpath("exploded").touch, ())

    torch.save(Bomb(), filled.features() / "sae_sparsity.pt")
    np.save(filled.features() / "cls_sae_cnt.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"sae_sparsity.pt' cannot be read \(UnsafePickleError"):
        read_features(filled.features())
    with pytest.raises(UserError, match=r"cls_sae_cnt.npy' cannot be read \(ValueError: Object arrays"):
        read_counts(filled.features(), "patient")
    assert not (filled.root / "exploded").exists()


def test_labels_txt_has_one_line_per_label_whatever_they_contain(with_sae, tmp_path):
    features = ensure_features(config(with_sae))
    odd = dataclasses.replace(features, labels=("blast\ncell", "x\r\n", "y\u2028z"))
    save_features(tmp_path, odd, ActivationStore.open(with_sae.store))
    assert (tmp_path / "labels.txt").read_text().splitlines() == ["blast cell", "x", "y z"]


def test_labels_of_several_lines_become_one_line_and_keep_their_places(with_images):
    names = sorted(path.relative_to(with_images.images).as_posix() for path in with_images.images.rglob("0*.png"))
    rows = [f'{name},"{"two" if number % 2 else "o"}\n""lines"",\nyes",p' for number, name in enumerate(names)]
    (with_images.images / "manifest.csv").write_bytes("\n".join(["path,label,patient", *rows]).encode())
    with_images.build()
    with_images.train("--run_name", "r")
    features = ensure_features(config(with_images))
    assert features.labels == ('o "lines", yes', 'two "lines", yes')
    filled = features.top_rows >= 0
    np.testing.assert_array_equal(features.top_labels[filled], features.top_rows[filled] % 2)
    record = json.loads((with_images.features() / "features.json").read_text())
    assert {name: value for name, value in record.items() if name != "sha256"} == features.record


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: [], "must contain label_images"),
        (lambda value: {**value, "position_share": value["position_share"][:-1]}, "must contain position_share"),
        (
            lambda value: {**value, "label_means": -value["label_means"] - 1},
            "label_means must be finite and at least 0",
        ),
    ],
)
def test_damaged_specificity_is_one_message(with_sae, change, message):
    with_sae.run("features", "--dataset_name", "toy", "--sae_path", with_sae.sae())
    path = with_sae.features() / "sae_specificity.pt"
    torch.save(change(torch.load(path, weights_only=True)), path)
    with pytest.raises(UserError, match=message):
        read_features(with_sae.features())
    path.unlink()
    with pytest.raises(UserError, match=r"Compute them again with `cytosae-cache features`"):
        read_features(with_sae.features())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"'shape'", b"'sha(e'"), (b"{'descr'", b"'{descr'"), (b"(4, 96)", b"(9**9,)"), (b"}", b"("), (b"<f8", b"|O8"),
        (b", }                  ", b"9999999999999999999)}"),
    ],
)  # fmt: skip
def test_damaged_headers_of_arrays_are_one_message(filled, old, new):
    path = filled.features() / "cls_sae_cnt.npy"
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))
    with pytest.raises(UserError, match="cls_sae_cnt.npy' cannot be read"):
        read_counts(filled.features(), "patient")


def test_an_archive_of_counts_that_unpacks_to_more_than_its_size_is_refused(filled):
    path = filled.features() / "patient_counts.npz"
    with np.load(path) as archive:
        np.savez_compressed(path, **archive)
    with pytest.raises(UserError, match="patient_counts.npz' cannot be read .ValueError: it is compressed; expected"):
        read_counts(filled.features(), "patient")
