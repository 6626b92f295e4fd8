"""One pass of the encoder over a store that feeds any number of accumulators."""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence

import torch

from cytosae.statistics.block_encoder import BLOCK_IMAGES, BlockEncoder, ImageEncoder, PooledActs
from cytosae.statistics.screened_encoder import ScreenedEncoder, make_screened_encoder
from cytosae.statistics.screened_images import ScreenedImageEncoder
from cytosae_cache.reading.loader import iter_row_blocks
from cytosae_cache.reading.permutation import spread_rows
from cytosae_cache.reading.prefetch import PREFETCHED
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.config import PassOptions
from cytosae_pipeline.errors import say_count
from cytosae_pipeline.runtime.devices import DTYPES
from cytosae_pipeline.runtime.memory import available_ram, exceeds_page_cache
from cytosae_pipeline.runtime.product_rates import find_rates
from cytosae_pipeline.runtime.progress import Progress
from cytosae_pipeline.runtime.shortage import require_memory
from cytosae_pipeline.statistics.inputs import Inputs

logger = logging.getLogger(__name__)

_WORTHWHILE = 5e12
"""Operations of the encoder's product, about half a minute, from which finding out how it takes less time pays."""
_SAMPLED_IMAGES, _SAMPLED_TOKENS = 8, 256
"""Images, and tokens of them, on which latents that can be active are counted."""
_SCREENING, _EXACT, _MOST_COST = 1.35, 10.0, 0.8
"""Time of a screened product in terms of the dense one: of the 8-bit product with everything around it, in terms of the
product alone; of computing all activations by the screen; and up to which the screen is used. Fitted to a few
autoencoders on one machine: a guess decides about time, not about results."""

PooledConsumer = Callable[[torch.Tensor, PooledActs], None]
"""Takes row numbers, int64, shape `(n,)`, and what was pooled of each."""

ActsConsumer = Callable[[torch.Tensor, slice, torch.Tensor], None]
"""Takes row numbers, shape `(n,)`, a range of latents, and their activations, float32, shape `(n, T, n_latents)`, which
are valid until it returns."""


ActsRequest = tuple[ActsConsumer, torch.Tensor | None]
"""A consumer of activations, and the images that it takes, bool, shape `(n_images,)`; None for all readable ones."""


def make_encoder(
    inputs: Inputs, config: PassOptions, thresholds: Sequence[float] = (), *, screened: bool | None = None
) -> ImageEncoder:
    """The encoder in the precision that the options ask for; `auto` is fp32, of latents that can be active alone.

    Args:
        inputs: Store and autoencoder.
        config: Options.
        thresholds: Thresholds of the counts.
        screened: What `is_screened` has found, where it was asked before.
    """
    sae = inputs.sae
    if config.precision == "auto" and (screened is None or (screened and sae.W_enc.device.type == "cpu")):
        encoder = _choose_screened(inputs, config) if screened is None else make_screened_encoder(sae)
        if encoder is not None:
            return ScreenedImageEncoder(sae, encoder, thresholds)
    dtype = DTYPES["fp32" if config.precision == "auto" else config.precision]
    return BlockEncoder(sae, thresholds, dtype=dtype)


def is_screened(inputs: Inputs, config: PassOptions) -> bool:
    """Whether `make_encoder` chooses the encoder of latents that can be active alone.

    It is asked once for all workers of a cluster: the two encoders round differently.
    """
    return config.precision == "auto" and _choose_screened(inputs, config) is not None


def _choose_screened(inputs: Inputs, config: PassOptions) -> ScreenedEncoder | None:
    """The screened encoder if it takes less time on this machine; None if not, and for little work.

    Which latents can be active is counted on a few tokens of images all over the store.
    """
    sae, store = inputs.sae, inputs.store
    if sae.W_enc.device.type != "cpu" or sae.W_enc.dtype != torch.float32 or not len(store.valid_rows):
        return None
    if 2 * store.n_images * store.n_tokens * sae.W_enc.numel() < _WORTHWHILE:
        return None
    rates = find_rates(len(sae.b_dec))
    cost = _SCREENING * rates.fp32 / max(rates.int8, 1.0)
    if cost > _MOST_COST or (encoder := make_screened_encoder(sae)) is None:
        return None
    rows = store.valid_rows[spread_rows(len(store.valid_rows), _SAMPLED_IMAGES)]
    with store.open_reader(verify=not config.no_verify) as reader:
        tokens = torch.from_numpy(reader.read(rows)).flatten(0, 1)
    tokens = tokens[torch.from_numpy(spread_rows(len(tokens), _SAMPLED_TOKENS))].float() - sae.b_dec.detach()
    share = encoder.candidate_share(tokens)
    if cost + _EXACT * share > _MOST_COST:
        return None
    logger.info(f"encoder: products of 8 bits show that {1 - share:.1%} of all activations are 0; the others in fp32")
    return encoder


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
    require_memory(n_bytes, available_ram(), f"reading {say_count(n_at_once, 'image')} at once", advice)


def encode_store(
    inputs: Inputs,
    config: PassOptions,
    consumers: Sequence[PooledConsumer],
    *,
    thresholds: Sequence[float] = (),
    on_acts: Sequence[ActsRequest] = (),
    what: str,
) -> None:
    """Encode every readable image once and pass on its scores and counts, with a progress bar.

    Args:
        inputs: Store and autoencoder.
        config: Batch size, precision, and whether checksums are verified.
        consumers: As for `encode_shards`.
        thresholds: Thresholds of the counts.
        on_acts: As for `encode_shards`.
        what: Name of the work, shown with the progress.

    Raises:
        NotEnoughMemoryError: If the batch size does not fit into memory.
    """
    store = inputs.store
    with Progress(what, store.n_images, "images") as bar:
        encode_shards(
            inputs, config, range(store.n_shards), consumers, thresholds=thresholds, on_acts=on_acts,
            advance=bar.advance,
        )  # fmt: skip


def encode_shards(
    inputs: Inputs,
    config: PassOptions,
    shards: range,
    consumers: Sequence[PooledConsumer],
    *,
    thresholds: Sequence[float] = (),
    on_acts: Sequence[ActsRequest] = (),
    screened: bool | None = None,
    advance: Callable[[int], None] = lambda n_images: None,
) -> None:
    """Encode every readable image of some shards once and pass on its scores and counts.

    Args:
        inputs: Store and autoencoder.
        config: Batch size, precision, and whether checksums are verified.
        shards: Consecutive shards; what is passed on does not depend on which others are encoded with them.
        consumers: Called in turn with the pooled activations of each batch.
        thresholds: Thresholds of the counts.
        on_acts: Called with the activations of all tokens before they are pooled, a few images and latents at a time;
            each with the images that it takes, bool, shape `(n_images,)`, or None for all readable ones.
        screened: As for `make_encoder`.
        advance: Called with the number of images of each batch after it.

    Raises:
        NotEnoughMemoryError: If the batch size does not fit into memory.
    """
    store, part = inputs.store, rows_of(inputs, shards)
    n_at_once = rows_at_once(config, store.n_images)
    require_batch_memory(inputs, n_at_once, len(thresholds))
    encoder = make_encoder(inputs, config, thresholds, screened=screened)
    direct = exceeds_page_cache(store.n_images * store.spec.record_bytes)
    for one, start, own in _cut(store, part):
        with one.open_reader(verify=not config.no_verify, direct=direct) as reader:
            for block in iter_row_blocks(reader, block_rows=n_at_once, start=own.start, stop=own.stop):
                valid = torch.from_numpy(block.valid)
                rows = torch.arange(block.first, block.first + len(valid)) + start
                pooled = encoder.reduce(
                    torch.from_numpy(block.activations),
                    block.first,
                    on_acts=functools.partial(_pass_on, on_acts, rows, valid) if on_acts else None,
                )
                here = valid.to(pooled.scores.device)
                chosen = PooledActs(pooled.scores[here], pooled.counts[:, here])
                for consume in consumers:
                    consume(rows[valid], chosen)
                advance(len(valid))


def _cut(store: ActivationStore, rows: range) -> Iterator[tuple[ActivationStore, int, range]]:
    """The parts of a store that rows are in: store, number of its first row, and its own rows.

    Each by itself, so that blocks of the encoder begin where they do for the part alone: the statistics of joined
    stores are those of their parts, merged.
    """
    start = 0
    for part in store.parts:
        low, high = max(rows.start - start, 0), min(rows.stop - start, part.n_images)
        if low < high:
            yield part, start, range(low, high)
        start += part.n_images


def rows_of(inputs: Inputs, shards: range) -> range:
    """Rows of consecutive shards."""
    if not shards:
        return range(0)
    return range(inputs.store.shard_rows(shards.start).start, inputs.store.shard_rows(shards[-1]).stop)


def _pass_on(
    on_acts: Sequence[ActsRequest],
    rows: torch.Tensor,
    valid: torch.Tensor,
    images: slice,
    latents: slice,
    acts: torch.Tensor,
) -> None:
    """Call each consumer of activations with those of the images that it takes."""
    for consume, wanted in on_acts:
        kept = valid[images] if wanted is None else valid[images] & wanted[rows[images]]
        if kept.all():
            consume(rows[images], latents, acts)
        elif kept.any():
            consume(rows[images][kept], latents, acts[kept.to(acts.device)])
