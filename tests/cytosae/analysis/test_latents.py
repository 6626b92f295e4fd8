"""Label entropy and group recovery against hand-made cases."""

import numpy as np
import pytest

from cytosae.analysis.latents import (
    best_latents,
    cluster_latents,
    correlate,
    group_means,
    label_entropy,
    order_by_group,
    select_latents,
)


def test_label_entropy_follows_the_definition():
    values = np.array([[2.0, 1.0, 1.0], [1, 1, 1], [3, 1, 0], [1, 1, 1]])
    labels = np.array([[0, 1, 1], [2, 2, 2], [0, 1, -1], [0, 1, 2]])
    expected = [-2 * 0.5 * np.log(0.5 + 1e-9), 0, -1, -np.log(1 / 3 + 1e-9)]
    np.testing.assert_allclose(label_entropy(values, labels, 3), expected, rtol=1e-12)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"must both be \(S, k\)"):
        label_entropy(np.zeros((2, 3)), np.zeros((2, 4), dtype=int), 2)


SPARSITY = np.array([0.5, 0.001, 0.0, 0.1, 0.1])
MEANS = np.array([1.0, 0.01, 0.0, 2.0, 0.5])
ENTROPY = np.array([0.9, -1.0, -1.0, -1e-9, 0.0])
"""A single label gives -1e-9 by the definition: below 0, but defined."""


def test_latents_are_selected_by_ranges():
    def chosen(**ranges):
        return np.flatnonzero(select_latents(SPARSITY, MEANS, ENTROPY, **ranges)).tolist()

    assert chosen() == [0, 1, 3, 4]
    assert chosen(log10_sparsity=(-1, None)) == [0, 3, 4]
    assert chosen(log10_sparsity=(None, -2)) == [1]
    assert chosen(log10_mean=(-1, 0)) == [0, 4]
    assert chosen(entropy_range=(None, 0.5)) == [3, 4]
    assert chosen(entropy_range=(None, None)) == [0, 3, 4]
    assert chosen(log10_mean=(0, None), entropy_range=(None, 0)) == [3]


def test_the_best_latents_are_specific_first_then_strong():
    assert best_latents(SPARSITY, MEANS, ENTROPY, 10).tolist() == [3, 4, 0, 1]
    assert best_latents(SPARSITY, MEANS, ENTROPY, 2).tolist() == [3, 4]
    assert best_latents(np.zeros(3), np.zeros(3), -np.ones(3), 2).tolist() == []


def test_planted_clusters_are_found_and_numbered_by_sparsity():
    rng = np.random.default_rng(0)
    centres = np.array([[-1.0, -3.0], [0.5, -1.0], [-2.0, -0.3]])
    truth = np.repeat([0, 1, 2], 40)
    points = 10 ** (centres[truth] + rng.normal(scale=0.05, size=(120, 2)))
    means, sparsity = np.append(points[:, 0], 0), np.append(points[:, 1], 0)
    found = cluster_latents(means, sparsity, 3, seed=1)
    assert found[:-1].tolist() == [{0: 2, 1: 1, 2: 0}[number] for number in truth.tolist()]
    assert found[-1] == -1
    assert np.array_equal(found, cluster_latents(means, sparsity, 3, seed=1))


def test_clusters_of_few_or_no_latents():
    assert cluster_latents(np.zeros(3), np.zeros(3), 4).tolist() == [-1, -1, -1]
    assert cluster_latents(np.array([1.0, 1.0, 0]), np.array([0.5, 0.5, 0]), 4).tolist() == [0, 0, -1]
    assert sorted(cluster_latents(np.array([1.0, 2.0]), np.array([0.5, 0.1]), 4).tolist()) == [0, 1]


def test_a_groups_barcode_is_the_mean_of_its_patients():
    counts = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 0.0]])
    assert group_means(counts, np.array([0, 0, 2]), 3).tolist() == [[2, 3], [0, 0], [5, 0]]


def test_correlation_is_pearsons_on_log_counts():
    counts = np.random.default_rng(0).poisson(3.0, size=(6, 50)).astype(float)
    np.testing.assert_allclose(correlate(counts), np.corrcoef(np.log1p(counts)), atol=1e-12)
    counts[2] = 4
    found = correlate(counts)
    assert found[2].tolist() == [0, 0, 1, 0, 0, 0]


def test_patients_are_ordered_by_group_then_in_natural_order():
    names = ["P10", "P2", "x", "P1", "P02"]
    assert order_by_group(np.array([1, 1, 0, -1, 0]), names).tolist() == [4, 2, 1, 0, 3]
    assert order_by_group(np.zeros(3, dtype=int), ["b", "12", "a"]).tolist() == [1, 2, 0]
    # Digits that are not decimals, and more digits than an int may have.
    odd = ["²", "9" * 5000, "8" * 5000, "③x", ""]
    assert order_by_group(np.zeros(5, dtype=int), odd).tolist() == [4, 2, 1, 0, 3]


def test_ends_of_ranges_are_included_for_float32_values():
    values = np.array([0.001, 0.01, 0.1, 1.0], dtype=np.float32)
    chosen = select_latents(values, np.ones(4, np.float32), np.zeros(4), log10_sparsity=(-2, -1))
    assert chosen.tolist() == [False, True, True, False]
    chosen = select_latents(np.ones(4, np.float32), values, np.zeros(4), log10_mean=(-3, -2))
    assert chosen.tolist() == [True, True, False, False]
