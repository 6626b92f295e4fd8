"""Smallest possible p against all assignments, and what leaving out hopeless latents does to the others."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import false_discovery_control, rankdata

from cytosae.analysis.design import least_p, least_p_by_others, least_p_of_design, n_needed
from cytosae.analysis.differential import compare_groups


@pytest.mark.parametrize(("n_first", "n"), [(2, 4), (3, 7), (4, 8), (5, 7)])
def test_the_smallest_p_is_that_of_the_best_assignment(n_first, n):
    rng = np.random.default_rng(n)
    counts = np.concatenate([rng.poisson(rate, (n, 20)) for rate in (0.2, 1, 5)], axis=1) / 3
    for values in (rankdata(counts, axis=0), counts):
        found = least_p(values, n_first)
        for latent in range(counts.shape[1]):
            column = values[:, latent]
            middle = n_first * column.mean()
            far = [abs(column[list(chosen)].sum() - middle) for chosen in itertools.combinations(range(n), n_first)]
            share = np.mean(np.array(far) >= max(far) - 1e-9)
            assert found[latent] == pytest.approx(share, rel=1e-9), (latent, column)


@pytest.mark.parametrize("method", ["mann-whitney", "permutation"])
def test_no_assignment_has_a_smaller_p(method):
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.7, (8, 15)).astype(float)
    values = rankdata(counts, axis=0) if method == "mann-whitney" else counts
    least = least_p(values, 3)
    found = []
    for chosen in itertools.combinations(range(8), 3):
        found.append(compare_groups(counts, np.isin(np.arange(8), chosen), method=method).p_value)
    np.testing.assert_allclose(np.min(found, axis=0), least, rtol=1e-9)


def test_designs():
    assert least_p_of_design(3, 3) == pytest.approx(0.1)
    assert least_p_of_design(2, 2) == pytest.approx(1 / 3)
    assert least_p(np.arange(10.0)[:, None], 5) == pytest.approx(least_p_of_design(5, 5))
    assert n_needed(0.1, 500, 0.05) == 501
    assert n_needed(2 / 252, 400, 0.05) == 64
    q = false_discovery_control(np.concatenate([np.full(64, 2 / 252), np.ones(336)]))
    assert q[0] < 0.05
    assert false_discovery_control(np.concatenate([np.full(63, 2 / 252), np.ones(337)]))[0] > 0.05
    assert n_needed(1e-6, 400, 0.05) == 1
    assert n_needed(0.01, 0, 0.05) == 1


@pytest.mark.parametrize("sizes", [(2, 3), (3, 3, 2), (1, 2, 2, 1)])
def test_the_bound_by_the_number_of_other_counts_is_the_rarest_way_to_deal_them_out(sizes):
    total = sum(sizes)
    ways = math.factorial(total)
    bound = least_p_by_others(sizes)
    for m in range(total + 1):
        rarest = min(
            math.prod(math.perm(size, k) for size, k in zip(sizes, taken, strict=True)) * math.factorial(total - m)
            for taken in itertools.product(*(range(size + 1) for size in sizes))
            if sum(taken) == m
        )
        assert bound[m] == pytest.approx(rarest / ways)


def test_hopeless_latents_cost_no_power_and_nothing_is_lost():
    rng = np.random.default_rng(1)
    first = np.arange(12) < 6
    counts = np.zeros((12, 2000))
    counts[rng.integers(0, 12, 1900), np.arange(1900)] = 1  # one subject each
    counts[:, 1900:] = rng.gamma(2, size=(12, 100))
    counts[first, 1900:1905] += 20
    every, able = compare_groups(counts, first), compare_groups(counts, first, level=0.05)
    assert (every.q_value < 0.05).sum() == 0
    assert set(np.flatnonzero(able.q_value < 0.05)) == set(range(1900, 1905))
    assert able.tested.sum() == 100
    assert able.n_varying == every.n_varying == every.tested.sum() == 2000
    np.testing.assert_array_equal(able.p_value[1900:], every.p_value[1900:])
    assert (able.p_value[:1900] == 1).all()


def test_the_level_still_holds_among_what_is_left():
    rng = np.random.default_rng(2)
    counts = rng.poisson(rng.gamma(0.3, 2, 4000), (12, 4000)) * rng.gamma(1, 1, (12, 4000))
    found = compare_groups(counts, np.arange(12) < 5, level=0.05)
    assert 500 < found.tested.sum() < found.n_varying
    assert (found.p_value[found.tested] <= 0.05).mean() < 0.05 + 4 * math.sqrt(0.05 / found.tested.sum())


def test_a_design_that_cannot_reach_the_level_tests_what_is_best():
    counts = np.array([[0, 0], [1, 0], [2, 0], [3, 1.0]])
    found = compare_groups(counts, np.array([True, True, False, False]), level=0.05)
    assert found.tested.tolist() == [True, False]
    assert found.p_value[0] == pytest.approx(1 / 3)
