"""Clusters for tests, and functions that their workers import."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.patience import wait_until


def squares(part: range) -> list[int]:
    """The squares of a range: a list shows whether something was counted twice."""
    return [number * number for number in part]


def join(first: list[int], second: list[int]) -> list[int]:
    """Changes its first argument."""
    first += second
    return first


def squares_once_killed(mark: Path, part: range) -> list[int]:
    """Kills its worker the first time that the range contains 7."""
    if 7 in part and _is_first(mark):
        os.kill(os.getpid(), signal.SIGKILL)
    return squares(part)


def join_once_killed(mark: Path, first: list[int], second: list[int]) -> list[int]:
    """Kills its worker in the middle of merging, the first time."""
    join(first, second)
    if len(first) > 6 and _is_first(mark):
        os.kill(os.getpid(), signal.SIGKILL)
    return first


def kill(number: int, part: range) -> list[int]:
    """Kills another process and takes its time."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(number, signal.SIGKILL)
    time.sleep(1)
    return squares(part)


def kill_worker(part: range) -> list[int]:
    """Always kills its worker."""
    os.kill(os.getpid(), signal.SIGKILL)
    return squares(part)


def fail(error: Exception, part: range) -> list[int]:
    """Raises an error for the range that contains 7."""
    if 7 in part:
        raise error
    return squares(part)


def fail_twice(folder: Path, part: range) -> list[int]:
    """Has the disk fail twice for every range."""
    if any(_is_first(folder / f"{part.start}-{n}") for n in range(2)):
        raise TimeoutError("the disk did not answer")
    return squares(part)


def describe_process(part: range) -> list[tuple[int, int]]:
    """Number of the process, and threads of torch."""
    import torch

    return [(os.getpid(), torch.get_num_threads())]


def count_page_faults(part: range) -> list[int]:
    """Pages that the system gave for buffers of 8 MB which are used one after another, 40 times."""
    import resource

    import torch

    torch.ones(1 << 21)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(40):
        torch.ones(1 << 21)
    return [resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before]


def _is_first(mark: Path) -> bool:
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


@contextlib.contextmanager
def scheduler(folder: Path, before: str = "pass") -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A scheduler in a process of its own, and its scheduler file.

    Args:
        folder: Where the file goes.
        before: What the process does first, in Python.
    """
    file = folder / "scheduler.json"
    arguments = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)]
    code = f"import sys; from distributed.cli.dask_scheduler import main; {before}; main(sys.argv[1:])"
    with _running([sys.executable, "-c", code, *arguments]) as process:
        wait_until(lambda: file.exists() and file.stat().st_size, "the scheduler wrote no file")
        yield process, file


@contextlib.contextmanager
def worker(file: Path, name: str = "0") -> Iterator[subprocess.Popen[bytes]]:
    """A worker of a scheduler, without a nanny."""
    command = [sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(file)]
    options = ["--no-nanny", "--nthreads", "1", "--name", name, "--no-dashboard", "--death-timeout", "20"]
    with _running([*command, *options]) as process:
        yield process


@contextlib.contextmanager
def local_cluster() -> Iterator[str]:
    """The address of a running cluster of two worker processes, which are started again when they die."""
    import dask
    from distributed import LocalCluster

    with (
        # Otherwise a nanny whose worker is killed again within this time would be closed.
        dask.config.set({"distributed.deploy.lost-worker-timeout": "1000 days"}),
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            memory_limit=0,
            scheduler_kwargs={"dashboard": False, "dashboard_address": "127.0.0.1:0"},
            silence_logs=logging.CRITICAL,
        ) as cluster,
    ):
        yield cluster.scheduler_address


def kill_one_worker(address: str) -> None:
    """Kill a worker process of a cluster."""
    from distributed import Client

    with Client(address, set_as_default=False) as client:
        os.kill(next(iter(client.run(os.getpid).values())), signal.SIGKILL)


@contextlib.contextmanager
def _running(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()
