"""Evaluation of an autoencoder on images that it was not trained on."""

from dataclasses import asdict, dataclass

import numpy as np
import torch

from cytosae.sae.base import Sae
from cytosae.sae.coo import CooMatrix
from cytosae.training.matmul import MatmulConfig, iter_parts
from cytosae_cache.format.spec import TokenLayout
from cytosae_cache.reading.concat import ConcatReader
from cytosae_cache.reading.permutation import spread_rows
from cytosae_pipeline.training.init import choose_tokens

_IMAGES_AT_ONCE = 32


@dataclass(frozen=True)
class Evaluation:
    """Metrics of held-out images."""

    explained_variance: float
    """`1 - sum ||x - x^||^2 / sum ||x - mean||^2`, with the mean over the evaluated tokens; sums in float64."""
    l0: float
    """Mean number of active latents per token."""
    dead_share: float
    """Share of latents that are active on none of the evaluated tokens."""
    cosine: float
    """Mean cosine similarity between tokens and their reconstructions."""
    n_images: int
    """Evaluated images."""

    def metrics(self) -> dict[str, float]:
        """The same under the names that metric loggers get."""
        return {f"eval/{name}": value for name, value in asdict(self).items()}


@torch.no_grad()
def evaluate(
    sae: Sae,
    images: ConcatReader,
    layout: TokenLayout,
    *,
    products: MatmulConfig,
    choice: str = "all",
    limit: int | None = None,
) -> Evaluation:
    """Evaluate an autoencoder of raw activations, in float32.

    Args:
        sae: The autoencoder, as it is saved.
        images: Held-out images.
        layout: Kinds of their tokens.
        products: How products are computed, of type float32.
        choice: Which tokens.
        limit: Images to evaluate, spread evenly; all by default.
    """
    device, n_latents = sae.b_enc.device, sae.b_enc.shape[0]
    wide = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    rows = spread_rows(len(images), limit or len(images))
    error, squares, cosine = (torch.zeros((), dtype=wide, device=device) for _ in range(3))
    total = torch.zeros(sae.b_dec.shape[0], dtype=wide, device=device)
    n_fired = torch.zeros(n_latents, dtype=torch.int64, device=device)
    n_tokens = 0
    for start in range(0, len(rows), _IMAGES_AT_ONCE):
        chosen = rows[start : start + _IMAGES_AT_ONCE]
        values = np.empty((len(chosen), *images.image_shape), dtype=images.dtype)
        images.read(chosen, values)
        tokens = choose_tokens(torch.from_numpy(values), choice, layout).flatten(0, 1).to(device).float()
        for part in iter_parts(len(tokens), products.n_tokens(n_latents)):
            x = tokens[part]
            acts = sae.encode(x)
            fired = torch.count_nonzero(acts, dim=0)
            n_active, n_tokens = int(fired.sum()), n_tokens + len(x)
            sparse = n_active < products.sparse_below * acts.numel()
            again = CooMatrix.from_dense(acts).matmul(sae.W_dec) + sae.b_dec if sparse else sae.decode(acts)
            n_fired += fired
            error += (x - again).to(wide).square().sum()
            squares += x.to(wide).square().sum()
            total += x.sum(dim=0, dtype=wide)
            cosine += torch.nn.functional.cosine_similarity(x, again, dim=1).sum(dtype=wide)
    variance = squares - total.square().sum() / n_tokens
    return Evaluation(
        explained_variance=float(1 - error / variance.clamp_min(torch.finfo(wide).tiny)),
        l0=float(n_fired.sum()) / n_tokens,
        dead_share=float((n_fired == 0).double().mean()),
        cosine=float(cosine) / n_tokens,
        n_images=len(rows),
    )
