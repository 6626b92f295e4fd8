"""Options that say which store is meant, and from what it can be built."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cytosae_pipeline.config.cluster import ClusterChoice
from cytosae_pipeline.config.fields import Config, option
from cytosae_pipeline.config.layout import parse_layout
from cytosae_pipeline.errors import UserError

Device = Literal["auto", "cpu", "cuda", "mps"]
PrecisionChoice = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class WorkspaceChoice(Config):
    """Options of every verb that reads or writes a workspace: which one."""

    root_dir: Path = option(Path(), "Folder that contains dataset/ and out/.", variable="CYTOSAE_ROOT_DIR")


@dataclass(frozen=True, kw_only=True)
class StorePlace(WorkspaceChoice):
    """Options that say where a store is, and of which encoder."""

    dataset_name: str | None = option(None, "Name of the data set.", "dataset")
    store: str | None = option(
        None,
        "Path or URL (s3://...) of the store itself, instead of the place under root_dir named after the data set.",
    )
    model_name: str | None = option(
        None,
        "Encoder, such as dinov2_vitb14, uni or kaiko_vits8 (docs/encoders.md lists all). Needed only where neither "
        "the files nor the shapes say which it is.",
    )
    module_name: Literal["resid"] = option("resid", "What is used of the block: the residual stream after it.")
    image_size: int | None = option(
        None, "Height and width in pixels that images are resized to. [default: the encoder's own]", minimum=1
    )
    image_mean: tuple[float, float, float] | None = option(
        None,
        "Mean of each RGB channel, subtracted from values of 0 to 1. [default: the encoder's own]",
        minimum=0,
        maximum=1,
    )
    image_std: tuple[float, float, float] | None = option(
        None, "Standard deviation of each RGB channel. [default: the encoder's own]", above=0, maximum=1
    )
    image_resample: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] | None = option(
        None, "Filter of the resize. [default: the encoder's own]"
    )
    white_level: int | None = option(
        None,
        "Value that stands for white in greyscale of more than 8 bits, such as 4095 for a camera's 12 bits in 16-bit "
        "files. [default: the largest of a file's bits]",
        minimum=256,
        maximum=65535,
    )


@dataclass(frozen=True, kw_only=True)
class StoreChoice(StorePlace):
    """Options of every verb that reads a store: which one."""

    block_layer: int = option(-2, "Block whose output is used, as a Python index; -2 is the second-to-last.")


@dataclass(frozen=True, kw_only=True)
class ImageSource(Config):
    """Options of everything that runs an encoder over images."""

    model_path: Path | None = option(
        None,
        "Checkpoint of the vision transformer, a local folder of transformers, timm or open_clip, or the word "
        "`embedded`.",
    )
    images: Path | None = option(
        None, "Folder of images, or a CSV with columns path[,label][,patient]. [default: <root>/dataset/<name>]"
    )
    layout: str = option(
        "auto",
        "Meaning of the folder levels: class = the parent folder is the label, patient = the parent is the patient, "
        "class/patient = the grandparent is the label; patient-in-class: the numbering of patients restarts in every "
        "class. With * levels count from the top: '*/class' skips one folder, 'class/*' whatever is below. auto uses "
        "manifest.csv if there is one, else the folders' depth and names, and stops where they do not decide.",
    )
    vit_type: str = option("custom", "Kind of backbone; one folder of the outputs is named after it.")
    device: Device = option("auto", "Device to run on. auto: cuda, then mps, then cpu.")

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_layout(self.layout)


@dataclass(frozen=True, kw_only=True)
class StoreSource(ImageSource, StoreChoice):
    """Options of every verb that builds a missing store first: from what."""


@dataclass(frozen=True, kw_only=True)
class JoinChoice(Config):
    """Options of every verb that can read the stores of several data sets as one: which further ones."""

    with_dataset: tuple[str, ...] = option(
        (),
        "Name of a further data set, whose store is read together with the first; both must be of the same encoder. "
        "Its name is a column of the images, `dataset`. Repeatable.",
    )
    joined_patients: Literal["same", "separate"] | None = option(
        None,
        "What it means that a patient's name stands in several data sets (--with_dataset): same = one person, "
        "separate = another one in each, called `data set/patient`. Needed only if there are such names.",
    )

    def __post_init__(self) -> None:
        """Check that something is joined."""
        super().__post_init__()
        if self.joined_patients is not None and not self.with_dataset:
            raise UserError("joined_patients is about several data sets: name the others with --with_dataset NAME")


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(ClusterChoice, StoreSource):
    """Options of `verify`."""

    deep: bool = option(False, "Also recompute the activations of some images, from --model_path and --images.")
