"""Options of `build`."""

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

from cytosae_pipeline.config.cluster import ClusterChoice
from cytosae_pipeline.config.fields import option
from cytosae_pipeline.config.store import ImageSource, PrecisionChoice, StorePlace
from cytosae_pipeline.errors import UserError


class Part(NamedTuple):
    """One of several equal parts of a store's shards."""

    number: int
    """Which one, from 1."""
    n_parts: int
    """How many there are."""

    def of(self, n_shards: int) -> range:
        """The part's shards, which follow each other."""
        start, stop = ((number * n_shards) // self.n_parts for number in (self.number - 1, self.number))
        return range(start, stop)


@dataclass(frozen=True, kw_only=True)
class BuildConfig(ClusterChoice, ImageSource, StorePlace):
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
    keep_tail: bool = option(
        False,
        "Also write the network's blocks after the stored one, and its final norm, to a file beside the store: "
        "`evaluate --downstream` needs them. Repeating the build adds it to a finished store. Off by default, because "
        "the weights of many encoders may not be passed on.",
    )
    shards: str | None = option(
        None,
        "Compute one part of the shards, such as 3/16, the third of 16: for job arrays and several machines that share "
        "the store. The parts may start in any order; the one that ends last completes the store.",
    )

    def __post_init__(self) -> None:
        """Check that every block has a place of its own."""
        super().__post_init__()
        if self.delete_first and not self.overwrite:
            raise UserError("delete_first says how an existing store is replaced: give overwrite as well")
        if self.is_shared and self.overwrite:
            raise UserError(
                f"{'dask' if self.part is None else 'shards'} has several processes fill the same store, which "
                "overwrite would delete: delete the old store first, or omit one of the two"
            )
        if not self.block_layer or len(set(self.block_layer)) < len(self.block_layer):
            raise UserError(f"block_layer must be one or more different blocks, found {list(self.block_layer)}")
        if self.store is not None and len(self.block_layer) > 1:
            raise UserError(
                f"store names one place, but block_layer asks for {len(self.block_layer)} stores. Omit one of the two"
            )

    @property
    def part(self) -> Part | None:
        """The part of the shards to compute; None for all.

        Raises:
            UserError: If `shards` does not name one.
        """
        if self.shards is None:
            return None
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", self.shards)
        part = Part(int(match[1]), int(match[2])) if match else None
        if part is None or not 1 <= part.number <= part.n_parts:
            raise UserError(f"shards must be I/N with I from 1 to N, such as 3/16, found {self.shards!r}")
        return part

    @property
    def is_shared(self) -> bool:
        """Whether other processes may write to the same store."""
        return self.part is not None or self.dask is not None
