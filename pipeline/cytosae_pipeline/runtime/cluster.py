"""Work on a cluster: ranges are mapped over the workers of `dask.distributed`, and their results merged as a tree."""

import collections
import contextlib
import itertools
import logging
import queue
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from cytosae_pipeline.errors import escape
from cytosae_pipeline.runtime.cluster_client import connect as connect
from cytosae_pipeline.runtime.cluster_client import keep_connected as keep_connected
from cytosae_pipeline.runtime.cluster_worker import (
    ClusterError,
    check_worker,
    find_versions,
    merge_parts,
    run_task,
)

if TYPE_CHECKING:
    from distributed import Client, Future

logger = logging.getLogger(__name__)

T = TypeVar("T")

_RANGES_PER_WORKER = 16
_AHEAD = 2
"""Ranges that each thread of the workers has or waits for."""
_MERGED = 2
"""Results that are merged at once: a worker holds so many and one more, which may take some hundred megabytes each."""
_RETRIES = 2
"""How often a range is tried again after an error of a disk or network."""
_INTERVAL_S = 1.0


class SchedulerLostError(ClusterError):
    """The scheduler no longer answers."""


def map_ranges(
    client: "Client",
    function: Callable[[range], T],
    ranges: Sequence[range],
    merge: Callable[[T, T], T],
    on_done: Callable[[range], None] = lambda part: None,
    *,
    unit: str = "shards",
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
        unit: What the ranges count, in the plural, for messages.

    Returns:
        The merged result.

    Raises:
        ClusterError: If the scheduler is lost, a range ends one worker after another, or a worker cannot run it.
        Exception: Whatever `function` raises; errors of the system are raised after some more tries.
    """
    waiting, run = iter(ranges), _Run(client, function, merge, unit=unit)
    tree = _Tree(run, merge)
    with run.opened() as n_ahead:
        for part in itertools.islice(waiting, n_ahead):
            run.call(part)
        while True:
            future, done = run.next_result()
            tree.add(future)
            if done is not None:
                on_done(done)
                for part in itertools.islice(waiting, 1):
                    run.call(part)
            if not run.running and (last := tree.merge_rest()) is not None:
                found: T = last.result()
                return found


def iter_ranges(
    client: "Client", function: Callable[[range], T], ranges: Sequence[range], *, unit: str = "shards"
) -> Iterator[T]:
    """Call a function on every range, on the workers, and yield what it returns in the order of the ranges.

    Args:
        client: As for `map_ranges`.
        function: As for `map_ranges`; a few results for each thread of the workers are in memory at once.
        ranges: The ranges.
        unit: As for `map_ranges`.

    Raises:
        ClusterError: As for `map_ranges`.
        Exception: As for `map_ranges`.
    """
    waiting, run = iter(ranges), _Run(client, function, unit=unit)
    ready: dict[range, Future] = {}
    order: collections.deque[range] = collections.deque()
    with run.opened() as n_ahead:
        for part in itertools.islice(waiting, n_ahead):
            order.append(part)
            run.call(part)
        while order:
            while order[0] not in ready:
                future, done = run.next_result()
                assert done is not None
                ready[done] = future
            yield ready.pop(order.popleft()).result()
            for part in itertools.islice(waiting, 1):
                order.append(part)
                run.call(part)


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
    """Calls of one function for ranges, some of them ahead of the others.

    Args:
        client: The cluster.
        function: The function.
        *needed: Further functions that workers will be asked to call.
        unit: What the ranges count, in the plural.
    """

    def __init__(
        self, client: "Client", function: Callable[[range], Any], *needed: object, unit: str = "shards"
    ) -> None:
        self._client, self._function, self._needed, self._unit = client, function, needed, unit
        self._versions = find_versions()
        self._ended: queue.SimpleQueue[Future] = queue.SimpleQueue()
        self._tries: dict[range, int] = {}
        self.running: dict[Future, range | None] = {}
        """Range of each call that has not ended; None for other calls."""

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        """How many ranges to submit ahead; at the end, whatever still runs is cancelled."""
        with _one_message(self._client):
            n_ahead = _AHEAD * count_workers(self._client)
            self._require_usable_workers()
            try:
                yield n_ahead
            finally:
                if self._client.status == "running":
                    self._client.cancel(list(self.running), force=True)

    def call(self, part: range) -> None:
        """Call the function."""
        self.submit(part, run_task, self._function, part, self._versions)

    def submit(self, part: range | None, function: Callable[..., Any], *arguments: object) -> "Future":
        """Call any function."""
        future = self._client.submit(function, *arguments, pure=False)
        self.running[future] = part
        future.add_done_callback(self._ended.put)
        return future

    def next_result(self) -> "tuple[Future, range | None]":
        """The next call that succeeded, and its range; calls that failed for a passing reason are made again.

        Raises:
            SchedulerLostError: If the scheduler is lost.
            Exception: Of a call.
        """
        while True:
            future = self._wait()
            part = self.running.pop(future)
            if future.status == "cancelled":
                raise _lost(self._client)
            if future.status != "error":
                return future, part
            error = future.exception()
            assert error is not None
            if part is None or not _is_passing(error) or self._tries.get(part, 0) == _RETRIES:
                raise _explain(error, part, self._unit)
            self._tries[part] = self._tries.get(part, 0) + 1
            self.call(part)

    def _wait(self) -> "Future":
        """The next call that ended."""
        is_told = False
        while True:
            try:
                return self._ended.get(timeout=_INTERVAL_S)
            except queue.Empty:
                if self._client.status != "running":
                    raise _lost(self._client) from None
                if not is_told and not self._client.nthreads():
                    logger.info(
                        "no worker is left: waiting for another one (Ctrl-C stops). Workers that leave at once were "
                        "started from an environment that lacks this package"
                    )
                    is_told = True

    def _require_usable_workers(self) -> None:
        """Have all workers import what they will be asked for: one that cannot would silently leave the cluster."""
        answers = self._client.run(check_worker, self._versions, self._function, *self._needed, on_error="return")
        for answer in answers.values():
            if isinstance(answer, ClusterError):
                raise answer
            if found := re.search(r"(?:ModuleNotFound|Import|Attribute)Error\((.*)\)", repr(answer)):
                raise ClusterError(
                    f"a worker cannot import what it needs: {escape(found[1])}. Start scheduler and workers from the "
                    "environment in which you type this command"
                )


class _Tree:
    """Results on the workers, merged there as they are added.

    Args:
        run: Submits the merges.
        merge: Merges two results.
    """

    def __init__(self, run: _Run, merge: Callable[[Any, Any], Any]) -> None:
        self._run, self._merge = run, merge
        self._waiting: dict[int, list[Future]] = {}
        """Results that are not merged yet, by the height of the tree below them."""
        self._heights: dict[Future, int] = {}

    def add(self, future: "Future") -> None:
        """Keep a result of a range or of a merge, or merge it with others of its height."""
        height = self._heights.pop(future, 0)
        found = self._waiting.setdefault(height, [])
        found.append(future)
        if len(found) == _MERGED:
            self._submit(self._waiting.pop(height), height + 1)

    def merge_rest(self) -> "Future | None":
        """Merge results of different heights, when nothing else is to come; the last one if a single one is left."""
        rest = [future for height in sorted(self._waiting) for future in self._waiting[height]]
        if len(rest) == 1:
            return rest[0]
        height = max(self._waiting) + 1
        self._waiting = {height: rest[_MERGED:]}
        self._submit(rest[:_MERGED], height)
        return None

    def _submit(self, futures: "list[Future]", height: int) -> None:
        self._heights[self._run.submit(None, merge_parts, self._merge, *futures)] = height


@contextlib.contextmanager
def _one_message(client: "Client") -> Iterator[None]:
    """Turn whatever a lost scheduler causes into one error."""
    from distributed.client import FutureCancelledError, FuturesCancelledError
    from distributed.comm import CommClosedError

    try:
        yield
    except (FutureCancelledError, FuturesCancelledError, CommClosedError) as error:
        raise _lost(client) from error
    except (RuntimeError, OSError) as error:
        if client.status != "running":
            raise _lost(client) from error
        if "deserialization of the task graph" not in str(error):
            raise
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


def _explain(error: BaseException, part: range | None, unit: str) -> BaseException:
    """The error to raise for one of a worker."""
    from distributed.scheduler import KilledWorker

    if isinstance(error, KilledWorker):
        what = "merging results" if part is None else f"{unit} {part.start} to {part.stop - 1}"
        return ClusterError(
            f"{error.allowed_failures + 1} workers died one after another in the same work: {what}. Most likely they "
            "had too little memory: start workers with more of it, or lower --batch_size"
        )
    return error
