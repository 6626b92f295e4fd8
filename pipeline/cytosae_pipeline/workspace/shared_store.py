"""A store as the workers of a cluster open it: by name, once, and only if it is the same one."""

import functools
import socket
import threading
from dataclasses import dataclass

from cytosae_cache.joined_store import JoinedStore, SameNames, join_stores
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.runtime.cluster_worker import ClusterError

_opening = threading.Lock()


@dataclass(frozen=True)
class SharedStore:
    """A store that workers open."""

    locations: tuple[str, ...]
    """Its path from the root, or its URL; of joined stores, those of all."""
    contents: str
    """Its content digest."""
    joined_patients: SameNames | None = None
    """What was stated about patients of joined stores."""

    @classmethod
    def of(cls, store: ActivationStore) -> "SharedStore":
        """What workers need to know of a store."""
        stated = store.joined_patients if isinstance(store, JoinedStore) else None
        return cls(tuple(str(part.absolute_location) for part in store.parts), store.contents, stated)

    def open(self) -> ActivationStore:
        """The store, opened once in this process.

        Raises:
            ClusterError: If it is not there, or another one.
        """
        with _opening:
            return _open_store(self)


def unreachable(what: str, place: str) -> ClusterError:
    """The error for what a worker does not find."""
    return ClusterError(
        f"the worker on {socket.gethostname()} finds no {what} at '{place}'. Put it on a disk that all workers share "
        "under the same path, or in a bucket"
    )


def different(what: str, place: str) -> ClusterError:
    """The error for what is not the same on a worker."""
    return ClusterError(
        f"the {what} that the worker on {socket.gethostname()} finds at '{place}' is another one than here, or was "
        "changed in memory. All workers must share one disk"
    )


@functools.lru_cache(maxsize=1)
def _open_store(shared: SharedStore) -> ActivationStore:
    place = shared.locations[0]
    try:
        stores = []
        for place in shared.locations:
            stores.append(ActivationStore.open(place))
    except FileNotFoundError as error:
        raise unreachable("store", place) from error
    store = join_stores(stores, joined_patients=shared.joined_patients)
    if store.contents != shared.contents:
        raise different("store", " + ".join(shared.locations))
    return store
