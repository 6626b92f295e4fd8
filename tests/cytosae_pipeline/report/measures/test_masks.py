"""Masks of a store's images on the pages of latents: the planted regions of the demo, and every message."""

import hashlib
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score

from cytosae.formats.checkpoint import load_sae
from cytosae_cache.reading.reader import StoreReader
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.config import ReportConfig
from cytosae_pipeline.demo.cells import REGIONS, make_cell_with_regions, make_stain
from cytosae_pipeline.demo.cohort import _make_rng, plan_cohort
from cytosae_pipeline.errors import UserError
from tests.conftest import Workplace
from tests.support.browser import Visit, browser_or_skip, file_url
from tests.support.reports import read_data

LATENTS = list(range(6))


def report(place, masks, *arguments, code=0, out="masked"):
    return place.run(
        "report", "--dataset_name", "toy", "--sae_path", place.sae(), "--masking_images", 0, "--map_images", 0,
        "--latents", "0-5", "--masks", masks, "--out", place.root / out, *arguments, code=code,
    )  # fmt: skip


@pytest.fixture(scope="module")
def place(_pristine, tmp_path_factory):
    """The toy data with a mask for all images but two, of which one has another size."""
    root = tmp_path_factory.mktemp("masks") / "root"
    shutil.copytree(_pristine["sae"], root)
    place = Workplace(root)
    store, rng = ActivationStore.open(place.store), np.random.default_rng(0)
    for number, row in enumerate(store.valid_rows.tolist()):
        path = root / "masks" / store.images.path[row]
        path.parent.mkdir(parents=True, exist_ok=True)
        mask = Image.fromarray(np.kron(rng.integers(0, 3, (4, 4)), np.ones((8, 8))).astype(np.uint8))
        if number == 1:
            mask = mask.resize((20, 20))
        if number:
            mask.save(path.with_suffix((".png", ".tif")[number % 2]))
    return place


def test_shares_and_precisions_are_those_of_all_patches(place):
    output = " ".join(report(place, place.root / "masks", "--mask_names", "nucleus").output.split())
    assert "2 of 22 images have no usable mask in" in output
    assert "1 has no mask, such as" in output
    assert "1 found 20 x 20 pixels, expected 32 x 32 as its image has, such as" in output
    store, sae = ActivationStore.open(place.store), load_sae(place.sae()).sae
    rows = store.valid_rows[2:]
    size, grid = store.spec.preprocessing.image_size, store.spec.tokens.grid
    acts, inside, shares = [], [], []
    with StoreReader(store) as reader:
        for number, row in enumerate(rows.tolist(), start=2):
            path = (place.root / "masks" / store.images.path[row]).with_suffix((".png", ".tif")[number % 2])
            mask = np.asarray(Image.open(path).resize((size, size), Image.Resampling.NEAREST))
            patch = size // grid[0]
            for at in range(grid[0] * grid[1]):
                top, left = patch * (at // grid[1]), patch * (at % grid[1])
                window = mask[top : top + patch, left : left + patch]
                shares.append([(window == value).mean() for value in range(3)])
            x = torch.from_numpy(reader.read(np.array([row]))[0]).float()
            acts.append(sae.encode(x)[1:, LATENTS].numpy())
    acts, shares = np.concatenate(acts).astype(np.float64), np.array(shares)
    inside = shares >= 0.5
    for latent in LATENTS:
        found = read_data(place.root / "masked", f"latents/{latent}")["compartments"]
        assert (found["n_images"], found["n_without"]) == (20, 2)
        assert [one["name"] for one in found["compartments"]] == ["background", "nucleus", "compartment 2"]
        for value, one in enumerate(found["compartments"]):
            expected = (acts[:, latent] * shares[:, value]).sum() / acts[:, latent].sum()
            assert one["share"] == pytest.approx(expected, rel=1e-4)
            assert one["area"] == pytest.approx(shares[:, value].mean(), rel=1e-5)
            assert one["inside"] == pytest.approx(inside[:, value].mean())
            expected = average_precision_score(inside[:, value], acts[:, latent])
            assert one["precision"] == pytest.approx(expected, abs=1e-3)


def test_masks_that_cannot_be_used_are_said(place, tmp_path):
    assert "is not a folder: expected one with label images" in report(place, "nowhere", code=1).output
    output = " ".join(report(place, tmp_path, code=1).output.split())
    assert "none of 22 images has a usable mask in" in output
    assert "22 has no mask, such as" in output
    assert "with the same folders, as PNG, TIFF or BMP" in output


def test_masks_without_the_images_are_not_compared_in_size(place, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(place.root, root, ignore=shutil.ignore_patterns("masked"))
    shutil.rmtree(root / "dataset")
    other = Workplace(root)
    output = " ".join(report(other, root / "masks").output.split())
    assert "the images were not found, so that the sizes of masks are not compared with theirs" in output
    assert read_data(root / "masked", "latents/0")["compartments"]["n_images"] == 21


@pytest.mark.parametrize("names", ["a,,b", "a,a", ""])
def test_names_must_differ(names):
    with pytest.raises(UserError, match="mask_names must be different names separated by commas, found"):
        ReportConfig(dataset_name="toy", masks="m", mask_names=names)


def test_names_need_masks():
    with pytest.raises(UserError, match="mask_names needs the folder of the masks: give --masks FOLDER, too"):
        ReportConfig(dataset_name="toy", mask_names="nucleus")


@pytest.mark.slow
def test_the_planted_regions_of_the_demo_are_recovered(demo_run, tmp_path):
    images = demo_run.root / "dataset" / "demo-0"
    regions = [REGIONS.index(name) for name in ("nucleus", "cytoplasm", "red cell")]
    cells = plan_cohort(seed=0, n_patients_per_group=12, cells_per_patient=20)
    for cell in cells:
        # One in six, by a hash of the path.
        if hashlib.sha256(cell.path.encode()).digest()[0] % 6:
            continue
        stain = make_stain(_make_rng(cell.seed[:2], "stain"))
        _, shown = make_cell_with_regions(cell.label, _make_rng(cell.seed, "pixels"), size=224, stain=stain)
        mask = sum((shown == region) * np.uint8(number) for number, region in enumerate(regions, start=1))
        path = (tmp_path / "masks" / cell.path).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask.astype(np.uint8)).save(path)
    (sae,) = demo_run.root.glob("out/checkpoints/*/final_*.pt")
    # Latents of a region are active on nearly all images; those that come first are specific to a class.
    mean, sparsity = (
        torch.load(demo_run.report.parent / f"sae_{name}.pt", weights_only=True) for name in ("mean_acts", "sparsity")
    )
    chosen = (mean * sparsity).argsort(descending=True)[:60].tolist()
    Workplace(demo_run.root).run(
        "report", "--dataset_name", "demo-0", "--images", images / "manifest.csv", "--model_path", "embedded",
        "--sae_path", sae, "--masks", tmp_path / "masks", "--mask_names", "nucleus,<b>cytoplasm</b>,red cell",
        "--masking_images", 0, "--map_images", 0, "--latents", ",".join(map(str, chosen)), "--out", tmp_path / "page",
    )  # fmt: skip
    overview = read_data(tmp_path / "page", "overview")
    best = {}
    for latent in overview["featured"]:
        for one in read_data(tmp_path / "page", f"latents/{latent}")["compartments"]["compartments"]:
            gain = (one["precision"] or 0) - one["inside"]
            best[one["name"]] = max(best.get(one["name"], (0, 0)), (gain, latent))
    assert best["nucleus"][0] > 0.3, best
    latent = best["nucleus"][1]
    with browser_or_skip() as browser:
        visit = Visit(browser, file_url(tmp_path / "page"))
        try:
            visit.go(f"latent/{latent}")
            visit.page.wait_for_selector(".band")
            rows = visit.page.get_by_role("region", name="Compartments").locator("tbody tr").all_inner_texts()
            names = [row.split("\t")[0] for row in rows]
            assert names == ["background", "nucleus", "<b>cytoplasm</b>", "red cell"]
            assert "Where it is active on " in visit.page.inner_text("#view")
        finally:
            visit.close()
