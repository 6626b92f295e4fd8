"""The probe is the minimum of its loss, and its softmax is what scikit-learn predicts."""

import pytest
import torch

from cytosae.analysis.logistic_probe import fit_logistic_probe


def make(n_classes, n=120, width=5):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % n_classes
    centres = torch.randn(n_classes, width, generator=generator)
    return centres[labels] + torch.randn(n, width, generator=generator), labels


@pytest.mark.parametrize("n_classes", [2, 3, 4])
def test_it_is_the_minimum_of_its_loss(n_classes):
    features, labels = make(n_classes)
    probe = fit_logistic_probe(features, labels, n_classes, penalty=0.05)
    weights, intercept = (part.clone().requires_grad_() for part in (probe.weights, probe.intercept))
    z = (features.double() - probe.mean) / probe.scale
    loss = torch.nn.functional.cross_entropy(z @ weights + intercept, labels)
    # Two classes are one logit, of which the penalty is that of a weight w = W_1 - W_0.
    size = weights.square().sum() if n_classes > 2 else (weights[:, 1] - weights[:, 0]).square().sum()
    (loss + 0.025 * size).backward()
    assert float(weights.grad.abs().max()) < 1e-4
    assert float(intercept.grad.abs().max()) < 1e-4


def test_a_constant_channel_has_no_weight():
    features, labels = make(3)
    features[:, 2] = 7
    probe = fit_logistic_probe(features, labels, 3)
    assert probe.weights[2].abs().max() < 1e-9
    assert torch.isfinite(probe.logits(features)).all()


@pytest.mark.parametrize(
    ("labels", "n_classes", "penalty"), [([0, 0, 0], 2, 0.1), ([0, 0, 0], 1, 0.1), ([0, 1, 1], 2, 0.0)]
)
def test_what_cannot_be_fitted_is_refused(labels, n_classes, penalty):
    with pytest.raises(ValueError, match="a probe needs two classes with images and a penalty above 0, found"):
        fit_logistic_probe(torch.randn(3, 2), torch.tensor(labels), n_classes, penalty=penalty)
