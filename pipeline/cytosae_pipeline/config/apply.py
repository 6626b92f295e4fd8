"""Options of `apply`."""

from dataclasses import dataclass
from pathlib import Path

from cytosae_pipeline.config.fields import option
from cytosae_pipeline.config.layout import parse_layout
from cytosae_pipeline.config.statistics import PassOptions
from cytosae_pipeline.config.store import Device
from cytosae_pipeline.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ApplyConfig(PassOptions):
    """Options of `apply`: an atlas, new images, and what is written about them."""

    atlas: Path | None = option(None, "The atlas: a folder that `export --format atlas` wrote.")
    images: Path | None = option(
        None, "New images: a folder, or a CSV with columns path[,label][,patient]. Needs --model_path."
    )
    model_path: Path | None = option(
        None, "Checkpoint of the vision transformer that the atlas was made with, or the word `embedded`."
    )
    layout: str = option("auto", "Meaning of the folder levels of --images, as for `build`.")
    store: str | None = option(
        None, "Path or URL of a store of the new images with the atlas' spec, instead of --images and --model_path."
    )
    out: Path | None = option(
        None,
        "Folder to write into. [default: beside the new images or the store, named after them, ending in .placed]",
    )
    outside: float = option(
        0.01,
        "An image is outside if its share of known images is at most this: also the most images like those of the "
        "atlas that are called outside.",
        above=0,
        maximum=1,
    )
    nearest: int = option(3, "Reference patients named for each new one.", minimum=1)
    top: int = option(5, "Latents named for each image.", minimum=0)
    device: Device = option("auto", "Device to run on. auto: cuda, then mps, then cpu.")
    workers: int | None = option(
        None, "Processes that decode images; 0 decodes in the main one. [default: one per core, at most 8]", minimum=0
    )
    seed: int = option(0, "Seed of the folds in which settings of the model of groups are chosen.", minimum=0)
    overwrite: bool = option(False, "Replace existing files.")

    def __post_init__(self) -> None:
        """Check that the new images are named once."""
        super().__post_init__()
        parse_layout(self.layout)
        if self.atlas is None:
            raise UserError("name the atlas: a folder that was written by: cytosae-cache export --format atlas")
        if (self.images is None) == (self.store is None):
            found = "neither" if self.images is None else "both"
            raise UserError(
                f"give the new images as images, with model_path, or as store, a store of them; found {found}"
            )
        if self.images is not None and self.model_path is None:
            raise UserError("images needs model_path, the vision transformer that the atlas was made with")
        if self.store is not None:
            for name, given in (("model_path", self.model_path is not None), ("layout", self.layout != "auto")):
                if given:
                    raise UserError(f"{name} is for images, but store was given, whose activations are there already")
