"""Options of `evaluate` and `compare`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cytosae_pipeline.config.fields import Config, option
from cytosae_pipeline.config.masks import MaskChoice
from cytosae_pipeline.config.statistics import ReadOptions, SaeChoice
from cytosae_pipeline.config.store import JoinChoice
from cytosae_pipeline.config.subjects import SubjectChoice
from cytosae_pipeline.errors import UserError


@dataclass(frozen=True, kw_only=True)
class MatchChoice(Config):
    """Options of everything that matches the latents of two autoencoders."""

    match_above: float = option(
        0.7,
        "Latents of two autoencoders can be partners if their similarity is above this: correlation of activations, or "
        "cosine of decoder rows.",
        minimum=0.1,
        maximum=0.999,
    )


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(MatchChoice, SubjectChoice, MaskChoice, ReadOptions):
    """Options of what `evaluate` measures."""

    other_sae_path: tuple[Path, ...] = option(
        (),
        "Autoencoder of the same encoder, such as another seed, in which partners of the latents are looked for. "
        "Repeatable.",
    )
    probe: bool = option(
        False,
        "Also measure how well 1, 2, 5 and 20 latents tell the labels apart, on images of persons that the probe has "
        "not seen, beside the vision transformer's own mean token.",
    )
    probe_images: int = option(
        4000, "Labelled images of the whole store that --probe uses at most, spread evenly.", minimum=4, maximum=100_000
    )
    monosemanticity: bool = option(False, "Also measure for each latent how similar the images are that activate it.")

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
    held_out_by: Literal["image", "patient", "subject"] | None = option(
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

    def __post_init__(self) -> None:
        """Check that what is said about persons and patches is used."""
        super().__post_init__()
        for name in ("covariates", "subject_column"):
            if getattr(self, name) is not None and not self.probe:
                raise UserError(f"{name} says which images the probe must not learn from: give it with --probe")
        if self.masks is not None and not self.monosemanticity:
            raise UserError("masks says which patches are compared with each other: give it with --monosemanticity")


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
class EvaluateConfig(EvaluateOptions, JoinChoice, SaeChoice):
    """Options of `evaluate`."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions(MatchChoice, ReadOptions):
    """Options of what `compare` computes."""

    limit: int | None = option(None, "Images to compare on, spread over those in common. [default: all]", minimum=2)
    common_images: bool = option(False, "Compare on the images that both stores have, where each has others, too.")
    tokens: Literal["all", "patches", "cls"] = option(
        "all", "Tokens of an image over which activations are averaged; patches where one encoder has no CLS token."
    )


@dataclass(frozen=True, kw_only=True)
class CompareConfig(CompareOptions, SaeChoice):
    """Options of `compare`."""

    other_sae_path: Path | None = option(None, "The other autoencoder, named as --sae_path is.")
    other_store: str | None = option(
        None,
        "Path or URL of the other autoencoder's store, if it is one of another encoder. [default: the same store]",
    )
    out: Path | None = option(
        None, "Folder of the tables. [default: a folder named after the other autoencoder, where `features` writes]"
    )
    keep_notes: bool = option(
        False, "Take names of latents even if they were written about another autoencoder or other images."
    )
    replace_foreign: bool = option(False, "Replace tables in the output's folder that another program wrote.")

    def __post_init__(self) -> None:
        """Check that there are two autoencoders."""
        super().__post_init__()
        if self.other_sae_path is None:
            raise UserError("compare takes two autoencoders: name the other one with --other_sae_path")
