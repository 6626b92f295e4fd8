"""`--cache`: the time to write the same activations to a program's cache, and to read them in shuffled batches."""

import json
import platform
import statistics
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.campaign.data import Data
from benchmarks.campaign.environments import make_environment
from benchmarks.campaign.plan import OURS, Line
from benchmarks.campaign.training import adapter_environment, failure, own_python
from benchmarks.rivals.cache_job import ANSWER_NAME, GIVEN_NAME, JOB_NAME, CacheJob

CACHES = {"saelens": "saelens_cache", OURS: "ours_cache"}
"""Adapters of programs that keep activations on disk and read them back, by program."""

_TIMES = ("write_s", "write_cpu_s", "read_s", "read_cpu_s")


def measure_caches(
    data: Data,
    programs: tuple[str, ...],
    environments: Path,
    *,
    n_images: int,
    rounds: int,
    n_threads: int,
    folder: Path,
) -> list[Line]:
    """Write and read the first images of a store.

    Args:
        data: The store.
        programs: Programs to measure; those without a cache are left out.
        environments: Folder of the programs' environments.
        n_images: Images to write, cut to whole batches.
        rounds: How often each program writes and reads; the first round is not counted.
        n_threads: Threads of every process.
        folder: Where the caches are written.

    Raises:
        RunFailedError: If an adapter fails.
    """
    images = data.trained
    n_images = min(n_images, len(images)) // data.batch_images * data.batch_images
    activations = np.empty((n_images, *images.image_shape), dtype=images.dtype)
    images.read(np.arange(n_images), activations)
    lines = []
    for dtype in ("float16", "float32"):
        with tempfile.TemporaryDirectory(prefix="peers-", dir=folder) as name:
            place = Path(name)
            job = CacheJob(*activations.shape, data.batch_images, dtype, rounds + 1)
            np.save(place / GIVEN_NAME, activations.astype(dtype))
            (place / JOB_NAME).write_text(json.dumps(job._asdict()))
            for program in [name for name in CACHES if name in programs]:
                python = own_python() if program == OURS else make_environment(program, environments)
                command = [python, "-W", "ignore", "-m", f"benchmarks.rivals.{CACHES[program]}", place]
                variables = adapter_environment(program, n_threads)
                done = subprocess.run(command, check=False, env=variables, capture_output=True, text=True)
                if done.returncode:
                    raise failure(program, "write and read a cache", done.returncode, done.stderr)
                found = json.loads((place / ANSWER_NAME).read_text())
                lines.append(
                    {
                        "name": "cache", "program": program, "version": found["version"], "dtype": dtype,
                        **{name: round(statistics.median(found[name][1:]), 4) for name in _TIMES},
                        "bytes": found["bytes"], "tokens_read": found["tokens_read"], "rounds": rounds,
                        "images": n_images, "tokens_per_image": job.n_tokens, "d_model": job.d_model,
                        "activation_bytes": job.n_bytes, "threads": n_threads, "machine": platform.machine(),
                    }
                )  # fmt: skip
    return lines
