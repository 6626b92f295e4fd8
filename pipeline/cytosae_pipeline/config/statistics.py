"""Options of `features`, `classes` and `patients`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cytosae_pipeline.config.fields import option
from cytosae_pipeline.config.store import PrecisionChoice, StoreSource
from cytosae_pipeline.errors import UserError


@dataclass(frozen=True, kw_only=True)
class StatisticsConfig(StoreSource):
    """Options of `features`, `classes` and `patients`."""

    sae_path: Path | None = option(
        None, "The autoencoder: a .pt written by `train` or by the reference, or an exported file or folder."
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
        False, "Replace results in the output's folder that another program wrote, such as published ones."
    )

    def __post_init__(self) -> None:
        """Check that there are thresholds, each once."""
        super().__post_init__()
        if not self.threshold:
            raise UserError("threshold must be given at least once")
        if len(set(self.threshold)) != len(self.threshold):
            raise UserError(f"threshold must not repeat a value, found {', '.join(map(str, self.threshold))}")
