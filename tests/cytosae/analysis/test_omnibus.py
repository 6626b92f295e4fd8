"""The test of several groups against scipy, brute force and null data."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import chi2, false_discovery_control, kruskal, kstest

import cytosae.analysis.omnibus
from cytosae.analysis.design import least_p_by_others
from cytosae.analysis.omnibus import compare_all_groups


def _counts(n, n_latents, seed):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.8, (n, n_latents)).astype(np.float64)
    counts[:, ::2] = rng.gamma(2.0, size=counts[:, ::2].shape)
    return counts


def _groups(*sizes, seed=0):
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))


@pytest.mark.parametrize("sizes", [(2, 2, 2), (9, 12, 20), (3, 40), (4, 5, 6, 7)])
def test_h_equals_scipy_with_ties_and_without(sizes, monkeypatch):
    monkeypatch.setattr(cytosae.analysis.omnibus, "REFINED_BELOW", 0)
    monkeypatch.setattr(cytosae.analysis.omnibus, "LATENT_BLOCK", 7)
    counts, groups = _counts(sum(sizes), 40, seed=len(sizes)), _groups(*sizes)
    found = compare_all_groups(counts, groups, len(sizes))
    assert found.tested.sum() > 30
    for latent in np.flatnonzero(found.tested):
        plain = kruskal(*(counts[groups == group, latent] for group in range(len(sizes))))
        assert found.statistic[latent] == pytest.approx(plain.statistic, rel=1e-10)
        assert found.p_value[latent] == pytest.approx(plain.pvalue, rel=1e-9)
        assert found.effect[latent] == pytest.approx(plain.statistic / (sum(sizes) - 1))
    np.testing.assert_allclose(found.q_value[found.tested], false_discovery_control(found.p_value[found.tested]))
    assert found.n_varying == found.tested.sum()


@pytest.mark.parametrize("sizes", [(2, 2, 2), (2, 3, 3), (3, 4)])
def test_all_assignments_equal_brute_force(sizes, monkeypatch):
    monkeypatch.setattr(cytosae.analysis.omnibus, "REFINED_BELOW", 2.0)
    monkeypatch.setattr(cytosae.analysis.omnibus, "PERMUTATION_BLOCK", 10)
    n = sum(sizes)
    counts, groups = _counts(n, 12, seed=1), _groups(*sizes)
    found = compare_all_groups(counts, groups, len(sizes))
    labels = np.repeat(np.arange(len(sizes)), sizes)
    every = [np.array(order) for order in set(itertools.permutations(labels.tolist()))]
    assert len(every) == math.factorial(n) // math.prod(map(math.factorial, sizes))
    for latent in np.flatnonzero(found.tested):
        column = counts[:, latent]

        def statistic(of, column=column):
            return kruskal(*(column[of == group] for group in range(len(sizes)))).statistic

        observed = statistic(groups)
        share = np.mean([statistic(of) >= observed * (1 - 1e-9) for of in every])
        assert found.p_value[latent] == pytest.approx(share, rel=1e-9)


def test_random_assignments_approximate_all_and_repeat():
    counts, groups = _counts(10, 60, seed=2), _groups(3, 3, 4)
    every = compare_all_groups(counts, groups, 3)
    drawn, again = (compare_all_groups(counts, groups, 3, n_permutations=3000, seed=1) for _ in range(2))
    other = compare_all_groups(counts, groups, 3, n_permutations=3000, seed=2)
    np.testing.assert_array_equal(drawn.p_value, again.p_value)
    assert (drawn.p_value != other.p_value).any()
    refined = chi2.sf(every.statistic, 2) < 0.25
    assert 5 < refined.sum() < 60
    np.testing.assert_allclose(drawn.p_value[refined], every.p_value[refined], atol=0.03)
    np.testing.assert_array_equal(drawn.p_value[~refined], every.p_value[~refined])
    steps = drawn.p_value[refined] * 3001
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-8)


def test_two_groups_with_many_subjects_agree_with_the_test_of_two(monkeypatch):
    from cytosae.analysis.differential import compare_groups

    counts, groups = _counts(60, 50, seed=3), _groups(30, 30)
    several, two = compare_all_groups(counts, groups, 2), compare_groups(counts, groups == 0)
    np.testing.assert_allclose(several.p_value, two.p_value, atol=0.02)


@pytest.mark.parametrize("sizes", [(4, 4, 4), (12, 12, 12), (3, 10, 30)])
def test_without_a_difference_the_level_holds(sizes):
    rng = np.random.default_rng(4)
    counts = rng.poisson(rng.gamma(0.5, 2, 1500), (sum(sizes), 1500)) * rng.gamma(1, 1, (sum(sizes), 1500))
    found = compare_all_groups(counts, _groups(*sizes), len(sizes), n_permutations=2000)
    for level in (0.01, 0.05):
        share = (found.p_value[found.tested] <= level).mean()
        assert share < level + 4 * math.sqrt(level / found.tested.sum()), level
    assert (found.q_value < 0.05).sum() == 0
    smooth = compare_all_groups(rng.gamma(2, 1, (36, 2000)), _groups(12, 12, 12), 3)
    assert kstest(smooth.p_value, "uniform").statistic < 0.04


def test_planted_latents_are_found():
    rng = np.random.default_rng(5)
    groups = _groups(6, 6, 6)
    counts = rng.poisson(5.0, (18, 300)).astype(float)
    counts[:, 200:] = 0
    for latent in (7, 9):
        counts[:, latent] += 20 * groups
    found = compare_all_groups(counts, groups, 3)
    assert set(np.flatnonzero(found.q_value < 0.05)) == {7, 9}
    assert found.tested.sum() == found.n_varying == 200
    assert (found.p_value[200:] == 1).all()
    assert found.effect.max() <= 1


def test_latents_that_cannot_reach_the_level_are_not_tested():
    sizes = (3, 3, 3)
    groups = np.repeat([0, 1, 2], 3)
    counts = np.zeros((9, 4))
    counts[:1, 0] = 1  # p >= 1/3
    counts[:2, 1] = [1, 2]  # p >= 1/12
    counts[:3, 2] = [1, 2, 3]
    found = compare_all_groups(counts, groups, 3, level=0.05)
    assert found.tested.tolist() == [False, False, True, False]
    assert found.n_varying == 3
    assert found.q_value[2] == found.p_value[2] == pytest.approx(3 / 84)
    assert least_p_by_others(sizes)[:4] == pytest.approx([1, 1 / 3, 1 / 12, 1 / 84])


def test_errors():
    counts, groups = np.ones((6, 2)), np.repeat([0, 1, 2], 2)
    with pytest.raises(ValueError, match=r"whole numbers of shape \(P,\), found \(6, 2\) and int64 of shape \(5,\)"):
        compare_all_groups(counts, groups[:5], 3)
    with pytest.raises(ValueError, match="groups must be numbers from 0 to 1 of at least 2 groups"):
        compare_all_groups(counts, groups, 2)
    with pytest.raises(ValueError, match="at least 2 subjects in each group, found 2, 2, 2, 0"):
        compare_all_groups(counts, groups, 4)
    with pytest.raises(ValueError, match="n_permutations must be at least 1, found 0"):
        compare_all_groups(counts, groups, 3, n_permutations=0)
    counts[0, 0] = np.nan
    with pytest.raises(ValueError, match="finite and not negative"):
        compare_all_groups(counts, groups, 3)
