"""Responses that are kept in memory. Safe to use from several threads at once."""

import threading
from collections import OrderedDict


class ByteCache:
    """The most recently used responses, up to a number of bytes.

    Args:
        max_bytes: Most bytes kept; a larger response is not kept at all.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._n_bytes = max_bytes, 0
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str) -> bytes | None:
        """The response kept under a name, or None."""
        with self._lock:
            data = self._kept.get(name)
            if data is not None:
                self._kept.move_to_end(name)
            return data

    def put(self, name: str, data: bytes) -> None:
        """Keep a response; the least recently used ones are dropped to make room."""
        with self._lock:
            self._n_bytes += len(data) - len(self._kept.pop(name, b""))
            self._kept[name] = data
            while self._n_bytes > self._max_bytes:
                self._n_bytes -= len(self._kept.popitem(last=False)[1])
