"""Comparison of groups within strata, against the test without strata, brute force, and confounded data."""

import itertools

import numpy as np
import pytest
from scipy.stats import chi2, norm, rankdata

import cytosae.analysis.omnibus
import cytosae.analysis.omnibus_within
import cytosae.analysis.within_strata
from cytosae.analysis.design import least_p_of_design
from cytosae.analysis.differential import compare_groups
from cytosae.analysis.omnibus import compare_all_groups
from cytosae.analysis.omnibus_within import compare_all_groups_within
from cytosae.analysis.strata import Strata
from cytosae.analysis.within_strata import compare_groups_within


def _counts(n, n_latents, seed):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.8, (n, n_latents)).astype(np.float64)
    counts[:, ::2] = rng.gamma(2.0, size=counts[:, ::2].shape)
    return counts


def _van_elteren(column, first, strata):
    """The statistic in units of a rank, and its normal deviate, by loops."""
    total, variance = 0.0, 0.0
    for stratum in set(strata.tolist()):
        rows = np.flatnonzero(strata == stratum)
        ranks, n, n_first = rankdata(column[rows]), len(rows), int(first[rows].sum())
        total += (sum(ranks[first[rows]]) - n_first * (n + 1) / 2) / (n + 1)
        squares = sum((rank - (n + 1) / 2) ** 2 for rank in ranks.tolist())
        variance += n_first * (n - n_first) * squares / (n * (n - 1)) / (n + 1) ** 2
    return total, total / variance**0.5 if variance else 0.0


def _assignments(first, strata):
    """Every assignment to the first group within the strata."""
    rows = [np.flatnonzero(strata == stratum) for stratum in sorted(set(strata.tolist()))]
    for chosen in itertools.product(*(itertools.combinations(here, int(first[here].sum())) for here in rows)):
        members = np.zeros(len(first), dtype=bool)
        members[list(itertools.chain.from_iterable(chosen))] = True
        yield members


@pytest.mark.parametrize(("n_first", "n_second"), [(3, 5), (8, 7), (12, 30)])
@pytest.mark.parametrize("method", ["mann-whitney", "permutation"])
def test_one_stratum_is_the_comparison_without(n_first, n_second, method):
    counts = _counts(n_first + n_second, 30, seed=n_first)
    first = np.random.default_rng(1).permutation(np.arange(len(counts)) < n_first)
    plain = compare_groups(counts, first, method=method, level=0.05)
    found = compare_groups_within(counts, first, np.zeros(len(counts), dtype=int), method=method, level=0.05)
    for name in ("mean_first", "mean_second", "log2_fold_change", "direction", "effect", "tested"):
        np.testing.assert_allclose(getattr(found, name), getattr(plain, name), atol=1e-12, err_msg=name)
    assert found.n_varying == plain.n_varying
    exact = plain.p_value < 0.2  # larger ones are normal approximations, here without the correction for continuity
    if min(n_first, n_second) < 9:
        np.testing.assert_allclose(found.p_value[exact], plain.p_value[exact], rtol=1e-9)
    else:
        np.testing.assert_allclose(found.p_value, plain.p_value, atol=0.03)


@pytest.mark.parametrize("method", ["mann-whitney", "permutation"])
@pytest.mark.parametrize("sizes", [[(2, 2), (3, 2)], [(1, 3), (2, 2), (2, 1)]])
def test_small_strata_equal_brute_force(sizes, method, monkeypatch):
    monkeypatch.setattr(cytosae.analysis.within_strata, "REFINED_BELOW", 2.0)
    monkeypatch.setattr(cytosae.analysis.within_strata, "PERMUTATION_BLOCK", 7)
    first = np.concatenate([np.arange(a + b) < a for a, b in sizes])
    strata = np.repeat(np.arange(len(sizes)), [a + b for a, b in sizes])
    order = np.random.default_rng(0).permutation(len(first))
    first, strata = first[order], strata[order]
    counts = _counts(len(first), 14, seed=2)
    found = compare_groups_within(counts, first, strata, method=method)
    every = list(_assignments(first, strata))
    weights = {h: 1 / (np.sum(strata == h) + 1) for h in set(strata.tolist())}

    def statistic(column, members):
        if method == "mann-whitney":
            return abs(_van_elteren(column, members, strata)[0])
        parts = []
        for h, weight in weights.items():
            one, two = column[members & (strata == h)], column[~members & (strata == h)]
            parts.append(weight * len(one) * len(two) * (one.mean() - two.mean()))
        return abs(sum(parts))

    assert found.tested.sum() > 10
    for latent in np.flatnonzero(found.tested):
        column = counts[:, latent]
        observed = statistic(column, first) * (1 - 1e-9)
        share = np.mean([statistic(column, members) >= observed for members in every])
        assert found.p_value[latent] == pytest.approx(share, rel=1e-9)
    filtered = compare_groups_within(counts, first, strata, method=method, level=0.2)
    for latent in np.flatnonzero(found.tested):
        values = [statistic(counts[:, latent], members) for members in every]
        least = np.mean(np.array(values) >= max(values) * (1 - 1e-9))
        assert filtered.tested[latent] == (least <= 0.2 * (1 + 1e-9))


def test_large_strata_have_the_normal_distribution_with_ties(monkeypatch):
    monkeypatch.setattr(cytosae.analysis.within_strata, "REFINED_BELOW", 0.0)
    monkeypatch.setattr(cytosae.analysis.strata, "LATENT_BLOCK", 5)
    rng = np.random.default_rng(3)
    strata, first = rng.integers(0, 3, 90), rng.random(90) < 0.4
    counts = _counts(90, 12, seed=4)
    found = compare_groups_within(counts, first, strata)
    for latent in range(12):
        _, deviate = _van_elteren(counts[:, latent], first, strata)
        assert found.p_value[latent] == pytest.approx(2 * norm.sf(abs(deviate)), rel=1e-9)
        effects, weights = [], []
        for h in range(3):
            one, two = counts[first & (strata == h), latent], counts[~first & (strata == h), latent]
            effects.append(np.sign(one[:, None] - two).mean())
            weights.append(len(one) * len(two) / (len(one) + len(two) + 1))
        assert found.effect[latent] == pytest.approx(np.average(effects, weights=weights))


def test_an_exact_distribution_that_is_too_long_is_sampled_or_left(monkeypatch):
    rng = np.random.default_rng(5)
    counts, first, strata = _counts(16, 6, seed=5), np.arange(16) % 4 == 0, np.arange(16) // 8
    exact = compare_groups_within(counts, first, strata)
    monkeypatch.setattr(cytosae.analysis.within_strata, "LARGEST_TABLE", 1.0)
    np.testing.assert_allclose(compare_groups_within(counts, first, strata).p_value, exact.p_value, atol=1e-9)
    large, groups, sites = _counts(60, 6, seed=6), rng.random(60) < 0.5, np.arange(60) % 2
    approximate = compare_groups_within(large, groups, sites).p_value
    monkeypatch.undo()
    np.testing.assert_allclose(approximate, compare_groups_within(large, groups, sites).p_value, atol=0.02)


def test_what_differs_between_sites_alone_is_not_found():
    rng = np.random.default_rng(7)
    site = np.repeat([0, 1], [20, 20])
    first = np.concatenate([np.arange(20) < 16, np.arange(20) < 4])
    counts = rng.gamma(3.0, size=(40, 60)) * np.where(site, 1.0, 3.0)[:, None]
    counts[:, :6] *= np.where(first, 4.0, 1.0)[:, None]
    plain = compare_groups(counts, first)
    within = compare_groups_within(counts, first, site)
    assert (plain.q_value[6:] < 0.05).mean() > 0.5
    assert (within.q_value < 0.05)[:6].all()
    assert (within.q_value[6:] < 0.05).sum() <= 1


@pytest.mark.parametrize("sizes", [(3, 3, 4), (20, 15, 25)])
def test_all_groups_in_one_stratum_are_kruskal_and_wallis(sizes, monkeypatch):
    monkeypatch.setattr(cytosae.analysis.omnibus, "REFINED_BELOW", 0)
    monkeypatch.setattr(cytosae.analysis.omnibus_within, "REFINED_BELOW", 0)
    groups = np.random.default_rng(0).permutation(np.repeat(np.arange(3), sizes))
    counts = _counts(sum(sizes), 20, seed=1)
    plain = compare_all_groups(counts, groups, 3, level=0.05)
    found = compare_all_groups_within(counts, groups, 3, np.zeros(len(groups), dtype=int), level=0.05)
    for name in ("statistic", "effect", "p_value", "q_value", "tested"):
        np.testing.assert_allclose(getattr(found, name), getattr(plain, name), rtol=1e-8, err_msg=name)


def test_all_groups_within_strata_equal_loops(monkeypatch):
    monkeypatch.setattr(cytosae.analysis.omnibus_within, "REFINED_BELOW", 0)
    rng = np.random.default_rng(8)
    groups, strata = rng.integers(0, 3, 50), rng.integers(0, 3, 50)
    counts = _counts(50, 8, seed=9)
    found = compare_all_groups_within(counts, groups, 3, strata)
    for latent in range(8):
        vector, covariance = np.zeros(3), np.zeros((3, 3))
        for h in range(3):
            rows = np.flatnonzero(strata == h)
            n, ranks = len(rows), rankdata(counts[rows, latent])
            spread = ranks.var(ddof=1)
            size = np.bincount(groups[rows], minlength=3)
            for one in range(3):
                vector[one] += (ranks[groups[rows] == one].sum() - size[one] * (n + 1) / 2) / (n + 1)
                for two in range(3):
                    covariance[one, two] += (
                        (size[one] * (one == two) - size[one] * size[two] / n) * spread / (n + 1) ** 2
                    )
        expected = vector[:2] @ np.linalg.solve(covariance[:2, :2], vector[:2])
        assert found.statistic[latent] == pytest.approx(expected, rel=1e-8)
        assert found.p_value[latent] == pytest.approx(chi2.sf(expected, 2), rel=1e-7)
        assert found.effect[latent] == pytest.approx(expected / 47)


def test_two_groups_at_once_are_the_square_of_two_compared(monkeypatch):
    monkeypatch.setattr(cytosae.analysis.omnibus_within, "REFINED_BELOW", 0)
    monkeypatch.setattr(cytosae.analysis.within_strata, "REFINED_BELOW", 0)
    rng = np.random.default_rng(10)
    first, strata, counts = rng.random(40) < 0.5, rng.integers(0, 2, 40), _counts(40, 9, seed=11)
    together = compare_all_groups_within(counts, first.astype(int), 2, strata)
    np.testing.assert_allclose(together.p_value, compare_groups_within(counts, first, strata).p_value, rtol=1e-8)


def test_small_groups_are_permuted_within_their_strata():
    rng = np.random.default_rng(12)
    strata = np.repeat([0, 1, 2], 6)
    groups = np.tile([0, 0, 1, 1, 2, 2], 3)
    counts = rng.gamma(2.0, size=(18, 400)) * (1 + 3 * strata)[:, None]
    found = compare_all_groups_within(counts, groups, 3, strata, n_permutations=2000)
    assert 0.02 <= (found.p_value <= 0.05).mean() <= 0.08
    again = compare_all_groups_within(counts, groups, 3, strata, n_permutations=2000)
    np.testing.assert_array_equal(found.p_value, again.p_value)
    permuted = found.p_value[found.p_value < 0.2] * 2001
    np.testing.assert_allclose(permuted, np.rint(permuted), atol=1e-6)
    few = compare_all_groups_within(counts * (rng.random((18, 400)) < 0.05), groups, 3, strata, level=0.05)
    assert 0 < few.tested.sum() < few.n_varying


def test_subjects_outside_usable_strata_do_not_count():
    counts, first = _counts(14, 10, seed=13), np.arange(14) % 2 == 0
    strata = np.array([0] * 8 + [1] * 2 + [2] + [-1] * 3)
    first[8:10] = True
    kept = compare_groups_within(counts, first, strata)
    np.testing.assert_array_equal(kept.p_value, compare_groups_within(counts[:8], first[:8], strata[:8]).p_value)
    assert Strata.of(first.astype(int), strata).used.tolist() == list(range(8))


def test_the_least_p_of_strata_is_the_product():
    assert least_p_of_design([3, 2], [3, 2]) == 2 / (20 * 6)
    assert least_p_of_design(3, 3) == 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strata": np.arange(6)}, "no stratum has subjects of two groups"),
        ({"strata": np.zeros(5, dtype=int)}, r"groups and strata must be \(P,\), found \(6,\) and \(5,\)"),
        ({"in_first": np.arange(6)}, r"in_first bool \(P,\), found \(6, 3\) and \(6,\)"),
        ({"method": "t"}, "method must be 'mann-whitney' or 'permutation', found 't'"),
        ({"counts": -np.ones((6, 3))}, "counts must be finite and not negative"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, message):
    given = {"counts": np.ones((6, 3)), "in_first": np.arange(6) % 2 == 0, "strata": np.zeros(6, dtype=int)}
    with pytest.raises(ValueError, match=message):
        compare_groups_within(**(given | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": np.zeros(5, dtype=int)}, r"counts must be \(P, S\) and groups \(P,\), found \(6, 3\) and \(5,\)"),
        ({"counts": np.full((6, 3), np.nan)}, "counts must be finite and not negative"),
        ({"strata": np.arange(6)}, "no stratum has subjects of two groups"),
    ],
)
def test_what_cannot_be_compared_at_once_is_refused(change, message):
    given = {"counts": np.ones((6, 3)), "groups": np.arange(6) % 3, "strata": np.zeros(6, dtype=int)}
    with pytest.raises(ValueError, match=message):
        compare_all_groups_within(**(given | change), n_groups=3)
