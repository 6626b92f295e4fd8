"""Decoded images to activations: one batch through the network, in the type that a store keeps."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cytosae.backbones.backbone import Backbone
from cytosae.backbones.images import to_tensor
from cytosae_cache.format.spec import StoreSpec
from cytosae_pipeline.images.decoding import Decoded
from cytosae_pipeline.runtime.devices import autocast

if TYPE_CHECKING:
    import numpy.typing as npt

_TORCH_SINGLE_THREADED = 32_768
"""Elements up to which torch stays in the calling thread."""


def compute_activations(
    backbone: Backbone, batch: Sequence[Decoded], spec: StoreSpec, device: torch.device
) -> "list[npt.NDArray[Any]]":
    """Activations of a batch at every block that the backbone was loaded for, from one pass.

    Unreadable images keep their slot in the batch as black pictures, so that the numbers of other images do not depend
    on them.

    Args:
        backbone: The network.
        batch: Images, decoded to the size that it takes.
        spec: Spec of one of the stores; they differ in nothing but the block.
        device: Device of the network.

    Returns:
        One array per block in the spec's dtype, shape `(n, T, D)`; NaN for unreadable images.
    """
    info = backbone.info
    size = info.image_size
    pixels = np.zeros((len(batch), size, size, 3), dtype=np.uint8)
    for slot, image in enumerate(batch):
        if image.pixels is not None:
            pixels[slot] = image.pixels
    with torch.inference_mode(), autocast(spec.precision, device):
        tensor = to_tensor(pixels, mean=info.image_mean, std=info.image_std, scale=info.image_scale, device=device)
        dtype = getattr(torch, spec.value_dtype)
        # CPU-GPU sync point: the copy back waits for the forward pass. Decoding and writing continue in the meantime.
        computed = [tokens.to(dtype).cpu().numpy() for tokens in backbone.compute_blocks(tensor)]
    for slot, image in enumerate(batch):
        if image.reason:
            for tokens in computed:
                tokens[slot] = np.nan
    return computed


def widen_with_torch(out: "npt.NDArray[np.float64]", values: "npt.NDArray[Any]") -> None:
    """Convert float16 to float64 with the processor's own instructions, which numpy does not use.

    Works on slices too small for torch to split among threads, which the network needs.
    """
    step = max(1, _TORCH_SINGLE_THREADED // values.shape[1])
    for start in range(0, len(values), step):
        part = torch.from_numpy(values[start : start + step])
        torch.from_numpy(out[start : start + step]).copy_(part.float())
