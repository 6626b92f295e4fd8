"""Spearman's rho and p, against scipy, with ties and unknown values."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from cytosae.analysis.rank_correlation import LEAST_IMAGES, RankedColumns


def test_correlations_are_scipys_on_the_known_pairs():
    rng = np.random.default_rng(0)
    scores = np.maximum(rng.normal(size=200), 0).astype(np.float32)
    values = rng.normal(size=(200, 6)) + scores[:, None] * np.arange(6)
    values[:, 1] = np.round(values[:, 1])
    values[rng.random(200) < 0.3, 2] = np.nan
    values[:, 3] = np.where(np.isnan(values[:, 2]), np.nan, values[:, 3])  # the same gaps
    values[rng.random(200) < 0.9, 4] = np.nan
    found = RankedColumns(values).correlate(scores)
    for column in range(6):
        known = ~np.isnan(values[:, column])
        expected = spearmanr(scores[known].astype(np.float64), values[known, column])
        assert found.n[column] == known.sum()
        assert found.rho[column] == pytest.approx(expected.statistic, abs=1e-12)
        assert found.p[column] == pytest.approx(expected.pvalue, rel=1e-8)


def test_only_the_order_of_values_counts():
    rng = np.random.default_rng(1)
    scores, values = rng.random(50).astype(np.float32), rng.random(50)
    plain = RankedColumns(values[:, None]).correlate(scores)
    bent = RankedColumns(np.exp(9 * values)[:, None]).correlate(scores**3)
    assert plain.rho == pytest.approx(bent.rho, abs=1e-12)
    same = RankedColumns(scores[:, None].astype(np.float64)).correlate(scores)
    assert same.rho == pytest.approx(1)
    assert same.p[0] < 1e-12


def test_constants_and_too_few_images_have_no_correlation():
    scores = np.arange(10, dtype=np.float32)
    values = np.stack([np.ones(10), np.arange(10.0), np.arange(10.0)], axis=1)
    values[LEAST_IMAGES - 1 :, 1] = np.nan
    found = RankedColumns(values).correlate(scores)
    assert np.isnan(found.rho).tolist() == [True, True, False]
    assert np.isnan(found.p).tolist() == [True, True, False]
    assert np.isnan(RankedColumns(values).correlate(np.zeros(10, np.float32)).rho).all()
