"""Positions of cells against plain linear algebra."""

import numpy as np
import pytest
from sklearn.decomposition import PCA

from cytosae.analysis.cell_map import cosine_similarity, nearest_images, principal_components


@pytest.mark.parametrize("shape", [(60, 8), (8, 60), (20, 20)])
def test_components_are_exact(shape):
    scores = np.maximum(np.random.default_rng(0).normal(size=shape), 0)
    found = principal_components(scores, 3)
    plain = PCA(3, svd_solver="full").fit(scores)
    np.testing.assert_allclose(found.shares, plain.explained_variance_ratio_, rtol=1e-8)
    theirs = plain.transform(scores)
    np.testing.assert_allclose(np.abs(found.positions), np.abs(theirs), atol=1e-7)
    again = principal_components(scores[::-1], 3)
    np.testing.assert_allclose(again.positions[::-1], found.positions, atol=1e-7, err_msg="the sign depends on order")
    assert (found.positions[np.abs(found.positions).argmax(axis=0), range(3)] > 0).all()


def test_images_without_differences_lie_in_one_place():
    found = principal_components(np.ones((5, 4)), 2)
    np.testing.assert_allclose(found.positions, 0, atol=1e-12)
    assert found.shares.tolist() == [0, 0]
    assert principal_components(np.ones((3, 1)), 2).positions.shape == (3, 1)


def test_the_nearest_images_are_those_of_the_largest_cosine():
    scores = np.array([[1.0, 0, 0], [2, 2, 0], [0, 1, 1], [0, 0, 0], [5, 5, 0]], np.float32)
    wanted = np.array([1.0, 1, 0], np.float32)
    assert nearest_images(scores, wanted, 3).tolist() == [1, 4, 0]
    np.testing.assert_allclose(cosine_similarity(scores, wanted), [0.5**0.5, 1, 0.5, 0, 1], rtol=1e-6)
    assert nearest_images(scores, np.zeros(3), 3).tolist() == [], "an image without activity is near to nothing"
