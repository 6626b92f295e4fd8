"""What training runs need of memory and disk, known from their shapes before anything is allocated or written."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cytosae.sae.base import Sae
from cytosae.sae.registry import make_sae
from cytosae_cache.reading.prefetch import PREFETCHED
from cytosae_pipeline.building.store_place import free_bytes
from cytosae_pipeline.errors import say_count
from cytosae_pipeline.runtime.progress import format_bytes
from cytosae_pipeline.runtime.shortage import require_memory
from cytosae_pipeline.training.placement import FreeMemory
from cytosae_pipeline.training.runs import Run, TrainingError

_N_STATES = 2
_MOMENTS = 2
_COPIES = 3 + _MOMENTS
"""Copies of the parameters while training: values, gradients, Adam's moments, and what is saved."""
_SMALLER = "Lower --expansion_factor or --batch_size"


@dataclass(frozen=True)
class DiskNeeds:
    """Bytes that training runs write into their folders."""

    n_checkpoints: int
    """Intermediate checkpoints of all runs together."""
    sae_bytes: int
    """Size of an autoencoder's file; of the largest, if runs differ."""
    total_bytes: int
    """Bytes at the worst moment, those included that are on disk already."""
    there_bytes: int
    """Bytes of these files that are on disk already."""

    @property
    def more_bytes(self) -> int:
        """Bytes that have to be free."""
        return max(0, self.total_bytes - self.there_bytes)

    def describe(self, n_runs: int) -> str:
        """What is written, as text."""
        whose = "" if n_runs == 1 else f" of {n_runs} runs"
        return (
            f"{self.n_checkpoints:,} checkpoints, final autoencoders and states{whose} take up to "
            f"{format_bytes(self.total_bytes)} of disk ({format_bytes(self.sae_bytes)} per autoencoder)"
        )


def find_disk_needs(runs: Sequence[Run]) -> DiskNeeds:
    """Disk that runs need for checkpoints, final autoencoders and, while they run, two states each.

    Args:
        runs: Unfinished runs.
    """
    counts = [min(run.config.n_checkpoints, run.n_steps) for run in runs]
    sizes = [sae_file_bytes(run) for run in runs]
    total = sum(
        (count + 1) * size + _N_STATES * state_file_bytes(run)
        for run, count, size in zip(runs, counts, sizes, strict=True)
    )
    there = sum(path.stat().st_size for run in runs for path in run.folder.glob("*.pt") if path.is_file())
    return DiskNeeds(sum(counts), max(sizes), total, there)


def require_disk(runs: Sequence[Run]) -> str:
    """Refuse runs whose checkpoints and states do not fit on the disk.

    Args:
        runs: Unfinished runs.

    Returns:
        What they need, as one line.

    Raises:
        TrainingError: If less is free; the message says what makes it smaller.
    """
    needs, folder = find_disk_needs(runs), runs[0].folder.parent
    free = free_bytes(Path(folder))
    text = needs.describe(len(runs))
    if free is not None and needs.more_bytes > free:
        raise TrainingError(
            f"{text}, but only {format_bytes(free)} are free at '{folder}'. Free some space, or lower --n_checkpoints "
            "or --expansion_factor"
        )
    return text


def require_training_memory(runs: Sequence[Run], free: FreeMemory) -> None:
    """Refuse runs that certainly do not fit into memory.

    Args:
        runs: Runs, trained side by side on one stream.
        free: Free memory; `gpu` counts only for runs on a GPU.

    Raises:
        NotEnoughMemoryError: If they do not; the message says how much is needed and what makes it smaller.
    """
    first = runs[0]
    widest = max(run.n_latents for run in runs)
    what = f"training {len(runs)} autoencoders of up to {widest:,} latents"
    advice = f"{_SMALLER}, or train fewer runs at once"
    if len(runs) == 1:
        what, advice = f"training an autoencoder of {widest:,} latents", _SMALLER
    what += f" on batches of {say_count(first.batch_images, 'image')}"
    weights = sum(4 * n_parameters(run) // run.latent_ranks.size for run in runs)
    tokens = first.batch_images * first.store.n_tokens * first.store.d_model * 4
    buffers = PREFETCHED * first.batch_images * first.store.image_bytes
    on_device = _COPIES * weights + tokens
    if first.device.type == "cuda":
        require_memory(on_device, free.gpu, f"{what} on {first.device}", advice)
        # Initial weights are drawn on the CPU, one autoencoder after another.
        require_memory(max(4 * n_parameters(run) for run in runs) + buffers, free.ram, what, advice)
    else:
        require_memory(on_device + buffers, free.ram, what, advice)


def n_parameters(run: Run) -> int:
    """Numbers that an autoencoder learns."""
    return sum(math.prod(part.shape) for part in _shell(run).parameters())


def sae_file_bytes(run: Run) -> int:
    """Size of a file with the autoencoder, without its small config."""
    return sum(math.prod(part.shape) * part.element_size() for part in _shell(run).state_dict().values())


def state_file_bytes(run: Run) -> int:
    """Size of a state, without its small parts."""
    counters = 2 * 8 * run.n_latents  # how often each latent fired, and how long ago
    return sae_file_bytes(run) + _MOMENTS * 4 * n_parameters(run) + counters


def _shell(run: Run) -> Sae:
    """The autoencoder's shapes, without memory."""
    config = run.config
    return make_sae(
        config.arch, run.store.d_model, run.n_latents, device="meta", k=config.k, bandwidth=config.bandwidth
    )
