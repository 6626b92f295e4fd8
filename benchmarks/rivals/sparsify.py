"""sparsify: `Trainer`, which hooks a module of a model; here the module's output is the next batch."""

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sparsify import SparseCoder, SparseCoderConfig, TrainConfig, Trainer
from torch import nn

from benchmarks.rivals.job import Batches, Job, Trained, run


class Replay(nn.Module):
    """A module that returns the batches one after another, as images of tokens, whatever its input is."""

    def __init__(self, job: Job, stream: Iterator[torch.Tensor]) -> None:
        super().__init__()
        self._shape, self._stream = (job.batch_images, job.tokens_per_image, job.d_in), stream
        self._device = job.device

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The next batch, shape `(batch_images, tokens_per_image, d_in)`."""
        if torch.is_inference_mode_enabled():  # the trainer asks for the width first
            return torch.zeros(self._shape, device=self._device)
        return next(self._stream).view(self._shape).to(self._device)


class Model(nn.Module):
    """What the trainer needs to know of a language model, around a `Replay`."""

    def __init__(self, job: Job, stream: Iterator[torch.Tensor]) -> None:
        super().__init__()
        self.activations = Replay(job, stream)
        self.device = torch.device(job.device)
        self.config = SimpleNamespace(num_hidden_layers=1)
        self.dummy_inputs = {"input_ids": torch.zeros(job.batch_images, job.tokens_per_image, dtype=torch.long)}

    @property
    def base_model(self) -> nn.Module:
        """Where hook points are looked up."""
        return self

    def forward(self, input_ids: torch.Tensor) -> Any:  # noqa: ANN401 - the trainer ignores it
        """Run the one module."""
        return self.activations(input_ids)


def train(job: Job, batches: Batches) -> Trained:
    config = TrainConfig(
        SparseCoderConfig(num_latents=job.n_latents, k=job.k), batch_size=job.batch_images, lr=job.rate,
        hookpoints=["activations"], init_seeds=[job.seed], log_to_wandb=False, save_dir=job.folder, run_name="run",
    )  # fmt: skip
    image = {"input_ids": torch.zeros(job.tokens_per_image, dtype=torch.long)}
    model = Model(job, batches.take(job.n_steps))
    trainer = Trainer(config, [image] * (job.n_steps * job.batch_images), model)
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    trainer.fit()
    path = Path(job.folder) / "run" / "activations"
    saved = SparseCoder.load_from_disk(path, device=job.device)
    return Trained(path, lambda x: saved(x.to(job.device)).sae_out.cpu(), rate, {}, {})


if __name__ == "__main__":
    run(version("eai-sparsify"), train)
