"""Embedding error and loss recovered equal their formulas, for any split of the images."""

import pytest
import torch

from cytosae.analysis.downstream import DownstreamStatistics, Embeddings
from cytosae.analysis.logistic_probe import fit_logistic_probe

N, WIDTH = 30, 6


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(N) % 3
    original = torch.randn(3, WIDTH, generator=generator)[labels] + 0.3 * torch.randn(N, WIDTH, generator=generator)
    noisy = original + 0.5 * torch.randn(N, WIDTH, generator=generator)
    ablated = torch.randn(1, WIDTH, generator=generator).expand(N, -1)
    return Embeddings(original, noisy, ablated), labels


def run(embeddings, labels, probe, sizes):
    whole = DownstreamStatistics(3)
    start = 0
    for size in sizes:
        part, at = DownstreamStatistics(3), slice(start, start + size)
        some = Embeddings(*(item[at] for item in embeddings))
        part.update(some, labels[at])
        part.update_probe(some, labels[at], probe, labels[at])
        whole.merge(part)
        start += size
    return whole


@pytest.mark.parametrize("sizes", [(N,), (1, 9, 20), (10, 10, 10)])
def test_the_formulas(images, sizes):
    embeddings, labels = images
    probe = fit_logistic_probe(embeddings.original, labels, 3)
    found = run(embeddings, labels, probe, sizes)
    for group, members in ((None, labels >= 0), (1, labels == 1)):
        e, r, a = (item[members].double() for item in embeddings)
        values = found.embedding(group)
        assert values.n_images == int(members.sum())
        assert values.cosine == pytest.approx(float(torch.nn.functional.cosine_similarity(e, r).mean()))
        assert values.cosine_ablated == pytest.approx(float(torch.nn.functional.cosine_similarity(e, a).mean()))
        assert values.error_recovered == pytest.approx(1 - float((e - r).square().sum() / (e - a).square().sum()))
        y = labels[members]
        losses = [float(torch.nn.functional.cross_entropy(probe.logits(item), y)) for item in (e, r, a)]
        read = found.probe(group)
        assert (read.cross_entropy, read.cross_entropy_reconstructed, read.cross_entropy_ablated) == pytest.approx(
            losses
        )
        if losses[2] > losses[0]:
            assert read.loss_recovered == pytest.approx((losses[2] - losses[1]) / (losses[2] - losses[0]))
        else:  # the ablated embedding happens to lie among those of this class
            assert read.loss_recovered is None
        guesses = [probe.logits(item).argmax(dim=1) for item in (e, r, a)]
        shares = [float((guess == y).double().mean()) for guess in guesses]
        assert (read.accuracy, read.accuracy_reconstructed, read.accuracy_ablated) == pytest.approx(shares)
        assert read.agreement == pytest.approx(float((guesses[0] == guesses[1]).double().mean()))


def test_a_perfect_reconstruction_recovers_all_and_the_ablation_nothing(images):
    embeddings, labels = images
    probe = fit_logistic_probe(embeddings.original, labels, 3)
    perfect = run(embeddings._replace(reconstructed=embeddings.original), labels, probe, (N,))
    assert (perfect.embedding().error_recovered, perfect.probe().loss_recovered) == (1, 1)
    assert perfect.probe().agreement == 1
    nothing = run(embeddings._replace(reconstructed=embeddings.ablated), labels, probe, (N,))
    assert nothing.embedding().error_recovered == pytest.approx(0, abs=1e-12)
    assert nothing.probe().loss_recovered == pytest.approx(0, abs=1e-12)


def test_an_ablation_without_harm_has_nothing_to_recover(images):
    embeddings, labels = images
    probe = fit_logistic_probe(embeddings.original, labels, 3)
    found = run(embeddings._replace(ablated=embeddings.original), labels, probe, (N,))
    assert found.embedding().error_recovered is None
    assert found.probe().loss_recovered is None


def test_images_without_a_group_count_overall_and_no_image_gives_nothing(images):
    embeddings, labels = images
    found = DownstreamStatistics(2)
    assert (found.embedding(), found.probe(), found.embedding(0)) == (None, None, None)
    found.update(embeddings, torch.where(labels == 2, -1, labels))
    assert (found.embedding().n_images, found.embedding(0).n_images) == (30, 10)
