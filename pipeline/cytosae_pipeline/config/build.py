"""Options of `build`."""

from dataclasses import dataclass
from typing import Literal

from cytosae_pipeline.config.fields import option
from cytosae_pipeline.config.store import ImageSource, PrecisionChoice, StorePlace
from cytosae_pipeline.errors import UserError


@dataclass(frozen=True, kw_only=True)
class BuildConfig(ImageSource, StorePlace):
    """Options of `build`, and of verbs that build a missing store first."""

    block_layer: tuple[int, ...] = option(
        (-2,),
        "Block whose output is stored, as a Python index; -2 is the second-to-last. Several give a store each, "
        "from one pass of the network.",
    )

    precision: PrecisionChoice = option("auto", "Type the network computes in. auto: fp16 on cuda, fp32 elsewhere.")
    batch_size: int = option(32, "Images per forward pass.", minimum=1)
    workers: int | None = option(
        None, "Processes that decode images; 0 decodes in the main one. [default: one per core, at most 8]", minimum=0
    )
    shard_images: int = option(256, "Images per shard file.", minimum=1)
    compression: Literal["none", "lz4", "zstd"] = option(
        "none", "Lossless codec; saves 0-7 % of fp16 activations, so raw is the default."
    )
    store_dtype: Literal["float16", "float32", "int8"] = option(
        "float16",
        "Type of the stored numbers. int8 halves the store: codes with one scale per token, read as float16.",
    )
    limit: int | None = option(None, "Build from this many images only, spread evenly over the list.", minimum=1)
    overwrite: bool = option(False, "Build from scratch; the new store replaces an existing one once it is complete.")
    delete_first: bool = option(
        False, "With --overwrite: delete the existing store before the new one is written, for want of space for both."
    )
    strict_images: bool = option(False, "Stop at the first unreadable image instead of setting it aside.")

    def __post_init__(self) -> None:
        """Check that every block has a place of its own."""
        super().__post_init__()
        if self.delete_first and not self.overwrite:
            raise UserError("delete_first says how an existing store is replaced: give overwrite as well")
        if not self.block_layer or len(set(self.block_layer)) < len(self.block_layer):
            raise UserError(f"block_layer must be one or more different blocks, found {list(self.block_layer)}")
        if self.store is not None and len(self.block_layer) > 1:
            raise UserError(
                f"store names one place, but block_layer asks for {len(self.block_layer)} stores. Omit one of the two"
            )
