"""Options of `build`."""

from dataclasses import dataclass
from typing import Literal

from cytosae_pipeline.config.fields import option
from cytosae_pipeline.config.store import PrecisionChoice, StoreSource


@dataclass(frozen=True, kw_only=True)
class BuildConfig(StoreSource):
    """Options of `build`, and of verbs that build a missing store first."""

    precision: PrecisionChoice = option("auto", "Type the network computes in. auto: fp16 on cuda, fp32 elsewhere.")
    batch_size: int = option(32, "Images per forward pass.", minimum=1)
    workers: int | None = option(
        None, "Processes that decode images; 0 decodes in the main one. [default: one per core]", minimum=0
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
    overwrite: bool = option(False, "Delete an existing store and build it from scratch.")
    strict_images: bool = option(False, "Stop at the first unreadable image instead of setting it aside.")
