"""Options of `evaluate`."""

from dataclasses import dataclass
from typing import Literal

from cytosae_pipeline.config.fields import option
from cytosae_pipeline.config.statistics import ReadOptions, SaeChoice
from cytosae_pipeline.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ReadOptions):
    """Options of what `evaluate` measures."""

    tokens: Literal["all", "patches", "cls"] | None = option(
        None, "Which tokens of an image. [default: those that the autoencoder was trained on]"
    )
    limit: int | None = option(None, "Images to evaluate, spread over the store. [default: all]", minimum=1)
    held_out: float | None = option(
        None,
        "Evaluate only the images that training with this --held_out leaves out; 0 for all images. [default: as the "
        "autoencoder was trained, on the store that it was trained on; else 0]",
        minimum=0,
        maximum=0.9,
    )
    held_out_by: Literal["image", "patient"] | None = option(
        None, "Unit that was held out as a whole. [default: as the autoencoder was trained, else image]"
    )
    downstream: bool = option(
        False,
        "Also measure the encoder's embedding, and a probe of the labels on it, from reconstructed activations. Needs "
        "the store's tail: build --keep_tail.",
    )
    ablation: Literal["mean", "zero"] = option(
        "mean",
        "What --downstream compares with: every token replaced by the store's mean token, or by zero.",
    )


@dataclass(frozen=True, kw_only=True)
class EffectOptions(ReadOptions):
    """Options of what a latent changes in the labels."""

    latents: tuple[int, ...] = option((), "The latents, each of which is scaled by itself.", minimum=0)
    rows: tuple[int, ...] = option((), "Rows of the images.", minimum=0)
    factor: float = option(0.0, "What the latent's activations are multiplied by; 0 removes it.", minimum=0)

    def __post_init__(self) -> None:
        """Check that there are latents and images."""
        super().__post_init__()
        if not self.latents or not self.rows:
            raise UserError("name at least one latent and one image: latents=430, rows=(0, 7)")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(EvaluateOptions, SaeChoice):
    """Options of `evaluate`."""
