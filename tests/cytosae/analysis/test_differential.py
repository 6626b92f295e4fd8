"""Group comparison against scipy, brute force, null data and planted differences."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import false_discovery_control, kstest, mannwhitneyu, rankdata

import cytosae.analysis.differential
from cytosae.analysis.differential import (
    GroupComparison,
    compare_groups,
    fold_change_pseudocount,
    largest_differences,
    rank_biserial,
)


def _counts(n_patients: int, n_latents: int, seed: int) -> np.ndarray:
    """Half of the latents full of tied zeros, half without a tie."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.8, (n_patients, n_latents)).astype(np.float64)
    counts[:, ::2] = rng.gamma(2.0, size=counts[:, ::2].shape)
    return counts


def _first(n_first: int, n_second: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.arange(n_first + n_second) < n_first)


@pytest.mark.parametrize(("n_first", "n_second"), [(2, 2), (3, 30), (8, 9), (9, 8), (9, 9), (14, 20)])
def test_without_ties_mann_whitney_equals_scipy(n_first, n_second, monkeypatch):
    monkeypatch.setattr(cytosae.analysis.differential, "REFINED_BELOW", 0)
    monkeypatch.setattr(cytosae.analysis.differential, "LATENT_BLOCK", 7)
    counts, first = _counts(n_first + n_second, 40, seed=n_first), _first(n_first, n_second)
    result = compare_groups(counts, first)
    assert result.tested.sum() > 30
    for latent in np.flatnonzero(result.tested):
        plain = mannwhitneyu(counts[first, latent], counts[~first, latent])
        assert result.p_value[latent] == pytest.approx(plain.pvalue, rel=1e-12)
        assert result.effect[latent] == pytest.approx(2 * plain.statistic / (n_first * n_second) - 1, abs=1e-12)


def test_the_test_is_exact_with_ties_as_well():
    counts = np.array([[1.0, 1], [2, 2], [3, 3], [4, 4], [5, 5], [6, 5]])
    assert compare_groups(counts, np.arange(6) < 3).p_value == pytest.approx(2 / math.comb(6, 3))
    one_of_three = np.zeros((63, 1))
    one_of_three[0] = 1
    assert compare_groups(one_of_three, np.arange(63) < 3).p_value == pytest.approx(3 / 63)


@pytest.mark.parametrize("n_first", [2, 3, 5, 8])
def test_the_exact_distribution_with_ties_equals_brute_force(n_first, monkeypatch):
    monkeypatch.setattr(cytosae.analysis.differential, "REFINED_BELOW", 2.0)
    n = 11
    rng = np.random.default_rng(n_first)
    counts = np.concatenate([rng.poisson(rate, (n, 12)) for rate in (0.1, 0.4, 1.0, 3.0)], axis=1).astype(float)
    counts[:, -1] = 1 - np.eye(n)[0]  # the most frequent count may be the largest
    first = _first(n_first, n - n_first, seed=n_first)
    result = compare_groups(counts, first)
    members = [list(chosen) for chosen in itertools.combinations(range(n), n_first)]
    for latent in np.flatnonzero(result.tested):
        # Twice the midranks are integers.
        ranks = np.rint(2 * rankdata(counts[:, latent])).astype(int)
        middle = n_first * int(ranks.sum())
        far = [abs(n * int(ranks[chosen].sum()) - middle) for chosen in members]
        observed = abs(n * int(ranks[first].sum()) - middle)
        expected = sum(value >= observed for value in far) / len(far)
        assert result.p_value[latent] == pytest.approx(expected, rel=1e-9), latent


def test_a_distribution_too_large_to_compute_is_sampled(monkeypatch):
    counts, first = _counts(30, 40, seed=9), _first(6, 24)
    exact = compare_groups(counts, first).p_value
    monkeypatch.setattr(cytosae.analysis.differential, "LARGEST_TABLE", 0)
    sampled = compare_groups(counts, first, n_permutations=4000).p_value
    tied = np.array([len(np.unique(column)) < 30 for column in counts.T]) & (exact < 0.2)
    assert tied.sum() > 2
    np.testing.assert_allclose(sampled[tied], exact[tied], atol=0.03)
    steps = sampled[tied] * 4001
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-8)


@pytest.mark.parametrize(("n_first", "n_second"), [(3, 60), (5, 184), (10, 100), (30, 150)])
def test_mostly_zero_counts_and_unequal_groups_give_no_false_findings(n_first, n_second):
    rng = np.random.default_rng(n_first)
    n, n_latents = n_first + n_second, 3000
    counts = rng.poisson(rng.gamma(0.3, 0.3, n_latents), (n, n_latents)) * rng.gamma(1, 1, (n, n_latents))
    result = compare_groups(counts, np.arange(n) < n_first)
    assert (result.q_value > 0.05).all()
    for level in (0.001, 0.01, 0.05):
        share = (result.p_value[result.tested] <= level).mean()
        assert share < level + 4 * math.sqrt(level / result.tested.sum()), level


def test_the_direction_is_that_of_the_tested_statistic():
    counts, first = np.array([[0.0, 0]] * 5 + [[100, 60]] + [[1, 20]] * 6), np.arange(12) < 6
    by_rank, by_mean = compare_groups(counts, first), compare_groups(counts, first, method="permutation")
    assert (by_rank.effect < 0).all()
    assert by_rank.direction.tolist() == [-1, -1]
    assert by_mean.direction.tolist() == [1, -1]
    assert largest_differences(by_mean, 5)[0].tolist() == [0]


def test_effect_is_the_difference_of_pairs_won_and_lost():
    counts, first = _counts(13, 30, seed=3), _first(6, 7)
    pairs = np.sign(counts[first][:, None] - counts[~first][None])
    np.testing.assert_allclose(rank_biserial(counts, first), pairs.mean(axis=(0, 1)), atol=1e-12)


def test_means_fold_change_and_q():
    counts, first = _counts(12, 50, seed=4), _first(5, 7)
    counts[:, 7] = 0
    counts[:, 9] = np.where(first, 0, 0.5)
    result = compare_groups(counts, first)
    np.testing.assert_allclose(result.mean_first, counts[first].mean(axis=0))
    np.testing.assert_allclose(result.mean_second, counts[~first].mean(axis=0))
    half = counts[counts > 0].min() / 2
    assert fold_change_pseudocount(counts) == half
    assert result.log2_fold_change[7] == 0
    assert result.log2_fold_change[9] == pytest.approx(np.log2(half / (0.5 + half)))
    family = result.tested
    assert not family[7]
    np.testing.assert_allclose(result.q_value[family], false_discovery_control(result.p_value[family]))


@pytest.mark.parametrize("method", ["mann-whitney", "permutation"])
def test_only_means_depend_on_the_unit_of_the_counts(method):
    counts, first = _counts(12, 50, seed=5), _first(5, 7)
    one, other = compare_groups(counts, first, method=method), compare_groups(counts / 256, first, method=method)
    for name in ("log2_fold_change", "effect", "p_value", "q_value", "tested"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-12)


@pytest.mark.parametrize("method", ["mann-whitney", "permutation"])
def test_swapping_the_groups_swaps_the_signs(method):
    counts, first = _counts(9, 30, seed=6), _first(4, 5)
    one, other = compare_groups(counts, first, method=method), compare_groups(counts, ~first, method=method)
    np.testing.assert_allclose(one.effect, -other.effect, atol=1e-12)
    np.testing.assert_allclose(one.log2_fold_change, -other.log2_fold_change, atol=1e-12)
    np.testing.assert_allclose(one.p_value, other.p_value, rtol=1e-12)


@pytest.mark.parametrize(("n_first", "n_second"), [(2, 2), (3, 5), (5, 4)])
def test_enumerated_permutations_equal_brute_force(n_first, n_second, monkeypatch):
    monkeypatch.setattr(cytosae.analysis.differential, "PERMUTATION_BLOCK", 10)
    monkeypatch.setattr(cytosae.analysis.differential, "LATENT_BLOCK", 7)
    n = n_first + n_second
    # Thirds are not exact in floating point: equal differences of means must still count as equal.
    whole = np.random.default_rng(1).poisson(1.0, (n, 20))
    first = _first(n_first, n_second)
    result = compare_groups(whole / 3, first, method="permutation")

    def statistic(column: list[int], members: tuple[int, ...]) -> Fraction:
        inside = sum(column[row] for row in members)
        return abs(Fraction(inside, n_first) - Fraction(sum(column) - inside, n_second))

    observed_members = tuple(np.flatnonzero(first))
    for latent in range(whole.shape[1]):
        column = whole[:, latent].tolist()
        observed = statistic(column, observed_members)
        every = [statistic(column, members) >= observed for members in itertools.combinations(range(n), n_first)]
        assert result.p_value[latent] == sum(every) / len(every)


def test_random_permutations_approximate_the_enumerated_ones_and_repeat():
    counts, first = _counts(12, 40, seed=7), _first(6, 6)
    everything = compare_groups(counts, first, method="permutation", n_permutations=924)
    drawn = compare_groups(counts, first, method="permutation", n_permutations=923, seed=1)
    again = compare_groups(counts, first, method="permutation", n_permutations=923, seed=1)
    other = compare_groups(counts, first, method="permutation", n_permutations=923, seed=2)
    np.testing.assert_array_equal(drawn.p_value, again.p_value)
    assert (drawn.p_value != other.p_value).any()
    assert np.abs(drawn.p_value - everything.p_value).max() < 0.08
    steps = drawn.p_value[drawn.tested] * 924
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-9)
    assert steps.min() >= 1


def test_blocks_do_not_change_the_draws(monkeypatch):
    counts, first = _counts(20, 30, seed=8), _first(10, 10)
    whole = compare_groups(counts, first, method="permutation", n_permutations=300)
    monkeypatch.setattr(cytosae.analysis.differential, "PERMUTATION_BLOCK", 37)
    monkeypatch.setattr(cytosae.analysis.differential, "LATENT_BLOCK", 7)
    parts = compare_groups(counts, first, method="permutation", n_permutations=300)
    np.testing.assert_array_equal(whole.p_value, parts.p_value)


@pytest.mark.parametrize("method", ["mann-whitney", "permutation"])
def test_without_a_difference_p_is_uniform(method):
    counts = np.random.default_rng(9).gamma(2.0, size=(30, 4000))
    result = compare_groups(counts, _first(14, 16), method=method, n_permutations=1500)
    assert kstest(result.p_value, "uniform").statistic < 0.04
    assert 0.03 < (result.p_value < 0.05).mean() < 0.07
    assert (result.q_value < 0.05).sum() == 0


@pytest.mark.parametrize("method", ["mann-whitney", "permutation"])
def test_planted_latents_are_found_with_their_sign(method):
    rng = np.random.default_rng(10)
    first = _first(14, 16)
    counts = rng.poisson(1.0, (30, 500)).astype(np.float64)
    counts[:, 400:] = 0
    counts[np.ix_(first, [5, 50])] += rng.poisson(5.0, (14, 2))
    counts[np.ix_(~first, [7, 70, 71])] += rng.poisson(5.0, (16, 3))
    result = compare_groups(counts, first, method=method)
    assert result.tested.sum() == 400
    assert set(np.flatnonzero(result.q_value < 0.05)) == {5, 7, 50, 70, 71}
    more_first, more_second = largest_differences(result, 3)
    assert set(more_first[:2]) == {5, 50}
    assert set(more_second) == {7, 70, 71}
    assert (result.effect[[5, 50]] > 0.5).all()
    assert (result.log2_fold_change[[7, 70, 71]] < -1).all()


@pytest.mark.parametrize("method", ["mann-whitney", "permutation"])
def test_constant_latents_are_not_tested(method):
    counts = _counts(10, 20, seed=11)
    alone = compare_groups(counts, _first(5, 5), method=method)
    wider = np.concatenate([counts, np.zeros((10, 100)), np.full((10, 100), 0.1)], axis=1)
    result = compare_groups(wider, _first(5, 5), method=method)
    assert not result.tested[20:].any()
    assert (result.p_value[20:] == 1).all()
    assert (result.q_value[20:] == 1).all()
    assert (result.effect[20:] == 0).all()
    assert (result.log2_fold_change[20:] == 0).all()
    np.testing.assert_array_equal(result.q_value[:20], alone.q_value)


@pytest.mark.parametrize("method", ["mann-whitney", "permutation"])
@pytest.mark.parametrize("shape", [(4, 0), (4, 3)])
def test_nothing_to_test(method, shape):
    result = compare_groups(np.zeros(shape), np.array([True, True, False, False]), method=method)
    assert not result.tested.any()
    assert (result.q_value == 1).all()
    assert [len(side) for side in largest_differences(result, 5)] == [0, 0]


def test_largest_differences_are_ordered_by_q_then_effect_then_index():
    effect = np.array([0.5, -0.5, 0.9, 0.5, 0.0, -0.5, -1.0, 0.7])
    q_value = np.array([0.1, 0.2, 0.3, 0.1, 0.0, 0.2, 0.2, 0.1])
    direction = np.sign(effect).astype(np.int8)
    result = GroupComparison(*(np.zeros(8),) * 3, direction, effect, q_value, q_value, q_value < 1)
    more_first, more_second = largest_differences(result, 10)
    assert more_first.tolist() == [7, 0, 3, 2]
    assert more_second.tolist() == [6, 1, 5]
    assert more_first.dtype == np.int64
    assert [side.tolist() for side in largest_differences(result, 1)] == [[7], [6]]
    assert [side.tolist() for side in largest_differences(result, 0)] == [[], []]


def test_errors():
    counts, first = np.ones((4, 3)), np.array([True, True, False, False])
    with pytest.raises(ValueError, match="at least 2 patients in each group, found 1 in the first and 3 in the second"):
        compare_groups(counts, np.array([True, False, False, False]))
    with pytest.raises(ValueError, match=r"bool of shape \(P,\), found \(4, 3\) and bool of shape \(3,\)"):
        compare_groups(counts, first[:3])
    with pytest.raises(ValueError, match="found .* int64"):
        compare_groups(counts, first.astype(np.int64))
    with pytest.raises(ValueError, match="method must be 'mann-whitney' or 'permutation', found 't-test'"):
        compare_groups(counts, first, method="t-test")
    with pytest.raises(ValueError, match="n_permutations must be at least 1, found 0"):
        compare_groups(counts, first, method="permutation", n_permutations=0)
    for bad in (np.nan, np.inf, -1.0):
        counts[1, 1] = bad
        with pytest.raises(ValueError, match="finite and not negative"):
            compare_groups(counts, first)
