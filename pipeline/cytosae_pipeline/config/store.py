"""Options that say which store is meant, and from what it can be built."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cytosae_pipeline.config.fields import Config, option
from cytosae_pipeline.config.layout import parse_layout

Device = Literal["auto", "cpu", "cuda", "mps"]
PrecisionChoice = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class StoreChoice(Config):
    """Options of every verb that reads a store: which one."""

    root_dir: Path = option(Path(), "Folder that contains dataset/ and out/.")
    dataset_name: str | None = option(None, "Name of the data set.", "dataset")
    store: str | None = option(
        None,
        "Path or URL (s3://...) of the store itself, instead of the place under root_dir named after the data set.",
    )
    model_name: str | None = option(
        None, "Backbone, such as dinov2_vits14, dinov2_vitb14, dinov2_vitl14 or dinov2_vitg14. Detected if not given."
    )
    block_layer: int = option(-2, "Block whose output is used, as a Python index; -2 is the second-to-last.")
    module_name: Literal["resid"] = option("resid", "What is used of the block: the residual stream after it.")


@dataclass(frozen=True, kw_only=True)
class StoreSource(StoreChoice):
    """Options of every verb that builds a missing store first: from what."""

    model_path: Path | None = option(
        None, "Checkpoint of the vision transformer, a local transformers folder, or the word `embedded`."
    )
    images: Path | None = option(
        None, "Folder of images, or a CSV with columns path[,label][,patient]. [default: <root>/dataset/<name>]"
    )
    layout: str = option(
        "auto",
        "Meaning of the folder levels: class = the parent folder is the label, patient = the parent is the patient, "
        "class/patient = the grandparent is the label; patient-in-class: patients are numbered anew in every class. "
        "With * levels count from the top: '*/class' skips one folder, 'class/*' whatever is below. auto uses "
        "manifest.csv if there is one, else the folders' depth and names, and stops where they do not decide.",
    )
    vit_type: str = option("custom", "Kind of backbone; one folder of the outputs is named after it.")
    device: Device = option("auto", "Device to run on. auto: cuda, then mps, then cpu.")

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_layout(self.layout)
