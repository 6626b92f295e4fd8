"""Feature data: top-k maximally activating images, mean activation and sparsity of every latent."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cytosae.analysis.latents import best_latents, label_entropy
from cytosae.analysis.specificity import first_latents
from cytosae.pickles import load_torch
from cytosae.statistics.accumulators import Accumulator, FeatureStatistics
from cytosae.statistics.block_encoder import PooledActs
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.config import StatisticsOptions
from cytosae_pipeline.errors import say_count
from cytosae_pipeline.images.image_list import join_lines
from cytosae_pipeline.runtime.devices import accumulator_device
from cytosae_pipeline.statistics.inputs import Inputs
from cytosae_pipeline.statistics.label_index import sorted_names
from cytosae_pipeline.statistics.records import (
    UnusableResultsError,
    all_within,
    make_record,
    read_record,
    read_result,
    replacing_results,
    require_ours,
    require_unchanged,
)
from cytosae_pipeline.statistics.specificity import FILE_NAME as SPECIFICITY
from cytosae_pipeline.statistics.specificity import (
    MAX_LABELS,
    Specificity,
    SpecificityAccumulator,
    read_specificity,
    save_specificity,
)
from cytosae_pipeline.workspace.csv_files import write_csv
from cytosae_pipeline.workspace.files import save_torch

VERB = "features"

TENSORS = {
    "top_rows": ("max_activating_image_indices", torch.int64),
    "top_labels": ("max_activating_image_label_indices", torch.int64),
    "top_values": ("max_activating_image_values", torch.float32),
    "mean_acts": ("sae_mean_acts", torch.float32),
    "sparsity": ("sae_sparsity", torch.float32),
}
"""Field of `Features`, stem of its file, and its type."""

FILES: tuple[str, ...] = (*(f"{stem}.pt" for stem, _ in TENSORS.values()), "images.csv", "labels.txt")
"""Files of the feature data beside its record."""

ENTROPY = "top_entropy.pt"
"""Label entropy of every latent, float32, which the reference's notebooks read; here it is computed from the rest."""


@dataclass(frozen=True, eq=False)
class Features:
    """Feature data of one autoencoder on one store (docs/definitions.md, section 6)."""

    top_rows: npt.NDArray[np.int64]
    """Rows of the top-k images, shape `(S, k)`; -1 in empty slots."""
    top_labels: npt.NDArray[np.int64]
    """Positions of their labels in `labels`, shape `(S, k)`; -1 in empty slots and for images without a label."""
    top_values: npt.NDArray[np.float32]
    """Their scores, falling, shape `(S, k)`; 0 in empty slots."""
    mean_acts: npt.NDArray[np.float32]
    """Mean score over the images where the latent is active, shape `(S,)`."""
    sparsity: npt.NDArray[np.float32]
    """Share of images where the latent is active, shape `(S,)`; 0 for dead latents."""
    labels: tuple[str, ...]
    """Names of the labels, sorted."""
    record: dict[str, Any]
    """What they were made from: the contents of features.json."""
    specificity: Specificity | None = field(default=None, kw_only=True)
    """Activity per label, and position shares; None in results of another program or an older version, and for more
    than `MAX_LABELS` labels."""

    @property
    def n_active(self) -> int:
        """Latents that are active on at least one image."""
        return int((self.sparsity > 0).sum())

    @property
    def label_entropy(self) -> npt.NDArray[np.float64]:
        """Entropy of the labels of each latent's top images, in nats, shape `(S,)`; -1 where it is not defined."""
        return label_entropy(self.top_values, self.top_labels, len(self.labels))

    def first_latents(self, n: int, allowed: npt.NDArray[np.bool_] | None = None) -> npt.NDArray[np.int64]:
        """The latents to look at first (docs/definitions.md, section 10), shape `(at most n,)`.

        Without specificity, those of the lowest label entropy come first, then those of the largest mean activation.

        Args:
            n: How many at most.
            allowed: Which may be chosen, shape `(S,)`; all that are active by default.
        """
        sparsity = self.sparsity if allowed is None else np.where(allowed, self.sparsity, 0)
        entropy, found = self.label_entropy, self.specificity
        if found is None:
            return best_latents(sparsity, self.mean_acts, entropy, n)
        return first_latents(
            sparsity, self.mean_acts, entropy, lift=found.lift, position_share=found.position_share, n=n
        )


class FeaturesAccumulator:
    """Collects feature data during a pass of the encoder.

    Args:
        inputs: Autoencoder and store.
        config: Options of `features`.
    """

    def __init__(self, inputs: Inputs, config: StatisticsOptions) -> None:
        self._inputs, self._config = inputs, config
        device = accumulator_device(inputs.sae.W_enc.device)
        self._statistics = FeatureStatistics(inputs.n_latents, config.top_k, device=device)
        self.specificity = SpecificityAccumulator(inputs) if _has_specificity(inputs) else None
        """Collects specificity in the same pass; it needs the activations of its `wanted` images, too."""

    def update(self, rows: torch.Tensor, pooled: PooledActs) -> None:
        """Count images."""
        self._statistics.update(rows, pooled.scores)
        if self.specificity is not None:
            self.specificity.update(rows, pooled)

    @property
    def state(self) -> list[Accumulator]:
        """What was collected so far."""
        return [self._statistics, *(self.specificity.state if self.specificity is not None else [])]

    def result(self) -> Features:
        """The feature data of all images counted."""
        found = self._statistics.result()
        labels = self._inputs.labels
        numbers = torch.from_numpy(labels.numbers)
        top_labels = torch.where(found.indices >= 0, numbers[found.indices.clamp(min=0)], -1)
        specificity = self.specificity.result() if self.specificity is not None else None
        record = features_record(self._inputs, self._config)
        assert record["n_images"] == self._statistics.n_images
        return Features(
            found.indices.numpy(),
            top_labels.numpy(),
            found.values.numpy(),
            found.mean_acts.numpy(),
            found.sparsity.numpy(),
            labels.names,
            record,
            specificity=specificity,
        )


def features_record(inputs: Inputs, config: StatisticsOptions) -> dict[str, Any]:
    """What feature data are made from, and with which options: the contents of features.json."""
    about = {"top_k": config.top_k, "n_images": len(inputs.store.valid_rows), "specificity": _has_specificity(inputs)}
    return make_record(inputs, config, VERB, **about)


def _has_specificity(inputs: Inputs) -> bool:
    """Whether there are few enough labels."""
    return len(inputs.labels.names) <= MAX_LABELS


def require_own_features(folder: Path, record: Mapping[str, Any], *, replace_foreign: bool) -> None:
    """Refuse to replace feature data of another program or activation function, see `require_ours`.

    Raises:
        UserError: If there are such files.
    """
    require_ours(folder, (*FILES, ENTROPY, SPECIFICITY), record, replace_foreign=replace_foreign)


def save_features(
    folder: Path, features: Features, store: ActivationStore, *, replace_foreign: bool = False
) -> list[Path]:
    """Write feature data under the names of the reference; until all files are complete, older ones stay.

    Args:
        folder: Where the files go.
        features: The feature data.
        store: The store that they are of.
        replace_foreign: Replace files of another program, too.

    Returns:
        The files' paths.

    Raises:
        UserError: If a file exists that another program wrote.
    """
    require_own_features(folder, features.record, replace_foreign=replace_foreign)
    names = [*FILES, ENTROPY, *([SPECIFICITY] if features.specificity is not None else [])]
    with replacing_results(folder, names, features.record) as places:
        for name, (stem, _) in TENSORS.items():
            save_torch(places[f"{stem}.pt"], torch.from_numpy(getattr(features, name)).contiguous().clone())
        save_torch(places[ENTROPY], torch.from_numpy(features.label_entropy.astype(np.float32)))
        _write_images(places["images.csv"], store)
        # One line per label: a store made from elsewhere may have names of several lines.
        places["labels.txt"].write_bytes("".join(f"{join_lines(name)}\n" for name in features.labels).encode())
        if features.specificity is not None:
            save_specificity(places[SPECIFICITY], features.specificity)
    return [folder / name for name in (*names, f"{VERB}.json")]


def read_features(folder: Path) -> Features:
    """Feature data that was saved in a folder; shapes, types and ranges are checked.

    Raises:
        UnusableResultsError: If something is missing, cannot be read or does not fit the rest.
    """
    record = read_record(folder, VERB)
    arrays = {name: _read_tensor(folder / f"{stem}.pt", dtype) for name, (stem, dtype) in TENSORS.items()}
    n_rows, labels = _read_labels(folder / "images.csv")
    n_latents = len(arrays["sparsity"])
    found = Features(**arrays, labels=labels, record=record, specificity=None)
    shapes = [(len(array), array.ndim) for array in arrays.values()]
    problem = None
    if (
        shapes != [(n_latents, 2)] * 3 + [(n_latents, 1)] * 2
        or len({array.shape for array in list(arrays.values())[:3]}) != 1
    ):
        problem = f"shapes do not fit together: {', '.join(str(array.shape) for array in arrays.values())}"
    elif not all_within(found.top_rows, -1, n_rows - 1) or not all_within(found.top_labels, -1, len(labels) - 1):
        problem = (
            f"indices lie outside the {say_count(n_rows, 'image')} or {say_count(len(labels), 'label')} of images.csv"
        )
    elif not all(all_within(array, 0, np.inf) for array in (found.top_values, found.mean_acts)):
        problem = "scores must be finite and at least 0"
    elif not all_within(found.sparsity, 0, 1):
        problem = "shares of images must lie between 0 and 1"
    if problem:
        raise UnusableResultsError(f"the files of `features` in '{folder}': {problem}", VERB)
    # The record says whether the file belongs to these results: an older version leaves that of a newer one behind.
    if record.get("specificity"):
        found = replace(found, specificity=read_specificity(folder, n_latents, len(labels), VERB))
    require_unchanged(folder, VERB, (*FILES, ENTROPY, SPECIFICITY))
    return found


def _write_images(path: Path, store: ActivationStore) -> None:
    """Write images.csv, row by row: path, label, patient, and whether the image could be read."""
    rows = zip(*store.images, store.valid, strict=True)
    lines = ([row, *names, int(valid)] for row, (*names, valid) in enumerate(rows))
    write_csv(path, ["row", "path", "label", "patient", "valid"], lines)


def _read_tensor(path: Path, dtype: torch.dtype) -> npt.NDArray[Any]:
    """A tensor's file as an array."""
    value = read_result(path, load_torch, VERB)
    if not isinstance(value, torch.Tensor) or value.dtype != dtype or value.layout != torch.strided:
        found = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        raise UnusableResultsError(f"'{path}' must contain a tensor of {dtype}, found {found}", VERB)
    return value.detach().numpy()


def _read_labels(path: Path) -> tuple[int, tuple[str, ...]]:
    """Rows of images.csv and names of the labels; unlike labels.txt it can contain names of several lines."""

    def load(path: Path) -> tuple[int, tuple[str, ...]]:
        with path.open(newline="", encoding="utf-8") as file:
            n_rows, labels = 0, set()
            for row in csv.DictReader(file, strict=True):
                n_rows += 1
                labels.add(row["label"])
        return n_rows, sorted_names(labels)

    return read_result(path, load, VERB)
