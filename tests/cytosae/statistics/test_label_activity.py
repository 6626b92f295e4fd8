"""Activity per label against plain numpy."""

import numpy as np
import pytest
import torch

from cytosae.statistics.label_activity import LabelActivity


def test_counts_and_means_equal_numpy_however_the_images_are_split():
    rng = np.random.default_rng(0)
    scores = np.maximum(rng.normal(size=(50, 7)), 0).astype(np.float32)
    labels = rng.integers(-1, 3, size=50)
    parts = [LabelActivity(7, 4), LabelActivity(7, 4)]
    for part, rows in zip(parts, (slice(0, 11), slice(11, 50)), strict=True):
        part.update(torch.from_numpy(labels[rows]), torch.from_numpy(scores[rows]))
    parts[0].merge(parts[1])
    found = parts[0].result()
    for label in range(4):
        here = scores[labels == label]
        assert found.n_images[label] == len(here)
        np.testing.assert_array_equal(found.n_active[:, label], (here > 0).sum(axis=0))
        mean = here.mean(axis=0) if len(here) else np.zeros(7)
        np.testing.assert_allclose(found.mean_scores[:, label], mean, rtol=1e-6)
    with pytest.raises(ValueError, match=r"scores must be \(2, 7\), found \(3, 7\)"):
        parts[0].update(torch.zeros(2, dtype=torch.int64), torch.zeros(3, 7))
