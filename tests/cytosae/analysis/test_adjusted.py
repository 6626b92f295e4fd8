"""The linear model with covariates against least squares by hand, and on confounded data."""

import numpy as np
import pytest
from scipy.stats import f as f_distribution
from scipy.stats import t as t_distribution

from cytosae.analysis.adjusted import ConfoundedError, compare_all_groups_adjusted, compare_groups_adjusted
from cytosae.analysis.differential import fold_change_pseudocount


def _cohort(n=24, n_latents=15, seed=0):
    rng = np.random.default_rng(seed)
    counts = rng.gamma(2.0, size=(n, n_latents)) * (rng.random((n, n_latents)) < 0.8)
    return counts, np.arange(n) % 3, np.column_stack([rng.normal(60, 10, n), rng.random(n) < 0.5])


def _residual_squares(design, y):
    fitted = design @ np.linalg.lstsq(design, y, rcond=None)[0]
    return float(((y - fitted) ** 2).sum())


def test_two_groups_equal_least_squares_by_hand():
    counts, groups, covariates = _cohort()
    first = groups == 0
    found = compare_groups_adjusted(counts, first, covariates)
    logs = np.log2(counts + fold_change_pseudocount(counts))
    design = np.column_stack([np.ones(24), covariates, first])
    inverse = np.linalg.inv(design.T @ design)
    for latent in range(15):
        coefficients = inverse @ design.T @ logs[:, latent]
        rest = _residual_squares(design, logs[:, latent])
        statistic = coefficients[3] / np.sqrt(inverse[3, 3] * rest / 20)
        assert found.log2_fold_change[latent] == pytest.approx(coefficients[3], rel=1e-8)
        assert found.p_value[latent] == pytest.approx(2 * t_distribution.sf(abs(statistic), 20), rel=1e-8)
        assert found.effect[latent] == pytest.approx(statistic / np.sqrt(statistic**2 + 20), rel=1e-8)
        assert found.direction[latent] == np.sign(coefficients[3])
    np.testing.assert_allclose(found.mean_first, counts[first].mean(axis=0))


def test_several_groups_equal_the_partial_f():
    counts, groups, covariates = _cohort(seed=1)
    found = compare_all_groups_adjusted(counts, groups, 3, covariates)
    logs = np.log2(counts + fold_change_pseudocount(counts))
    without = np.column_stack([np.ones(24), covariates])
    design = np.column_stack([without, groups == 1, groups == 2])
    for latent in range(15):
        rest = _residual_squares(design, logs[:, latent])
        explained = _residual_squares(without, logs[:, latent]) - rest
        statistic = explained / 2 / (rest / 19)
        assert found.statistic[latent] == pytest.approx(statistic, rel=1e-7)
        assert found.p_value[latent] == pytest.approx(f_distribution.sf(statistic, 2, 19), rel=1e-7)
        assert found.effect[latent] == pytest.approx(explained / (explained + rest), rel=1e-7)


def test_a_difference_of_age_is_not_one_of_the_groups():
    rng = np.random.default_rng(2)
    first = np.arange(60) < 30
    age = np.where(first, 70.0, 40.0) + rng.normal(0, 12, 60)
    counts = np.exp(0.06 * age[:, None] + rng.normal(0, 0.5, (60, 80)))
    counts[:, :8] *= np.where(first, 5.0, 1.0)[:, None]
    found = compare_groups_adjusted(counts, first, age[:, None])
    assert (found.q_value[:8] < 0.05).all()
    assert (found.q_value[8:] < 0.05).mean() < 0.05
    plain = compare_groups_adjusted(counts, first, np.zeros((60, 0)))
    assert (plain.q_value[8:] < 0.05).mean() > 0.9


def test_latents_that_do_not_vary_or_cannot_be_significant_are_not_tested():
    counts, groups, covariates = _cohort(seed=3)
    counts[:, 0], counts[:, 1] = 0, 0
    counts[5, 1] = 2.0
    two = compare_groups_adjusted(counts, groups == 0, covariates, level=0.05)
    several = compare_all_groups_adjusted(counts, groups, 3, covariates, level=0.05)
    for found in (two, several):
        assert found.tested.tolist() == [False, False] + [True] * 13
        assert found.n_varying == 14
        assert found.p_value[:2].tolist() == [1, 1]
        assert found.effect[:2].tolist() == [0, 0]
    everything = compare_groups_adjusted(counts, groups == 0, covariates)
    assert everything.tested.tolist() == [False] + [True] * 14


def test_a_latent_that_the_covariates_explain_wholly_has_no_difference():
    counts, groups, covariates = _cohort(seed=4)
    counts[:, 0] = 2.0 ** covariates[:, 1] * 8
    counts[counts == 0] = 16
    counts[0, 1] = 1e-9  # a pseudocount that changes nothing
    found = compare_groups_adjusted(counts, groups == 0, covariates)
    assert abs(found.log2_fold_change[0]) < 1e-6
    assert found.p_value[0] > 0.05


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"covariates": np.arange(9.0)[:, None] % 3 == 0}, ConfoundedError, "the covariates say which group"),
        (
            {"covariates": np.eye(9)[:, :7], "in_first": np.arange(9) == 7},
            ValueError,
            "9 subjects are too few for 7 covariates and the groups",
        ),
        ({"covariates": np.full((9, 1), np.nan)}, ValueError, "covariates must be finite: leave subjects out"),
        ({"covariates": np.ones(9)}, ValueError, r"covariates \(P, K\), found \(9, 2\), \(9,\) and \(9,\)"),
        ({"counts": np.full((9, 2), -1.0)}, ValueError, "counts must be finite and not negative"),
        ({"in_first": np.arange(9)}, ValueError, "in_first must be bool, found int64"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, error, message):
    given = {"counts": np.ones((9, 2)), "in_first": np.arange(9) % 3 == 0, "covariates": np.arange(9.0)[:, None]}
    with pytest.raises(error, match=message):
        compare_groups_adjusted(**(given | change))


def test_groups_that_covariates_know_in_part_are_refused():
    with pytest.raises(ConfoundedError):
        compare_all_groups_adjusted(np.ones((9, 2)), np.arange(9) % 3, 3, (np.arange(9.0)[:, None] % 3 == 1) * 1.0)
