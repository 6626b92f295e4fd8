"""How much of an autoencoder another seed finds again."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from cytosae.analysis.matching import Pairs, TooManyPairsError, match, pairs_by_cosine
from cytosae_pipeline.errors import UserError, escape
from cytosae_pipeline.evaluation.image_scores import ImageScores
from cytosae_pipeline.evaluation.pairing import explain_too_many, pair_by_activation, warn_of_rare
from cytosae_pipeline.statistics.inputs import Inputs, describe_sae, read_sae, require_match


@dataclass(frozen=True)
class Stability:
    """Live latents of an autoencoder that another one has, too (docs/definitions.md, section 12)."""

    other: str
    """Path of the other autoencoder."""
    above: float
    """Cosine and correlation above which two latents can be partners."""
    n_images: int
    """Images over which latents are live and correlations are computed."""
    n_live: int
    """Latents of the autoencoder that are active on at least one of these images."""
    n_live_other: int
    """The same of the other one."""
    n_rare: int
    """Live latents that are active on fewer than 5 of these images: many of their correlations are high by chance."""
    decoder_share: float | None
    """Share of the live latents with a partner by the cosine of decoder rows; None without live latents."""
    activation_share: float | None
    """Share of the live latents with a partner by the correlation of activations; None without live latents."""

    def describe(self) -> str:
        """The result in a line."""
        if self.decoder_share is None or self.activation_share is None:
            return f"stability against {escape(self.other)}: no latent is active on these images"
        return (
            f"stability against {escape(self.other)}: of {self.n_live:,} live latents ({self.n_live_other:,} in the "
            f"other), one to one, {self.decoder_share:.1%} have a partner with a decoder cosine above {self.above:g}, "
            f"{self.activation_share:.1%} one with a correlation above {self.above:g} over {self.n_images:,} images"
        )


def measure_stability(
    scores: ImageScores, path: Path, *, above: float, allow_mismatch: bool, no_verify: bool
) -> Stability:
    """Compare an autoencoder with another one of the same encoder, such as another seed.

    Args:
        scores: Scores of the autoencoder, with its decoder.
        path: The other autoencoder.
        above: Cosine and correlation above which two latents can be partners.
        allow_mismatch: Accept one that was trained on another spec.
        no_verify: Skip checksums while reading.

    Raises:
        UserError: If it is the same autoencoder, or so many pairs are above the threshold that they do not fit.
        ValueError: If it cannot be read or does not fit the store.
    """
    inputs = scores.inputs
    other = Inputs(inputs.store, read_sae(path, device=inputs.sae.W_enc.device))
    require_match(other.store, other.sae, allow_mismatch=allow_mismatch)
    if other.sae_sha256 == inputs.sae_sha256:
        raise UserError(
            f"'{path}' is the same autoencoder as {describe_sae(inputs.sae)}: give one of another seed as "
            "--other_sae_path"
        )
    their_scores = ImageScores(other, scores.rows, scores.tokens, no_verify=no_verify)
    found = pair_by_activation(scores, their_scores, above=above, what="stability")
    warn_of_rare(found, len(scores), "Use more images, such as with --held_out 0")
    partner = pair_by_decoder(inputs, other, found.first_active > 0, found.second_active > 0, above=above)
    n = found.n_first
    shares = [int((of >= 0).sum()) / n if n else None for of in (partner, found.partner)]
    return Stability(str(path), above, len(scores), n, found.n_second, found.n_rare, *shares)


def pair_by_decoder(
    first: Inputs,
    second: Inputs,
    first_live: npt.NDArray[np.bool_],
    second_live: npt.NDArray[np.bool_],
    *,
    above: float,
) -> npt.NDArray[np.int64]:
    """Pair live latents of two autoencoders of one encoder by the cosine of their decoder rows, one to one.

    Args:
        first: The first autoencoder, with its decoder.
        second: The second.
        first_live: Which latents of the first are live, shape `(S,)`.
        second_live: Which of the second, shape `(S',)`.
        above: Cosine above which two latents can be partners.

    Returns:
        Partner of each latent of the first, shape `(S,)`; -1 for none.

    Raises:
        UserError: If so many pairs are above the threshold that they do not fit into memory.
    """
    rows, columns = np.flatnonzero(first_live), np.flatnonzero(second_live)
    device = first.sae.W_dec.device
    one, other = (
        sae.W_dec.detach()[torch.from_numpy(kept).to(sae.W_dec.device)].to(device)
        for sae, kept in ((first.sae, rows), (second.sae, columns))
    )
    try:
        found = pairs_by_cosine(one, other, above)
    except TooManyPairsError as error:
        raise explain_too_many(error, above) from error
    return match(Pairs(rows[found.first], columns[found.second], found.similarity), len(first_live), len(second_live))
