"""`evaluate --monosemanticity --masks`: the score of patches by compartment, against all pairs of patches."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import cytosae_pipeline
from cytosae.formats.checkpoint import load
from cytosae.statistics.patch_monosemanticity import patch_monosemanticity_by_pairs
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.config import EvaluateOptions
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.evaluation import patch_monosemanticity
from cytosae_pipeline.runtime.shortage import NotEnoughMemoryError
from tests.conftest import Workplace

KINDS = ([0, 1, 1, 2], [1, 1, 2, 2], [0, 0, 0, 0])
"""Compartment of the four patches of an image, in turn."""


@pytest.fixture(scope="module")
def place(_pristine, tmp_path_factory):
    """The toy data with masks for every image but the last, whose patches lie in one compartment each."""
    root = tmp_path_factory.mktemp("patches") / "root"
    shutil.copytree(_pristine["sae"], root)
    place = Workplace(root)
    store = ActivationStore.open(place.store)
    for number, row in enumerate(store.valid_rows[:-1].tolist()):
        path = (root / "masks" / store.images.path[row]).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        mask = np.kron(np.array(KINDS[number % 3]).reshape(2, 2), np.ones((16, 16)))
        Image.fromarray(mask.astype(np.uint8)).save(path)
    return place


def evaluate(place, *arguments, code=0):
    return place.run(
        "evaluate", "--dataset_name", "toy", "--sae_path", place.sae(), "--monosemanticity", "--masks",
        place.root / "masks", *arguments, code=code,
    )  # fmt: skip


def expected_of(place, rows, wanted=None):
    """Plain scores over the patches of one compartment, or over all."""
    store, sae, images = ActivationStore.open(place.store), load(place.sae()), []
    number_of = {row: number for number, row in enumerate(store.valid_rows.tolist())}
    for row in rows:
        x = torch.from_numpy(store[row]).float()
        with torch.no_grad():
            acts = sae.encode(x)
        of = np.array(KINDS[number_of[row] % 3])
        inside = torch.from_numpy(np.ones(4, dtype=bool) if wanted is None else of == wanted)
        if inside.any():
            images.append((x[1:][inside], acts[1:][inside]))
    return patch_monosemanticity_by_pairs(images)


def assert_scores(found, expected):
    mine = np.array([np.nan if value is None else value for value in found["scores"]])
    defined = np.isfinite(mine)
    assert defined.any()
    np.testing.assert_allclose(mine[defined], expected.scores.numpy()[defined], rtol=1e-5)
    assert found["any_pair"] == pytest.approx(expected.any_pair, rel=1e-6)
    assert found["median"] == pytest.approx(np.median(mine[defined]))
    assert found["n_latents"] == defined.sum()


def test_scores_are_those_of_all_pairs_of_patches(place):
    result = evaluate(place, "--mask_names", "nucleus,cytoplasm", "--json")
    found = json.loads(result.stdout)["patches"]
    rows = ActivationStore.open(place.store).valid_rows[:-1].tolist()
    assert (found["n_images"], found["n_without"]) == (len(rows), 1)
    names = [one["name"] for one in found["compartments"]]
    assert names == ["all patches", "background", "nucleus", "cytoplasm"]
    for one, wanted in zip(found["compartments"], (None, 0, 1, 2), strict=True):
        assert_scores(one, expected_of(place, rows, wanted))
    counts = [one["n_patches"] for one in found["compartments"]]
    assert counts[0] == 4 * len(rows) == sum(counts[1:])


def test_the_table_names_every_compartment(place):
    output = evaluate(place, "--mask_names", "nucleus").output
    assert "monosemanticity of patches of 21 images with masks" in output
    for name in ("all patches", "background", "nucleus", "compartment 2"):
        assert f"\n{name} " in output
    assert "1 of 22 images have no usable mask in" in output


def test_only_evaluated_images_count(place):
    limited = json.loads(evaluate(place, "--limit", 6, "--json").stdout)["patches"]
    assert limited["n_images"] + limited["n_without"] == 6
    fewer = json.loads(evaluate(place, "--mask_images", 5, "--json").stdout)["patches"]
    assert fewer["n_images"] + fewer["n_without"] == 5


def test_in_python_masks_are_an_option_like_the_others(place):
    store = ActivationStore.open(place.store)
    found = cytosae_pipeline.evaluate_sae(place.sae(), store, monosemanticity=True, masks=place.root / "masks")
    expected = json.loads(evaluate(place, "--json").stdout)["patches"]
    assert [one.scores for one in found.patches.compartments] == [one["scores"] for one in expected["compartments"]]
    assert cytosae_pipeline.evaluate_sae(place.sae(), store, monosemanticity=True).patches is None


def test_masks_are_refused_where_nothing_uses_them():
    with pytest.raises(UserError, match="masks says which patches are compared with each other: give it with --mono"):
        EvaluateOptions(masks="m")
    with pytest.raises(UserError, match="mask_names needs the folder of the masks"):
        EvaluateOptions(mask_names="nucleus", monosemanticity=True)


def test_sums_that_do_not_fit_into_memory_are_refused(place, monkeypatch):
    monkeypatch.setattr(patch_monosemanticity, "available_ram", lambda: 1000)
    store = ActivationStore.open(place.store)
    with pytest.raises(NotEnoughMemoryError, match=r"comparing the patches of every compartment.*Leave out --masks"):
        cytosae_pipeline.evaluate_sae(place.sae(), store, monosemanticity=True, masks=place.root / "masks")
