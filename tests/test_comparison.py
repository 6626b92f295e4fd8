"""Two groups compared, against scipy latent by latent, brute-force permutations, and planted truth."""

import itertools

import numpy as np
import pytest
from scipy import stats

from cytosae.comparison import compare_groups, largest_differences


def _cohort(n_first=7, n_second=9, n_latents=60, seed=0):
    """Counts with many zeros, as patients have them, and some without ties."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.7, size=(n_first + n_second, n_latents)).astype(float)
    counts[:, ::3] = rng.random((n_first + n_second, len(counts[0, ::3])))
    return counts, np.arange(n_first + n_second) < n_first


@pytest.mark.parametrize(("n_first", "n_second"), [(2, 2), (7, 9), (8, 30), (12, 15)])
def test_ranks_are_those_of_scipy_latent_by_latent(n_first, n_second):
    counts, in_first = _cohort(n_first, n_second)
    found = compare_groups(counts, in_first)
    for latent, column in enumerate(counts.T):
        if column.min() == column.max():
            assert not found.tested[latent]
            continue
        exact = len(set(column)) == len(column) and min(n_first, n_second) <= 8
        plain = stats.mannwhitneyu(column[in_first], column[~in_first], method="exact" if exact else "asymptotic")
        assert found.p_value[latent] == pytest.approx(plain.pvalue, rel=1e-12)
        pairs = np.sign(column[in_first][:, None] - column[~in_first])
        assert found.effect[latent] == pytest.approx(pairs.mean(), abs=1e-12)


def test_permutations_are_all_assignments_where_they_can_be():
    counts, in_first = _cohort(4, 5, n_latents=12)
    found = compare_groups(counts, in_first, method="permutation")
    for latent, column in enumerate(counts.T):
        observed = abs(column[in_first].mean() - column[~in_first].mean())
        differences = []
        for chosen in itertools.combinations(range(9), 4):
            mask = np.isin(np.arange(9), chosen)
            differences.append(abs(column[mask].mean() - column[~mask].mean()))
        extreme = np.array(differences) >= observed - 1e-9
        assert found.p_value[latent] == pytest.approx(extreme.mean(), rel=1e-12)


def test_random_permutations_come_near_all_of_them_and_are_never_zero():
    counts, in_first = _cohort(6, 7, n_latents=30)
    every = compare_groups(counts, in_first, method="permutation", n_permutations=2000)  # 1716 assignments
    some = compare_groups(counts, in_first, method="permutation", n_permutations=1500, seed=3)
    np.testing.assert_allclose(some.p_value, every.p_value, atol=0.06)
    assert some.p_value.min() >= 1 / 1501
    again = compare_groups(counts, in_first, method="permutation", n_permutations=1500, seed=3)
    assert np.array_equal(some.p_value, again.p_value)
    other = compare_groups(counts, in_first, method="permutation", n_permutations=1500, seed=4)
    assert not np.array_equal(some.p_value, other.p_value)


@pytest.mark.parametrize("method", ["mann-whitney", "permutation"])
def test_without_a_difference_p_is_uniform(method):
    values = np.random.default_rng(1).normal(size=(30, 2000)) ** 2
    p = compare_groups(values, np.arange(30) < 14, method=method).p_value
    assert stats.kstest(p, "uniform").pvalue > 0.001


@pytest.mark.parametrize("method", ["mann-whitney", "permutation"])
def test_planted_latents_are_found_with_the_right_sign(method):
    rng = np.random.default_rng(2)
    counts = rng.poisson(2.0, size=(40, 3000)).astype(float)
    in_first = np.arange(40) < 18
    counts[in_first, :4] += 6
    counts[~in_first, 4:7] += 6
    found = compare_groups(counts, in_first, method=method)
    significant = set(np.flatnonzero(found.q_value < 0.05).tolist())
    assert significant >= set(range(7))
    assert len(significant) <= 9
    more_in_first, more_in_second = largest_differences(found, 4)
    assert sorted(more_in_first.tolist()) == [0, 1, 2, 3]
    assert sorted(more_in_second[:3].tolist()) == [4, 5, 6]
    assert (found.log2_fold_change[:4] > 1).all()
    assert (found.log2_fold_change[4:7] < -1).all()


def test_blocks_of_latents_do_not_show():
    counts, in_first = _cohort(n_latents=5000)
    whole, part = compare_groups(counts, in_first), compare_groups(counts[:, 4000:], in_first)
    assert np.array_equal(whole.p_value[4000:], part.p_value)


def test_constant_latents_are_not_tested_and_do_not_dilute_the_others():
    counts, in_first = _cohort(n_latents=20)
    padded = np.concatenate([counts, np.zeros((16, 500)), np.ones((16, 500))], axis=1)
    alone, among = compare_groups(counts, in_first), compare_groups(padded, in_first)
    np.testing.assert_allclose(among.q_value[:20], alone.q_value, rtol=1e-12)
    assert not among.tested[20:].any()
    assert (among.p_value[20:] == 1).all()
    assert (among.q_value[20:] == 1).all()
    assert (among.effect[20:] == 0).all()


def test_nothing_varies():
    found = compare_groups(np.zeros((4, 3)), np.array([True, True, False, False]))
    assert not found.tested.any()
    assert (found.log2_fold_change == 0).all()
    assert [len(side) for side in largest_differences(found, 5)] == [0, 0]


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match=r"each group needs two patients, found 1 and 3"):
        compare_groups(np.zeros((4, 2)), np.array([True, False, False, False]))
    with pytest.raises(ValueError, match=r"need counts \(P, S\)"):
        compare_groups(np.zeros((4, 2)), np.array([True, False]))
    with pytest.raises(ValueError, match="method must be mann-whitney or permutation"):
        compare_groups(np.zeros((4, 2)), np.array([True, True, False, False]), method="t")
