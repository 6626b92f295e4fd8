"""`evaluate --downstream`: what is left of the encoder's embedding, and of a probe on it, after a reconstruction."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cytosae.analysis.downstream import DownstreamStatistics, Embeddings, EmbeddingValues, ProbeValues
from cytosae.analysis.logistic_probe import PENALTY, fit_logistic_probe
from cytosae.analysis.probe import Probe
from cytosae.backbones.tail import Tail
from cytosae.sae.base import Sae
from cytosae.training.matmul import MatmulConfig, iter_parts
from cytosae_cache.reading.permutation import IntArray, spread_rows
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.building.tail_file import find_tail, open_tail
from cytosae_pipeline.config import EvaluateOptions
from cytosae_pipeline.config.store import StorePlace
from cytosae_pipeline.errors import join_few, quote
from cytosae_pipeline.runtime.memory import exceeds_page_cache
from cytosae_pipeline.runtime.progress import Progress
from cytosae_pipeline.runtime.tables import format_table
from cytosae_pipeline.statistics.halves import find_companions, split_in_halves
from cytosae_pipeline.statistics.inputs import Inputs
from cytosae_pipeline.statistics.label_index import LabelIndex
from cytosae_pipeline.training.evaluation import reconstruct
from cytosae_pipeline.training.init import choose_tokens
from cytosae_pipeline.training.matmul import fp32_matmul

logger = logging.getLogger(__name__)

Ablation = Literal["mean", "zero"]

MOST_TRAINING = 4000
"""Images that a probe is trained on at most, spread evenly: memory does not grow with the store."""

_LEAST_TRAINING = 2
"""Training images that a class must have."""

_IMAGES_AT_ONCE = 32
_WIDTH = 24


@dataclass(frozen=True)
class DownstreamValues:
    """What was measured on some images."""

    embedding: EmbeddingValues
    """Of all of them."""
    probe: ProbeValues | None
    """Of those that test the probe; None if there are none."""


@dataclass(frozen=True)
class Downstream:
    """What a reconstruction keeps of the encoder's embedding and of a probe on it (docs/definitions.md, section 9)."""

    overall: DownstreamValues
    """Of all evaluated images."""
    by_label: dict[str, DownstreamValues]
    """Of the images of each label, by name; only labels with evaluated images."""
    ablation: Ablation
    """What replaces the tokens for comparison."""
    pooling: str
    """What the embedding is; see `cytosae.backbones.tail.Pooling`."""
    classes: list[str]
    """Labels that the probe tells apart; empty if there is no probe."""
    n_train: int
    """Images that the probe was trained on; none of them tests it."""
    trained_on_other: Literal["patients", "images"]
    """Whether training and test images are of different patients, or only different images where none are known."""
    penalty: float
    """Strength of the probe's penalty; see `cytosae.analysis.logistic_probe.fit_logistic_probe`."""

    def describe(self) -> str:
        """The result as tables for humans."""
        kind = {"cls": "CLS token after the final norm", "mean": "mean of the patches after the final norm"}
        what = kind.get(self.pooling, "final norm of the mean of the patches")
        rows = {"all": self.overall, **{name or "(no name)": values for name, values in self.by_label.items()}}
        embeddings = [[_shown(name), *_embedding_row(values.embedding)] for name, values in rows.items()]
        header = ("", "images", "cosine", f"{self.ablation}-ablated", "error recovered")
        lines = [f"embedding: {what}", format_table(header, embeddings)]
        if not self.classes:
            return "\n".join(lines)
        lines.append(
            f"probe of {len(self.classes)} labels, trained on {self.n_train:,} images, tested on other "
            f"{self.trained_on_other}; cross-entropy of original, reconstruction, ablation"
        )
        columns = (
            "",
            "tested",
            "original",
            "reconstr.",
            "ablated",
            "loss recovered",
            "accuracy",
            "reconstr.",
            "agreement",
        )
        tested = [[_shown(name), *_probe_row(values.probe)] for name, values in rows.items() if values.probe]
        return "\n".join([*lines, format_table(columns, tested)])


class _Plan(NamedTuple):
    """Which images train the probe and which test it."""

    classes: list[str]
    """Names of the classes; empty if there is no probe."""
    labels: IntArray
    """Class of each image, -1 for none, shape `(n,)`."""
    trains: npt.NDArray[np.bool_]
    """Whether each image trains the probe, shape `(n,)`."""
    tests: npt.NDArray[np.bool_]
    """Whether each image tests it, shape `(n,)`."""
    by_patient: bool
    """Whether patients are known."""


@dataclass(frozen=True)
class Embedder:
    """Embeddings of a store's images from original, reconstructed and ablated activations.

    Args:
        sae: The autoencoder, with its decoder.
        tail: The rest of the encoder, on the autoencoder's device.
        store: The store.
        tokens: Which tokens are replaced: `all`, `patches` or `cls`; others stay as they are.
        ablation: What replaces them in the ablation.
    """

    sae: Sae
    tail: Tail
    store: ActivationStore
    tokens: str
    ablation: Ablation

    @torch.no_grad()
    def embed(self, activations: npt.NDArray[np.floating], matmul: MatmulConfig) -> Embeddings:
        """Embeddings of images.

        Args:
            activations: Shape `(n, T, D)`.
            matmul: How products are computed, of type float32.
        """
        x = torch.from_numpy(activations).to(self.sae.b_enc.device).float()
        chosen = choose_tokens(x, self.tokens, self.store.spec.tokens)
        flat = chosen.flatten(0, 1)
        parts = [
            reconstruct(self.sae, flat[part], matmul)[1]
            for part in iter_parts(len(flat), matmul.n_tokens(len(self.sae.b_enc)))
        ]
        again = self._replace(x, torch.cat(parts).view_as(chosen))
        mean = self._mean.to(x) if self.ablation == "mean" else torch.zeros_like(x[0, 0])
        ablated = self._replace(x, mean.expand_as(chosen))
        # Where nothing is left of the images, one pass is enough for all.
        is_same = chosen.shape == x.shape
        of_ablated = self.tail(ablated[:1]).expand(len(x), -1) if is_same else self.tail(ablated)
        return Embeddings(self.tail(x), self.tail(again), of_ablated)

    @property
    def _mean(self) -> torch.Tensor:
        """Mean of all tokens of the store's readable images, shape `(D,)`."""
        moments = self.store.moments
        return torch.from_numpy(moments.sum.sum(axis=0) / max(1, int(moments.count.sum()))).float()

    def _replace(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """A copy of the activations with other values of the chosen tokens."""
        copy = x.clone()
        choose_tokens(copy, self.tokens, self.store.spec.tokens)[:] = chosen
        return copy


def measure_downstream(inputs: Inputs, options: EvaluateOptions, rows: IntArray, tokens: str) -> Downstream:
    """Measure embeddings and a probe of the labels on some images; memory does not grow with their number.

    Half of the labelled images train the probe on their original embeddings, the others test it; all images of a
    patient are on one side. The embeddings themselves are compared on all images.

    Args:
        inputs: Autoencoder, with its decoder, and store.
        options: What to measure.
        rows: Readable rows of the store, increasing, shape `(n,)`.
        tokens: Tokens that are replaced: `all`, `patches` or `cls`.

    Raises:
        TailNotFoundError: If the store has no tail; the message says what to type.
        StoreError: If the tail is damaged or of another store.
    """
    store, device = inputs.store, inputs.sae.b_enc.device
    choice = options if isinstance(options, StorePlace) else None
    tail = open_tail(find_tail(store), choice, device=device)
    embedder = Embedder(inputs.sae, tail, store, tokens, options.ablation)
    names, numbers = LabelIndex.of(store.images.label)
    plan = _make_plan(store, rows, numbers[rows], names)
    found, probe = DownstreamStatistics(len(names), device=device if device.type != "mps" else "cpu"), None
    groups, labels = torch.from_numpy(numbers[rows].astype(np.int64)), torch.from_numpy(plan.labels)
    with Progress("downstream", len(rows), "images") as bar:
        features: list[torch.Tensor] = []
        first = np.flatnonzero(~plan.tests)
        for at, embeddings in _iter_embeddings(embedder, rows, first, options, bar.advance):
            found.update(embeddings, groups[at])
            features.append(embeddings.original[torch.from_numpy(plan.trains[at])].cpu())
        if plan.classes:
            train = torch.from_numpy(np.flatnonzero(plan.trains))
            probe = fit_logistic_probe(torch.cat(features), labels[train], len(plan.classes))
        _test(embedder, rows, plan, probe, found, groups, labels, options, bar.advance)
    return _conclude(found, names, plan, options.ablation, tail.info.pooling)


def _test(
    embedder: Embedder,
    rows: IntArray,
    plan: _Plan,
    probe: Probe | None,
    found: DownstreamStatistics,
    groups: torch.Tensor,
    labels: torch.Tensor,
    options: EvaluateOptions,
    advance: Callable[[int], None],
) -> None:
    """Add the test images."""
    for at, embeddings in _iter_embeddings(embedder, rows, np.flatnonzero(plan.tests), options, advance):
        found.update(embeddings, groups[at])
        if probe is not None:
            found.update_probe(embeddings, groups[at], probe, labels[at])


def _conclude(
    found: DownstreamStatistics, names: Sequence[str], plan: _Plan, ablation: Ablation, pooling: str
) -> Downstream:
    """The result from the sums."""
    overall = found.embedding()
    assert overall is not None, "there are images"
    by_label = {
        name: DownstreamValues(values, found.probe(at))
        for at, name in enumerate(names)
        if (values := found.embedding(at)) is not None
    }
    n_train = int(plan.trains.sum())
    other: Literal["patients", "images"] = "patients" if plan.by_patient else "images"
    return Downstream(
        DownstreamValues(overall, found.probe()), by_label, ablation, pooling, plan.classes, n_train, other, PENALTY
    )


def _make_plan(store: ActivationStore, rows: IntArray, labels: IntArray, names: Sequence[str]) -> _Plan:
    """Choose the images that train the probe and those that test it, and leave out classes with too few."""
    labelled = labels >= 0
    in_training = np.zeros(len(rows), dtype=bool)
    if labelled.any():
        companions = find_companions(store, rows[labelled])
        in_training[labelled] = split_in_halves(companions, labels[labelled], seed=0)
    n_train = np.bincount(labels[in_training], minlength=len(names))
    n_test = np.bincount(labels[labelled & ~in_training], minlength=len(names))
    enough = (n_train >= _LEAST_TRAINING) & (n_test >= 1)
    left_out = [name for name, fits, n in zip(names, enough, n_train + n_test, strict=True) if n and not fits]
    why = f"fewer than {_LEAST_TRAINING} training images or no test image"
    if enough.sum() < 2:
        logger.warning(
            "no probe is trained: it needs two labels of which some images train it and others, of other patients, "
            f"test it, but {join_few([quote(name) for name in left_out], 8) or 'no image'} "
            f"{'have ' + why if left_out else 'has a label'}"
        )
        enough[:] = False
    elif left_out:
        logger.info(f"left out of the probe, with {why}: {join_few([quote(name) for name in left_out], 8)}")
    classes = np.where(enough, np.cumsum(enough) - 1, -1) if len(names) else np.zeros(0, dtype=np.int64)
    used = np.full(len(rows), -1, dtype=np.int64)
    used[labelled] = classes[labels[labelled]]
    train = np.flatnonzero(in_training & (used >= 0))
    trains = np.zeros(len(rows), dtype=bool)
    trains[train[spread_rows(len(train), MOST_TRAINING)]] = True
    tests = ~in_training & (used >= 0)
    kept = [name for name, fits in zip(names, enough, strict=True) if fits]
    return _Plan(kept, used, trains, tests, any(store.images.patient))


def _iter_embeddings(
    embedder: Embedder, rows: IntArray, places: IntArray, options: EvaluateOptions, advance: Callable[[int], None]
) -> Iterator[tuple[IntArray, Embeddings]]:
    """Places among the rows, shape `(n,)`, and the embeddings of their images, a few at a time."""
    store = embedder.store
    matmul = fp32_matmul(embedder.sae.b_enc.device)
    direct = exceeds_page_cache(store.n_images * store.spec.record_bytes)
    with store.open_reader(verify=not options.no_verify, direct=direct) as reader:
        for start in range(0, len(places), _IMAGES_AT_ONCE):
            at = places[start : start + _IMAGES_AT_ONCE]
            yield at, embedder.embed(reader.read(rows[at]), matmul)
            advance(len(at))


def _shown(name: str) -> str:
    """A label as it may stand in a terminal."""
    text = "".join(c if c.isprintable() else "?" for c in name)
    return text if len(text) <= _WIDTH else text[: _WIDTH - 1] + "…"


def _embedding_row(values: EmbeddingValues) -> list[str]:
    cosines = f"{values.cosine:.4f}", f"{values.cosine_ablated:.4f}"
    return [f"{values.n_images:,}", *cosines, _share(values.error_recovered)]


def _probe_row(values: ProbeValues) -> list[str]:
    losses = values.cross_entropy, values.cross_entropy_reconstructed, values.cross_entropy_ablated
    shares = values.accuracy, values.accuracy_reconstructed, values.agreement
    return [
        f"{values.n_images:,}", *(f"{loss:.4f}" for loss in losses), _share(values.loss_recovered),
        *(f"{share:.1%}" for share in shares),
    ]  # fmt: skip


def _share(value: float | None) -> str:
    """A share of 1, or a dash where there is none."""
    return "-" if value is None else f"{value:.4f}"
