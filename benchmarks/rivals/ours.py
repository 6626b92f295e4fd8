"""Ours: `cytosae_pipeline`'s training in this repository, which reads the store itself, with the preset `modern`."""

from pathlib import Path

from benchmarks.rivals.job import Batches, Job, Trained, run
from cytosae_pipeline import __version__
from cytosae_pipeline.config import TrainConfig
from cytosae_pipeline.training.loop import train as train_sae


def train(job: Job, batches: Batches) -> Trained:
    rate = {} if job.rate is None else {"lr": job.rate}
    config = TrainConfig(
        root_dir=Path(job.folder), store=job.store, run_name="run", preset="modern", arch=job.arch, k=job.k,
        expansion_factor=job.expansion, batch_size=job.batch_images,
        total_training_tokens=job.n_steps * job.batch_images, held_out=job.held_out, seed=job.seed,
        order_seed=job.order_seed, n_checkpoints=0, precision=job.precision, device=job.device, **rate,
    )  # fmt: skip
    result = train_sae(config)
    sae = result.load()
    return Trained(result.sae, lambda x: sae.decode(sae.encode(x)), config.lr, {}, {})


if __name__ == "__main__":
    run(__version__, train)
