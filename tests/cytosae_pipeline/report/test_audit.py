"""`report --strata`, `--adjust` and the audit on a small store: what they say, refuse and show."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from cytosae.analysis.adjusted import compare_groups_adjusted
from cytosae.analysis.association import relate_names
from cytosae.analysis.within_strata import compare_groups_within
from cytosae_pipeline import UserError
from cytosae_pipeline.config import ReportConfig
from cytosae_pipeline.report.data.report_data import open_report_data
from cytosae_pipeline.report.records.audit import Audit, audit_cohort, audit_record
from cytosae_pipeline.report.records.comparisons import (
    GroupPair,
    all_sides,
    compare_all,
    compare_pair,
    comparison_record,
)
from cytosae_pipeline.report.records.group_tests import IncomparableError, compare_several, describe_left_out
from cytosae_pipeline.statistics.patient_columns import Column
from tests.support.browser import Visit, browser_or_skip, file_url
from tests.support.reports import read_data, unpack

N_PATIENTS = 12


def _column(values):
    return Column.of(np.array(values))


def _cohort(groups, columns, strata=None, adjust=(), n_latents=5, seed=0):
    """A cohort of made-up counts."""
    groups = np.array(groups)
    counts = np.random.default_rng(seed).gamma(2.0, size=(len(groups), n_latents))
    names = tuple("abcdef"[: groups.max() + 1])
    cohort = SimpleNamespace(
        groups=SimpleNamespace(of=groups, names=names), unit="patient", counts=counts, strata=strata, adjust=adjust,
        columns={name: _column(values) for name, values in columns.items()}, subjects=None,
        n_images=np.arange(len(groups)) + 20, n_passed=None,
    )  # fmt: skip
    cohort.units = cohort
    return cohort


@pytest.fixture(scope="module")
def place(_pristine, tmp_path_factory):
    """A store of twelve patients from two sites, and an autoencoder."""
    from tests.conftest import Workplace
    from tests.support.pictures import write_pictures

    root = tmp_path_factory.mktemp("audit") / "root"
    shutil.copytree(_pristine["images"], root)
    place = Workplace(root)
    write_pictures(place.images, 60, broken=False)
    files = sorted(path for path in place.images.rglob("*.png") if "broken" not in path.name)
    lines = [
        f"{path.relative_to(root)},{'ab'[at % 2]},p{at % N_PATIENTS:02d},site {'XY'[at % N_PATIENTS // 6]},{at}"
        for at, path in enumerate(files)
    ]
    (root / "m.csv").write_text("path,label,patient,site,area\n" + "\n".join(lines) + "\n")
    rows = [f"p{at:02d},{40 + at},{'fm'[at % 2]},c{at % 4}" for at in range(N_PATIENTS)]
    (root / "known.csv").write_text("patient,age,sex,batch\n" + "\n".join(rows) + "\n")
    groups = [f"p{at:02d},{'ill' if at % 3 else 'well'}" for at in range(N_PATIENTS)]
    (root / "groups.csv").write_text("patient,group\n" + "\n".join(groups) + "\n")
    (root / "sites.csv").write_text(
        "patient,group\n" + "\n".join(f"p{at:02d},{'XY'[at // 6]}" for at in range(N_PATIENTS)) + "\n"
    )
    place.build("--images", root / "m.csv")
    place.train("--run_name", "r")
    return place


def _report(place, *arguments, groups="groups.csv", code=0):
    out = place.root / "page"
    result = place.run(
        "report", "--dataset_name", "toy", "--sae_path", place.sae(), "--out", out, "--images", place.root / "m.csv",
        "--map_images", 0, "--groups", place.root / groups, *arguments, code=code,
    )  # fmt: skip
    return out, result.output


def test_the_command_compares_within_sites_and_at_equal_age(place):
    table = ("--covariates", place.root / "known.csv")
    config = {
        "root_dir": place.root,
        "dataset_name": "toy",
        "sae_path": place.sae(),
        "groups": place.root / "groups.csv",
    }
    report, _ = _report(place, "--strata", "Site")
    assert read_data(report, "comparisons/0")["method"] == "van Elteren, within site"
    assert read_data(report, "audit")["strata"] == "site"
    cohort = open_report_data(ReportConfig(**config, strata="site")).cohort
    first = cohort.groups.of == 0
    sites = np.array([int(name[1:]) // 6 for name in cohort.names])
    expected = compare_groups_within(cohort.counts, first, sites, level=0.05)
    found = compare_pair(cohort, GroupPair(0, 1), test="mann-whitney", seed=0)
    np.testing.assert_array_equal(found.p_value, expected.p_value)
    report, _ = _report(place, *table, "--adjust", "age", "--adjust", "site", "--adjust", "batch")
    record = read_data(report, "comparisons/0")
    assert record["method"] == "linear model of log2 counts with age, site, batch"
    assert record["about_effect"] == "the partial correlation with the group, at equal age, site, batch"
    assert read_data(report, "audit")["adjust"] == ["age", "site", "batch"]
    chosen = ReportConfig(**config, covariates=place.root / "known.csv", adjust=("age", "site", "batch"))
    cohort = open_report_data(chosen).cohort
    numbers = np.array([int(name[1:]) for name in cohort.names])
    design = np.column_stack([numbers + 40.0, numbers // 6, numbers % 4 == 1, numbers % 4 == 2, numbers % 4 == 3])
    expected = compare_groups_adjusted(cohort.counts, cohort.groups.of == 0, design, level=0.05)
    found = compare_pair(cohort, GroupPair(0, 1), test="mann-whitney", seed=0)
    np.testing.assert_allclose(found.p_value, expected.p_value, rtol=1e-9)


def test_groups_that_are_the_sites_are_refused(place):
    _, output = _report(place, "--strata", "site", groups="sites.csv", code=1)
    assert "'X' and 'Y' cannot be compared within 'site': no level of it has patients of two groups" in output
    assert "Leave out --strata to compare them regardless" in output
    _, output = _report(place, "--adjust", "site", groups="sites.csv", code=1)
    assert "'X' and 'Y' cannot be compared at equal 'site': these tell which group a patient is in" in output


def test_wrong_columns_and_options_are_refused(place):
    _, output = _report(place, "--strata", "area", code=1)
    assert "--strata 'area' differs within a patient, and patients are compared" in output
    _, output = _report(place, "--adjust", "weight", code=1)
    assert (
        "--adjust 'weight' names no column of the store's images that every patient has once, found: 'site'" in output
    )
    with pytest.raises(UserError, match="linear model, --strata by another test: give one of them"):
        ReportConfig(dataset_name="x", sae_path="y", strata="site", adjust=("age",))
    with pytest.raises(UserError, match="linear model, --group_test permutation by another test"):
        ReportConfig(dataset_name="x", sae_path="y", adjust=("age",), group_test="permutation")


def test_the_audit_is_on_the_page_with_what_is_known_and_without(place):
    with browser_or_skip() as browser:
        report, _ = _report(place, "--covariates", place.root / "known.csv")
        visit = Visit(browser, file_url(report))
        visit.go("patients/audit")
        visit.page.wait_for_selector("text=Each property of patients that is known")
        text = visit.page.inner_text("#view")
        for name in ("age", "sex", "batch", "site"):
            assert f"\n{name}\t" in text
        assert "Spearman's correlation" in text
        visit.close()


def test_the_audit_relates_every_property():
    rng = np.random.default_rng(1)
    groups = np.arange(30) % 2
    site = np.where(rng.random(30) < 0.8, groups, 1 - groups)
    cohort = _cohort(
        groups,
        {"site": [f"s{at}" for at in site], "age": rng.normal(60, 9, 30), "id": [f"x{at}" for at in range(30)]},
        n_latents=40,
    )
    cohort.counts[:, 3] *= 1 + 9 * site
    cohort.counts[:, 4] = cohort.columns["age"].numbers
    audit = audit_cohort(cohort, seed=0)
    assert [column.name for column in audit.columns] == ["site", "age", "readable images"]
    assert audit.told_by(3) == ["site"]
    assert audit.told_by(4) == ["age"]
    assert audit.told_by(5) == []
    record = audit_record(audit, cohort)
    by_site, by_age, by_images = record["columns"]
    assert (by_site["n_levels"], by_age["n_levels"]) == (2, 0)
    assert by_site["latents"][0]["latent"] == 3
    assert by_age["latents"][0]["correlation"] == pytest.approx(1)
    assert unpack(by_site["more_than_group"]).tolist() == [3]
    assert record["has_groups"]
    expected = relate_names(site, groups)
    assert by_site["with_groups"] == (expected.cramers_v, expected.p_value)
    assert (by_images["name"], by_images["n_subjects"]) == ("readable images", 30)
    assert record["n_known"] == 3
    without = _cohort([0] * 30, {"site": [f"s{at}" for at in site]})
    alone = audit_cohort(without, seed=0)
    assert alone.groups is None
    assert not audit_record(alone, without)["has_groups"]
    assert audit_record(alone, without)["columns"][0]["with_groups"] is None


def test_properties_that_nobody_shares_are_named_in_the_log(messages):
    audit_cohort(_cohort([0, 0, 1, 1, 0, 1], {"hospital": ["a", "b", "c", "a", "", ""], "x": ["k"] * 6}), seed=0)
    assert "not audited, as too few patients share a value: 'hospital', 'x'" in messages()


def test_one_pair_that_cannot_be_compared_does_not_cost_the_others():
    groups = [0, 0, 0, 1, 1, 1, 2, 2, 2]
    cohort = _cohort(groups, {"site": ["s", "s", "t", "s", "s", "t", "u", "u", "u"]}, strata="site")
    made = compare_all(cohort, test="mann-whitney", seed=0)
    pairs = [(pair.first, pair.second) for pair in made.pairs]
    assert [bool(text) for text in made.why_not] == [pair in {(0, 2), (1, 2), (2, None)} for pair in pairs]
    assert made.why_not_all == ""
    number = pairs.index((0, 2))
    record = comparison_record(made, number, cohort, "mann-whitney", Audit([], None))
    assert "'a' and 'c' cannot be compared within 'site'" in record["why_not"]
    assert (record["design"], record["left_out"], record["n_varying"]) == ("", "", 0)
    record = comparison_record(made, pairs.index((0, None)), cohort, "mann-whitney", Audit([], None))
    assert record["left_out"] == "3 of 9 patients, whose site is unknown or has one group only, do not count."
    assert record["design"].startswith(
        "With 3 against 3 patients within site the smallest possible p is 0.17: no latent"
    )


def test_few_subjects_and_covariates_that_know_the_group_are_refused():
    cohort = _cohort([0, 0, 1, 1, 2, 2], {"site": ["s", "s", "t", "t", "u", "v"]}, adjust=("site",))
    with pytest.raises(IncomparableError, match="groups cannot be compared at equal 'site': these tell which group"):
        compare_several(cohort, all_sides(cohort), seed=0)
    cohort = _cohort([0, 1, 0, 1], {"x": [1.5, 2.5, 7.5, 1.25], "y": [0.5, 7.5, 1.5, 2.5]}, adjust=("x", "y"))
    with pytest.raises(IncomparableError, match="4 patients of whom these are known are too few for so many columns"):
        compare_pair(cohort, GroupPair(0, 1), test="mann-whitney", seed=0)
    cohort = _cohort([0, 0, 1, 1], {"x": [1.5, np.nan, 2.5, 1.25]}, adjust=("x",))
    assert describe_left_out(cohort, 3, 4) == "1 of 4 patients, of whom x is unknown, do not count."
