"""Options of `features`, `classes` and `patients`, and those that they share with other verbs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cytosae.sae.registry import ARCHITECTURES, check_stated
from cytosae_pipeline.config.cluster import ClusterChoice
from cytosae_pipeline.config.fields import Config, option
from cytosae_pipeline.config.store import JoinChoice, PrecisionChoice, StoreSource
from cytosae_pipeline.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ReadOptions(Config):
    """Options of everything that applies an autoencoder to a store: what is checked."""

    allow_mismatch: bool = option(
        False, "Accept a store whose spec differs from the one the autoencoder was trained on."
    )
    no_verify: bool = option(False, "Skip checksums while reading.")


@dataclass(frozen=True, kw_only=True)
class PassOptions(ReadOptions):
    """Options of everything that encodes a store: how it is read and computed."""

    batch_size: int = option(64, "Images read at once; results do not depend on it.", minimum=1)
    precision: PrecisionChoice = option(
        "auto",
        "Type of the encoder's product. auto: fp32, without latents that cannot be active where that saves time.",
    )


@dataclass(frozen=True, kw_only=True)
class StatisticsOptions(ClusterChoice, PassOptions):
    """Options of what is computed by `features`, `classes` and `patients`."""

    top_k: int = option(10, "Maximally activating images kept per latent (features).", minimum=1)
    threshold: tuple[float, ...] = option(
        (0.2,), "A token counts if its activation is above this. Repeatable.", minimum=0
    )
    normalize: Literal["image", "token", "none", "latents"] = option(
        "image",
        "What counts are divided by: the group's images, its tokens, nothing, or the number of latents as in the "
        "published files.",
    )

    def __post_init__(self) -> None:
        """Check that there are thresholds, each once."""
        super().__post_init__()
        if not self.threshold:
            raise UserError("threshold must be given at least once")
        if len(set(self.threshold)) != len(self.threshold):
            raise UserError(f"threshold must not repeat a value, found {', '.join(map(str, self.threshold))}")


@dataclass(frozen=True, kw_only=True)
class SaeChoice(StoreSource, ReadOptions):
    """Options of every verb that applies an autoencoder to a store: which ones."""

    sae_path: Path | None = option(
        None,
        "The autoencoder: a run's name or folder, `latest` for the newest finished run, a .pt written by `train` or by "
        "the reference, an exported file or folder, or one of SAELens, dictionary_learning, sparsify or overcomplete "
        "(docs/autoencoders.md).",
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

    def __post_init__(self) -> None:
        """Check that what is stated about the autoencoder fits together."""
        super().__post_init__()
        try:
            check_stated(self.sae_arch, self.sae_k, self.sae_threshold)
        except ValueError as error:
            raise UserError(str(error)) from error


@dataclass(frozen=True, kw_only=True)
class StatisticsConfig(StatisticsOptions, JoinChoice, SaeChoice):
    """Options of `features`, `classes` and `patients`."""

    replace_foreign: bool = option(
        False,
        "Replace results in the output's folder that another program wrote, such as published ones, or that belong to "
        "another activation function (--sae_arch).",
    )
