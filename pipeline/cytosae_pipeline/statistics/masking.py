"""The masking experiment: how well images are classified when only some latents are kept or removed."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cytosae.analysis.masking import ClassScores, Masking, MaskingCounts, MaskingExperiment
from cytosae.analysis.probe import LinearProbe
from cytosae.formats.checkpoint import load_sae
from cytosae.statistics.accumulators import BLOCK_IMAGES, BlockEncoder
from cytosae_cache.reading.permutation import IntArray, spread_rows
from cytosae_cache.reading.prefetch import Prefetcher
from cytosae_cache.reading.reader import StoreReader, aligned_buffer
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.config import StatisticsConfig
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.runtime.devices import DTYPES, accumulator_device
from cytosae_pipeline.runtime.memory import available_ram
from cytosae_pipeline.runtime.progress import Progress
from cytosae_pipeline.statistics.encode import Inputs
from cytosae_pipeline.statistics.features import label_index, sorted_names
from cytosae_pipeline.training.placement import exceeds_page_cache
from cytosae_pipeline.training.split import split_in_halves

logger = logging.getLogger(__name__)

KS = (1, 2, 5, 10, 20, 50, 100)
"""Numbers of latents kept or removed by default."""

_LEAST_TRAINING = 2
"""Training images that a class needs."""


@dataclass(frozen=True)
class Accuracy:
    """Shares of test images classified rightly, between 0 and 1."""

    original: float
    """On the original activations."""
    reconstruction: float
    """On the reconstruction from all latents."""
    masked: dict[Masking, npt.NDArray[np.float64]]
    """On masked reconstructions, one number for each k, shape `(n_ks,)`; see `MaskingExperiment`."""
    chance: float
    """Of always naming the class with most training images."""

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        masked: dict[str, Any] = {kind: values.tolist() for kind, values in self.masked.items()}
        return {"original": self.original, "reconstruction": self.reconstruction, **masked, "chance": self.chance}


@dataclass(frozen=True)
class MaskingResult:
    """What the masking experiment found."""

    classes: list[str]
    """Names of the classes, sorted."""
    left_out: list[str]
    """Classes with too few images on one side."""
    train_images: list[int]
    """Training images of each class."""
    hits: MaskingCounts
    """Test images of each class, and those classified rightly."""
    ridge: float
    """Strength of the probe's penalty; see `cytosae.analysis.probe.LinearProbe.fit`."""
    seed: int
    """Seed of the split and of the control."""

    @property
    def ks(self) -> tuple[int, ...]:
        """Numbers of latents kept or removed."""
        return self.hits.ks

    @property
    def n_train(self) -> int:
        """Training images."""
        return sum(self.train_images)

    @property
    def n_test(self) -> int:
        """Test images."""
        return int(self.hits.n_images.sum())

    @property
    def accuracy(self) -> Accuracy:
        """Every test image counts alike."""
        return self._accuracy(self.hits.n_images.new_ones(len(self.classes)).double() / self.n_test)

    @property
    def balanced_accuracy(self) -> Accuracy:
        """Every class counts alike, however many test images it has."""
        return self._accuracy(1 / (len(self.classes) * self.hits.n_images.double()))

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON values; lists by class are in the order of `classes`."""
        hits = self.hits
        by_class: dict[str, Any] = {kind: counts.tolist() for kind, counts in hits.masked.items()}
        return {
            "classes": self.classes,
            "left_out": self.left_out,
            "n_train": self.n_train,
            "n_test": self.n_test,
            "train_images": self.train_images,
            "test_images": hits.n_images.tolist(),
            "ridge": self.ridge,
            "seed": self.seed,
            "ks": list(hits.ks),
            "n_class_latents": list(hits.n_class_latents),
            "accuracy": self.accuracy.to_json(),
            "balanced_accuracy": self.balanced_accuracy.to_json(),
            "hits": {
                "original": hits.original.tolist(),
                "reconstruction": hits.reconstruction.tolist(),
                **by_class,
            },
        }

    def _accuracy(self, weights: torch.Tensor) -> Accuracy:
        """Hits weighted by class, shape `(C,)`."""
        hits, largest = self.hits, int(np.argmax(self.train_images))
        return Accuracy(
            original=float(hits.original.double() @ weights),
            reconstruction=float(hits.reconstruction.double() @ weights),
            masked={kind: (counts.double() @ weights).numpy() for kind, counts in hits.masked.items()},
            chance=float(hits.n_images[largest] * weights[largest]),
        )


class _Side(NamedTuple):
    """Training or test images."""

    rows: IntArray
    """Increasing row numbers, shape `(n,)`."""
    labels: torch.Tensor
    """Class of each, int64, shape `(n,)`."""


class _Plan(NamedTuple):
    """Which images do what."""

    classes: list[str]
    left_out: list[str]
    train: _Side
    test: _Side


class _Images(NamedTuple):
    """What the experiment needs of some images."""

    at: slice
    """Their places among the rows asked for."""
    features: torch.Tensor
    """Means of their tokens, float64, shape `(n, D)`."""
    scores: torch.Tensor
    """Float32, shape `(n, S)`."""


def run_masking(
    inputs: Inputs,
    config: StatisticsConfig,
    *,
    n_images: int = 4000,
    ks: Sequence[int] = KS,
    ridge: float = 0.01,
    seed: int = 0,
) -> MaskingResult:
    """Train a linear probe on half of the labelled images and test it on masked reconstructions of the other half.

    All images of a patient are on one side; an image without one counts for itself, with its exact copies. What is
    chosen by class is chosen on training images. The memory needed does not grow with the images, and the result does
    not depend on the batch size.

    Args:
        inputs: Store and autoencoder; its decoder is read again from `config.sae_path` if it was left out.
        config: Batch size, precision, and whether checksums are checked.
        n_images: Images to look at, at most, spread evenly over the store's valid images with a label.
        ks: Numbers of latents to keep or remove; those above S count as S.
        ridge: Strength of the probe's penalty.
        seed: Seed of the split and of the control; 0 or more.

    Raises:
        UserError: If the store has no labels, or fewer than two classes have 2 training images and a test image.
        ValueError: If `ks`, `ridge` or `seed` is out of range.
    """
    plan = _make_plan(inputs.store, n_images, seed)
    if plan.left_out:
        logger.info(
            f"{len(plan.left_out)} classes are left out, for lack of {_LEAST_TRAINING} training images or of a test "
            f"image: {', '.join(plan.left_out)}"
        )
    n_latents, device = inputs.sae.W_enc.shape[1], accumulator_device(inputs.sae.W_enc.device)
    probe = LinearProbe(inputs.store.d_model, len(plan.classes), device=device)
    class_scores = ClassScores(len(plan.classes), n_latents, device=device)
    with (
        StoreReader(
            inputs.store, verify=not config.no_verify, direct=exceeds_page_cache([inputs.store], available_ram())
        ) as reader,
        Progress("masking", len(plan.train.rows) + len(plan.test.rows), "images") as bar,
    ):
        for images in _iter_images(inputs, config, reader, plan.train.rows, bar.advance):
            probe.update(images.features, plan.train.labels[images.at])
            class_scores.update(images.scores, plan.train.labels[images.at])
        experiment = MaskingExperiment(
            probe.fit(ridge), _decoder(inputs, config), inputs.sae.b_dec, class_scores.differences(), ks,
            seed=seed, device=device,
        )  # fmt: skip
        rows = torch.from_numpy(plan.test.rows)
        for images in _iter_images(inputs, config, reader, plan.test.rows, bar.advance):
            experiment.update(rows[images.at], images.features, images.scores, plan.test.labels[images.at])
    return MaskingResult(
        plan.classes, plan.left_out, probe.n_images.tolist(), experiment.result(), ridge=ridge, seed=seed
    )


def _make_plan(store: ActivationStore, n_images: int, seed: int) -> _Plan:
    """Choose images, split them, and leave out classes with too few."""
    column = list(store.images.label)
    names = sorted_names(column)
    if not names:
        raise UserError(
            f"no image of store '{store.path}' has a label. Build it from a CSV with a 'label' column, or from folders "
            "with --layout class"
        )
    index = label_index(names, column).numpy()
    labelled = store.valid_rows[index[store.valid_rows] >= 0]
    rows = labelled[spread_rows(len(labelled), n_images)]
    labels = index[rows]
    in_training = split_in_halves(_groups(store, rows), labels, seed=seed)
    n_train = np.bincount(labels[in_training], minlength=len(names))
    n_test = np.bincount(labels[~in_training], minlength=len(names))
    enough = (n_train >= _LEAST_TRAINING) & (n_test >= 1)
    if enough.sum() < 2:
        found = [f"{name} {a} and {b}" for name, a, b in zip(names, n_train, n_test, strict=True)]
        raise UserError(
            f"masking needs two classes with {_LEAST_TRAINING} training images and a test image each, but of "
            f"{len(rows)} images of store '{store.path}' the halves hold: {', '.join(found[:8])}. All images of a "
            "patient are in one half: label more images, of more patients, or look at more of them"
        )
    classes = np.cumsum(enough) - 1
    sides = [
        _Side(rows[side & enough[labels]], torch.from_numpy(classes[labels[side & enough[labels]]]))
        for side in (in_training, ~in_training)
    ]
    kept = [name for name, there in zip(names, enough, strict=True) if there]
    left_out = [name for name, n in zip(names, n_train + n_test, strict=True) if n and name not in kept]
    return _Plan(kept, left_out, *sides)


def _groups(store: ActivationStore, rows: IntArray) -> IntArray:
    """Which images must stay together: those of a patient; without one, equal pictures. Shape `(n,)`."""
    patients, digests = store.images.patient, store.column("images/sha256")
    numbers: dict[str | bytes, int] = {}
    keys = (patients[row] or bytes(digests[row]) for row in rows.tolist())
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def _iter_images(
    inputs: Inputs, config: StatisticsConfig, reader: StoreReader, rows: IntArray, advance: Callable[[int], None]
) -> Iterator[_Images]:
    """Token means and scores of the given rows, in their order, read ahead of the encoder."""
    encoder = BlockEncoder(inputs.sae, dtype=DTYPES["fp32" if config.precision == "auto" else config.precision])
    n_at_once = -(-config.batch_size // BLOCK_IMAGES) * BLOCK_IMAGES

    def read(start: int, buffer: npt.NDArray[Any]) -> tuple[int, npt.NDArray[Any]]:
        part = rows[start : start + n_at_once]
        reader.read_rows(part, buffer[: len(part)])
        return start, buffer[: len(part)]

    shape = (min(n_at_once, len(rows)), *inputs.store.spec.image_shape)
    plans = range(0, len(rows), n_at_once)
    for start, values in Prefetcher(plans, read, lambda: aligned_buffer(shape, inputs.store.dtype)):
        activations = torch.from_numpy(values)
        # Sums of float16 are exact in float64, an image at a time keeps them small.
        features = torch.stack([image.double().mean(dim=0) for image in activations])
        # An image's place among the rows decides its block, so that blocks are full though the rows lie scattered.
        yield _Images(slice(start, start + len(values)), features, encoder.reduce(activations, start).scores)
        advance(len(values))


def _decoder(inputs: Inputs, config: StatisticsConfig) -> torch.Tensor:
    """`W_dec`, shape `(S, D)`."""
    if len(inputs.sae.W_dec) or config.sae_path is None:
        return inputs.sae.W_dec.detach()
    return load_sae(config.sae_path).sae.W_dec.detach()
