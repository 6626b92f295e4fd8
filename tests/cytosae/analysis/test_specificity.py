"""Lift against scipy's interval, and the order in which latents are shown."""

import numpy as np
import pytest
from scipy.stats import binomtest

from cytosae.analysis.specificity import first_latents, label_lift, mostly_label, specific_latents

N_IMAGES = np.array([100, 300, 0])
ACTIVE = np.array([[90, 10, 0], [100, 300, 0], [0, 0, 0], [2, 0, 0], [5, 60, 0], [0, 40, 0]])


def test_lift_is_the_lower_end_of_wilsons_interval_over_the_prior():
    lift = label_lift(ACTIVE, N_IMAGES)
    for latent in (0, 1, 3, 4, 5):
        for label in (0, 1):
            n = int(ACTIVE[latent].sum())
            low = binomtest(int(ACTIVE[latent, label]), n).proportion_ci(method="wilson").low
            assert lift[latent, label] == pytest.approx(low / (N_IMAGES[label] / 400), rel=1e-6)
    assert lift[2].tolist() == [0, 0, 0], "a dead latent"
    assert lift[:, 2].tolist() == [0] * 6, "a label without images"
    assert lift[0, 0] > 3
    assert lift[1].max() < 1, "a latent that is always active says nothing"
    assert lift[3, 0] < lift[0, 0], "two images are no evidence"


def test_labels_take_turns_and_only_lifts_above_one_count():
    lift = label_lift(ACTIVE, N_IMAGES)
    assert specific_latents(lift, np.ones(6, bool), 10).tolist() == [0, 5, 3, 4]
    assert specific_latents(lift, np.arange(6) != 0, 10).tolist() == [3, 5, 4]
    assert specific_latents(lift, np.ones(6, bool), 2).tolist() == [0, 5]
    assert specific_latents(np.zeros((6, 0)), np.ones(6, bool), 2).tolist() == []


def test_specific_latents_come_first_and_those_of_a_position_last():
    found = first_latents(
        sparsity=np.array([0.25, 1, 0, 0.005, 0.1625, 0.1]),
        mean_acts=np.ones(6),
        entropy=np.array([0.5, 0.6, -1, 0.0, 0.0, 0.0]),
        lift=label_lift(ACTIVE, N_IMAGES),
        position_share=np.array([0.1, -1, -1, -1, 0.2, 0.9]),
        n=6,
    )
    # By lift 0, then 3 and 4 in turn; 1, which says nothing; 5, which depends on position; never 2, which is dead.
    assert found.tolist() == [0, 4, 3, 1, 5]


def test_mostly_a_label_only_where_top_images_and_means_agree():
    mass = np.array([[9, 1], [9, 1], [5, 5], [1, 9], [0, 0]])
    means = np.array([[0.9, 0.1], [0.1, 0.9], [0.9, 0.1], [0.2, 0.3], [0, 0]])
    assert mostly_label(mass, means).tolist() == [0, -1, -1, 1, -1]
    assert mostly_label(np.zeros((2, 0)), np.zeros((2, 0))).tolist() == [-1, -1]
