"""How well a few latents tell the labels of images apart, on persons that the probe has not seen."""

import logging
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cytosae.analysis.classification import split_folds
from cytosae.analysis.sparse_probe import Accuracy, ProbeMoments, probe_folds, score_predictions
from cytosae_cache.reading.permutation import IntArray, spread_rows
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.errors import UserError, join_few, quote, say_count
from cytosae_pipeline.evaluation.image_scores import ImageScores, Tokens, mean_tokens
from cytosae_pipeline.runtime.devices import accumulator_device
from cytosae_pipeline.runtime.progress import Progress
from cytosae_pipeline.statistics.halves import find_companions
from cytosae_pipeline.statistics.inputs import Inputs
from cytosae_pipeline.statistics.label_index import LabelIndex

logger = logging.getLogger(__name__)

KS = (1, 2, 5, 20)
"""Numbers of latents that a probe uses."""

N_FOLDS = 5
"""Folds; fewer where a label has fewer persons."""

_TRIES = 20
"""Draws of the folds before they are given up: a label of few persons may be missing from a training part."""


@dataclass(frozen=True)
class ProbeAccuracy:
    """How well a probe predicts the labels of images of other persons."""

    balanced_accuracy: float
    """Mean over the labels of the share of their images predicted rightly."""
    accuracy: float
    """Share of images predicted rightly."""
    one_vs_rest: dict[str, float]
    """Balanced accuracy of telling each label from all others by a probe of its own, by name."""
    mean_one_vs_rest: float
    """Mean of these."""


@dataclass(frozen=True)
class SaeProbe:
    """Sparse probing of an autoencoder (docs/definitions.md, section 12)."""

    by_k: dict[int, ProbeAccuracy]
    """By the number of latents."""
    mean_token: ProbeAccuracy
    """The same probe on all channels of the mean token of the vision transformer."""
    chance: float
    """Balanced accuracy of guessing, 1 / C."""
    n_images: int
    """Images."""
    n_persons: int
    """Persons, or images where no patient is known: all images of one are tested in the same fold."""
    unit: str
    """What is in one fold as a whole: `subject`, `patient` or `image`."""
    n_folds: int
    """Folds."""
    left_out: list[str]
    """Labels with images of fewer than two persons."""

    def describe(self) -> str:
        """The result as a table for humans."""
        unit = say_count(self.n_persons, self.unit)
        lines = [
            f"probes of {say_count(len(self.mean_token.one_vs_rest), 'label')} on "
            f"{say_count(self.n_images, 'image')} of {unit}, {self.n_folds} folds (guessing: {self.chance:.3f})",
            f"{'':<12}  {'balanced acc.':>13}  {'accuracy':>8}  {'one vs rest':>11}",
        ]
        named = {say_count(k, "latent"): found for k, found in self.by_k.items()} | {"mean token": self.mean_token}
        lines += [
            f"{name:<12}  {found.balanced_accuracy:>13.3f}  {found.accuracy:>8.3f}  {found.mean_one_vs_rest:>11.3f}"
            for name, found in named.items()
        ]
        return "\n".join(lines)


class _Plan(NamedTuple):
    """Which images are probed, and how they are split."""

    names: list[str]
    rows: IntArray
    labels: npt.NDArray[np.int64]
    folds: npt.NDArray[np.int64]
    n_persons: int
    left_out: list[str]


def measure_probe(
    inputs: Inputs,
    tokens: Tokens,
    *,
    n_images: int,
    subjects: IntArray | None,
    no_verify: bool,
    seed: int = 0,
) -> SaeProbe:
    """Probe labels by the best latents and by the mean token.

    Two passes: moments of all latents by fold and label, which select latents; then the scores of selected latents are
    kept, at most `n_images x (folds x (labels + 1) x 20)` numbers, and the mean token of each image.

    Args:
        inputs: Autoencoder and store.
        tokens: Tokens over which activations are averaged, and of which the mean token is that.
        n_images: Images to use at most, spread evenly over the store's readable images with a label.
        subjects: Person of each image of the store, shape `(n_images,)`; -1 where the patient is the person.
        no_verify: Skip checksums while reading.
        seed: Seed of the folds.

    Raises:
        UserError: If the store has no two labels with images of two persons each, or no folds have all labels.
    """
    plan = _make_plan(inputs.store, n_images, subjects, seed)
    if plan.left_out:
        logger.info(
            f"probe: {say_count(len(plan.left_out), 'label has', 'labels have')} images of fewer than two persons and "
            f"cannot be tested: {join_few(map(quote, plan.left_out), 8)}"
        )
    scores = ImageScores(inputs, plan.rows, tokens, no_verify=no_verify)
    n_labels, n_folds = len(plan.names), int(plan.folds.max()) + 1
    device = accumulator_device(inputs.sae.W_enc.device)
    moments = ProbeMoments(n_folds, n_labels, inputs.n_latents, device=device)
    folds, labels = torch.from_numpy(plan.folds), torch.from_numpy(plan.labels)
    means = np.empty((len(plan.rows), inputs.store.d_model), dtype=np.float32)
    with Progress("probe", 2 * len(plan.rows), "images") as bar:
        for images in scores:
            moments.update(images.scores, folds[images.at], labels[images.at])
            means[images.at] = mean_tokens(images.tokens).cpu().numpy()
            bar.advance(len(images.scores))
        targets = [None, *range(n_labels)]
        best = {target: [moments.select(fold, max(KS), target) for fold in range(n_folds)] for target in targets}
        kept = np.unique(np.concatenate([latents for found in best.values() for latents in found]))
        features = np.empty((len(plan.rows), len(kept)), dtype=np.float32)
        for images in scores:
            features[images.at] = images.scores[:, torch.from_numpy(kept).to(images.scores.device)].cpu().numpy()
            bar.advance(len(images.scores))
    places = {target: [np.searchsorted(kept, latents) for latents in found] for target, found in best.items()}
    by_k = {
        k: _measure(plan, features, {target: [part[:k] for part in found] for target, found in places.items()})
        for k in KS
        if k <= inputs.n_latents
    }
    unit = "subject" if subjects is not None else "patient" if any(inputs.store.images.patient) else "image"
    return SaeProbe(
        by_k, _measure(plan, means, None), 1 / n_labels, len(plan.rows), plan.n_persons, unit, n_folds, plan.left_out
    )


def _measure(
    plan: _Plan,
    features: npt.NDArray[np.float32],
    columns: dict[int | None, list[npt.NDArray[np.integer]]] | None,
) -> ProbeAccuracy:
    """Accuracies of probes that use the given features of each fold, for all labels and for each; None for all."""

    def probe(labels: npt.NDArray[np.int64], target: int | None) -> Accuracy:
        return score_predictions(
            labels, probe_folds(features, labels, plan.folds, None if columns is None else columns[target])
        )

    whole = probe(plan.labels, None)
    one_vs_rest = {
        name: probe((plan.labels == label).astype(np.int64), label).balanced_accuracy
        for label, name in enumerate(plan.names)
    }
    return ProbeAccuracy(*whole, one_vs_rest, float(np.mean(list(one_vs_rest.values()))))


def _make_plan(store: ActivationStore, n_images: int, subjects: IntArray | None, seed: int) -> _Plan:
    """Choose images, leave out labels that cannot be tested, and split the rest.

    Raises:
        UserError: If fewer than two labels are left, or no folds have all labels.
    """
    names, index = LabelIndex.of(store.images.label)
    labelled = store.valid_rows[index[store.valid_rows] >= 0]
    rows = labelled[spread_rows(len(labelled), n_images)]
    groups, labels = find_companions(store, rows, subjects), index[rows]
    pairs = np.unique(np.stack([labels, groups], axis=1), axis=0)
    enough = np.bincount(pairs[:, 0], minlength=len(names)) >= 2
    there = np.bincount(labels, minlength=len(names)) > 0
    if enough.sum() < 2:
        found = [
            f"{quote(name)} of {say_count(int((pairs[:, 0] == at).sum()), 'person')}"
            for at, name in enumerate(names)
            if there[at]
        ]
        raise UserError(
            f"a probe needs two labels with images of two persons each, but {say_count(len(rows), 'image')} of store "
            f"'{store.path}' have: {join_few(found, 8) or 'no label'}. Build it from a CSV with columns label and "
            "patient, or use more images (--probe_images)"
        )
    kept = enough[labels]
    rows, groups, labels = (
        rows[kept],
        np.unique(groups[kept], return_inverse=True)[1],
        (np.cumsum(enough) - 1)[labels[kept]],
    )
    splits = next(filter(None, (split_folds(labels, groups, N_FOLDS, seed + at) for at in range(_TRIES))), None)
    if splits is None:
        raise UserError(
            f"the persons of store '{store.path}' cannot be split so that every training part has all labels: a label "
            "has images of very few persons. Use more images (--probe_images)"
        )
    folds = np.zeros(len(rows), dtype=np.int64)
    for number, (_, test) in enumerate(splits):
        folds[test] = number
    chosen = [name for name, is_kept in zip(names, enough, strict=True) if is_kept]
    left_out = [
        name for name, is_kept, any_image in zip(names, enough, there, strict=True) if any_image and not is_kept
    ]
    return _Plan(chosen, rows, labels, folds, int(groups.max()) + 1, left_out)
