"""Samples of one person in `report`, `export` and the figures: persons are compared, and the page says so."""

import re
import shutil

import numpy as np
import pandas as pd
import pytest

import cytosae
import cytosae_cache
import cytosae_pipeline
from cytosae.analysis.classification import classify_groups
from cytosae.analysis.differential import compare_groups
from cytosae_pipeline import UserError, plot
from cytosae_pipeline.config import ReportConfig
from cytosae_pipeline.report.data.report_data import open_report_data
from cytosae_pipeline.report.records.comparisons import GroupPair, compare_pair
from cytosae_pipeline.statistics.halves import find_companions
from cytosae_pipeline.statistics.inputs import open_inputs
from tests.support.browser import Visit, browser_or_skip, file_url
from tests.support.reports import read_data

N_SAMPLES = 12
"""Patients of the store: two samples of each of six persons."""


@pytest.fixture(scope="module")
def place(_pristine, tmp_path_factory):
    """A store whose manifest names a patient and a subject for every image, and an autoencoder."""
    from tests.conftest import Workplace
    from tests.support.pictures import write_pictures

    root = tmp_path_factory.mktemp("subjects") / "root"
    shutil.copytree(_pristine["images"], root)
    place = Workplace(root)
    write_pictures(place.images, 60, broken=False)
    files = sorted(path for path in place.images.rglob("*.png") if "broken" not in path.name)
    lines = []
    for at, path in enumerate(files):
        sample = at % N_SAMPLES
        lines.append(f"{path.relative_to(root)},{'ab'[at % 2]},sample{sample:02d},person{sample // 2}")
    (root / "m.csv").write_text("path,label,patient,subject\n" + "\n".join(lines) + "\n")
    place.build("--images", root / "m.csv")
    place.train("--run_name", "r")
    return place


@pytest.fixture(scope="module")
def browser():
    with browser_or_skip() as found:
        yield found


def _groups_csv(place, name="groups.csv", split=False):
    path = place.root / name
    rows = [f"sample{at:02d},{'well' if at // 2 < 3 else 'ill'}" for at in range(N_SAMPLES)]
    if split:
        rows[1] = "sample01,ill"
    path.write_text("patient,group\n" + "\n".join(rows) + "\n")
    return path


def _report(place, *arguments, code=0):
    out = place.root / "page"
    result = place.run(
        "report", "--dataset_name", "toy", "--sae_path", place.sae(), "--out", out, "--images", place.root / "m.csv",
        "--map_images", 0, *arguments, code=code,
    )  # fmt: skip
    return out, result.output


def _plain(place):
    """Counts per image of the persons, by a loop, and whether each is ill."""
    store, sae = cytosae_cache.open(place.store), cytosae.load(place.sae())
    counts = cytosae_pipeline.patient_counts(sae, store)
    persons = [int(name.removeprefix("sample")) // 2 for name in counts.names]
    pooled = np.stack(
        [
            sum(counts.counts[0][at] for at, of in enumerate(persons) if of == person)
            / sum(int(counts.n_images[at]) for at, of in enumerate(persons) if of == person)
            for person in range(6)
        ]
    )
    return counts, pooled, np.arange(6) >= 3


def test_persons_are_compared_classified_and_kept_on_one_side(place):
    report, output = _report(place, "--groups", _groups_csv(place), "--figures")
    assert "column 'subject' of the store's images: 12 patients of 6 subjects, and subjects are compared" in output
    record = read_data(report, "patients")
    assert record["names"] == [f"sample{at:02d}" for at in (*range(6, 12), *range(6))]
    assert record["subjects"]["names"] == [f"person{at}" for at in range(6)]
    assert record["subjects"]["of"] == [3, 3, 4, 4, 5, 5, 0, 0, 1, 1, 2, 2]
    assert record["comparisons"] == [{"first": "ill", "second": "well", "n_first": 3, "n_second": 3, "groups": [0, 1]}]
    assert np.sum(record["classification"]["confusion"], axis=1).tolist() == [3, 3]
    _counts, pooled, ill = _plain(place)
    config = ReportConfig(root_dir=place.root, dataset_name="toy", sae_path=place.sae(), groups=_groups_csv(place))
    data = open_report_data(config)
    found = compare_pair(data.cohort, GroupPair(0, 1), test="mann-whitney", seed=0)
    plain = compare_groups(pooled, ill, level=0.05)
    np.testing.assert_allclose(found.mean_first, plain.mean_first)
    np.testing.assert_array_equal(found.p_value, plain.p_value)
    np.testing.assert_allclose(found.effect, plain.effect)
    order = [3, 4, 5, 0, 1, 2]
    np.testing.assert_allclose(data.cohort.units.counts, pooled[order])
    again = classify_groups(pooled[order], np.array([0, 0, 0, 1, 1, 1]), ["ill", "well"])
    assert record["classification"]["confusion"] == again.confusion.tolist()
    # The halves of the masking experiment, too.
    store = data.store
    sides = find_companions(store, store.valid_rows, data.subjects)
    persons = [int(store.images.patient[row].removeprefix("sample")) // 2 for row in store.valid_rows.tolist()]
    assert len(set(zip(sides.tolist(), persons, strict=True))) == len(set(persons)) == 6
    assert len(set(find_companions(store, store.valid_rows, None).tolist())) == N_SAMPLES


def test_patients_can_be_taken_as_persons_on_demand(place):
    report, output = _report(place, "--groups", _groups_csv(place), "--subject_column", "patient")
    assert "subjects are compared" not in output
    record = read_data(report, "patients")
    assert record["subjects"] is None
    assert record["comparisons"][0]["n_first"] == 6


def test_the_page_says_that_subjects_are_compared(place, browser):
    report, _ = _report(place, "--groups", _groups_csv(place))
    visit = Visit(browser, file_url(report))
    for view in ("patients/compare", "patients/classification"):
        visit.go(view)
        visit.page.wait_for_selector("text=12 patients of 6 subjects: subjects are compared")
    assert "cross-validation over subjects" in visit.page.inner_text("#view")
    visit.go("patients/compare")
    visit.page.wait_for_selector("text=vary among these subjects")
    assert "ill (3) against well (3)" in visit.page.inner_text("#compared")
    visit.go("patients")
    visit.page.wait_for_selector("text=Mean of its subjects, each with all its patients.")
    visit.page.locator("canvas.matrix").last.hover()
    assert re.match(r"sample\d\d \(of person\d, (ill|well)\), latent \d+", visit.page.inner_text(".readout >> nth=-1"))
    visit.go("patient/0")
    visit.page.wait_for_selector("text=Of subject person3.")
    visit.close()


def test_a_subject_in_two_groups_stops_the_report(place):
    split = _groups_csv(place, "split.csv", split=True)
    _, output = _report(place, "--groups", split, code=1)
    assert "column 'subject' of the store's images gives subject 'person0' patients of two groups, such as" in output
    assert "'sample01' in 'ill' and 'sample00' in 'well'" in output
    _, output = _report(place, "--groups", split, "--pseudonymize", code=1)
    assert re.search(r"gives subject 'subject-[0-9a-f]{12}' patients of two groups, such as 'patient-", output)
    assert "leave out --pseudonymize" in output
    assert not re.search(r"person\d|sample\d", output)


def test_pseudonyms_replace_persons_on_the_page(place):
    report, _ = _report(place, "--groups", _groups_csv(place), "--pseudonymize")
    record = read_data(report, "patients")
    assert all(re.fullmatch(r"subject-[0-9a-f]{12}", name) for name in record["subjects"]["names"])
    assert record["subjects"]["names"] == sorted(record["subjects"]["names"])
    assert record["comparisons"][0]["n_first"] == 3
    text = "".join(path.read_text() for path in (report / "data").rglob("*.js"))
    assert not re.search(r"person\d|sample\d", text)


def test_covariates_name_persons_and_reach_every_export(place):
    table = place.root / "covariates.csv"
    rows = [f"sample{at:02d},x{at // 4},{20 + at},{'NA' if at else 'u'}" for at in range(N_SAMPLES)]
    table.write_text("patient,who,age,latent_3\n" + "\n".join(rows) + "\n")
    where = ("--dataset_name", "toy", "--sae_path", place.sae())
    for kind, read in (("csv", pd.read_csv), ("parquet", pd.read_parquet)):
        place.run(
            "export", *where, "--format", kind, "--out", place.root / "t", "--covariates", table, "--subject_column",
            "who", "--overwrite",
        )  # fmt: skip
        found = read(place.root / "t" / f"table_patients.{kind}")
        assert found["subject"].tolist() == found["who"].tolist() == [f"x{at // 4}" for at in range(N_SAMPLES)]
        assert found["age"].tolist() == list(range(20, 32))
        assert found["latent_3_2"].tolist()[0] == "u"
        assert found["latent_3"].dtype == np.float64
    place.run("export", *where, "--format", "anndata", "--out", place.root / "t")
    import anndata

    obs = anndata.read_h5ad(place.root / "t" / "patients.h5ad").obs
    assert obs["subject"].tolist() == [f"person{at // 2}" for at in range(N_SAMPLES)]
    output = place.run("export", "--sae_path", place.sae(), "--covariates", table, code=2).output
    assert "covariates needs format anndata, csv, parquet or atlas, found format saelens" in output
    output = place.run("export", "--sae_path", place.sae(), "--subject_column", "x", code=2).output
    assert "subject_column needs format anndata, csv, parquet or atlas" in output
    output = _report(place, "--covariates", table, "--subject_column", "who", code=1)[1]
    assert "gives subject 'x0' patients of two groups, such as 'sample00' in 'a' and 'sample01' in 'b'" in output
    groups = place.root / "three.csv"
    groups.write_text("patient,group\n" + "".join(f"sample{at:02d},{'uv'[at > 3]}\n" for at in range(N_SAMPLES)))
    report, output = _report(place, "--covariates", table, "--subject_column", "who", "--groups", groups)
    assert "column 'who' of '" in output
    assert read_data(report, "patients")["subjects"]["names"] == ["x0", "x1", "x2"]


def test_figures_of_statistics_in_memory_pool_persons(place):
    counts, pooled, ill = _plain(place)
    groups = {name: "ill" if int(name[-2:]) // 2 >= 3 else "well" for name in counts.names}
    cohort = plot.make_cohort(counts, groups)
    np.testing.assert_allclose(cohort.units.counts, pooled[[3, 4, 5, 0, 1, 2]])
    every = plot.make_cohort(counts, groups, subjects={name: name for name in counts.names})
    assert every.subjects is None
    halves = plot.make_cohort(counts, groups, subjects={name: groups[name] for name in counts.names})
    assert halves.units.names == ["ill", "well"]
    assert plot.volcano(counts, "ill", groups=groups)
    assert plot.barcodes(counts, [1, 2], groups=groups)
    assert plot.correlation(counts, groups=groups)
    with pytest.raises(UserError, match="a comparison needs at least 2 patients in each group, found 1 in the first"):
        plot.volcano(counts, "ill", groups=groups, subjects={name: groups[name] for name in counts.names})
    with pytest.raises(UserError, match="subjects names no person for 12 of 12 patients, such as 'sample00'"):
        plot.barcodes(counts, 1, subjects={"x": "y"})
    with pytest.raises(UserError, match="subjects gives subject 'one' patients of two groups"):
        plot.volcano(counts, "ill", groups=groups, subjects=dict.fromkeys(counts.names, "one"))
    assert ill.sum() == 3


def test_options_about_patients_need_patients(with_images):
    files = sorted(path for path in with_images.images.rglob("*.png") if "broken" not in path.name)
    manifest = with_images.root / "m.csv"
    manifest.write_text("path,label\n" + "".join(f"{path.relative_to(with_images.root)},x\n" for path in files))
    with_images.build("--images", manifest)
    with_images.train("--run_name", "r")
    where = ("--dataset_name", "toy", "--sae_path", with_images.sae())
    output = with_images.run("report", *where, "--subject_column", "x", code=1).output
    assert "--subject_column 'x' cannot be used: the store has no patient column. Build it" in output
    for option in ("--strata", "--adjust"):
        output = with_images.run("report", *where, option, "x", code=1).output
        assert f"{option} 'x' cannot be used: the store has no patient column. Build it" in output
    output = with_images.run("export", *where, "--format", "csv", "--covariates", "x.csv", code=1).output
    assert "--covariates 'x.csv' cannot be used: no image of store" in output
    assert open_inputs(ReportConfig(root_dir=with_images.root, dataset_name="toy", sae_path=with_images.sae()))
