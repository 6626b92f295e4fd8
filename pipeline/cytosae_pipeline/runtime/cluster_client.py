"""Reaching a cluster: workers that are started on this machine, an address, or a scheduler file."""

import contextlib
import contextvars
import json
import logging
import multiprocessing
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cytosae_pipeline.config.cluster import parse_dask
from cytosae_pipeline.errors import install, quote, say_count
from cytosae_pipeline.runtime.cluster_worker import ClusterError, find_versions, require_versions

if TYPE_CHECKING:
    from distributed import Client

logger = logging.getLogger(__name__)

_CONNECT_S = 10.0
_LARGEST_FILE = 1 << 20


class _Connections:
    """Clients that are kept.

    Args:
        stack: Closes them at its end.
    """

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._clients: dict[str, Client] = {}

    def reach(self, where: str) -> "Client":
        """The client of a cluster, connected when it is asked for first, and again if it was lost."""
        client = self._clients.get(where)
        if client is None or client.status != "running":
            client = self._clients[where] = self._stack.enter_context(_connect(where))
        return client


_kept: contextvars.ContextVar[_Connections | None] = contextvars.ContextVar("kept", default=None)


@contextlib.contextmanager
def keep_connected() -> Iterator[None]:
    """Inside, clusters are reached once: whatever `connect` reaches is kept until the end, its workers included."""
    if _kept.get() is not None:
        yield
        return
    with contextlib.ExitStack() as stack:
        token = _kept.set(_Connections(stack))
        try:
            yield
        finally:
            _kept.reset(token)


@contextlib.contextmanager
def connect(where: str) -> Iterator["Client"]:
    """A client of a cluster; workers that are started for it end with the block, or with that of `keep_connected`.

    Args:
        where: Value of `--dask`: `local:N`, the address of a scheduler, or the path of a scheduler file.

    Raises:
        ClusterError: If `distributed` is missing, nothing answers, versions differ, or workers cannot be started.
        UserError: If `where` names no cluster.
    """
    kept = _kept.get()
    if kept is not None:
        yield kept.reach(where)
        return
    with _connect(where) as client:
        yield client


@contextlib.contextmanager
def _connect(where: str) -> Iterator["Client"]:
    """See `connect`."""
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

    logger.info(f"starting {say_count(n_workers, 'worker process', 'worker processes')}")
    before = dask.config.get("distributed.nanny.pre-spawn-environ")
    n_threads = max(1, (os.cpu_count() or 1) // n_workers)
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), n_threads)
    settings = {
        "distributed.nanny.pre-spawn-environ": {**before, **threads},
        # A nanny whose worker is away for 15 s, which it may need to start again, would be closed for good.
        "distributed.deploy.lost-worker-timeout": "1000 days",
    }
    with dask.config.set(settings):
        try:
            # Any user of the machine could have workers run code, were it not for the keys of `security`. Without an
            # address the pages about the cluster would take a port that other clusters ask for.
            cluster = LocalCluster(
                n_workers=n_workers, threads_per_worker=1, memory_limit=0, security=True,
                silence_logs=logging.CRITICAL,
                scheduler_kwargs={"dashboard": False, "dashboard_address": "127.0.0.1:0"},
            )  # fmt: skip
        except (OSError, RuntimeError, ImportError) as error:
            raise ClusterError(
                f"{say_count(n_workers, 'local worker')} cannot be started ({error}). Try fewer, or leave --dask out"
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
