"""dictionary_learning: `trainSAE`, which takes anything that yields batches."""

import itertools
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.training import trainSAE
from dictionary_learning.utils import load_dictionary

from benchmarks.rivals.job import PREFIXES, Batches, Job, Trained, run

TRAINERS: dict[str, Any] = {
    "topk": TopKTrainer,
    "batchtopk": BatchTopKTrainer,
    "matryoshka": MatryoshkaBatchTopKTrainer,
    "jumprelu": JumpReluTrainer,
}

FULL_STEPS = 10_000
"""Its defaults, a warm-up of 1,000 steps among them, are taken to be for runs of at least so many steps."""


class Data:
    """What `trainSAE` iterates over: first for the scale of the activations, if it is asked to, then for training."""

    def __init__(self, job: Job, batches: Batches) -> None:
        passes = ([job.n_scaling] if job.scaled else []) + [job.n_steps]
        self._device, self._passes = job.device, iter([batches.take(n_batches) for n_batches in passes])

    def __iter__(self) -> Iterator[Any]:
        # Its trainers take batches where they are.
        return (batch.to(self._device) for batch in next(self._passes))


def train(job: Job, batches: Batches) -> Trained:
    changed = shorten(job)
    options: dict[str, Any] = {"target_l0": float(job.k)} if job.arch == "jumprelu" else {"k": job.k}
    if job.arch == "matryoshka":
        options["group_fractions"] = [end - start for start, end in itertools.pairwise([0.0, *PREFIXES])]
    config = {
        "trainer": TRAINERS[job.arch], "steps": job.n_steps, "activation_dim": job.d_in, "dict_size": job.n_latents,
        "layer": 0, "lm_name": "none", "seed": job.seed, "device": job.device, **options, **changed,
    }  # fmt: skip
    if job.rate is not None:
        config["lr"] = job.rate
    trainSAE(
        Data(job, batches), [config], steps=job.n_steps, save_dir=job.folder, device=job.device,
        normalize_activations=job.scaled,
    )  # fmt: skip
    path = Path(job.folder) / "trainer_0"
    rate = json.loads((path / "config.json").read_text())["trainer"]["lr"]
    if job.scaled:
        changed["normalize_activations"] = True
    return Trained(path, load_dictionary(str(path), "cpu")[0], rate, {}, changed)


def shorten(job: Job) -> dict[str, Any]:
    """Its numbers of steps, in proportion, if a run is so short that they do not fit."""
    factor = job.n_steps / FULL_STEPS
    if factor >= 1:
        return {}
    warm_up = {"warmup_steps": round(1000 * factor)}
    if job.arch == "jumprelu":
        return {**warm_up, "sparsity_warmup_steps": round(2000 * factor)}
    # The threshold for inference is a running mean: over the last 1,000 steps of a whole run.
    return {**warm_up, "threshold_start_step": round(1000 * factor), "threshold_beta": max(0.0, 1 - 0.001 / factor)}


if __name__ == "__main__":
    run(version("dictionary-learning"), train)
