"""The nearest latents of other autoencoders, such as those of other seeds."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from cytosae.analysis.partners import Partners, nearest_partners
from cytosae.formats.checkpoint import digest_sae
from cytosae.sae.base import Sae
from cytosae_pipeline.config import PageConfig
from cytosae_pipeline.errors import UserError, quote
from cytosae_pipeline.statistics.inputs import Inputs, open_sae
from cytosae_pipeline.workspace.runs import resolve_sae


class OtherSeed(NamedTuple):
    """Nearest latents of one other autoencoder."""

    name: str
    """Its run, or its file."""
    partners: Partners
    """For every latent of the report."""


def find_partners(inputs: Inputs, config: PageConfig) -> list[OtherSeed]:
    """The nearest partner of every latent in each autoencoder of `--other_sae_path`.

    Raises:
        ValueError: If one cannot be read, has another width, or is the report's own.
    """
    found: list[OtherSeed] = []
    own = digest_sae(inputs.sae) if config.other_sae_path else ""
    for path in config.other_sae_path:
        resolved = resolve_sae(replace(config, sae_path=path))
        other = open_sae(resolved, device=inputs.sae.W_dec.device)
        _check(other, path, inputs.sae, own)
        assert resolved.sae_path is not None
        found.append(OtherSeed(_name(other, resolved.sae_path), nearest_partners(inputs.sae.W_dec, other.W_dec)))
    return found


def partner_records(seeds: list[OtherSeed], latent: int) -> list[dict[str, Any]]:
    """The partners of a latent, as the page shows them."""
    return [
        {
            "name": seed.name,
            "partner": int(seed.partners.latent[latent]),
            "cosine": round(float(seed.partners.cosine[latent]), 4),
        }
        for seed in seeds
    ]


def _check(other: Sae, path: Path, sae: Sae, own: str) -> None:
    """Refuse an autoencoder that cannot be compared."""
    if other.W_dec.shape[1] != sae.W_dec.shape[1]:
        raise UserError(
            f"--other_sae_path '{path}' has decoder rows of {other.W_dec.shape[1]} numbers, the report's autoencoder "
            f"of {sae.W_dec.shape[1]}: they belong to different vision transformers. Give one trained on the same store"
        )
    if digest_sae(other) == own:
        raise UserError(
            f"--other_sae_path '{path}' is the report's own autoencoder: every latent would find itself. Give one that "
            "was trained with another --seed"
        )


def _name(sae: Sae, path: Path) -> str:
    """The run's name, else the file's."""
    name = {} if sae.source is None else sae.source.cfg
    run = name.get("run_name")
    return run if isinstance(run, str) and run else quote(path.name)[1:-1]
