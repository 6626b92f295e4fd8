"""Two autoencoders compared latent by latent, over the same images."""

import logging
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cytosae.analysis.matching import cosines_of
from cytosae_cache.reading.permutation import spread_rows
from cytosae_pipeline.config import CompareOptions
from cytosae_pipeline.errors import UserError, escape
from cytosae_pipeline.evaluation.common_images import find_common
from cytosae_pipeline.evaluation.image_scores import ImageScores
from cytosae_pipeline.evaluation.pairing import ActivationPairs, pair_by_activation, warn_of_rare
from cytosae_pipeline.evaluation.stability import pair_by_decoder
from cytosae_pipeline.runtime.tables import format_table
from cytosae_pipeline.statistics.inputs import Inputs, describe_sae

logger = logging.getLogger(__name__)

_SHOWN = 5
"""Pairs and single latents in the summary."""


@dataclass(frozen=True)
class LatentMatch:
    """A live latent and what the other autoencoder has of it."""

    latent: int
    """The latent."""
    name: str
    """Its name in the notes; '' without one."""
    sparsity: float
    """Share of the images on which it is active."""
    partner: int | None
    """Its partner in the one-to-one matching; None without one."""
    partner_name: str
    """Name of the partner; '' without one."""
    correlation: float | None
    """Correlation with the partner."""
    best: int
    """The most correlated latent of the other autoencoder, whoever else has it; -1 if none is live."""
    best_name: str
    """Its name."""
    best_correlation: float | None
    """Correlation with it."""
    decoder_cosine: float | None
    """Cosine of the decoder rows of the latent and its partner or, without one, the best; None for two encoders."""


@dataclass(frozen=True)
class Comparison:
    """Two autoencoders compared (docs/definitions.md, section 12)."""

    first: str
    """The autoencoder: architecture and path."""
    second: str
    """The other one."""
    n_images: int
    """Images on which they are compared."""
    above: float
    """Similarity above which latents can be partners."""
    same_encoder: bool
    """Whether both are of one encoder, so that decoder rows can be compared."""
    n_live: int
    """Live latents of the autoencoder."""
    n_live_other: int
    """Live latents of the other one."""
    n_matched: int
    """Pairs in the one-to-one matching by activations."""
    n_decoder_matched: int | None
    """Pairs in the one-to-one matching by decoder rows; None for two encoders."""
    latents: list[LatentMatch]
    """Live latents of the autoencoder, by index."""
    other_latents: list[LatentMatch]
    """Live latents of the other one, by index."""

    @property
    def only_first(self) -> list[LatentMatch]:
        """Live latents of the autoencoder without a partner."""
        return [one for one in self.latents if one.partner is None]

    @property
    def only_second(self) -> list[LatentMatch]:
        """Live latents of the other one without a partner."""
        return [one for one in self.other_latents if one.partner is None]

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON values."""
        return asdict(self)

    def describe(self) -> str:
        """The result as text for humans."""
        n_first, n_second = len(self.only_first), len(self.only_second)
        lines = [
            f"A: {escape(self.first)}",
            f"B: {escape(self.second)}",
            f"{self.n_matched:,} pairs of latents, one to one, with a correlation above {self.above:g} over "
            f"{self.n_images:,} images: {_share(self.n_matched, self.n_live)} of {self.n_live:,} live latents of A, "
            f"{_share(self.n_matched, self.n_live_other)} of {self.n_live_other:,} of B",
            f"only in A: {n_first:,}; only in B: {n_second:,}",
        ]
        if self.n_decoder_matched is not None:
            lines.insert(3, f"by decoder cosine above {self.above:g}: {self.n_decoder_matched:,} pairs")
        best = sorted(
            (one for one in self.latents if one.correlation is not None), key=lambda one: -(one.correlation or 0)
        )
        if best:
            rows = [
                [_shown(one.latent, one.name), _shown(one.partner, one.partner_name), f"{one.correlation:.3f}",
                 f"{one.sparsity:.1%}"]
                for one in best[:_SHOWN]
            ]  # fmt: skip
            lines += ["", format_table(["latent of A", "of B", "correlation", "active in A"], rows)]
        return "\n".join(lines)


def compare_pair(
    first: Inputs,
    second: Inputs,
    options: CompareOptions,
    *,
    names: dict[int, str] | None = None,
    other_names: dict[int, str] | None = None,
) -> Comparison:
    """Compare two autoencoders on the images that their stores have in common.

    Args:
        first: An autoencoder, with its decoder, and its store.
        second: The other one, and its store, which may be the same object.
        options: What to compare.
        names: Names of the latents of the first.
        other_names: Names of the latents of the second.

    Raises:
        UserError: If the images differ and `common_images` is not set, none is in common, the images of a store do not
            have such tokens, or both are the same autoencoder on the same store.
    """
    same_encoder = first.store.spec == second.store.spec
    if first.sae_sha256 == second.sae_sha256 and same_encoder:
        raise UserError(f"both are the same autoencoder, {describe_sae(first.sae)}: give two to compare")
    for inputs in (first, second):
        _require_tokens(inputs, options)
    common = find_common(first.store, second.store, common_only=options.common_images)
    chosen = spread_rows(len(common.first), options.limit or len(common.first))
    scores = [
        ImageScores(inputs, rows[chosen], options.tokens, no_verify=options.no_verify)
        for inputs, rows in ((first, common.first), (second, common.second))
    ]
    found = pair_by_activation(*scores, above=options.match_above, what="compare")
    warn_of_rare(found, len(chosen), "Compare on more images")
    decoder = None
    if same_encoder:
        live = found.first_active > 0, found.second_active > 0
        decoder = int((pair_by_decoder(first, second, *live, above=options.match_above) >= 0).sum())
    latents, other_latents = _match_latents(
        first, second, found, len(chosen), names or {}, other_names or {}, same_encoder=same_encoder
    )
    return Comparison(
        _place(first), _place(second), len(chosen), options.match_above, same_encoder,
        found.n_first, found.n_second, found.n_matched, decoder, latents, other_latents,
    )  # fmt: skip


def _match_latents(
    first: Inputs,
    second: Inputs,
    found: ActivationPairs,
    n_images: int,
    names: dict[int, str],
    other_names: dict[int, str],
    *,
    same_encoder: bool,
) -> tuple[list[LatentMatch], list[LatentMatch]]:
    """The live latents of both, each with its partner and its best."""
    back = np.full(second.n_latents, -1, dtype=np.int64)
    matched = np.flatnonzero(found.partner >= 0)
    back[found.partner[matched]] = matched
    there = np.zeros(second.n_latents)
    there[found.partner[matched]] = found.correlation[matched]
    sides = (
        (first, second, found.first_active, found.partner, found.correlation, found.first_best, names, other_names),
        (second, first, found.second_active, back, there, found.second_best, other_names, names),
    )
    both = []
    for one, other, n_active, partner, correlation, best, own_names, their_names in sides:
        live = np.flatnonzero(n_active > 0)
        best_latent, best_value = best.latent.numpy()[live], best.similarity.numpy()[live]
        nearest = np.where(partner[live] >= 0, partner[live], best_latent)
        cosine = _decoder_cosines(one, other, live, nearest) if same_encoder else None
        both.append(
            [
                _describe_latent(
                    latent, own_names, their_names, float(n_active[latent]) / n_images,
                    int(partner[latent]), float(correlation[latent]), int(best_latent[at]), float(best_value[at]),
                    None if cosine is None or nearest[at] < 0 else float(cosine[at]),
                )
                for at, latent in enumerate(live.tolist())
            ]
        )  # fmt: skip
    return both[0], both[1]


def _describe_latent(
    latent: int,
    names: dict[int, str],
    their_names: dict[int, str],
    sparsity: float,
    partner: int,
    correlation: float,
    best: int,
    best_correlation: float,
    cosine: float | None,
) -> LatentMatch:
    """One latent; -1 stands for no partner and no best."""
    is_matched, has_best = partner >= 0, best >= 0
    return LatentMatch(
        latent,
        names.get(latent, ""),
        sparsity,
        partner if is_matched else None,
        their_names.get(partner, ""),
        correlation if is_matched else None,
        best,
        their_names.get(best, ""),
        best_correlation if has_best else None,
        cosine,
    )


def _decoder_cosines(
    one: Inputs, other: Inputs, rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Cosine of the decoder rows of pairs of latents; that of the last latent where there is none (-1)."""
    device = one.sae.W_dec.device
    places = torch.from_numpy(rows).to(device), torch.from_numpy(columns % other.n_latents).to(device)
    return cosines_of(one.sae.W_dec, other.sae.W_dec.to(device), *places).cpu().numpy()


def _require_tokens(inputs: Inputs, options: CompareOptions) -> None:
    """Refuse tokens that the images of a store do not have.

    Raises:
        UserError: If there are none.
    """
    layout = inputs.store.spec.tokens
    n = {"all": layout.n_tokens, "cls": layout.n_cls, "patches": layout.grid[0] * layout.grid[1]}[options.tokens]
    if not n:
        raise UserError(
            f"images of store '{inputs.store.path}' have no {options.tokens} tokens: give another value of tokens"
        )


def _place(inputs: Inputs) -> str:
    """An autoencoder: what it is, where it is, and what encoder it is of."""
    size = f"{inputs.sae.architecture}, {inputs.n_latents:,} latents"
    return f"{size}, {describe_sae(inputs.sae)} on {inputs.store.spec.model_name}"


def _share(n: int, of: int) -> str:
    """A share in per cent."""
    return f"{n / of:.1%}" if of else "none"


def _shown(latent: int | None, name: str) -> str:
    """A latent, with its name if it has one."""
    return f"{latent} {escape(name)[:40]}".rstrip()
