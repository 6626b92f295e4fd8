"""The masking experiment: how well images are classified when latents are kept or removed."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cytosae.analysis.masking import ClassScores, Masking, MaskingCounts, MaskingExperiment
from cytosae.analysis.probe import LinearProbe
from cytosae_cache.reading.permutation import IntArray, spread_rows
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.config import StatisticsOptions
from cytosae_pipeline.errors import UserError, join_few, quote, say_count
from cytosae_pipeline.runtime.devices import accumulator_device
from cytosae_pipeline.runtime.progress import Progress
from cytosae_pipeline.statistics.halves import find_companions, split_in_halves
from cytosae_pipeline.statistics.inputs import Inputs
from cytosae_pipeline.statistics.label_index import LabelIndex
from cytosae_pipeline.statistics.some_rows import EncodedRows, encode_rows

logger = logging.getLogger(__name__)

KS = (1, 2, 5, 10, 20, 50, 100)
"""Numbers of latents kept or removed by default."""

_LEAST_TRAINING = 2
"""Training images that a class must have."""


@dataclass(frozen=True)
class Accuracy:
    """Shares of test images classified correctly, between 0 and 1."""

    original: float
    """On the original activations."""
    reconstruction: float
    """On the reconstruction from all latents."""
    masked: dict[Masking, npt.NDArray[np.float64]]
    """On masked reconstructions, one number for each k, shape `(n_ks,)`; see `MaskingExperiment`."""
    chance: float
    """Of always predicting the class with most training images."""

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        masked: dict[str, Any] = {kind: values.tolist() for kind, values in self.masked.items()}
        return {"original": self.original, "reconstruction": self.reconstruction, **masked, "chance": self.chance}


@dataclass(frozen=True)
class MaskingResult:
    """Result of the masking experiment."""

    classes: list[str]
    """Names of the classes, sorted."""
    left_out: list[str]
    """Classes with too few training or test images."""
    train_images: list[int]
    """Training images of each class."""
    n_correct: MaskingCounts
    """Test images of each class, and those classified rightly."""
    ridge: float
    """Strength of the probe's penalty; see `cytosae.analysis.probe.LinearProbe.fit`."""
    seed: int
    """Seed of the split and of the control."""

    @property
    def ks(self) -> tuple[int, ...]:
        """Numbers of latents kept or removed."""
        return self.n_correct.ks

    @property
    def n_train(self) -> int:
        """Training images."""
        return sum(self.train_images)

    @property
    def n_test(self) -> int:
        """Test images."""
        return int(self.n_correct.n_images.sum())

    @property
    def accuracy(self) -> Accuracy:
        """Accuracy in which every test image has the same weight."""
        return self._accuracy(self.n_correct.n_images.new_ones(len(self.classes)).double() / self.n_test)

    @property
    def balanced_accuracy(self) -> Accuracy:
        """Accuracy in which every class has the same weight, whatever its number of test images."""
        return self._accuracy(1 / (len(self.classes) * self.n_correct.n_images.double()))

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON values; lists by class are in the order of `classes`."""
        n_correct = self.n_correct
        by_class: dict[str, Any] = {kind: counts.tolist() for kind, counts in n_correct.masked.items()}
        return {
            "classes": self.classes,
            "left_out": self.left_out,
            "n_train": self.n_train,
            "n_test": self.n_test,
            "train_images": self.train_images,
            "test_images": n_correct.n_images.tolist(),
            "ridge": self.ridge,
            "seed": self.seed,
            "ks": list(n_correct.ks),
            "n_class_latents": list(n_correct.n_class_latents),
            "accuracy": self.accuracy.to_json(),
            "balanced_accuracy": self.balanced_accuracy.to_json(),
            "hits": {
                "original": n_correct.original.tolist(),
                "reconstruction": n_correct.reconstruction.tolist(),
                **by_class,
            },
        }

    def _accuracy(self, weights: torch.Tensor) -> Accuracy:
        """Hits weighted by class, shape `(C,)`."""
        n_correct, largest = self.n_correct, int(np.argmax(self.train_images))
        return Accuracy(
            original=float(n_correct.original.double() @ weights),
            reconstruction=float(n_correct.reconstruction.double() @ weights),
            masked={kind: (counts.double() @ weights).numpy() for kind, counts in n_correct.masked.items()},
            chance=float(n_correct.n_images[largest] * weights[largest]),
        )


class _Side(NamedTuple):
    """Training or test images."""

    rows: IntArray
    """Increasing row numbers, shape `(n,)`."""
    labels: torch.Tensor
    """Class of each, int64, shape `(n,)`."""


class _Plan(NamedTuple):
    """Training and test images of the experiment."""

    classes: list[str]
    left_out: list[str]
    train: _Side
    test: _Side


class _Images(NamedTuple):
    """Features and scores of some images."""

    at: slice
    """Their positions among the requested rows."""
    features: torch.Tensor
    """Means of their tokens, float64, shape `(n, D)`."""
    scores: torch.Tensor
    """Float32, shape `(n, S)`."""


def run_masking(
    inputs: Inputs,
    config: StatisticsOptions,
    *,
    n_images: int = 4000,
    ks: Sequence[int] = KS,
    ridge: float = 0.01,
    seed: int = 0,
    subjects: IntArray | None = None,
) -> MaskingResult:
    """Train a linear probe on half of the labelled images and test it on masked reconstructions of the other half.

    All images of a person are on one side: of a subject, else of a patient; an image without a patient counts by
    itself, together with its exact copies. Latents of classes are chosen on training images. Memory does not grow with
    the number of images, and the result does not depend on the batch size.

    Args:
        inputs: Store and autoencoder, with its decoder.
        config: Batch size, precision, whether checksums are checked, and the cluster whose workers encode, if any.
        n_images: Images to use at most, spread evenly over the store's readable images with a label.
        ks: Numbers of latents to keep or remove; those above S count as S.
        ridge: Strength of the probe's penalty.
        seed: Seed of the split and of the control; 0 or more.
        subjects: Person of each image of the store, shape `(n_images,)`; -1 where the patient is the person.

    Raises:
        UserError: If the store has no labels, or fewer than two classes have 2 training images and a test image.
        ValueError: If `ks`, `ridge` or `seed` is out of range.
    """
    plan = _make_plan(inputs.store, n_images, seed, subjects)
    if plan.left_out:
        n, verb = len(plan.left_out), "is" if len(plan.left_out) == 1 else "are"
        logger.info(
            f"{say_count(n, 'class has', 'classes have')} fewer than {_LEAST_TRAINING} training images or no test "
            f"image and {verb} left out: {', '.join(plan.left_out)}"
        )
    n_latents, device = inputs.n_latents, accumulator_device(inputs.sae.W_enc.device)
    probe = LinearProbe(inputs.store.d_model, len(plan.classes), device=device)
    class_scores = ClassScores(len(plan.classes), n_latents, device=device)
    with Progress("masking", len(plan.train.rows) + len(plan.test.rows), "images") as bar:
        for images in encode_rows(inputs, config, plan.train.rows, _image_of, bar.advance):
            probe.update(images.features, plan.train.labels[images.at])
            class_scores.update(images.scores, plan.train.labels[images.at])
        experiment = MaskingExperiment(
            probe.fit(ridge), inputs.sae.W_dec.detach(), inputs.sae.b_dec, class_scores.differences(), ks,
            seed=seed, device=device,
        )  # fmt: skip
        rows = torch.from_numpy(plan.test.rows)
        for images in encode_rows(inputs, config, plan.test.rows, _image_of, bar.advance):
            experiment.update(rows[images.at], images.features, images.scores, plan.test.labels[images.at])
    return MaskingResult(
        plan.classes, plan.left_out, probe.n_images.tolist(), experiment.result(), ridge=ridge, seed=seed
    )


def _make_plan(store: ActivationStore, n_images: int, seed: int, subjects: IntArray | None) -> _Plan:
    """Choose images, split them, and leave out classes with too few images."""
    names, index = LabelIndex.of(store.images.label)
    if not names:
        raise UserError(
            f"no image of store '{store.path}' has a label. Build it from a CSV with a 'label' column, or from folders "
            "with --layout class"
        )
    labelled = store.valid_rows[index[store.valid_rows] >= 0]
    rows = labelled[spread_rows(len(labelled), n_images)]
    labels = index[rows]
    in_training = split_in_halves(find_companions(store, rows, subjects), labels, seed=seed)
    n_train = np.bincount(labels[in_training], minlength=len(names))
    n_test = np.bincount(labels[~in_training], minlength=len(names))
    enough = (n_train >= _LEAST_TRAINING) & (n_test >= 1)
    if enough.sum() < 2:
        found = [f"{quote(name)} {a} and {b}" for name, a, b in zip(names, n_train, n_test, strict=True)]
        raise UserError(
            f"masking needs two classes with {_LEAST_TRAINING} training images and a test image each, but the halves "
            f"of {say_count(len(rows), 'image')} of store '{store.path}' have: {join_few(found, 8)}. All images of a "
            "patient are in one half: label more images of more patients, or use more images"
        )
    classes = np.cumsum(enough) - 1
    sides = [
        _Side(rows[side & enough[labels]], torch.from_numpy(classes[labels[side & enough[labels]]]))
        for side in (in_training, ~in_training)
    ]
    kept = [name for name, there in zip(names, enough, strict=True) if there]
    left_out = [name for name, n in zip(names, n_train + n_test, strict=True) if n and name not in kept]
    return _Plan(kept, left_out, *sides)


def _image_of(images: EncodedRows) -> _Images:
    """Token means and scores."""
    # Sums of float16 are exact in float64; one image at a time keeps them small.
    features = torch.stack([image.double().mean(dim=0) for image in images.activations])
    return _Images(images.at, features, images.pooled.scores)
