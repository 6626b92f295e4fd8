"""Work on a cluster: ranges are mapped over the workers of `dask.distributed`, and their results merged as a tree."""

import contextlib
import itertools
import json
import logging
import multiprocessing
import os
import queue
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cytosae_pipeline.config.cluster import parse_dask
from cytosae_pipeline.errors import escape, install, quote
from cytosae_pipeline.runtime.cluster_worker import (
    ClusterError,
    find_versions,
    merge_parts,
    prepare_worker,
    require_versions,
    run_task,
)

if TYPE_CHECKING:
    from distributed import Client, Future

logger = logging.getLogger(__name__)

T = TypeVar("T")

_RANGES_PER_WORKER = 16
_AHEAD = 2
"""Ranges that each thread of the workers has or waits for."""
_MERGED = 4
"""Results that are merged at once."""
_RETRIES = 2
"""How often a range is tried again after an error of a disk or network."""
_CONNECT_S = 10.0
_INTERVAL_S = 1.0
_LARGEST_FILE = 1 << 20


class SchedulerLostError(ClusterError):
    """The scheduler no longer answers."""


@contextlib.contextmanager
def connect(where: str) -> Iterator["Client"]:
    """A client of a cluster; workers that are started for it end with the block.

    Args:
        where: Value of `--dask`: `local:N`, the address of a scheduler, or the path of a scheduler file.

    Raises:
        ClusterError: If `distributed` is missing, nothing answers, versions differ, or workers cannot be started.
        UserError: If `where` names no cluster.
    """
    place = parse_dask(where)
    try:
        from distributed import Client
        from distributed.utils import silence_logging_cmgr
    except ImportError as error:
        raise ClusterError(f"--dask needs the package distributed: {install('cluster')}") from error
    with contextlib.ExitStack() as stack:
        stack.enter_context(silence_logging_cmgr(logging.CRITICAL))  # what is wrong is said once, by an error
        cluster = stack.enter_context(_start_workers(place)) if isinstance(place, int) else None
        address = _read_scheduler_file(place) if isinstance(place, Path) else place
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about versions, which are compared below
                client = Client(cluster or address, timeout=_CONNECT_S, set_as_default=False)
            stack.enter_context(client)
            scheduler = client.get_versions()["scheduler"]["packages"]
        except (OSError, ValueError) as error:
            raise ClusterError(
                f"no dask scheduler answers at {address}. Start one with `dask scheduler`, look at the address, or "
                "leave --dask out"
            ) from error
        versions = {name: scheduler[name] for name in ("dask", "distributed")}
        require_versions(versions, find_versions(), f"scheduler at {address}")
        yield client


def map_ranges(
    client: "Client",
    function: Callable[[range], T],
    ranges: Sequence[range],
    merge: Callable[[T, T], T],
    on_done: Callable[[range], None] = lambda part: None,
) -> T:
    """Call a function on every range, on the workers, and merge what it returns.

    Results stay on the workers, which merge them as a tree in the order in which they are finished. What a worker had
    when it died is computed again, so a range may be computed more than once; its result counts once.

    Args:
        client: The cluster, as from `connect`.
        function: Function of a range; picklable, as is its result. What it needs beside is bound with
            `functools.partial`.
        ranges: The ranges, at least one.
        merge: Merges two results and returns theirs; it may change its first argument. Order and grouping must not
            matter.
        on_done: Called in this thread with each range once, after it is finished.

    Returns:
        The merged result.

    Raises:
        ClusterError: If the scheduler is lost, a range ends one worker after another, or a worker cannot run it.
        Exception: Whatever `function` raises; errors of the system are raised after some more tries.
    """
    found: T = _Run(client, function, merge, on_done).result(ranges)
    return found


def count_workers(client: "Client") -> int:
    """Threads of all workers, which is how many ranges are computed at once; waits for the first worker."""
    with _one_message(client):
        n_threads = int(sum(client.nthreads().values()))
        if not n_threads:
            logger.info("the scheduler has no workers yet: waiting for the first one (Ctrl-C stops)")
            client.wait_for_workers(1)
            n_threads = int(sum(client.nthreads().values()))
    return max(1, n_threads)


def plan_ranges(n_shards: int, n_workers: int) -> list[range]:
    """Ranges of shards in order, as even as possible, so many that workers of different speeds end together.

    Args:
        n_shards: Shards.
        n_workers: Workers.

    Returns:
        At least one range; none is empty unless there are no shards.
    """
    n_ranges = max(1, min(n_shards, _RANGES_PER_WORKER * n_workers))
    ends = [n_shards * number // n_ranges for number in range(n_ranges + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(ends)]


class _Run:
    """One call of `map_ranges`."""

    def __init__(
        self,
        client: "Client",
        function: Callable[[range], Any],
        merge: Callable[[Any, Any], Any],
        on_done: Callable[[range], None],
    ) -> None:
        self._client, self._function, self._merge, self._on_done = client, function, merge, on_done
        self._versions = find_versions()
        self._finished: queue.SimpleQueue[Future] = queue.SimpleQueue()
        self._running: dict[Future, tuple[range | None, int]] = {}
        """Range of each call, None for a merge, and how often it was tried again, or the height of the tree."""
        self._results: dict[int, list[Future]] = {}
        """Results that are not merged yet, by the height of the tree below them."""

    def result(self, ranges: Sequence[range]) -> Any:  # noqa: ANN401 - the function's
        """Run everything."""
        waiting = iter(ranges)
        with _one_message(self._client):
            n_ahead = _AHEAD * count_workers(self._client)
            self._require_usable_workers()
            try:
                for part in itertools.islice(waiting, n_ahead):
                    self._call(part)
                while self._running:
                    for part in itertools.islice(waiting, self._take(self._wait())):
                        self._call(part)
                    if not self._running:
                        self._merge_rest()
                ((last,),) = (found for found in self._results.values() if found)
                return last.result()
            finally:
                rest = [*self._running, *itertools.chain(*self._results.values())]
                if self._client.status == "running":
                    self._client.cancel(rest, force=True)

    def _require_usable_workers(self) -> None:
        """Have all workers import what they will be asked for: one that cannot would silently leave the cluster."""
        answers = self._client.run(prepare_worker, self._versions, self._function, self._merge, on_error="return")
        for answer in answers.values():
            if isinstance(answer, ClusterError):
                raise answer
            if found := re.search(r"(?:ModuleNotFound|Import|Attribute)Error\((.*)\)", repr(answer)):
                raise ClusterError(
                    f"a worker cannot import what it needs: {escape(found[1])}. Start scheduler and workers from the "
                    "environment in which you type this command"
                )

    def _call(self, part: range, n_tries: int = 0) -> None:
        self._watch(self._client.submit(run_task, self._function, part, self._versions, pure=False), part, n_tries)

    def _watch(self, future: "Future", part: range | None, number: int) -> None:
        self._running[future] = part, number
        future.add_done_callback(self._finished.put)

    def _wait(self) -> "Future":
        """The next call that ended."""
        is_told = False
        while True:
            try:
                return self._finished.get(timeout=_INTERVAL_S)
            except queue.Empty:
                if self._client.status != "running":
                    raise _lost(self._client) from None
                if not is_told and not self._client.nthreads():
                    logger.info(
                        "no worker is left: waiting for another one (Ctrl-C stops). Workers that leave at once were "
                        "started from an environment that lacks this package"
                    )
                    is_told = True

    def _take(self, future: "Future") -> int:
        """Use the result of a call; returns how many further ranges can be submitted."""
        part, number = self._running.pop(future)
        if future.status == "cancelled":
            raise _lost(self._client)
        if future.status == "error":
            error = future.exception()
            assert error is not None
            if part is None or not _is_passing(error) or number == _RETRIES:
                raise _explain(error, part)
            self._call(part, number + 1)
            return 0
        if part is not None:
            self._on_done(part)
        self._add(future, 0 if part is not None else number)
        return int(part is not None)

    def _add(self, future: "Future", height: int) -> None:
        """Keep a result, or merge it with others of its height."""
        found = self._results.setdefault(height, [])
        found.append(future)
        if len(found) == _MERGED:
            self._submit_merge(self._results.pop(height), height + 1)

    def _merge_rest(self) -> None:
        """Merge results of different heights, when nothing else is to come."""
        rest = [future for height in sorted(self._results) for future in self._results[height]]
        if len(rest) > 1:
            height = max(self._results) + 1
            self._results = {}
            for start in range(0, len(rest), _MERGED):
                some = rest[start : start + _MERGED]
                if len(some) > 1:
                    self._submit_merge(some, height)
                else:
                    self._results.setdefault(height, []).extend(some)

    def _submit_merge(self, futures: "list[Future]", height: int) -> None:
        self._watch(self._client.submit(merge_parts, self._merge, *futures, pure=False), None, height)


@contextlib.contextmanager
def _start_workers(n_workers: int) -> Iterator[Any]:
    """A cluster of processes on this machine, which nobody else on it can use."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise ClusterError(
            "local workers import your script again, and it starts workers of its own. Put what it does below the "
            "line `if __name__ == '__main__':`"
        )
    import dask
    from distributed import LocalCluster

    before = dask.config.get("distributed.nanny.pre-spawn-environ")
    n_threads = max(1, (os.cpu_count() or 1) // n_workers)
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), n_threads)
    try:
        with dask.config.set({"distributed.nanny.pre-spawn-environ": {**before, **threads}}):
            # Any user of the machine could have workers run code, were it not for the keys of `security`. Without an
            # address the pages about the cluster would take a port that other clusters ask for.
            cluster = LocalCluster(
                n_workers=n_workers, threads_per_worker=1, memory_limit=0, security=True,
                silence_logs=logging.CRITICAL,
                scheduler_kwargs={"dashboard": False, "dashboard_address": "127.0.0.1:0"},
            )  # fmt: skip
    except (OSError, RuntimeError, ImportError) as error:
        raise ClusterError(
            f"{n_workers} local workers cannot be started ({error}). Try fewer, or leave --dask out"
        ) from error
    with cluster:
        yield cluster


def _read_scheduler_file(path: Path) -> str:
    """The address in a scheduler file.

    Raises:
        ClusterError: If there is no such file, or it contains no address.
    """
    advice = "`dask scheduler --scheduler-file PATH` writes it, on a disk that all machines share"
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(_LARGEST_FILE))
    except (OSError, ValueError, RecursionError) as error:
        raise ClusterError(f"the scheduler file '{path}' cannot be read ({error}). {advice}") from error
    address = found.get("address") if isinstance(found, dict) else None
    try:
        parsed = parse_dask(address) if isinstance(address, str) else None
    except ValueError:
        parsed = None
    if not isinstance(parsed, str):
        shown = quote(str(address))
        raise ClusterError(f"'{path}' must contain the address of a scheduler, found {shown}. {advice}")
    return parsed


@contextlib.contextmanager
def _one_message(client: "Client") -> Iterator[None]:
    """Turn whatever a lost scheduler causes into one error."""
    from distributed.client import FutureCancelledError, FuturesCancelledError
    from distributed.comm import CommClosedError

    try:
        yield
    except (FutureCancelledError, FuturesCancelledError, CommClosedError) as error:
        raise _lost(client) from error
    except RuntimeError as error:
        if client.status == "running" and "deserialization of the task graph" not in str(error):
            raise
        if client.status != "running":
            raise _lost(client) from error
        raise ClusterError(
            "the scheduler cannot import cytosae_pipeline. Start it from the environment in which you type this command"
        ) from error


def _lost(client: "Client") -> SchedulerLostError:
    address = client.scheduler.address if client.scheduler is not None else "its address"
    return SchedulerLostError(
        f"the dask scheduler at {address} no longer answers: it ended, or the network failed. Start it "
        "again, then type the same command"
    )


def _is_passing(error: BaseException) -> bool:
    """Whether an error may not come again: of a disk or a network, and not one of ours about what was found there."""
    return isinstance(error, OSError) and not isinstance(error, ValueError)


def _explain(error: BaseException, part: range | None) -> BaseException:
    """The error to raise for one of a worker."""
    from distributed.scheduler import KilledWorker

    if isinstance(error, KilledWorker):
        what = "merging results" if part is None else f"shards {part.start} to {part.stop - 1}"
        return ClusterError(
            f"{error.allowed_failures + 1} workers died one after another in the same work: {what}. Most likely they "
            "had too little memory: start workers with more of it, or lower --batch_size"
        )
    return error
