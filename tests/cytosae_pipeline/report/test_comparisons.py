"""Records of comparisons: all groups at once, q over all comparisons, and what the design can find."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import false_discovery_control

from cytosae.analysis.differential import adjust_together, compare_groups, least_p_of
from cytosae.analysis.omnibus import compare_all_groups
from cytosae_pipeline.config import PageConfig
from cytosae_pipeline.report.data.limits import SIGNIFICANT_Q
from cytosae_pipeline.report.data.report_data import open_report_data
from cytosae_pipeline.report.explore.service import ExploreService
from cytosae_pipeline.report.measures.extras import find_extras
from cytosae_pipeline.report.records.comparisons import GroupPair, compare_all, describe_design, sides_of_pair
from cytosae_pipeline.report.records.images import make_image_book
from tests.support.browser import Visit, browser_or_skip, file_url
from tests.support.reports import read_data, unpack


def _groups(*sizes, unit="patient", n_latents=4, seed=0):
    """A cohort without names."""
    of = np.repeat(np.arange(len(sizes)), sizes)
    names = tuple("abcdef"[: len(sizes)])
    counts = np.random.default_rng(seed).gamma(2, size=(len(of), n_latents))
    cohort = SimpleNamespace(
        groups=SimpleNamespace(of=of, names=names), unit=unit, counts=counts, strata=None, adjust=(), columns={}
    )
    cohort.units = cohort
    return cohort


@pytest.fixture(scope="module")
def demo(demo_run):
    """Counts of the demo's patients per image, and their groups."""
    folder = demo_run.report.parent
    counts = np.load(folder / "cls_sae_cnt.npy")
    (table,) = demo_run.root.glob("dataset/*/patients.csv")
    with table.open(newline="") as file:
        group = {row["patient"]: row["group"] for row in csv.DictReader(file)}
    with (folder / "patients.csv").open(newline="") as file:
        names = [row["patient"] for row in csv.DictReader(file)]
    known = sorted(set(group.values()))
    groups = np.array([known.index(group[name]) for name in names])
    # As the report orders them: random assignments depend on the order.
    order = np.lexsort((names, groups))
    return counts[order], groups[order], known


def test_all_groups_are_compared_first(demo_run, demo):
    counts, groups, names = demo
    found = compare_all_groups(counts, groups, 3, level=SIGNIFICANT_Q)
    record = read_data(demo_run.report, "comparisons/all")
    assert read_data(demo_run.report, "patients")["all_groups"] == record["groups"] == [0, 1, 2]
    assert (record["n_varying"], record["n_tested"]) == (found.n_varying, found.tested.sum())
    assert record["n_significant"] == (found.q_value < SIGNIFICANT_Q).sum() > 0
    best = np.lexsort((-found.statistic, found.q_value))[:15]
    assert [item["latent"] for item in record["latents"]] == best.tolist()
    for item in record["latents"]:
        assert item["p"] == found.p_value[item["latent"]]
        assert item["q"] == found.q_value[item["latent"]]
        assert item["effect"] == pytest.approx(found.statistic[item["latent"]] / (len(groups) - 1))
    assert len(names) == 3


def test_q_is_adjusted_over_all_comparisons_too(demo_run, demo):
    counts, groups, _names = demo
    described = read_data(demo_run.report, "patients")["comparisons"]
    assert len(described) == 6
    found = []
    for pair in described:
        first, second = pair["groups"]
        rows = np.flatnonzero((groups == first) | (groups == second)) if second is not None else np.arange(len(groups))
        found.append(compare_groups(counts[rows], groups[rows] == first, level=SIGNIFICANT_Q))
    together = false_discovery_control(np.concatenate([one.p_value[one.tested] for one in found]))
    at = 0
    for number, one in enumerate(found):
        record = read_data(demo_run.report, f"comparisons/{number}")
        latents = unpack(record["latents"])
        assert latents.tolist() == np.flatnonzero(one.tested).tolist()
        assert record["n_varying"] == one.n_varying >= len(latents)
        mine = together[at : at + len(latents)]
        at += len(latents)
        np.testing.assert_allclose(10.0 ** -unpack(record["minus_log10_q_over_all"]), mine, rtol=1e-5)
        np.testing.assert_allclose(10.0 ** -unpack(record["minus_log10_q"]), one.q_value[latents], rtol=1e-5)
        assert record["design"] == ""
    assert at == len(together)


def test_the_explorer_serves_the_same(demo_run):
    (sae,), (groups,) = demo_run.root.glob("out/checkpoints/*/final_*.pt"), demo_run.root.glob("dataset/*/patients.csv")
    config = PageConfig(root_dir=demo_run.root, dataset_name="demo-0", sae_path=sae, groups=groups)
    data = open_report_data(config, profiles=False)
    with ExploreService(data, np.arange(3), {}, None, None, make_image_book(data), find_extras(data)) as service:
        for name, asked in (("all", service.all_groups()), ("3", service.comparison(3))):
            assert asked == (demo_run.report / f"data/comparisons/{name}.js").read_bytes()


def test_adjusting_together_equals_scipy_and_takes_nothing():
    rng = np.random.default_rng(0)
    made = [compare_groups(rng.gamma(2, size=(10, 30)), np.arange(10) < n) for n in (3, 5)]
    expected = false_discovery_control(np.concatenate([one.p_value for one in made]))
    np.testing.assert_allclose(np.concatenate(adjust_together(made)), expected)
    assert adjust_together([]) == []
    (alone,) = adjust_together([compare_groups(np.zeros((4, 3)), np.arange(4) < 2)])
    assert alone.tolist() == [1, 1, 1]


def _design(cohort, pair, n_tested, test):
    return describe_design(cohort, sides_of_pair(cohort, pair), n_tested, test)


def test_the_design_says_what_can_be_found():
    pair = GroupPair(0, 1)
    assert _design(_groups(3, 3), pair, 500, "mann-whitney") == (
        "With 3 against 3 patients the smallest possible p is 0.1: no latent can reach q < 0.05."
    )
    assert _design(_groups(5, 5, unit="subject"), pair, 400, "mann-whitney") == (
        "With 5 against 5 subjects the smallest possible p is 0.0079: at least 64 of 400 latents must reach it before "
        "any has q < 0.05."
    )
    assert _design(_groups(5, 5, 20), GroupPair(0, None), 400, "mann-whitney") == ""
    assert "smallest possible p is 0.0001: at least 2 of" in _design(_groups(20, 20), pair, 1000, "permutation")


@pytest.mark.parametrize("method", ["mann-whitney", "permutation"])
@pytest.mark.parametrize(("n_first", "n_second"), [(2, 2), (3, 4), (8, 9), (9, 9), (12, 10), (14, 12)])
def test_the_smallest_possible_p_is_that_of_complete_separation(method, n_first, n_second):
    counts = (2.0 ** np.arange(n_first + n_second))[:, None]
    first = np.arange(n_first + n_second) >= n_second
    found = min(compare_groups(counts, which, method=method).p_value[0] for which in (first, ~first[::-1]))
    least = least_p_of(n_first, n_second, method)
    # Random assignments may contain the observed one by chance.
    assert found == pytest.approx(least, rel=1e-9) or (least == 1 / 10_001 and found < 3 * least)


def test_fewer_than_three_groups_are_not_tested_at_once():
    made = compare_all(_groups(4, 4), test="mann-whitney", seed=0)
    assert made.all_groups is None
    assert len(made.pairs) == len(made.found) == len(made.q_over_all) == 1
    steps = []
    made = compare_all(_groups(3, 1, 3, 3), test="mann-whitney", seed=0, advance=lambda: steps.append(1))
    assert made.all_groups is not None
    assert len(made.pairs) == len(steps) == 6, "groups of one are left out"


def test_the_page_shows_all_groups_and_both_q(demo_run, demo):
    with browser_or_skip() as browser:
        visit = Visit(browser, file_url(demo_run.report))
        visit.go("patients/compare")
        visit.page.click("text=all 3 groups at once >> nth=0")
        visit.page.wait_for_selector("text=/Kruskal.Wallis: AML-like, CML-like, healthy/")
        record = read_data(demo_run.report, "comparisons/all")
        text = visit.page.inner_text("#view")
        assert f"{record['n_significant']:,} differ between any of the groups" in text
        assert f"latent {record['latents'][0]['latent']}" in text.lower()
        visit.page.select_option("#compared", "3")
        visit.page.wait_for_selector("text=q over all")
        assert "Over all comparisons of this report," in visit.page.inner_text("#view")
        visit.close()


def test_the_page_says_what_so_few_patients_can_find(with_sae):
    path, out = with_sae.root / "groups.csv", with_sae.root / "page"
    path.write_text("patient,group\np0,ill\np1,well\np2,ill\np3,well\n")
    with_sae.run(
        "report", "--dataset_name", "toy", "--sae_path", with_sae.sae(), "--out", out, "--groups", path,
        "--map_images", 0, "--masking_images", 0,
    )  # fmt: skip
    text = "With 2 against 2 patients the smallest possible p is 0.33: no latent can reach q < 0.05."
    record = read_data(out, "comparisons/0")
    assert record["design"] == text
    assert read_data(out, "patients")["all_groups"] is None
    assert not (out / "data/comparisons/all.js").exists()
    tested = len(unpack(record["latents"]))
    assert 0 < tested < record["n_varying"]
    with browser_or_skip() as browser:
        visit = Visit(browser, file_url(out))
        visit.go("patients/compare")
        visit.page.wait_for_selector(f"text={text}")
        assert f"the {tested} that could be significant, whatever the groups" in visit.page.inner_text("#view")
        visit.close()
