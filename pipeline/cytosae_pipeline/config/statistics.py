"""Options of `features`, `classes` and `patients`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cytosae.sae.registry import ARCHITECTURES
from cytosae_pipeline.config.fields import option
from cytosae_pipeline.config.store import PrecisionChoice, StoreSource
from cytosae_pipeline.errors import UserError


@dataclass(frozen=True, kw_only=True)
class StatisticsConfig(StoreSource):
    """Options of `features`, `classes` and `patients`."""

    sae_path: Path | None = option(
        None,
        "The autoencoder: a .pt written by `train` or by the reference, an exported file or folder, or one of SAELens, "
        "dictionary_learning, sparsify or overcomplete (docs/autoencoders.md).",
    )
    sae_arch: str | None = option(
        None,
        "Architecture of an autoencoder whose files do not contain its activation function.",
        choices=ARCHITECTURES,
    )
    sae_k: int | None = option(None, "Its active latents per token (topk, batchtopk).", minimum=1)
    sae_threshold: float | None = option(
        None, "The activation that a latent must exceed, the same for all latents (batchtopk).", minimum=0
    )
    top_k: int = option(10, "Maximally activating images kept per latent (features).", minimum=1)
    threshold: tuple[float, ...] = option(
        (0.2,), "A token counts if its activation is above this. Repeatable.", minimum=0
    )
    normalize: Literal["image", "token", "none", "latents"] = option(
        "image",
        "What counts are divided by: the group's images, its tokens, nothing, or the number of latents as in the "
        "published files.",
    )
    batch_size: int = option(64, "Images read at once; results do not depend on it.", minimum=1)
    precision: PrecisionChoice = option("auto", "Type of the encoder's product. auto: fp32.")
    allow_mismatch: bool = option(
        False, "Accept a store whose spec differs from the one the autoencoder was trained on."
    )
    no_verify: bool = option(False, "Skip checksums while reading.")
    replace_foreign: bool = option(
        False,
        "Replace results in the output's folder that another program wrote, such as published ones, or that belong to "
        "another activation function (--sae_arch).",
    )

    def __post_init__(self) -> None:
        """Check that there are thresholds, each once, and that what is stated about the autoencoder fits together."""
        super().__post_init__()
        for name, owners in (("sae_k", ("topk", "batchtopk")), ("sae_threshold", ("batchtopk",))):
            if getattr(self, name) is not None and self.sae_arch not in owners:
                found = "none" if self.sae_arch is None else self.sae_arch
                raise UserError(f"{name} needs sae_arch {' or '.join(owners)}, found {found}")
        if not self.threshold:
            raise UserError("threshold must be given at least once")
        if len(set(self.threshold)) != len(self.threshold):
            raise UserError(f"threshold must not repeat a value, found {', '.join(map(str, self.threshold))}")
