"""Evaluation of an autoencoder on images of stores, such as those that it was not trained on."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import torch

from cytosae.sae.base import Sae
from cytosae.sae.coo import CooMatrix
from cytosae.sae.world import ALONE, World
from cytosae.statistics.fidelity import Fidelity, FidelityStatistics
from cytosae.training.encoder_blocks import EncoderProduct
from cytosae.training.matmul import MatmulConfig, iter_parts
from cytosae_cache.format.spec import TokenLayout
from cytosae_cache.reading.concat import ConcatReader
from cytosae_cache.reading.permutation import spread_rows
from cytosae_pipeline.training.init import choose_tokens

_IMAGES_AT_ONCE = 32
_TOKENS_AT_ONCE = 1024
"""Tokens whose latents are all computed at once: several matrices of them live at the same time."""
_MOST_ON_THE_WAY, _FEWEST_ON_THE_WAY = 512, 4
"""Images of an evaluation during training; that of the end is of all."""
_SHARE_ON_THE_WAY = 0.1
"""Images of all evaluations during training together, as a share of those trained on."""


@dataclass(frozen=True)
class Evaluation:
    """Metrics of images."""

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

    @classmethod
    def of(cls, fidelity: Fidelity, n_images: int) -> "Evaluation":
        """From what was measured on the tokens of some images."""
        values = fidelity._asdict()
        return cls(
            **{name: values[name] for name in ("explained_variance", "l0", "dead_share", "cosine")}, n_images=n_images
        )

    def metrics(self) -> dict[str, float]:
        """The same under the names that metric loggers get."""
        return {f"eval/{name}": value for name, value in asdict(self).items()}


def evaluate(
    sae: Sae,
    images: ConcatReader,
    layout: TokenLayout,
    *,
    matmul: MatmulConfig,
    choice: str = "all",
    limit: int | None = None,
    ranks: World = ALONE,
) -> Evaluation:
    """Evaluate an autoencoder of raw activations, in float32.

    Args:
        sae: The autoencoder, as it is saved.
        images: Held-out images.
        layout: Kinds of their tokens.
        matmul: How products are computed, of type float32.
        choice: Which tokens.
        limit: Images to evaluate, spread evenly; all by default.
        ranks: Processes that evaluate the same autoencoder, each on its part of the images.
    """
    chosen = spread_rows(len(images), limit or len(images))
    found = measure(sae, images, chosen[ranks.share(len(chosen))], layout, matmul=matmul, choice=choice)
    found.gather(ranks)
    return Evaluation.of(found.overall(), len(chosen))


@torch.no_grad()
def measure(
    sae: Sae,
    images: ConcatReader,
    chosen: npt.NDArray[np.int64],
    layout: TokenLayout,
    *,
    matmul: MatmulConfig,
    choice: str = "all",
    groups: npt.NDArray[np.int64] | None = None,
    n_groups: int = 0,
    advance: Callable[[int], None] | None = None,
) -> FidelityStatistics:
    """Measure how well an autoencoder of raw activations reconstructs images, in float32.

    Args:
        sae: The autoencoder, with its decoder.
        images: Images of one or several stores.
        chosen: Which of them, increasing, shape `(n,)`.
        layout: Kinds of their tokens.
        matmul: How products are computed, of type float32.
        choice: Which tokens: `all`, `patches` or `cls`.
        groups: Group of each chosen image, shape `(n,)`, -1 for none; None measures no groups.
        n_groups: Number of groups.
        advance: Called with the number of images that were measured.
    """
    device, n_latents = sae.b_enc.device, sae.b_enc.shape[0]
    found = FidelityStatistics(len(sae.b_dec), n_latents, n_groups, device=device)
    for first in range(0, len(chosen), _IMAGES_AT_ONCE):
        here = chosen[first : first + _IMAGES_AT_ONCE]
        values = np.empty((len(here), *images.image_shape), dtype=images.dtype)
        images.read(here, values)
        tokens = choose_tokens(torch.from_numpy(values), choice, layout)
        for group, members in _split(groups, first, len(here)):
            flat = tokens[members].flatten(0, 1).to(device).float()
            for part in iter_parts(len(flat), matmul.n_tokens(n_latents)):
                found.update(flat[part], *reconstruct(sae, flat[part], matmul), group)
        if advance is not None:
            advance(len(here))
    return found


def reconstruct(sae: Sae, x: torch.Tensor, matmul: MatmulConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """How many tokens each latent is active on, int64, shape `(S,)`, and the reconstruction, as `encode` and `decode`.

    Args:
        sae: The autoencoder, with its decoder.
        x: Tokens, float32, shape `(n, D)`.
        matmul: How products are computed, of type float32.
    """
    bound, active = sae.active_above, None
    if bound is not None and matmul.sparse_below:
        active = EncoderProduct(sae, x - sae.b_dec, matmul).above_if_few(bound, matmul.sparse_below)
    if active is not None:
        return torch.bincount(active.columns, minlength=len(sae.b_enc)), active.matmul(sae.W_dec) + sae.b_dec
    parts = [_reconstruct_densely(sae, x[part], matmul) for part in iter_parts(len(x), _TOKENS_AT_ONCE)]
    n_fired, reconstructions = zip(*parts, strict=True)
    return torch.stack(n_fired).sum(dim=0), torch.cat(reconstructions)


def _reconstruct_densely(sae: Sae, x: torch.Tensor, matmul: MatmulConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, by computing all latents."""
    acts = sae.encode(x)
    n_fired = torch.count_nonzero(acts, dim=0)
    sparse = int(n_fired.sum()) < matmul.sparse_below * acts.numel()
    return n_fired, CooMatrix.from_dense(acts).matmul(sae.W_dec) + sae.b_dec if sparse else sae.decode(acts)


def _split(
    groups: npt.NDArray[np.int64] | None, first: int, n: int
) -> list[tuple[int | None, slice | npt.NDArray[np.int64]]]:
    """The members of each group among `n` images from `first` on."""
    if groups is None:
        return [(None, slice(None))]
    here = groups[first : first + n]
    return [(None if group < 0 else group, np.flatnonzero(here == group)) for group in np.unique(here).tolist()]


def images_on_the_way(n_trained: int, n_checkpoints: int) -> int:
    """Images of an evaluation at a checkpoint: few where a run is short, so that it does not wait for them.

    Args:
        n_trained: Images trained on in the whole run.
        n_checkpoints: Checkpoints before its end.
    """
    share = int(_SHARE_ON_THE_WAY * n_trained / max(1, n_checkpoints))
    return min(_MOST_ON_THE_WAY, max(_FEWEST_ON_THE_WAY, share))
