"""Reading ahead: a background thread fills reused buffers while the caller computes."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable
from typing import Any, Generic, TypeVar

import numpy.typing as npt

PREFETCHED = 3
"""Buffers in rotation by default: one in use, the others filled or being filled."""

Plan = TypeVar("Plan")
Item = TypeVar("Item")


class Prefetcher(Generic[Plan, Item]):
    """Fills reused buffers in a background thread, in the order of the plans.

    Args:
        plans: What to read.
        fill: Reads one plan into a buffer and returns the item for the consumer.
        make_buffer: Makes a buffer; called `depth` times.
        depth: Buffers in rotation; at least 2.
    """

    def __init__(
        self,
        plans: Iterable[Plan],
        fill: Callable[[Plan, npt.NDArray[Any]], Item],
        make_buffer: Callable[[], npt.NDArray[Any]],
        *,
        depth: int = PREFETCHED,
    ) -> None:
        self._plans, self._fill, self._make_buffer, self._depth = plans, fill, make_buffer, max(2, depth)
        self.waited_s = 0.0
        """Seconds that the consumer has waited for data."""

    def __iter__(self) -> Generator[Item, None, None]:
        """The item of each plan, in order; its buffer is reused once the next item is requested."""
        # Not `queue.Queue`: Ctrl-C while the consumer notifies the thread would lose the notification.
        free: queue.SimpleQueue[npt.NDArray[Any] | None] = queue.SimpleQueue()
        ready: queue.SimpleQueue[tuple[Item, npt.NDArray[Any]] | BaseException | None] = queue.SimpleQueue()
        for _ in range(self._depth):
            free.put(self._make_buffer())

        def run() -> None:
            try:
                for plan in self._plans:
                    buffer = free.get()
                    if buffer is None:
                        return
                    ready.put((self._fill(plan, buffer), buffer))
                ready.put(None)
            except BaseException as error:  # noqa: BLE001 - raised in the consumer
                ready.put(error)

        thread = threading.Thread(target=run, name="prefetcher", daemon=True)
        thread.start()
        try:
            while (filled := self._wait(ready)) is not None:
                if isinstance(filled, BaseException):
                    raise filled
                yield filled[0]
                free.put(filled[1])
        finally:
            with contextlib.suppress(queue.Empty):
                while True:
                    free.get_nowait()
            free.put(None)
            thread.join()

    def _wait(self, ready: "queue.SimpleQueue[Any]") -> Any:  # noqa: ANN401 - any queued item
        start = time.perf_counter()
        filled = ready.get()
        self.waited_s += time.perf_counter() - start
        return filled
