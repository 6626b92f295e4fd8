"""The images of a store that a campaign trains on and evaluates on, as our own training divides and orders them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cytosae.sae.base import Sae
from cytosae_cache.reading.concat import ConcatReader
from cytosae_cache.reading.loader import ShuffledLoader
from cytosae_cache.reading.permutation import spread_rows
from cytosae_cache.reading.reader import StoreReader
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.training.evaluation import Evaluation, evaluate
from cytosae_pipeline.training.holdout import held_out
from cytosae_pipeline.training.matmul import fp32_matmul


class Data:
    """A store, divided by the hash of `--held_out`.

    Args:
        path: The store.
        share: Share of the images to hold out.
        batch_images: Images of a batch.
    """

    def __init__(self, path: Path, share: float, batch_images: int) -> None:
        self.store = ActivationStore.open(path)
        self.batch_images = batch_images
        """Images of a batch."""
        self._stack = contextlib.ExitStack()
        reader = self._stack.enter_context(StoreReader(self.store))
        apart = held_out(self.store, share, "image")
        self.trained, self.evaluated = ConcatReader([reader], [~apart]), ConcatReader([reader], [apart])

    def __enter__(self) -> "Data":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def iter_batches(self, seed: int, n_batches: int) -> Iterator[np.ndarray]:
        """Batches of tokens in the order of our own training, float32, shape `(n, n_tokens, d_model)`."""
        loader = ShuffledLoader(
            self.trained, batch_images=self.batch_images, seed=seed, stop=n_batches * self.batch_images,
            batch_of="tokens",
        )  # fmt: skip
        for batch in loader:
            yield batch.activations.astype(np.float32)

    def held_out_batch(self) -> np.ndarray:
        """As many held-out tokens as a batch has, float32, shape `(n, d_model)`; images repeat if there are too few."""
        n_images = len(self.evaluated)
        chosen = np.resize(spread_rows(n_images, min(n_images, self.batch_images)), self.batch_images)
        values = np.empty((len(chosen), *self.evaluated.image_shape), dtype=self.evaluated.dtype)
        self.evaluated.read(chosen.astype(np.int64), values)
        return values.astype(np.float32).reshape(-1, values.shape[-1])

    def evaluate(self, sae: Sae) -> Evaluation:
        """Metrics of the held-out images, by the formulas of `evaluate`."""
        matmul = fp32_matmul(sae.b_enc.device)
        return evaluate(sae, self.evaluated, self.store.spec.tokens, matmul=matmul)
