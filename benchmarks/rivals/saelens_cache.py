"""SAELens' cache of activations: what its runner writes, and what its `ActivationsStore` reads.

A language model is needed to make one of its runners, which would compute the activations; here they are given.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Array2D, Features
from sae_lens.cache_activations_runner import CacheActivationsRunner
from sae_lens.config import CacheActivationsRunnerConfig
from sae_lens.training.activations_store import ActivationsStore

from benchmarks.rivals.cache_job import CacheJob, Given, run

HOOK = "activations"


class Images:
    """In place of the store that would run the language model."""

    def __init__(self, given: Given, batch_images: int) -> None:
        self._given, self._batch_images, self._at = given, batch_images, 0

    def get_raw_llm_batch(self) -> tuple[torch.Tensor, None]:
        """The next images, shape `(batch_images * n_tokens, d_model)`."""
        if self._at + self._batch_images > len(self._given):
            raise StopIteration
        part = torch.from_numpy(self._given[self._at : self._at + self._batch_images].copy())
        self._at += self._batch_images
        return part.flatten(0, 1), None


def make_config(job: CacheJob, path: Path) -> CacheActivationsRunnerConfig:
    return CacheActivationsRunnerConfig(
        dataset_path="none", model_name="none", model_batch_size=job.batch_images, hook_name=HOOK, d_in=job.d_model,
        training_tokens=job.n_images * job.n_tokens, context_size=job.n_tokens, device="cpu", dtype=job.dtype,
        new_cached_activations_path=str(path), buffer_size_gb=min(2.0, job.n_bytes / 1e9), shuffle=False,
    )  # fmt: skip


def write(job: CacheJob, given: Given, path: Path) -> None:
    runner = CacheActivationsRunner.__new__(CacheActivationsRunner)
    runner.cfg = make_config(job, path)
    runner.context_size = job.n_tokens
    runner.features = Features({HOOK: Array2D(shape=(job.n_tokens, job.d_model), dtype=job.dtype)})
    store: Any = Images(given, job.batch_images)
    runner.activations_store = store
    runner.run()


def read(job: CacheJob, path: Path) -> int:
    config = make_config(job, path)
    store = ActivationsStore(
        model=None, dataset=None, streaming=False, hook_name=HOOK, hook_head_index=None, context_size=job.n_tokens,
        d_in=job.d_model, n_batches_in_buffer=20, total_training_tokens=config.training_tokens,
        store_batch_size_prompts=job.batch_images, train_batch_size_tokens=job.batch_images * job.n_tokens,
        prepend_bos=False, normalize_activations="none", device=torch.device("cpu"), dtype=job.dtype,
        cached_activations_path=str(path),
    )  # fmt: skip
    n_read = 0
    for _ in range(job.n_images // job.batch_images):
        n_read += len(next(store))
    return n_read


if __name__ == "__main__":
    run(version("sae-lens"), write, read)
