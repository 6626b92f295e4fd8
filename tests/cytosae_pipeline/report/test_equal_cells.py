"""`--cells equal` and `--min_images`: what is counted, what is left out, and what the page says."""

import shutil

import numpy as np
import pytest
import torch

import cytosae
import cytosae_cache
import cytosae_pipeline
from cytosae.analysis.equal_cells import draw_equal
from cytosae_pipeline import UserError, plot
from cytosae_pipeline.config import ReportConfig
from cytosae_pipeline.report.data.report_data import open_report_data
from tests.support.browser import Visit, browser_or_skip, file_url
from tests.support.reports import read_data

N_IMAGES = {"p0": 12, "p1": 9, "p2": 14, "p3": 3, "p4": 4, "p5": 4, "p6": 1}


@pytest.fixture(scope="module")
def place(_pristine, tmp_path_factory):
    """Patients of two groups with many and with few images; the last has no group."""
    from tests.conftest import Workplace
    from tests.support.pictures import write_pictures

    root = tmp_path_factory.mktemp("equal") / "root"
    shutil.copytree(_pristine["images"], root)
    place = Workplace(root)
    write_pictures(place.images, sum(N_IMAGES.values()))
    files = sorted(path for path in place.images.rglob("*.png") if "broken" not in path.name)
    names = [name for name, n in N_IMAGES.items() for _ in range(n)]
    order = np.random.default_rng(0).permutation(len(names))
    lines = [f"{path.relative_to(root)},x,{names[at]}" for path, at in zip(files, order, strict=True)]
    (broken,) = place.images.rglob("broken.png")
    lines.append(f"{broken.relative_to(root)},x,p3")
    (root / "m.csv").write_text("path,label,patient\n" + "\n".join(lines) + "\n")
    groups = [f"{name},{'many' if n > 8 else 'few'}" for name, n in N_IMAGES.items() if n > 1]
    (root / "groups.csv").write_text("patient,group\n" + "\n".join(groups) + "\n")
    place.build("--images", root / "m.csv")
    place.train("--run_name", "r")
    return place


def _report(place, *arguments, code=0):
    out = place.root / "page"
    result = place.run(
        "report", "--dataset_name", "toy", "--sae_path", place.sae(), "--out", out, "--images", place.root / "m.csv",
        "--map_images", 0, "--masking_images", 0, "--groups", place.root / "groups.csv", *arguments, code=code,
    )  # fmt: skip
    return out, result.output


def _compared(place, **options):
    config = ReportConfig(
        root_dir=place.root, dataset_name="toy", sae_path=place.sae(), groups=place.root / "groups.csv", **options
    )
    return open_report_data(config).cohort


def _plain(place, rows, names):
    """Tokens above the threshold in some rows, by patient, from all activations."""
    store, sae = cytosae_cache.open(place.store), cytosae.load(place.sae())
    acts = sae.encode(torch.from_numpy(np.stack([np.asarray(store[int(row)]) for row in rows])).float()).numpy()
    counts = (acts > 0.2).sum(axis=1)
    patients = [store.images.patient[row] for row in rows]
    return np.stack([counts[[of == name for of in patients]].sum(axis=0) for name in names])


def test_equal_numbers_of_images_are_counted(place):
    cohort = _compared(place, cells="equal", seed=3)
    units = cohort.units
    assert cohort.names == ["p3", "p4", "p5", "p0", "p1", "p2", "p6"], "all are shown"
    assert units.names == ["p3", "p4", "p5", "p0", "p1", "p2"], "p6 has no group"
    assert units.n_each == 3
    assert units.n_images.tolist() == [3] * 6
    store = cytosae_cache.open(place.store)
    subjects = np.array([units.names.index(name) if name in units.names else -1 for name in store.images.patient])
    rows = draw_equal(np.where(store.valid, subjects, -1), 6, 3, seed=3)
    np.testing.assert_array_equal(units.raw, _plain(place, rows, units.names))
    np.testing.assert_allclose(units.counts, units.raw / 3)
    again, other = (_compared(place, cells="equal", seed=seed).units.raw for seed in (3, 4))
    np.testing.assert_array_equal(units.raw, again)
    assert (units.raw != other).any()
    by_one = _compared(place, cells="equal", seed=3, batch_size=1).units.raw
    np.testing.assert_array_equal(units.raw, by_one)


def test_subjects_with_few_images_are_left_out(place):
    cohort = _compared(place, cells="equal", min_images=4)
    assert (cohort.units.names, cohort.units.n_each) == (["p4", "p5", "p0", "p1", "p2"], 4)
    cohort = _compared(place, min_images=4)
    assert cohort.units.names == ["p4", "p5", "p0", "p1", "p2"]
    assert cohort.units.n_images.tolist() == [4, 4, 12, 9, 14]
    np.testing.assert_array_equal(cohort.units.raw, cohort.raw[[1, 2, 3, 4, 5]])
    _, output = _report(place, "--min_images", 4)
    assert "1 of 6 patients have fewer than 4 readable images (--min_images) and are not compared" in output
    _, output = _report(place, "--min_images", 99, code=1)
    assert "--min_images 99 leaves none of 6 patients: the one with most has 14 readable images" in output


def test_unequal_numbers_are_pointed_out_and_equal_ones_stated(place):
    report, _ = _report(place)
    record = read_data(report, "comparisons/0")
    assert record["cells"].startswith("A patient of the first side has 4 images (median), one of the second 12: counts")
    assert "--cells equal" in record["cells"]
    with browser_or_skip() as browser:
        visit = Visit(browser, file_url(report))
        visit.go("patients/compare")
        visit.page.wait_for_selector("text=Compare equal numbers of images with --cells equal.")
        report, output = _report(place, "--cells", "equal")
        assert "3 images of each of 6 patients, drawn at random, are compared" in output
        assert read_data(report, "comparisons/0")["cells"] == ""
        assert read_data(report, "patients")["n_each"] == 3
        assert read_data(report, "patients")["n_images"] == [3, 4, 4, 12, 9, 14, 1]
        visit.page.reload()
        visit.go("patients/classification")
        visit.page.wait_for_selector("text=3 images of each, drawn at random, are counted: no side is more certain.")
        visit.close()


def test_figures_of_statistics_in_memory_take_equal_numbers(place):
    counts = cytosae_pipeline.patient_counts(cytosae.load(place.sae()), cytosae_cache.open(place.store))
    groups = {name: "many" if n > 8 else "few" for name, n in N_IMAGES.items() if n > 1}
    assert plot.volcano(counts, "many", "few", groups=groups, cells="equal")
    with pytest.raises(UserError, match="--min_images 99 leaves none of 6 patients"):
        plot.volcano(counts, "many", "few", groups=groups, min_images=99)
    labels = cytosae_pipeline.class_counts(cytosae.load(place.sae()), cytosae_cache.open(place.store))
    with pytest.raises(UserError, match="at least 2 patients"):
        plot.volcano(labels, "x", groups={"x": "x"}, cells="equal")


def test_subjects_of_several_patients_give_equal_numbers(place):
    table = place.root / "subjects.csv"
    person = {"p0": "a", "p1": "a", "p2": "b", "p3": "c", "p4": "c", "p5": "d", "p6": "e"}
    table.write_text("patient,subject\n" + "".join(f"{name},{of}\n" for name, of in person.items()))
    cohort = _compared(place, cells="equal", covariates=table)
    assert (cohort.units.names, cohort.units.n_each) == (["c", "d", "a", "b"], 4)
    assert cohort.unit_of.tolist() == [0, 0, 1, 2, 2, 3, -1]
    store = cytosae_cache.open(place.store)
    names = np.array([person[name] for name in store.images.patient])
    subjects = np.array([cohort.units.names.index(of) if of != "e" else -1 for of in names])
    rows = draw_equal(np.where(store.valid, subjects, -1), 4, 4)
    assert cohort.units.raw.sum() == _plain(place, rows, N_IMAGES).sum()
