"""What an adapter is sent and what it sends back, in any environment that has torch and numpy.

On stdin: one line of JSON, a `Job`, and then float32 batches of shape `(n, d_in)`: `n_scaling` for the program's own
measure of scale, `n_steps` to train on, and one on which the trained autoencoder's forward pass is written down.
Results are files in the job's folder; what a program prints is none of them.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

ANSWER_NAME = "answer.json"
"""File with what was measured."""

FORWARD_NAME = "forward.npy"
"""File with the reconstruction of the last batch, float32, shape `(n, d_in)`."""

PREFIXES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Shares of the latents in the nested dictionaries of matryoshka, the same for all programs."""


class Job(NamedTuple):
    """One autoencoder to train."""

    arch: str
    """Our name of the architecture."""
    k: int
    """Wanted mean number of active latents per token."""
    d_in: int
    """Width D of the activations."""
    n_latents: int
    """Latents S."""
    tokens_per_image: int
    """Tokens of an image."""
    batch_images: int
    """Images in a batch."""
    n_steps: int
    """Batches to train on."""
    n_scaling: int
    """Batches before them, from which the program may measure the scale of the activations."""
    seed: int
    """Seed of the weights."""
    order_seed: int
    """Seed of the order; used by our own trainer, which reads the store itself."""
    rate: float | None
    """Learning rate; None for the program's default."""
    scaled: bool
    """Whether to switch on the program's option that scales activations."""
    folder: str
    """Folder to save to."""
    store: str
    """Path of the store; used by our own trainer alone."""
    expansion: int
    """Latents per channel."""
    held_out: float
    """Share of the images that is not trained on; used by our own trainer alone."""
    precision: str
    """Type of products; `fp32` for all programs but ours."""
    device: str
    """Where to train: `cpu` or `cuda`."""

    @property
    def batch_tokens(self) -> int:
        """Tokens in a batch."""
        return self.batch_images * self.tokens_per_image


class Trained(NamedTuple):
    """What an adapter made of a job."""

    path: Path
    """The autoencoder in the program's own format."""
    forward: Callable[[torch.Tensor], torch.Tensor]
    """The program's own forward pass of the saved autoencoder, for inference."""
    rate: float
    """Learning rate that was used."""
    stated: dict[str, Any]
    """Options of `cytosae.load` for what the format does not contain."""
    changed: dict[str, Any]
    """Defaults of the program that had to be changed, with their values."""


class Batches:
    """Batches from stdin, each in memory of its own.

    Args:
        stream: Where they come from.
        job: The job.
    """

    def __init__(self, stream: BinaryIO, job: Job) -> None:
        self._stream, self._shape = stream, (job.batch_tokens, job.d_in)
        self.waited_s = 0.0
        """Seconds spent waiting for batches and copying them."""

    def read(self) -> torch.Tensor:
        """The next batch, float32, shape `(batch_tokens, d_in)`.

        Raises:
            EOFError: If the stream ends.
        """
        started = time.perf_counter()
        batch = np.empty(self._shape, dtype=np.float32)
        left = memoryview(batch).cast("B")
        while len(left):
            n_read = self._stream.readinto(left)  # type: ignore[attr-defined]
            if not n_read:
                raise EOFError("the stream of batches has ended")
            left = left[n_read:]
        self.waited_s += time.perf_counter() - started
        return torch.from_numpy(batch)

    def take(self, n_batches: int) -> Iterator[torch.Tensor]:
        """The next batches."""
        for _ in range(n_batches):
            yield self.read()


def run(version: str, train: Callable[[Job, Batches], Trained]) -> None:
    """Carry out the job on stdin.

    Args:
        version: Version of the program.
        train: Trains and saves.
    """
    job = Job(**json.loads(sys.stdin.buffer.readline()))
    batches = Batches(sys.stdin.buffer, job)
    torch.manual_seed(job.seed)
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    trained = train(job, batches)
    cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
    peak_mb = measure_peak_mb()
    with torch.no_grad():
        forward = trained.forward(batches.read()).detach().float().numpy()
    is_finite = bool(np.isfinite(forward).all())
    np.save(Path(job.folder) / FORWARD_NAME, forward)
    answer = {
        "path": str(trained.path.relative_to(job.folder)), "stated": trained.stated, "rate": trained.rate,
        "changed": trained.changed, "is_finite": is_finite, "version": version,
        "torch": torch.__version__, "cpu_s": cpu_s, "wall_s": wall_s, "waited_s": batches.waited_s,
        "peak_mb": peak_mb,
    }  # fmt: skip
    (Path(job.folder) / ANSWER_NAME).write_text(json.dumps(answer))


def measure_peak_mb() -> float:
    """Megabytes of resident memory that this process has used at most."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: on Linux it also counts the process that started this one.
        (kilobytes,) = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(kilobytes) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
