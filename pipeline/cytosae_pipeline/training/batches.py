"""Batches of a training run as tensors, from disk, from memory, or from a tensor on the device."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from cytosae_cache.reading.concat import JoinedReader
from cytosae_cache.reading.loader import TrainingStream
from cytosae_cache.reading.reader import aligned_buffer
from cytosae_cache.reading.sampler import Sampling
from cytosae_pipeline.config import TrainConfig
from cytosae_pipeline.training.placement import Place


class TensorBatch(NamedTuple):
    """What one training step sees."""

    activations: torch.Tensor
    """Shape `(n, T, D)`, of the store's dtype; valid until the next batch is asked for."""
    position: int
    """Images' worth served when this batch has been used, over all epochs: where to resume."""


class Batches(Protocol):
    """A run's remaining batches."""

    @property
    def waited_s(self) -> float:
        """Seconds spent waiting for data so far."""
        ...

    def __iter__(self) -> Iterator[TensorBatch]: ...


class HostBatches:
    """Batches of a stream, in the host's memory.

    Args:
        stream: Where they come from.
    """

    def __init__(self, stream: TrainingStream) -> None:
        self._stream = stream

    @property
    def waited_s(self) -> float:
        """Seconds spent waiting for data so far."""
        return self._stream.waited_s

    def __iter__(self) -> Iterator[TensorBatch]:
        for batch in self._stream:
            yield TensorBatch(torch.from_numpy(batch.activations), batch.position)


class DeviceBatches:
    """The same batches, gathered from a tensor on the device that holds all images.

    Args:
        images: The images; all are read once, now.
        sampling: The order.
        position: Images' worth already served, over all epochs.
        stop: Position at which to stop.
        device: Where the tensor lies.
    """

    waited_s = 0.0
    """Nothing is waited for."""

    def __init__(
        self, images: JoinedReader, sampling: Sampling, *, position: int, stop: int, device: torch.device
    ) -> None:
        self._sampling, self._position, self._stop, self._device = sampling, position, stop, device
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
        n_parts, position = self._sampling.parts_per_row, self._position
        parts_nd = self._values.flatten(0, 1) if n_parts > 1 else self._values
        for parts in self._sampling.iter_batches(position=position, stop=self._stop):
            position += len(parts) // n_parts
            chosen = parts_nd.index_select(0, torch.from_numpy(parts).to(self._device))
            yield TensorBatch(chosen.view(-1, *self._image_shape), position)


def open_batches(
    images: JoinedReader, config: TrainConfig, *, position: int, device: torch.device, place: Place
) -> Batches:
    """A run's batches from `position` on; the same wherever the activations are kept.

    Args:
        images: What it trains on.
        config: Its options.
        position: Images already trained on.
        device: Where training runs.
        place: Where the activations are kept.
    """
    stop = config.total_training_tokens
    if place == "gpu":
        sampling = Sampling(
            images.layout, images.image_shape[0], config.batch_size, config.order, config.shuffle, config.batch_of
        )
        return DeviceBatches(images, sampling, position=position, stop=stop, device=device)
    make_buffer = _make_pinned if device.type == "cuda" else aligned_buffer
    stream = TrainingStream(
        images, batch_images=config.batch_size, seed=config.order, position=position, stop=stop, shuffle=config.shuffle,
        batch_of=config.batch_of, in_memory=place == "ram", make_buffer=make_buffer,
    )  # fmt: skip
    return HostBatches(stream)


def _make_pinned(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> npt.NDArray[Any]:
    """Page-locked memory, which a GPU copies from several times as fast."""
    return torch.empty(shape, dtype=_torch_dtype(dtype), pin_memory=True).numpy()


def _torch_dtype(dtype: np.dtype[np.generic]) -> torch.dtype:
    """Torch's name for a numpy type."""
    return torch.from_numpy(np.empty(0, dtype=dtype)).dtype
