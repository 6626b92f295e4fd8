"""One pass of the encoder over a store that feeds any number of accumulators."""

from collections.abc import Callable, Sequence

import torch

from cytosae.statistics.accumulators import BLOCK_IMAGES, BlockEncoder, PooledActs
from cytosae_cache.reading.loader import iter_row_blocks
from cytosae_cache.reading.prefetch import PREFETCHED
from cytosae_cache.reading.reader import StoreReader
from cytosae_pipeline.config import PassOptions
from cytosae_pipeline.runtime.devices import DTYPES
from cytosae_pipeline.runtime.memory import available_ram, exceeds_page_cache
from cytosae_pipeline.runtime.progress import Progress
from cytosae_pipeline.runtime.shortage import require_memory
from cytosae_pipeline.statistics.inputs import Inputs

PooledConsumer = Callable[[torch.Tensor, PooledActs], None]
"""Takes row numbers, int64, shape `(n,)`, and what was pooled of each."""

ActsConsumer = Callable[[torch.Tensor, slice, torch.Tensor], None]
"""Takes row numbers, shape `(n,)`, a range of latents, and their activations, float32, shape `(n, T, n_latents)`."""


def make_encoder(inputs: Inputs, config: PassOptions, thresholds: Sequence[float] = ()) -> BlockEncoder:
    """The encoder in the precision that the options ask for; `auto` is fp32."""
    dtype = DTYPES["fp32" if config.precision == "auto" else config.precision]
    return BlockEncoder(inputs.sae, thresholds, dtype=dtype)


def rows_at_once(config: PassOptions, n_rows: int | None = None) -> int:
    """Rows read at once: the batch size, rounded up to whole blocks of the encoder.

    Args:
        config: Options.
        n_rows: Rows that are read in all, which limit it; None for no limit.
    """
    n = config.batch_size if n_rows is None else min(config.batch_size, max(n_rows, 1))
    return -(-n // BLOCK_IMAGES) * BLOCK_IMAGES


def require_batch_memory(inputs: Inputs, n_at_once: int, n_thresholds: int = 0) -> None:
    """Refuse a batch whose buffers and results do not fit into memory.

    Args:
        inputs: Store and autoencoder.
        n_at_once: Rows read at once.
        n_thresholds: Thresholds of the counts.

    Raises:
        NotEnoughMemoryError: If they do not.
    """
    n_bytes = n_at_once * (PREFETCHED * inputs.store.image_bytes + 4 * inputs.n_latents * (1 + n_thresholds))
    advice = "Lower --batch_size: results stay the same"
    require_memory(n_bytes, available_ram(), f"reading {n_at_once:,} images at once", advice)


def encode_store(
    inputs: Inputs,
    config: PassOptions,
    consumers: Sequence[PooledConsumer],
    *,
    thresholds: Sequence[float] = (),
    on_acts: Sequence[tuple[ActsConsumer, torch.Tensor | None]] = (),
    what: str,
) -> None:
    """Encode every readable image once and pass on its scores and counts.

    Args:
        inputs: Store and autoencoder.
        config: Batch size, precision, and whether checksums are verified.
        consumers: Called in turn with the pooled activations of each batch.
        thresholds: Thresholds of the counts.
        on_acts: Called with the activations of all tokens before they are pooled, a few images and latents at a time;
            each with the images that it takes, bool, shape `(n_images,)`, or None for all readable ones.
        what: Name of the work, shown with the progress.

    Raises:
        NotEnoughMemoryError: If the batch size does not fit into memory.
    """
    store = inputs.store
    n_at_once = rows_at_once(config, store.n_images)
    require_batch_memory(inputs, n_at_once, len(thresholds))
    encoder = make_encoder(inputs, config, thresholds)
    direct = exceeds_page_cache(store.n_images * store.spec.record_bytes)
    with (
        StoreReader(store, verify=not config.no_verify, direct=direct) as reader,
        Progress(what, store.n_images, "images") as bar,
    ):
        for block in iter_row_blocks(reader, block_rows=n_at_once):
            valid = torch.from_numpy(block.valid)
            rows = torch.arange(block.first, block.first + len(valid))

            def pass_on(
                images: slice,
                latents: slice,
                acts: torch.Tensor,
                valid: torch.Tensor = valid,
                rows: torch.Tensor = rows,
            ) -> None:
                for consume, wanted in on_acts:
                    kept = valid[images] if wanted is None else valid[images] & wanted[rows[images]]
                    if kept.all():
                        consume(rows[images], latents, acts)
                    elif kept.any():
                        consume(rows[images][kept], latents, acts[kept.to(acts.device)])

            pooled = encoder.reduce(
                torch.from_numpy(block.activations), block.first, on_acts=pass_on if on_acts else None
            )
            here = valid.to(pooled.scores.device)
            chosen = PooledActs(pooled.scores[here], pooled.counts[:, here])
            for consume in consumers:
                consume(rows[valid], chosen)
            bar.advance(len(valid))
