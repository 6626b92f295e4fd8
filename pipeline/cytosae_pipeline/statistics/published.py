"""Feature data that the reference wrote: read as ours where they differ, without a store or an autoencoder."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cytosae.pickles import load_torch
from cytosae_pipeline.config import StatisticsConfig
from cytosae_pipeline.errors import UserError, say_count
from cytosae_pipeline.statistics.features import TENSORS, VERB, Features
from cytosae_pipeline.statistics.records import all_within, has_record, read_result
from cytosae_pipeline.workspace.paths import Workspace

LABEL_NAMES = "labels.txt"
"""File beside the tensors that names the labels, one per line; the reference's own is configs/classnames/<dataset>."""

_OPTIONAL = "top_labels"
"""The reference leaves these out where images have no labels."""

_EXACT_FLOAT32 = 1 << 24
_MOST_LABELS = 4096


def find_published(config: StatisticsConfig) -> Path | None:
    """The folder of a verb's results, if another program's feature data lie there.

    Args:
        config: Names autoencoder, data set and `vit_type`; the autoencoder's file need not exist.
    """
    if config.sae_path is None or config.dataset_name is None or config.with_dataset or config.replace_foreign:
        return None
    folder = Workspace(config.root_dir).feature_dir(config.sae_path, config.vit_type, config.dataset_name)
    needed = (stem for name, (stem, _) in TENSORS.items() if name != _OPTIONAL)
    if has_record(folder, VERB) or not all((folder / f"{stem}.pt").is_file() for stem in needed):
        return None
    return folder


def read_published(folder: Path) -> Features:
    """Feature data as the reference writes them.

    Indices may be floating-point numbers. A latent's empty slots contain the value 0 and an index of 0, which stands
    for no image: here it becomes -1. The mean activation of latents that are never active is NaN: here it becomes 0.
    Rows are those of the reference's shuffled list of images, not those of a store.

    Args:
        folder: Where the files are, with `labels.txt` if the names of the labels are known.

    Returns:
        The feature data, with an empty record.

    Raises:
        UserError: If something is missing, cannot be read or does not fit the rest.
    """
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name, (stem, dtype) in TENSORS.items():
        path = folder / f"{stem}.pt"
        if path.is_file() or name != _OPTIONAL:
            arrays[name] = _read_tensor(path).astype(torch.empty(0, dtype=dtype).numpy().dtype)
    arrays.setdefault(_OPTIONAL, np.full(arrays["top_values"].shape, -1, dtype=np.int64))
    problem = _find_misfit(arrays)
    if not problem:
        empty, dead = arrays["top_values"] == 0, arrays["sparsity"] == 0
        arrays["top_rows"] = np.where(empty, -1, arrays["top_rows"])
        arrays[_OPTIONAL] = np.where(empty, -1, arrays[_OPTIONAL])
        arrays["mean_acts"] = np.where(dead, 0, arrays["mean_acts"]).astype(np.float32)
        problem = _find_outlier(arrays)
    if problem:
        raise UserError(f"the feature data in '{folder}' are not those of CytoSAE: {problem}")
    labels = _read_labels(folder, int(arrays[_OPTIONAL].max(initial=-1)) + 1)
    return Features(**arrays, labels=labels, record={}, specificity=None)


def _find_misfit(arrays: dict[str, npt.NDArray[Any]]) -> str:
    """What is wrong with the shapes; '' if nothing is."""
    n_latents, k = arrays["top_values"].shape if arrays["top_values"].ndim == 2 else (-1, -1)
    wanted = {"mean_acts": (n_latents,), "sparsity": (n_latents,)}
    if n_latents > 0 and all(array.shape == wanted.get(name, (n_latents, k)) for name, array in arrays.items()):
        return ""
    return "the shapes do not fit together: " + ", ".join(f"{name} {array.shape}" for name, array in arrays.items())


def _find_outlier(arrays: dict[str, npt.NDArray[Any]]) -> str:
    """Which numbers contradict the definitions; '' if none do."""
    indices, labels, sparsity = arrays["top_rows"], arrays[_OPTIONAL], arrays["sparsity"]
    if not all(all_within(array, 0, np.inf) for array in (arrays["top_values"], arrays["mean_acts"])):
        return "scores must be finite and at least 0"
    if not all_within(sparsity, 0, 1):
        return "shares of images must lie between 0 and 1"
    if indices.min(initial=0) < -1 or not all_within(labels, -1, _MOST_LABELS - 1):
        return f"indices of images must be at least 0, and those of labels lie between 0 and {_MOST_LABELS - 1}"
    if indices.max(initial=0) >= _EXACT_FLOAT32:
        return f"rows from {_EXACT_FLOAT32:,} on are not exact, as they are stored as float32"
    return ""


def _read_tensor(path: Path) -> npt.NDArray[Any]:
    """A tensor of numbers as an array."""
    value = read_result(path, load_torch, VERB)
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_complex():
        raise UserError(f"'{path}' must contain a tensor of numbers, found {type(value).__name__}")
    array = value.detach().to(torch.float64).numpy()
    if "indices" in path.name and not (np.isfinite(array) & (array == np.rint(array))).all():
        raise UserError(f"'{path}' must contain whole numbers, found others")
    return array


def _read_labels(folder: Path, n_labels: int) -> tuple[str, ...]:
    """Names of the labels from the file beside the tensors; numbered if there is none."""
    path = folder / LABEL_NAMES
    if not path.is_file():
        return tuple(f"label {number}" for number in range(n_labels))
    names = tuple(line.strip() for line in read_result(path, lambda path: path.read_text("utf-8"), VERB).splitlines())
    if len(names) < n_labels:
        raise UserError(
            f"'{path}' names {say_count(len(names), 'label')}, but the feature data refer to {n_labels}: add the others"
        )
    return names
