"""The masking experiment on stores with planted classes, against plain numpy, and its errors."""

import json

import numpy as np
import pytest
import torch

from cytosae.analysis.masking import MASKINGS
from cytosae.formats.checkpoint import load_sae, save_sae
from cytosae.sae.base import Sae
from cytosae.sae.relu import ReluSae
from cytosae_cache.format.layout import ImageTable
from cytosae_cache.reading.permutation import spread_rows
from cytosae_pipeline.config import StatisticsConfig
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.statistics.halves import split_in_halves
from cytosae_pipeline.statistics.inputs import Inputs, open_inputs
from cytosae_pipeline.statistics.masking import KS, run_masking
from tests.support.stores import make_store

N, T, D, C = 300, 5, 16, 3
LABELS = ["blast", "lymphocyte", "neutrophil"]
INVALID = [4, 77]
UNLABELLED = [10, 11, 12]


def make_table(labels, patients=None) -> ImageTable:
    names = [f"img_{row:04d}.png" for row in range(len(labels))]
    return ImageTable(names, list(labels), list(patients) if patients else [""] * len(labels))


def planted_labels() -> list[str]:
    chosen = np.random.default_rng(0).choice(C, size=N, p=[0.5, 0.3, 0.2])
    return ["" if row in UNLABELLED else LABELS[label] for row, label in enumerate(chosen)]


def plant(labels) -> np.ndarray:
    """Latent c of class c is the loudest of its images; the other 13 latents are active everywhere and mean nothing."""
    rng = np.random.default_rng(1)
    values = rng.uniform(0.1, 1, size=(len(labels), T, D))
    values[:, :, :C] = 0
    for row, label in enumerate(labels):
        if label:
            values[row, :, LABELS.index(label)] = rng.uniform(3, 4, size=T)
    return values.astype(np.float16)


def make_sae() -> Sae:
    """Latent s reads and writes channel s."""
    sae = ReluSae(D, D).requires_grad_(False)
    sae.W_enc.copy_(torch.eye(D))
    sae.W_dec.copy_(torch.eye(D))
    return sae


def make_inputs(tmp_path, labels=None, patients=None, *, encoder_only=False) -> tuple[Inputs, StatisticsConfig]:
    labels = labels or planted_labels()
    store = make_store(
        tmp_path / "s.zarr", plant(labels), shard_images=7, invalid=INVALID, table=make_table(labels, patients)
    )
    save_sae(tmp_path / "sae.pt", make_sae(), {})
    config = StatisticsConfig(sae_path=tmp_path / "sae.pt", batch_size=20)
    return Inputs(store, load_sae(config.sae_path, encoder_only=encoder_only).sae), config


def run(inputs, config, **options):
    return run_masking(inputs, config, **options)


def test_planted_latents_are_what_the_classifier_needs(tmp_path):
    result = run(*make_inputs(tmp_path))
    assert result.classes == LABELS
    assert result.left_out == []
    assert result.n_train + result.n_test == N - len(INVALID) - len(UNLABELLED)
    assert max(abs(a - b) for a, b in zip(result.train_images, result.n_correct.n_images.tolist(), strict=True)) <= 1
    assert result.ks == (1, 2, 5, 10, D)
    for accuracy in (result.accuracy, result.balanced_accuracy):
        assert accuracy.original == pytest.approx(1)
        assert accuracy.reconstruction == pytest.approx(1)
        assert accuracy.masked["kept"][0] > 0.97
        assert accuracy.masked["removed"][0] < 0.6
        assert accuracy.masked["random_removed"][0] > 0.9
        assert accuracy.masked["class_kept"][0] > 0.97
        assert accuracy.masked["class_removed"][0] < 0.6
    assert result.n_correct.n_class_latents[0] == C
    assert result.accuracy.chance == result.n_correct.n_images[0] / result.n_test
    assert result.balanced_accuracy.chance == pytest.approx(1 / C)


def test_counts_are_those_of_plain_numpy(tmp_path):
    patients = [f"p{row // 4}" if row % 3 else "" for row in range(N)]
    inputs, config = make_inputs(tmp_path, patients=patients)
    result = run(inputs, config, n_images=120, ks=(1, 3), seed=5, ridge=0.5)
    labels = planted_labels()
    usable = [row for row in range(N) if row not in INVALID and labels[row]]
    rows = np.array(usable)[spread_rows(len(usable), 120)]
    groups = np.unique([patients[row] or f"row {row}" for row in rows], return_inverse=True)[1]
    # The order of first appearance numbers the groups.
    first = np.unique(groups, return_index=True)[1]
    groups = np.argsort(np.argsort(first))[groups]
    y = np.array([LABELS.index(labels[row]) for row in rows])
    training = split_in_halves(groups, y, seed=5)
    x = plant(labels)[rows].astype(np.float64)
    mean, scale = x.mean(axis=1)[training].mean(axis=0), x.mean(axis=1)[training].std(axis=0)
    z = (x.mean(axis=1)[training] - mean) / scale
    target = np.eye(C)[y[training]]
    weights = np.linalg.solve(z.T @ z + 0.5 * len(z) * np.eye(D), z.T @ (target - target.mean(axis=0)))

    def n_correct(features):
        found = ((features - mean) / scale @ weights + target.mean(axis=0)).argmax(axis=1)
        return np.bincount(y[~training][found == y[~training]], minlength=C).tolist()

    scores = np.maximum(x, 0).mean(axis=1)[~training]
    assert result.n_correct.original.tolist() == result.n_correct.reconstruction.tolist() == n_correct(scores)
    order = np.argsort(-scores, axis=1, kind="stable")
    for place, k in enumerate((1, 3)):
        mask = np.zeros_like(scores)
        np.put_along_axis(mask, order[:, :k], 1, axis=1)
        assert result.n_correct.masked["kept"][place].tolist() == n_correct(scores * mask)
        assert result.n_correct.masked["removed"][place].tolist() == n_correct(scores * (1 - mask))
    assert result.train_images == np.bincount(y[training], minlength=C).tolist()


def test_nothing_depends_on_the_batch_size_or_on_what_was_loaded(tmp_path):
    inputs, config = make_inputs(tmp_path)
    expected = run(inputs, config).to_json()
    for batch_size in (1, 9, 500):
        config = StatisticsConfig(sae_path=config.sae_path, batch_size=batch_size)
        assert run(inputs, config).to_json() == expected
    whole, _ = make_inputs(tmp_path / "whole", encoder_only=False)
    assert run(whole, StatisticsConfig()).to_json() == expected
    other = run(inputs, config, seed=1).to_json()
    assert other != expected
    assert other == run(inputs, config, seed=1).to_json()


def test_the_result_as_json(tmp_path):
    value = json.loads(json.dumps(run(*make_inputs(tmp_path), ks=(1, 2)).to_json()))
    assert value["ks"] == [1, 2]
    assert set(value["hits"]) == {"original", "reconstruction", *MASKINGS}
    assert set(value["accuracy"]) == set(value["hits"]) | {"chance"}
    assert sum(value["train_images"]) == value["n_train"]
    n_test = value["test_images"]
    assert sum(n_test) == value["n_test"]
    for kind in MASKINGS:
        for place in range(2):
            n_correct = value["hits"][kind][place]
            assert value["accuracy"][kind][place] == pytest.approx(sum(n_correct) / sum(n_test))
            shares = [a / b for a, b in zip(n_correct, n_test, strict=True)]
            assert value["balanced_accuracy"][kind][place] == pytest.approx(sum(shares) / C)


def test_a_class_of_one_patient_is_left_out_and_said(tmp_path, messages):
    labels = [LABELS[row % 3] for row in range(60)]
    patients = ["alone" if label == "lymphocyte" else f"p{row % 7}" for row, label in enumerate(labels)]
    inputs, config = make_inputs(tmp_path, labels, patients)
    result = run_masking(inputs, config)
    assert "1 class has fewer than 2 training images or no test image and is left out: lymphocyte" in (messages())
    assert result.classes == ["blast", "neutrophil"]
    assert result.left_out == ["lymphocyte"]
    assert len(result.train_images) == len(result.n_correct.n_images) == 2
    assert result.accuracy.original == 1


def test_copies_of_a_picture_stay_together(tmp_path):
    labels = [LABELS[1] if row in (0, 256) else LABELS[2 * (row % 2)] for row in range(258)]
    inputs, config = make_inputs(tmp_path, labels)
    digests = inputs.store.column("images/sha256")
    assert bytes(digests[0]) == bytes(digests[256])
    assert run(inputs, config).left_out == ["lymphocyte"]


def test_too_few_classes_are_explained(tmp_path, monkeypatch):
    inputs, config = make_inputs(tmp_path / "none", [""] * 20)
    with pytest.raises(UserError, match="no image of store .* has a label. Build it from a CSV with a 'label' column"):
        run(inputs, config)
    inputs, config = make_inputs(tmp_path / "one", ["blast"] * 20)
    with pytest.raises(UserError, match="masking needs two classes .* halves of 19 images .* have: 'blast' 10 and 9"):
        run(inputs, config)
    monkeypatch.setattr(f"{__name__}.LABELS", ["\x1b[2J" + "a" * 5000, *LABELS[1:]])
    inputs, config = make_inputs(tmp_path / "hostile", LABELS[:1] * 20)
    with pytest.raises(UserError) as caught:
        run(inputs, config)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 600
    patients = ["p" if row % 2 else "q" for row in range(20)]
    inputs, config = make_inputs(tmp_path / "two", [LABELS[row % 2] for row in range(20)], patients)
    with pytest.raises(UserError, match="All images of a patient are in one half"):
        run(inputs, config)
    with pytest.raises(ValueError, match="ks must be numbers of 1 or more"):
        run(*make_inputs(tmp_path), ks=(0,))


def test_a_trained_autoencoder_opened_for_statistics(with_sae):
    config = StatisticsConfig(root_dir=with_sae.root, dataset_name="toy", sae_path=with_sae.sae())
    inputs = open_inputs(config, encoder_only=False)
    result = run(inputs, config)
    assert result.ks == tuple(min(k, 96) for k in KS)
    assert result.classes == ["blast", "lymphocyte", "neutrophil"]
    assert torch.equal(result.n_correct.masked["kept"][-1], result.n_correct.reconstruction)
