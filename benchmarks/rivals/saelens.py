"""SAELens: `SAETrainer`, which takes an iterator of batches."""

from importlib.metadata import version
from pathlib import Path

from sae_lens import SAE
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer

from benchmarks.rivals.job import PREFIXES, Batches, Job, Trained, run


def train(job: Job, batches: Batches) -> Trained:
    options, name = {
        "topk": ({"k": job.k}, "topk"),
        "batchtopk": ({"k": job.k}, "batchtopk"),
        "matryoshka": (
            {"k": job.k, "matryoshka_widths": [round(share * job.n_latents) for share in PREFIXES]},
            "matryoshka_batchtopk",
        ),
        # Of its three sparsity terms only this one aims at a number of active latents.
        "jumprelu": ({"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": job.k}, "jumprelu"),
    }[job.arch]
    kind, make_sae_config = get_sae_training_class(name)
    scaling = {"normalize_activations": "expected_average_only_in"} if job.scaled else {}
    sae = kind(make_sae_config(d_in=job.d_in, d_sae=job.n_latents, device=job.device, **options, **scaling))
    config = SAETrainerConfig(
        total_training_samples=job.n_steps * job.batch_tokens,
        train_batch_size_samples=job.batch_tokens,
        n_batches_for_norm_estimate=job.n_scaling,
        device=job.device,
        **({} if job.rate is None else {"lr": job.rate}),
    )
    # Its runner for language models fills this in; a constant rate ignores it.
    config.lr_end = config.lr / 10
    SAETrainer(config, sae, batches.take(job.n_scaling + job.n_steps)).fit()
    path = Path(job.folder) / "sae"
    sae.save_inference_model(path)
    changed = {} if job.arch != "jumprelu" else {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": job.k}
    if job.scaled:
        changed |= {"normalize_activations": "expected_average_only_in", "n_batches_for_norm_estimate": job.n_scaling}
    return Trained(path, SAE.load_from_disk(path, device="cpu"), config.lr, {}, changed)


if __name__ == "__main__":
    run(version("sae-lens"), train)
