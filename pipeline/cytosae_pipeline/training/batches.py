"""Batches of a training run as tensors, from disk, from memory, or from a tensor on the device."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from cytosae.sae.world import ALONE, World
from cytosae_cache.reading.concat import ConcatReader
from cytosae_cache.reading.loader import ShuffledLoader
from cytosae_cache.reading.reader import aligned_buffer
from cytosae_cache.reading.sampler import Sampler
from cytosae_pipeline.config import TrainConfig
from cytosae_pipeline.training.placement import Place

ChooseTokens = Callable[[torch.Tensor], torch.Tensor]
"""Takes activations of images, shape `(n, T, D)`, and returns a view of the tokens to train on."""


class TensorBatch(NamedTuple):
    """Input of one training step."""

    activations: torch.Tensor
    """Of the chosen tokens, shape `(n, T, D)`, of the store's dtype; valid until the next batch is asked for."""
    samples_seen: int
    """Images served after this batch by all processes, over all epochs: where to resume. Mixed tokens count as
    fractions of images."""


class Batches(Protocol):
    """A run's remaining batches."""

    @property
    def waited_s(self) -> float:
        """Seconds spent waiting for data so far."""
        ...

    def __iter__(self) -> Iterator[TensorBatch]: ...


class HostBatches:
    """Batches of a stream, in the host's memory, or copied to a CUDA device while it still computes.

    Args:
        stream: Source of the batches, in page-locked memory if they are copied.
        choose: Chooses the tokens.
        device: Device of the training.
    """

    def __init__(self, stream: ShuffledLoader, choose: ChooseTokens, device: torch.device) -> None:
        self._stream, self._choose, self._device = stream, choose, device

    @property
    def waited_s(self) -> float:
        """Seconds spent waiting for data so far."""
        return self._stream.waited_s

    def __iter__(self) -> Iterator[TensorBatch]:
        for batch in self._stream:
            images = torch.from_numpy(batch.activations)
            if self._device.type != "cuda":
                yield TensorBatch(self._choose(images), batch.samples_seen)
                continue
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            values = copy_chosen(images, self._choose, self._device)
            copied.record(torch.cuda.current_stream(self._device))
            try:
                yield TensorBatch(values, batch.samples_seen)
            finally:
                # CPU-GPU sync point: the stream fills the memory again. It waits for the copy alone, not for the step
                # on it, so that the host is at most one step ahead.
                copied.synchronize()


def copy_chosen(images: torch.Tensor, choose: ChooseTokens, device: torch.device) -> torch.Tensor:
    """The chosen tokens on a device; from page-locked memory, the copy may end later than the call.

    Most of an image's tokens are chosen on the device: from a part of the memory, torch would first make a copy on the
    host.
    """
    chosen = choose(images)
    if 2 * chosen.numel() > images.numel():
        return choose(images.to(device, non_blocking=True))
    return chosen.to(device, non_blocking=True)


class DeviceBatches:
    """The same batches, gathered from a tensor of all images on the device.

    Args:
        images: The images; all are read once, on construction.
        sampling: The order.
        choose: Chooses the tokens.
        samples_seen: Images already served, over all epochs.
        stop: Number of images after which to stop.
        device: Device of the tensor.
        world: The processes, each of which is served its part of every batch.
    """

    waited_s = 0.0
    """Batches in memory never wait."""

    def __init__(
        self,
        images: ConcatReader,
        sampling: Sampler,
        choose: ChooseTokens,
        *,
        samples_seen: int,
        stop: int,
        device: torch.device,
        world: World = ALONE,
    ) -> None:
        self._sampling, self._samples_seen, self._stop, self._device = sampling, samples_seen, stop, device
        self._world = world
        self._choose = choose
        self._image_shape = images.image_shape
        self._values = torch.empty((len(images), *images.image_shape), dtype=_torch_dtype(images.dtype), device=device)
        buffer: npt.NDArray[Any] = np.empty((0, *images.image_shape), dtype=images.dtype)
        for block in images.iter_blocks():
            if len(buffer) < block.stop - block.start:
                buffer = np.empty((block.stop - block.start, *images.image_shape), dtype=images.dtype)
            values = buffer[: block.stop - block.start]
            images.read_block(block, values)
            self._values[block] = torch.from_numpy(values).to(device)

    def __iter__(self) -> Iterator[TensorBatch]:
        n_parts, samples_seen = self._sampling.parts_per_row, self._samples_seen
        parts_nd = self._values.flatten(0, 1) if n_parts > 1 else self._values
        for parts in self._sampling.iter_batches(samples_seen=samples_seen, stop=self._stop):
            samples_seen += len(parts) // n_parts
            own = self._world.share(len(parts) // n_parts)
            parts = parts[own.start * n_parts : own.stop * n_parts]
            # Without waiting for the last step; the driver has read ordinary memory before the call returns.
            at = torch.from_numpy(parts).to(self._device, non_blocking=True)
            batch = parts_nd.index_select(0, at).view(own.stop - own.start, *self._image_shape)
            yield TensorBatch(self._choose(batch), samples_seen)


def open_batches(
    images: ConcatReader,
    config: TrainConfig,
    choose: ChooseTokens,
    *,
    samples_seen: int,
    device: torch.device,
    place: Place,
    world: World = ALONE,
) -> Batches:
    """A run's remaining batches; they are the same wherever the activations are kept.

    Args:
        images: Training images.
        config: Options of the run.
        choose: Chooses the tokens to train on.
        samples_seen: Images already trained on.
        device: Device of the training.
        place: Where the activations are kept.
        world: The processes that share every batch.
    """
    stop = config.total_training_tokens
    if place == "gpu":
        sampling = Sampler(
            images.layout,
            images.image_shape[0],
            config.batch_size,
            config.shuffle_seed,
            config.shuffle,
            config.batch_of,
        )
        return DeviceBatches(images, sampling, choose, samples_seen=samples_seen, stop=stop, device=device, world=world)
    make_buffer = _make_pinned if device.type == "cuda" else aligned_buffer
    stream = ShuffledLoader(
        images, batch_images=config.batch_size, seed=config.shuffle_seed, samples_seen=samples_seen, stop=stop,
        shuffle=config.shuffle, batch_of=config.batch_of, in_memory=place == "ram", make_buffer=make_buffer,
        part=(world.rank, world.size),
    )  # fmt: skip
    return HostBatches(stream, choose, device)


def _make_pinned(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> npt.NDArray[Any]:
    """Page-locked memory, from which copies to a GPU are several times as fast."""
    return torch.empty(shape, dtype=_torch_dtype(dtype), pin_memory=True).numpy()


def _torch_dtype(dtype: np.dtype[np.generic]) -> torch.dtype:
    """Torch's name for a numpy type."""
    return torch.from_numpy(np.empty(0, dtype=dtype)).dtype
