"""What properties of subjects tell about latents, against scipy, and on confounded data."""

import numpy as np
import pytest
from scipy.stats import chi2_contingency, false_discovery_control, fisher_exact, kruskal, spearmanr

import cytosae.analysis.association
from cytosae.analysis.association import associate_levels, associate_numbers, relate_names


def _counts(n, n_latents=20, seed=0):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(1.5, (n, n_latents)).astype(np.float64)
    counts[:, ::2] = rng.gamma(2.0, size=counts[:, ::2].shape)
    return counts


def test_numbers_equal_spearman(monkeypatch):
    monkeypatch.setattr(cytosae.analysis.association, "LATENT_BLOCK", 6)
    counts, numbers = _counts(30), np.random.default_rng(1).integers(20, 40, 30).astype(float)
    numbers[4] = np.nan
    counts[:, 3] = 1
    found = associate_numbers(counts, numbers)
    known = np.isfinite(numbers)
    for latent in np.flatnonzero(found.tested):
        plain = spearmanr(counts[known, latent], numbers[known])
        assert found.correlation[latent] == pytest.approx(plain.statistic, abs=1e-12)
        assert found.p_value[latent] == pytest.approx(plain.pvalue, rel=1e-9)
    assert not found.tested[3]
    assert (found.correlation[3], found.p_value[3], found.q_value[3], found.share[3]) == (0, 1, 1, 0)
    np.testing.assert_allclose(found.q_value[found.tested], false_discovery_control(found.p_value[found.tested]))
    np.testing.assert_allclose(found.share, np.clip((28 * found.correlation**2 - 1) / 27, 0, 1))
    assert found.n_subjects == 29


def test_few_numbers_are_permuted():
    counts = _counts(8, 300, seed=2)
    found = associate_numbers(counts, np.arange(8.0), n_permutations=4000)
    assert 0.02 <= (found.p_value <= 0.05).mean() <= 0.08
    whole = found.p_value * 4001
    np.testing.assert_allclose(whole[found.tested], np.rint(whole[found.tested]), atol=1e-6)
    same = associate_numbers(np.arange(8.0)[:, None], np.arange(8.0))
    assert same.correlation[0] == pytest.approx(1)
    assert same.p_value[0] < 0.001


def test_levels_equal_kruskal_and_leave_lone_ones_out():
    counts = _counts(40, seed=3)
    levels = np.array([0] * 15 + [1] * 12 + [2] * 10 + [3] + [-1] * 2)
    found = associate_levels(counts, levels)
    assert found.n_subjects == 37
    assert found.correlation is None
    for latent in np.flatnonzero(found.p_value > 0.3):
        plain = kruskal(*(counts[levels == level, latent] for level in range(3)))
        assert found.p_value[latent] == pytest.approx(plain.pvalue, rel=1e-9)
        assert found.share[latent] == pytest.approx(max(0, (plain.statistic - 2) / 34))


@pytest.mark.parametrize("n_levels", [2, 8])
def test_a_random_property_explains_nothing_on_average(n_levels):
    counts, levels = _counts(48, 600, seed=4), np.arange(48) % n_levels
    found = associate_levels(counts, levels)
    assert (found.p_value <= 0.05).mean() < 0.08
    # Clipped at 0, so a little above it.
    assert found.share.mean() < 0.05


def test_a_site_and_a_dose_are_found():
    rng = np.random.default_rng(5)
    site, dose = np.arange(30) % 2, rng.random(30)
    counts = rng.gamma(2.0, size=(30, 50))
    counts[:, 0] *= 1 + 6 * site
    counts[:, 1] = dose * 10
    by_site, by_dose = associate_levels(counts, site, level=0.05), associate_numbers(counts, dose)
    assert np.flatnonzero(by_site.q_value < 0.05).tolist() == [0]
    assert by_site.share[0] > 0.4
    assert by_dose.q_value[1] < 0.001
    assert by_dose.correlation[1] == pytest.approx(1)


@pytest.mark.parametrize("levels", [[0] * 6, [0, 0, 0, 0, 1, 2], [-1] * 6])
def test_too_few_levels_tell_nothing(levels):
    assert associate_levels(np.ones((6, 2)), np.array(levels)) is None


@pytest.mark.parametrize("numbers", [[1.0] * 6, [1, 2, 3, np.nan, np.nan, np.nan]])
def test_too_few_numbers_tell_nothing(numbers):
    assert associate_numbers(np.ones((6, 2)), np.array(numbers)) is None


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"counts must be \(P, S\) and levels \(P,\), found \(6, 2\) and \(5,\)"):
        associate_levels(np.ones((6, 2)), np.zeros(5, dtype=int))
    with pytest.raises(ValueError, match=r"counts must be \(P, S\) and numbers \(P,\), found \(6, 2\) and \(5,\)"):
        associate_numbers(np.ones((6, 2)), np.zeros(5))
    with pytest.raises(ValueError, match="counts must be finite and not negative"):
        associate_numbers(np.full((6, 2), np.inf), np.arange(6.0))


def test_names_are_related_by_permutations():
    one = np.array([0] * 10 + [1] * 10 + [-1])
    assert relate_names(one, one).cramers_v == pytest.approx(1)
    assert relate_names(one, one, n_permutations=2000).p_value < 0.002
    two = np.array([0] * 7 + [1] * 3 + [0] * 4 + [1] * 6 + [1])
    table = chi2_contingency(np.array([[7, 3], [4, 6]]), correction=False)
    found = relate_names(one, two)
    assert found.cramers_v == pytest.approx((table.statistic / 20) ** 0.5)
    # The exact share of permutations, by the hypergeometric distribution of one cell.
    exact = fisher_exact([[7, 3], [4, 6]]).pvalue
    assert found.p_value == pytest.approx(exact, abs=0.02)
    assert relate_names(one, np.zeros(21, dtype=int)) is None
    with pytest.raises(ValueError, match=r"both properties must be \(P,\), found \(21,\) and \(20,\)"):
        relate_names(one, two[:20])
