"""Specificity of latents to labels, and their dependence on position, collected in the pass of `features`."""

import logging
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cytosae.analysis.specificity import label_lift
from cytosae.pickles import load_torch
from cytosae.statistics.accumulators import Accumulator
from cytosae.statistics.block_encoder import PooledActs
from cytosae.statistics.label_activity import LabelActivity
from cytosae.statistics.position import PositionMaps
from cytosae_cache.reading.permutation import spread_rows
from cytosae_pipeline.runtime.devices import accumulator_device
from cytosae_pipeline.statistics.inputs import Inputs
from cytosae_pipeline.statistics.records import UnusableResultsError, all_within, read_result
from cytosae_pipeline.workspace.files import save_torch

logger = logging.getLogger(__name__)

FILE_NAME = "sae_specificity.pt"

POSITION_IMAGES = 1000
"""Most images, spread evenly over the store, from which position shares are computed."""

MAX_LABELS = 256
"""Most labels for which activity is counted."""

_MAP_BYTES = 1 << 29
"""Most memory for the maps of all latents; beyond it, position shares are not computed."""


@dataclass(frozen=True, eq=False)
class Specificity:
    """What docs/definitions.md, section 10 is computed from: activity per label, and position shares."""

    label_images: npt.NDArray[np.int64]
    """Readable images of each label, shape `(L,)`."""
    label_active: npt.NDArray[np.int64]
    """Those of them on which the latent is active, shape `(S, L)`."""
    label_means: npt.NDArray[np.float32]
    """Mean score over the readable images of each label, shape `(S, L)`."""
    position_share: npt.NDArray[np.float32]
    """Position share of each latent, shape `(S,)`; -1 where it is not defined."""

    @property
    def lift(self) -> npt.NDArray[np.float64]:
        """Lift of each latent for each label, shape `(S, L)`."""
        return label_lift(self.label_active, self.label_images)


class SpecificityAccumulator:
    """Collects specificity during a pass of the encoder.

    Args:
        inputs: Autoencoder and store; the store has at most `MAX_LABELS` labels.
    """

    def __init__(self, inputs: Inputs) -> None:
        store = inputs.store
        labels = inputs.labels
        device = accumulator_device(inputs.sae.W_enc.device)
        self._labels = torch.from_numpy(labels.numbers)
        self._activity = LabelActivity(inputs.n_latents, len(labels.names), device=device)
        self._n_prefix = store.spec.tokens.n_cls + store.spec.tokens.n_registers
        n_patches = math.prod(store.spec.tokens.grid)
        if 8 * n_patches * inputs.n_latents > _MAP_BYTES:
            logger.info(f"position shares are not computed: {n_patches:,} patches x {inputs.n_latents:,} latents")
            n_patches = 0
        self._n_patches = n_patches
        self._maps = PositionMaps(inputs.n_latents, n_patches, device=device)
        self.wanted = torch.zeros(store.n_images, dtype=torch.bool)
        """Images whose activations `add` takes, shape `(n_images,)`."""
        if n_patches:
            self.wanted[torch.from_numpy(store.valid_rows[spread_rows(len(store.valid_rows), POSITION_IMAGES)])] = True

    def update(self, rows: torch.Tensor, pooled: PooledActs) -> None:
        """Count images."""
        self._activity.update(self._labels[rows], pooled.scores)

    def add(self, rows: torch.Tensor, latents: slice, acts: torch.Tensor) -> None:
        """Add activations of some of the latents on wanted images, float32, shape `(n, T, m)`."""
        self._maps.add(acts[:, self._n_prefix : self._n_prefix + self._n_patches], latents)

    @property
    def state(self) -> list[Accumulator]:
        """What was collected so far."""
        return [self._activity, self._maps]

    def result(self) -> Specificity:
        """The specificity over all images counted."""
        n_images, n_active, means = self._activity.result()
        return Specificity(n_images.numpy(), n_active.numpy(), means.numpy(), self._maps.result().numpy())


def save_specificity(path: Path, specificity: Specificity) -> None:
    """Write the file. A plain write: not atomic."""
    arrays = {field.name: getattr(specificity, field.name) for field in fields(specificity)}
    save_torch(path, {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()})


def read_specificity(folder: Path, n_latents: int, n_labels: int, verb: str) -> Specificity:
    """Specificity that was saved in a folder; shapes, types and ranges are checked.

    Raises:
        UnusableResultsError: If the file cannot be read or does not fit.
    """
    path = folder / FILE_NAME
    value = read_result(path, load_torch, verb)
    wanted: dict[str, tuple[Any, tuple[int, ...], float]] = {
        "label_images": (torch.int64, (n_labels,), 0),
        "label_active": (torch.int64, (n_latents, n_labels), 0),
        "label_means": (torch.float32, (n_latents, n_labels), 0),
        "position_share": (torch.float32, (n_latents,), -1),
    }
    arrays = {}
    for name, (dtype, shape, low) in wanted.items():
        tensor = value.get(name) if isinstance(value, dict) else None
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != dtype or tuple(tensor.shape) != shape:
            found = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else "something else"
            raise UnusableResultsError(f"'{path}' must contain {name}, {dtype} of shape {shape}, found {found}", verb)
        if tensor.layout != torch.strided or not all_within(tensor.numpy(), low, np.inf):
            raise UnusableResultsError(f"'{path}': {name} must be finite and at least {low}", verb)
        arrays[name] = tensor.numpy()
    return Specificity(**arrays)
