"""Feature data as the reference writes them: float32 indices, NaN means, and row 0 in empty slots."""

from pathlib import Path

import numpy as np
import torch

from cytosae_pipeline.statistics.features import Features


def publish(found: Features, folder: Path) -> None:
    """Write feature data of ours as the reference would have written them."""
    folder.mkdir(parents=True, exist_ok=True)
    empty, dead = found.top_rows < 0, found.sparsity == 0
    row_labels = dict(zip(found.top_rows.ravel().tolist(), found.top_labels.ravel().tolist(), strict=True))
    tensors = {
        "max_activating_image_indices": np.where(empty, 0, found.top_rows).astype(np.float32),
        "max_activating_image_label_indices": np.where(empty, row_labels.get(0, 0), found.top_labels),
        "max_activating_image_values": found.top_values,
        "sae_mean_acts": np.where(dead, np.nan, found.mean_acts).astype(np.float32),
        "sae_sparsity": found.sparsity,
    }
    for name, array in tensors.items():
        torch.save(torch.from_numpy(array), folder / f"{name}.pt")
