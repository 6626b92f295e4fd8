"""Label entropy and group recovery against hand-made cases."""

import numpy as np
import pytest

from cytosae.analysis import label_entropy, leave_one_out_accuracy


def test_label_entropy_is_that_of_the_definition():
    values = np.array([[2.0, 1.0, 1.0], [1, 1, 1], [3, 1, 0], [1, 1, 1]])
    labels = np.array([[0, 1, 1], [2, 2, 2], [0, 1, -1], [0, 1, 2]])
    expected = [-2 * 0.5 * np.log(0.5 + 1e-9), -np.log(1 + 1e-9), -1, -np.log(1 / 3 + 1e-9)]
    np.testing.assert_allclose(label_entropy(values, labels, 3), expected, rtol=1e-12)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"must both be \(S, k\)"):
        label_entropy(np.zeros((2, 3)), np.zeros((2, 4), dtype=int), 2)


def test_groups_that_differ_are_recovered_and_others_are_not():
    rng = np.random.default_rng(0)
    groups = np.repeat([0, 1, 2], 12)
    noise = rng.poisson(5.0, size=(36, 40)).astype(float)
    assert leave_one_out_accuracy(noise, groups) < 0.6
    planted = noise.copy()
    planted[np.arange(36), groups] += 30
    assert leave_one_out_accuracy(planted, groups) > 0.9


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="two rows a group"):
        leave_one_out_accuracy(np.zeros((3, 2)), np.array([0, 0, 1]))
