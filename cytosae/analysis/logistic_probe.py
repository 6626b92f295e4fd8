"""A linear classifier that gives probabilities: multinomial logistic regression."""

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from cytosae.analysis.probe import Probe, check_labels, check_shape

PENALTY = 0.01
"""Strength of the L2 penalty, relative to the mean cross-entropy of an image."""

_MOST_ITERATIONS = 2000
_TOLERANCE = 1e-6
_CONSTANT = 1e-12
"""A channel counts as constant if its variance is at most this share of its mean square."""


def fit_logistic_probe(
    features: torch.Tensor, labels: torch.Tensor, n_classes: int, *, penalty: float = PENALTY
) -> Probe:
    """Fit multinomial logistic regression on standardised features.

    With z the standardised features and W the weights it minimises `mean_i CE(softmax(z_i W + c), y_i) + penalty / 2
    ||W||^2`; the intercept c is not penalised (Bishop 2006, Pattern Recognition and Machine Learning, section 4.3.4).

    Args:
        features: Any float type, shape `(n, D)`.
        labels: Class of each, int64, shape `(n,)`; every class must occur.
        n_classes: Classes C, at least 2.
        penalty: Strength of the penalty; above 0.

    Returns:
        The classifier; `softmax` of its logits is the probability of each class.

    Raises:
        ValueError: If the shapes do not fit, a class has no image or `penalty` is not above 0.
    """
    check_shape("labels", labels, (len(features),))
    check_labels(labels, n_classes)
    n_images = torch.bincount(labels, minlength=n_classes)
    if n_classes < 2 or not int(n_images.min()) or not penalty > 0:
        raise ValueError(
            f"a probe needs two classes with images and a penalty above 0, found {n_images.tolist()} and {penalty}"
        )
    wide = features.detach().cpu().double()
    mean, variance = wide.mean(dim=0), wide.var(dim=0, correction=0)
    varies = variance > _CONSTANT * wide.square().mean(dim=0)
    scale = torch.where(varies, variance, 1.0).sqrt()
    z = ((wide - mean) / scale * varies).numpy()
    model = LogisticRegression(C=1 / (penalty * len(z)), max_iter=_MOST_ITERATIONS, tol=_TOLERANCE)
    model.fit(z, labels.cpu().numpy())
    weights, intercept = model.coef_, model.intercept_
    if n_classes == 2:  # one logit of the second class over the first: half of it for each, with the same softmax
        weights, intercept = np.concatenate([-weights, weights]) / 2, np.concatenate([-intercept, intercept]) / 2
    return Probe(mean, scale, torch.from_numpy(weights.T.copy()), torch.from_numpy(intercept.copy()))
