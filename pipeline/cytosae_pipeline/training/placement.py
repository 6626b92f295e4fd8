"""Where the activations of a training run are kept: on disk, in memory, or on the GPU."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from cytosae_pipeline.config.train import Resident
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.runtime.memory import available_ram
from cytosae_pipeline.runtime.progress import format_bytes
from cytosae_pipeline.runtime.ranks import n_processes_here
from cytosae_pipeline.training.runs import Run

Place = Literal["none", "ram", "gpu"]

_SHARE = 0.8
"""Share of the free memory that may be used."""

_MATRICES = 6
"""Matrices of (tokens, latents) that a training step may need at once; measured steps need fewer."""


@dataclass(frozen=True)
class Needs:
    """Memory that a training run needs."""

    store_bytes: int
    """Uncompressed activations of all its stores."""
    step_bytes: int
    """Upper estimate of what the autoencoder and a step need on the device."""
    n_epochs: float
    """Epochs left; may be less than one."""
    slow_reads: bool
    """Whether reading takes far longer than copying, as with a compressed, int8 or remote store."""


@dataclass(frozen=True)
class FreeMemory:
    """Free memory in bytes."""

    ram: int | None
    """None where the system does not say."""
    gpu: int | None
    """None without a CUDA device."""
    n_processes: int = 1
    """Processes of the training on this machine; `ram` is the part of each."""


class Placement(NamedTuple):
    """Where activations are kept, and why."""

    place: Place
    """Where the activations are kept; `none` reads them from disk every epoch."""
    text: str
    """The reason, as one line."""


def choose_placement(asked: Resident, needs: Needs, free: FreeMemory) -> Placement:
    """Decide where activations are kept. Every choice gives the same batches.

    `auto` keeps them on a CUDA device if they fit beside the training step, and in memory only if reads are slow: an
    uncompressed local store is in the page cache anyway, which is faster than a training step (docs/shuffling.md).

    Raises:
        UserError: If the requested place has too little memory.
    """
    size = format_bytes(needs.store_bytes)
    wanted = {"gpu": needs.store_bytes + needs.step_bytes, "ram": needs.store_bytes}
    available = {"gpu": free.gpu, "ram": free.ram}
    # The order of every epoch is another one, so that each process comes to need every image.
    each = f" by each of {free.n_processes} processes" if free.n_processes > 1 else ""
    kept = {
        "gpu": f"activations ({size}) are read once and kept on the GPU{each}",
        "ram": f"activations ({size}) are read once and kept in memory{each}",
    }
    read = f"activations ({size}) are read from disk every epoch"

    def fits(place: str) -> bool:
        there = available[place]
        return there is not None and wanted[place] <= _SHARE * there

    if asked == "none":
        return Placement("none", f"{read}: --resident none")
    if asked == "gpu" or asked == "ram":
        there = available[asked]
        if asked == "gpu" and there is None:
            raise UserError("--resident gpu needs a CUDA device, but training runs without one. Try --resident auto")
        if there is not None and not fits(asked):
            raise UserError(
                f"--resident {asked} needs {format_bytes(wanted[asked])}{each.replace(' by', ' for')}, but "
                f"{format_bytes(there)} are free{each.replace(' by', ' for')}, of which {_SHARE:.0%} may be used. Try "
                "--resident auto"
            )
        return Placement(asked, kept[asked])
    if needs.n_epochs <= 1:
        return Placement("none", f"{read}: no image is needed twice")
    if fits("gpu"):
        return Placement("gpu", kept["gpu"])
    if not needs.slow_reads:
        return Placement("none", f"{read}: an uncompressed store is fast to read")
    if fits("ram"):
        return Placement("ram", f"{kept['ram']}: fetching or decoding them every epoch would be slower")
    return Placement("none", f"{read}: they do not fit into memory")


def find_needs(runs: Sequence[Run], *, samples_seen: int) -> Needs:
    """Memory that runs on the same stores need.

    Args:
        runs: The runs, trained side by side.
        samples_seen: Images already trained on.
    """
    stores, config = runs[0].stores, runs[0].config
    n_images = sum(len(store.valid_rows) for store in stores)
    return Needs(
        store_bytes=n_images * stores[0].image_bytes,
        step_bytes=sum(map(_step_bytes, runs)),
        n_epochs=(config.total_training_tokens - samples_seen) / max(n_images, 1),
        slow_reads=any(
            store.compression != "none" or store.spec.store_dtype == "int8" or isinstance(store.path, str)
            for store in stores
        ),
    )


def _step_bytes(run: Run) -> int:
    """Memory of an autoencoder and its step on the device."""
    matmul = run.matmul
    n_weights = 2 * run.n_latents * run.store.d_model
    n_tokens = run.batch_images * run.store.n_tokens
    largest = min(matmul.max_bytes, n_tokens * run.n_latents * matmul.dtype.itemsize)
    # Parameters, gradients, two moments and copies in the products' type; then the matrices.
    return n_weights * (4 * 4 + matmul.dtype.itemsize) + _MATRICES * largest


def find_free_memory(device: torch.device) -> FreeMemory:
    """Free memory of the machine, of which every process of a training has its part, and of the device."""
    gpu = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    ram, n_processes = available_ram(), n_processes_here()
    return FreeMemory(None if ram is None else ram // n_processes, gpu, n_processes)
