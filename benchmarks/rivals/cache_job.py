"""What an adapter of `--cache` is told and what it measures, in any environment that has numpy.

The folder that it is given contains `job.json`, a `CacheJob`, and `activations.npy`; it writes `answer.json` into it.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

JOB_NAME, ANSWER_NAME, GIVEN_NAME = "job.json", "answer.json", "activations.npy"

Given = npt.NDArray[Any]
"""The activations to write, shape `(n_images, n_tokens, d_model)`."""


class CacheJob(NamedTuple):
    """A cache to write and to read."""

    n_images: int
    n_tokens: int
    d_model: int
    batch_images: int
    dtype: str
    """`float16` or `float32`."""
    rounds: int

    @property
    def n_bytes(self) -> int:
        """Bytes of the activations."""
        return self.n_images * self.n_tokens * self.d_model * np.dtype(self.dtype).itemsize


def run(version: str, write: Callable[[CacheJob, Given, Path], None], read: Callable[[CacheJob, Path], int]) -> None:
    """Carry out the job in the folder that the command line names.

    Args:
        version: Version of the program.
        write: Writes a cache of the activations.
        read: Reads one epoch of shuffled batches of tokens; returns the number of tokens.
    """
    folder = Path(sys.argv[1])
    job = CacheJob(**json.loads((folder / JOB_NAME).read_text()))
    given, path = np.load(folder / GIVEN_NAME), folder / "cache"
    times: dict[str, list[float]] = {"write_s": [], "read_s": [], "write_cpu_s": [], "read_cpu_s": []}
    n_read = 0
    for _ in range(job.rounds):
        shutil.rmtree(path, ignore_errors=True)
        _time(times, "write", lambda: write(job, given, path))
        n_read = _time(times, "read", lambda: read(job, path))
    n_bytes = sum(item.stat().st_size for item in path.rglob("*") if item.is_file())
    answer = {"version": version, "bytes": n_bytes, "tokens_read": n_read, **times}
    (folder / ANSWER_NAME).write_text(json.dumps(answer))


def _time(times: dict[str, list[float]], name: str, function: Callable[[], Any]) -> Any:  # noqa: ANN401
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    found = function()
    times[f"{name}_s"].append(time.perf_counter() - wall_s)
    times[f"{name}_cpu_s"].append(time.process_time() - cpu_s)
    return found
