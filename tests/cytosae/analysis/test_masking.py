"""Masked classification against literally masking, decoding, averaging and classifying, for every architecture."""

import itertools

import numpy as np
import pytest
import torch

from cytosae.analysis.masking import MASKINGS, ClassScores, MaskingExperiment
from cytosae.analysis.probe import LinearProbe
from cytosae.sae.registry import ARCHITECTURES, make_sae
from cytosae.statistics.block_encoder import BlockEncoder

N, T, D, S, C = 150, 5, 6, 20, 3
KS = (1, 2, 5, 12, 99)
SEED = 3


def make_random(name):
    """An autoencoder whose decoder, biases and thresholds are all non-zero, with some latents inactive."""
    sae = make_sae(name, D, S, k=4, prefixes=(0.25, 1.0), bandwidth=0.2)
    generator = torch.Generator().manual_seed(0)
    for tensor in sae.state_dict().values():
        tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
    for unit in sae._latent_units()[1:]:
        unit.data.abs_()
    sae.W_dec.data.mul_(torch.rand(S, 1, generator=generator) + 0.5)
    return sae.requires_grad_(False)


def make_images():
    """Activations of images, shape (N, T, D), and their classes, which shift the mean of all tokens."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, C, size=N)
    acts = rng.normal(size=(N, T, D)) + 0.6 * rng.normal(size=(C, D))[labels][:, None]
    return torch.from_numpy(acts).float(), torch.from_numpy(labels)


class Case:
    """A probe and class scores of half of the images, and the data of the other half."""

    def __init__(self, name="relu"):
        self.sae = make_random(name)
        self.activations, self.labels = make_images()
        self.features = self.activations.mean(dim=1, dtype=torch.float64)
        self.scores = BlockEncoder(self.sae).reduce(self.activations, 0).scores
        self.train, self.test = torch.arange(0, N, 2), torch.arange(1, N, 2)
        probe = LinearProbe(D, C)
        probe.update(self.features[self.train], self.labels[self.train])
        self.probe = probe.fit()
        self.class_scores = ClassScores(C, S)
        self.class_scores.update(self.scores[self.train], self.labels[self.train])

    def experiment(self, ks=KS, seed=SEED):
        differences = self.class_scores.differences()
        return MaskingExperiment(self.probe, self.sae.W_dec, self.sae.b_dec, differences, ks, seed=seed)

    def update(self, experiment, at):
        experiment.update(at, self.features[at], self.scores[at], self.labels[at])
        return experiment

    # The plain path, one image at a time.

    def is_right(self, row, mask=None):
        """Whether an image is classified correctly, on its activations or on its masked reconstruction."""
        tokens = self.activations[row]
        if mask is not None:
            tokens = self.sae.decode(self.sae.encode(tokens) * torch.from_numpy(mask).float())
        feature = tokens.double().mean(dim=0)
        logits = ((feature - self.probe.mean) / self.probe.scale) @ self.probe.weights + self.probe.intercept
        return int(logits.argmax() == self.labels[row])

    def own(self, row, k):
        scores = self.scores[row].tolist()
        return sorted(range(S), key=lambda latent: (-scores[latent], latent))[:k]

    def drawn(self, row, k):
        raw = np.random.Philox(np.random.SeedSequence((SEED, row, 1))).random_raw(S)
        active = np.flatnonzero(self.scores[row].numpy() > 0)
        return active[np.argsort(-(raw[active] >> 1).astype(np.int64))][:k]

    def of_classes(self, k):
        scores, labels = self.scores[self.train].double().numpy(), self.labels[self.train].numpy()
        chosen = set()
        for label in range(C):
            difference = scores[labels == label].mean(axis=0) - scores.mean(axis=0)
            chosen |= set(sorted(range(S), key=lambda latent: (-difference[latent], latent))[:k])
        return sorted(chosen)


def mask_of(latents, inside=1.0):
    mask = np.full(S, 1 - inside)
    mask[latents] = inside
    return mask


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_counts_equal_masking_every_token(name):
    case = Case(name)
    result = case.update(case.experiment(), case.test).result()
    ks = (1, 2, 5, 12, S)
    assert result.ks == ks
    expected = {kind: torch.zeros(len(ks), C, dtype=torch.int64) for kind in MASKINGS}
    original, reconstruction = torch.zeros(C, dtype=torch.int64), torch.zeros(C, dtype=torch.int64)
    for row in case.test.tolist():
        label = case.labels[row]
        original[label] += case.is_right(row)
        reconstruction[label] += case.is_right(row, np.ones(S))
        for place, k in enumerate(ks):
            expected["kept"][place, label] += case.is_right(row, mask_of(case.own(row, k)))
            expected["removed"][place, label] += case.is_right(row, mask_of(case.own(row, k), 0.0))
            expected["random_removed"][place, label] += case.is_right(row, mask_of(case.drawn(row, k), 0.0))
            expected["class_kept"][place, label] += case.is_right(row, mask_of(case.of_classes(k)))
            expected["class_removed"][place, label] += case.is_right(row, mask_of(case.of_classes(k), 0.0))
    assert result.n_images.tolist() == torch.bincount(case.labels[case.test]).tolist()
    assert result.original.tolist() == original.tolist()
    assert result.reconstruction.tolist() == reconstruction.tolist()
    assert {kind: n_correct.tolist() for kind, n_correct in result.masked.items()} == {
        kind: n_correct.tolist() for kind, n_correct in expected.items()
    }
    assert result.n_class_latents == tuple(len(case.of_classes(k)) for k in ks)
    # The case distinguishes the maskings: none is always or never correct.
    counts = {kind: int(n_correct[0].sum()) for kind, n_correct in result.masked.items()}
    assert len({*counts.values(), int(reconstruction.sum()), int(original.sum())}) >= 4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_mean_of_the_reconstruction_follows_from_the_scores(name):
    case = Case(name)
    mean = case.sae.decode(case.sae.encode(case.activations)).mean(dim=1)
    torch.testing.assert_close(case.scores @ case.sae.W_dec + case.sae.b_dec, mean, rtol=1e-4, atol=1e-5)


def test_keeping_all_latents_is_the_reconstruction_and_removing_all_leaves_the_bias():
    case = Case()
    result = case.update(case.experiment(ks=(S,)), case.test).result()
    for kind in ("kept", "class_kept"):
        assert result.masked[kind][0].tolist() == result.reconstruction.tolist()
    empty = int(
        (((case.sae.b_dec - case.probe.mean) / case.probe.scale) @ case.probe.weights + case.probe.intercept).argmax()
    )
    always = [int(n) if label == empty else 0 for label, n in enumerate(result.n_images)]
    for kind in ("removed", "random_removed", "class_removed"):
        assert result.masked[kind][0].tolist() == always


def test_ties_go_to_the_smaller_latent():
    case = Case()
    case.scores = torch.ones_like(case.scores)
    # The first two latents indicate one class, the last two another.
    towards = (case.probe.weights * case.probe.scale[:, None]).T.float()
    case.sae.W_dec.zero_()
    case.sae.W_dec[:2], case.sae.W_dec[-2:] = 100 * (towards[0] - towards[1]), 100 * (towards[1] - towards[0])
    labels = [
        int(case.probe.logits(200 * (one - other)[None]).argmax()) for one, other in (towards[:2], towards[[1, 0]])
    ]
    assert labels[0] != labels[1]
    result = case.update(case.experiment(ks=(2,)), case.test).result()
    for kind, label in (("kept", labels[0]), ("removed", labels[1])):
        assert result.masked[kind][0].tolist() == [n if at == label else 0 for at, n in enumerate(result.n_images)]


def test_counts_do_not_depend_on_order_split_or_merging():
    case = Case()
    expected = case.update(case.experiment(), case.test).result()
    parts = [case.test[:1], case.test[1:8].flip(0), case.test[8:8], case.test[8:]]
    for order in itertools.permutations(range(4)):
        merged = case.experiment()
        for number in order:
            merged.merge(case.update(case.experiment(), parts[number]))
        assert_same(merged.result(), expected)
    one = case.experiment()
    for row in case.test.flip(0):
        case.update(one, row[None])
    assert_same(one.result(), expected)


def test_only_the_control_depends_on_the_seed():
    case = Case()
    one, other = (case.update(case.experiment(seed=seed), case.test).result() for seed in (SEED, SEED + 1))
    for kind in MASKINGS:
        assert torch.equal(one.masked[kind], other.masked[kind]) == (kind != "random_removed")


def test_differences_of_class_scores_can_be_merged():
    case = Case()
    scores, labels = case.scores[case.train], case.labels[case.train]
    merged, part = ClassScores(C, S), ClassScores(C, S)
    merged.update(scores[:10], labels[:10])
    part.update(scores[10:], labels[10:])
    merged.merge(part)
    torch.testing.assert_close(merged.differences(), case.class_scores.differences())
    assert not ClassScores(C, S).differences().any()


def test_wrong_arguments_are_refused():
    case = Case()
    for ks in ((), (0, 1)):
        with pytest.raises(ValueError, match="ks must be numbers of 1 or more"):
            case.experiment(ks=ks)
    with pytest.raises(ValueError, match="seed 0 or more, found .* and -1"):
        case.experiment(seed=-1)
    with pytest.raises(ValueError, match=r"W_dec must be \(20, 6\), found \(0, 6\)"):
        MaskingExperiment(case.probe, torch.zeros(0, D), case.sae.b_dec, case.class_scores.differences(), KS)
    with pytest.raises(ValueError, match="only experiments with the same ks"):
        case.experiment().merge(case.experiment(ks=(1,)))
    with pytest.raises(ValueError, match="scores must be 0 or more"):
        case.experiment().update(case.test, case.features[case.test], -case.scores[case.test], case.labels[case.test])
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.2, found 3\.\.3"):
        case.experiment().update(case.test[:1], case.features[:1], case.scores[:1], torch.tensor([3]))
    with pytest.raises(ValueError, match=r"scores must be \(1, 20\)"):
        case.experiment().update(case.test[:1], case.features[:1], case.scores[:1, :4], case.labels[:1])


def assert_same(found, expected):
    assert found.ks == expected.ks
    for one, other in zip(found[2:5], expected[2:5], strict=True):
        assert torch.equal(one, other)
    assert all(torch.equal(found.masked[kind], expected.masked[kind]) for kind in MASKINGS)
