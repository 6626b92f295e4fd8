"""The demo with two scanners: the confounder is flagged and kept out of comparisons, and the planted truth found."""

import csv
import json

import numpy as np
import pytest
from click.testing import CliRunner

from cytosae_pipeline.cli.app import cli
from cytosae_pipeline.config import ReportConfig
from cytosae_pipeline.demo.cohort import SCANNERS, make_cohort_cell, plan_cohort, write_cohort
from cytosae_pipeline.report.data.limits import SIGNIFICANT_Q
from cytosae_pipeline.report.data.report_data import main_labels, open_report_data
from cytosae_pipeline.report.records.comparisons import compare_all
from tests.support.browser import Visit, browser_or_skip, file_url
from tests.support.reports import read_data, unpack

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """What `demo --scanners` wrote."""
    root = tmp_path_factory.mktemp("scanners")
    result = CliRunner().invoke(cli, ["demo", "--root_dir", str(root), "--scanners", "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    (images,) = root.glob("dataset/*")
    (sae,) = root.glob("out/checkpoints/*/final*.pt")
    (report,) = root.glob("out/feature_data/*/custom/*/report")
    return {"root": root, "images": images, "sae": sae, "report": report, "facts": facts}


def _open(place, groups, **options):
    """The report's data with other options."""
    images = place["images"]
    return open_report_data(
        ReportConfig(
            root_dir=place["root"],
            dataset_name=images.name,
            images=images / "manifest.csv",
            model_path="embedded",
            sae_path=place["sae"],
            groups=groups,
            covariates=images / "covariates.csv",
            **options,
        )
    )


def _read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _arms(place, tmp_path):
    """Groups that have nothing to do with the cells, and much with the scanner."""
    group = {row["patient"]: row["group"] for row in _read(place["images"] / "patients.csv")}
    lines, seen = ["patient,group"], {}
    for row in _read(place["images"] / "covariates.csv"):
        kind = (group[row["patient"]], row["scanner"])
        seen[kind] = seen.get(kind, -1) + 1
        often = seen[kind] % 6 != 0
        lines.append(f"{row['patient']},{'arm-1' if often == (row['scanner'] == 'scanner-1') else 'arm-2'}")
    path = tmp_path / "arms.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_audit_flags_the_scanner_and_not_the_age(place):
    columns = {column["name"]: column for column in read_data(place["report"], "audit")["columns"]}
    assert set(columns) == {"scanner", "age", "readable images"} - ({"readable images"} - set(columns))
    scanner, age = columns["scanner"], columns["age"]
    assert scanner["n_significant"] > 200
    assert len(unpack(scanner["more_than_group"])) > 0.5 * scanner["n_significant"]
    assert scanner["latents"][0]["share"] > 0.6
    assert (age["n_significant"], age["n_levels"]) == (0, 0)
    effect, p = scanner["with_groups"]
    assert 0.2 < effect < 0.6
    assert 0.01 < p < 0.5


@pytest.mark.parametrize("options", [{"strata": "scanner"}, {"adjust": ("scanner",)}])
def test_the_scanner_does_not_reach_groups_that_differ_in_nothing_else(place, tmp_path, options):
    arms = _arms(place, tmp_path)
    plain = compare_all(_open(place, arms).cohort, test="mann-whitney", seed=0).found[0]
    assert (plain.q_value < SIGNIFICANT_Q).sum() > 40
    found = compare_all(_open(place, arms, **options).cohort, test="mann-whitney", seed=0).found[0]
    assert (found.q_value < SIGNIFICANT_Q).sum() == 0
    assert (found.p_value[found.tested] <= 0.05).mean() < 0.08


@pytest.mark.parametrize("options", [{"strata": "scanner"}, {"adjust": ("scanner",)}])
def test_the_planted_groups_are_still_found(place, options):
    data = _open(place, place["images"] / "patients.csv", **options)
    made = compare_all(data.cohort, test="mann-whitney", seed=0)
    names = data.cohort.groups.names
    number = next(at for at, pair in enumerate(made.pairs) if {pair.first, pair.second} == {0, names.index("healthy")})
    active = np.flatnonzero(data.features.sparsity > 0)
    blast = data.features.labels.index("blast")
    specific = active[(np.array(main_labels(data, active)) == blast) & (data.entropy[active] < 0.1)]
    found = made.found[number]
    more = found.q_value[specific] < SIGNIFICANT_Q
    assert len(specific) > 20
    assert more.mean() > 0.5
    assert (found.direction[specific][more] > 0).mean() > 0.9
    assert made.all_groups is not None
    assert (made.all_groups.q_value[specific] < SIGNIFICANT_Q).mean() > 0.5


def test_the_page_shows_the_audit_and_marks_latents(place):
    with browser_or_skip() as browser:
        visit = Visit(browser, file_url(place["report"]))
        visit.go("patients/audit")
        visit.page.wait_for_selector("text=Groups are compared within scanner.")
        row = visit.page.locator("tr", has_text="2 names").first.inner_text()
        assert row.startswith("scanner")
        assert "share of the variance of ranks that the property explains" in visit.page.inner_text("#view")
        visit.go("patients/compare")
        visit.page.wait_for_selector("text=van Elteren, within scanner")
        assert "Effect is the rank-biserial correlation within scanner, on average." in visit.page.inner_text("#view")
        visit.page.wait_for_selector("th:has-text('told more by')")
        visit.go("patients/compare/all")
        visit.page.wait_for_selector("text=row mean scores within scanner: AML-like, CML-like, healthy")
        featured = read_data(place["report"], "overview")["featured"]
        columns = {column["name"]: column for column in read_data(place["report"], "audit")["columns"]}
        told = set(unpack(columns["scanner"]["more_than_group"]).tolist())
        marked, other = (next(one for one in featured if (one in told) == wanted) for wanted in (True, False))
        visit.go(f"latent/{marked}")
        visit.page.wait_for_selector("text=scanner: tells more of this latent than the group does.")
        visit.go(f"latent/{other}")
        visit.page.wait_for_selector("h2:has-text('Patients')")
        assert "tells more of this latent" not in visit.page.inner_text("#view")
        visit.close()


def test_scanners_change_colours_alone_and_only_where_asked(tmp_path):
    with_scanners = plan_cohort(seed=0, n_patients_per_group=3, cells_per_patient=2, scanners=True)
    plain = plan_cohort(seed=0, n_patients_per_group=3, cells_per_patient=2)
    assert {cell.scanner for cell in with_scanners} == set(SCANNERS)
    assert {cell.scanner for cell in plain} == {""}
    for one, two in zip(with_scanners[:8], plain, strict=False):
        assert (one.path, one.label, one.seed) == (two.path, two.label, two.seed)
        same = np.array_equal(make_cohort_cell(one, size=32), make_cohort_cell(two, size=32))
        assert same == (one.scanner == "scanner-1")
    write_cohort(tmp_path / "two", with_scanners, size=32)
    write_cohort(tmp_path / "one", plain, size=32)
    rows = _read(tmp_path / "two" / "covariates.csv")
    assert {row["patient"]: row["scanner"] for row in rows} == {cell.patient: cell.scanner for cell in with_scanners}
    assert all(20 <= int(row["age"]) < 85 for row in rows)
    assert not (tmp_path / "one" / "covariates.csv").exists()
