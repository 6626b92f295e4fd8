"""overcomplete: `train_sae`, which takes anything that yields batches, with the loss and optimizer of its README."""

import sys
import types
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.rivals.job import Batches, Job, Trained, run

RATE = 5e-4
"""Learning rate of the example in its README; `train_sae` has no default."""


def train(job: Job, batches: Batches) -> Trained:
    # Its autoencoders do not use torchvision, whose build would have to match that of torch.
    sys.modules["torchvision"] = types.ModuleType("torchvision")
    sys.modules["torchvision"].transforms = None  # type: ignore[attr-defined]
    from overcomplete.sae import BatchTopKSAE, TopKSAE, train_sae

    changed = {}
    if job.arch == "batchtopk":
        # Its top_k counts the active latents of a whole batch.
        changed["top_k"] = job.k * job.batch_tokens
        sae = BatchTopKSAE(job.d_in, job.n_latents, device=job.device, **changed)
    else:
        sae = TopKSAE(job.d_in, job.n_latents, top_k=job.k, device=job.device)
    rate = job.rate or RATE
    optimizer = torch.optim.Adam(sae.parameters(), lr=rate)
    train_sae(
        sae, batches.take(job.n_steps), mean_squared_error, optimizer, nb_epochs=1, monitoring=0, device=job.device
    )
    sae.eval()
    path = Path(job.folder) / "sae.pt"
    torch.save(sae.state_dict(), path)
    if job.arch == "topk":
        stated = {"sae_arch": "topk", "sae_k": job.k}
    else:
        # A latent at its threshold is active there. The threshold is not in its state dict.
        below = torch.nextafter(sae.running_threshold.cpu(), torch.tensor(-torch.inf))
        stated = {"sae_arch": "batchtopk", "sae_threshold": float(below)}
    return Trained(path, lambda x: sae(x.to(job.device))[2].cpu(), rate, stated, changed)


def mean_squared_error(
    x: torch.Tensor, x_hat: torch.Tensor, pre_codes: torch.Tensor, codes: torch.Tensor, dictionary: torch.Tensor
) -> torch.Tensor:
    """The loss of the example in its README."""
    return (x - x_hat).square().mean()


if __name__ == "__main__":
    run(version("overcomplete"), train)
