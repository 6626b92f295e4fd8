"""`features`: top-k maximally activating images, mean activations and sparsity of every latent."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cytosae.statistics.accumulators import FeatureResult, FeatureStatistics
from cytosae_cache.storage.atomic import write_file
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.config import StatisticsConfig
from cytosae_pipeline.runtime.devices import accumulator_device
from cytosae_pipeline.statistics.encode import open_inputs, run_pass, withdraw_record, write_record
from cytosae_pipeline.workspace.files import write_torch


@dataclass(frozen=True)
class FeaturesResult:
    """What `features` did."""

    folder: Path
    """Where the files lie."""
    files: list[Path]
    """The files."""
    n_images: int
    """Images counted."""
    n_latents: int
    """Latents S."""
    n_active: int
    """Latents that were active on at least one image."""


def compute_features(config: StatisticsConfig) -> FeaturesResult:
    """Compute and write the feature data of docs/definitions.md, section 6.

    Raises:
        ValueError: If the autoencoder or store is missing or they do not fit.
    """
    inputs = open_inputs(config)
    store, device = inputs.store, accumulator_device(inputs.sae.W_enc.device)
    statistics = FeatureStatistics(inputs.sae.W_enc.shape[1], config.top_k, device=device)
    run_pass(inputs, config, (), lambda rows, images: statistics.update(rows, images.scores), what="features")
    result = statistics.result()
    withdraw_record(inputs, "features")
    files = write_features(inputs.folder, result, store)
    files.append(write_record(inputs, config, "features", top_k=config.top_k, n_images=statistics.n_images))
    n_active = int((result.sparsity > 0).sum())
    return FeaturesResult(inputs.folder, files, statistics.n_images, len(result.sparsity), n_active)


def label_index(names: list[str], labels: list[str]) -> torch.Tensor:
    """Index of each image's label among the sorted names, int64, shape `(n,)`; -1 where it has none."""
    index = {name: number for number, name in enumerate(names)}
    return torch.tensor([index.get(label, -1) for label in labels], dtype=torch.int64)


def sorted_names(values: list[str]) -> list[str]:
    """The different names among the values, sorted; '' is none."""
    return sorted({value for value in values if value})


def write_features(folder: Path, result: FeatureResult, store: ActivationStore) -> list[Path]:
    """Write the files that README lists.

    Returns:
        Their paths.
    """
    names = sorted_names(list(store.images.label))
    labels = label_index(names, list(store.images.label))
    filled = result.indices >= 0
    label_indices = torch.where(filled, labels[result.indices.clamp(min=0)], -1)
    tensors = {
        "max_activating_image_indices": result.indices,
        "max_activating_image_label_indices": label_indices,
        "max_activating_image_values": result.values,
        "sae_mean_acts": result.mean_acts,
        "sae_sparsity": result.sparsity,
    }
    files = []
    for name, tensor in tensors.items():
        files.append(folder / f"{name}.pt")
        write_torch(files[-1], tensor.contiguous().clone())
    files += [folder / "images.csv", folder / "labels.txt"]
    write_file(files[-2], _images_csv(store))
    write_file(files[-1], "".join(f"{name}\n" for name in names).encode())
    return files


def _images_csv(store: ActivationStore) -> bytes:
    """Row by row: path, label, patient, and whether the image could be read."""
    rows = zip(*store.images, store.valid, strict=True)
    lines = [[row, *names, int(valid)] for row, (*names, valid) in enumerate(rows)]
    return to_csv(["row", "path", "label", "patient", "valid"], lines)


def to_csv(header: Sequence[str], lines: Sequence[Sequence[object]]) -> bytes:
    """A table as the bytes of a CSV that every reader splits at the same places.

    Args:
        header: Names of the columns.
        lines: Cells.
    """
    text = io.StringIO()
    # Before Python 3.13 a lone carriage return is not quoted under this line end, and is read as another.
    lone = any(isinstance(cell, str) and "\r" in cell for line in lines for cell in line)
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL if lone else csv.QUOTE_MINIMAL)
    writer.writerow(header)
    writer.writerows(lines)
    return text.getvalue().encode()
