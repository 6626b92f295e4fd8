"""A store's files on object storage, or on any other file system that fsspec can write to: `s3://`, `gs://` ..."""

import contextlib
import errno
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from cytosae_cache.errors import StoreCorruptError, StoreError, StoreUnreachableError
from cytosae_cache.storage.base import StorageBackend, is_litter, map_requests
from cytosae_cache.storage.lease import Lease
from cytosae_cache.storage.s3_uploads import UnfinishedUploads

N_ATTEMPTS = 5
"""Attempts at a request before it fails."""

PART_BYTES = 50 << 20
"""Objects of two parts and more are uploaded to S3 in parts of so many bytes."""

_DELETED_AT_ONCE = 1000
"""Most objects that S3 deletes with one request."""

_FIRST_PAUSE_S = 0.2
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)

_leases: dict[str, Lease] = {}
"""Those that this process holds, by the store that they protect: its writers look here."""

T = TypeVar("T")

logger = logging.getLogger(__name__)


class RemoteStorage(StorageBackend):
    """The objects below a URL.

    An object appears only once it is complete, so writing needs no renaming. On S3 an object beside the store is the
    lock (`Lease`); elsewhere there is none.

    Args:
        url: Such as `s3://bucket/folder`. Credentials and endpoint come from where the protocol's library looks for
            them (for S3 the variables `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_ENDPOINT_URL` or `~/.aws`).

    Raises:
        StoreError: If the protocol is unknown or its library is not installed.
    """

    n_threads = 16
    is_remote = True
    checks_content = False

    def __init__(self, url: str) -> None:
        import fsspec

        self.location = url.rstrip("/")
        try:
            # Listings are never cached: another process may be writing.
            self._system, root = fsspec.core.url_to_fs(self.location, use_listings_cache=False)
        except ImportError as error:
            extra = " Install it in your clone of cytosae-cache: pip install '.[s3]'" if url.startswith("s3:") else ""
            raise StoreError(f"'{url}' needs a package that is not installed: {error}.{extra}") from error
        except ValueError as error:
            raise StoreError(f"'{url}' is neither a path nor a URL that fsspec knows: {error}") from error
        self._root = str(root).rstrip("/")
        self._uploads = UnfinishedUploads(self._system)
        self._is_s3 = self._uploads.exist

    def check_links(self) -> None:
        """Nothing to do: object storage has no links."""

    def read(self, name: str, *, max_bytes: int | None = None) -> bytes:
        """Read a whole object, with one request."""
        # From byte 0: without a range, s3fs asks for the length first.
        data = self.read_range(name, 0, None if max_bytes is None else max_bytes + 1)
        if max_bytes is not None and len(data) > max_bytes:
            raise StoreCorruptError(
                f"'{self}/{name}' is larger than any metadata of this format may be ({max_bytes:,} bytes)"
            )
        return data

    def size(self, name: str) -> int | None:
        """Length of an object in bytes; None if it does not exist."""
        try:
            found = self._try("look up", name, lambda: self._system.info(self._path(name)))
        except FileNotFoundError:
            return None
        return int(found["size"]) if found["type"] == "file" else None

    def names(self, prefix: str = "", *, with_litter: bool = False) -> list[str]:
        """Names of all objects that start with `prefix`, sorted."""
        start = self._path(prefix.rpartition("/")[0]).rstrip("/")
        try:
            found = self._try("list", prefix, lambda: self._system.find(start))
        except FileNotFoundError:
            return []
        files = (str(path).removeprefix(self._root).lstrip("/") for path in found)
        return sorted(name for name in files if name.startswith(prefix) and (with_litter or not is_litter(name)))

    def open(self, name: str, *, direct: bool = False, n_bytes: int | None = None) -> "RemoteFile":
        """Open an object for reads at any offset: nothing is requested, every read is one request."""
        return RemoteFile(self, name, n_bytes)

    def read_range(self, name: str, start: int, stop: int | None) -> bytes:
        """Read bytes `start` to `stop` of an object, to its end if `stop` is None or beyond it."""

        def request() -> bytes:
            try:
                return bytes(self._system.cat_file(self._path(name), start=start, end=stop))
            except OSError as error:
                if error.errno == errno.EINVAL and "range" in str(error).lower():  # it ends before `start`
                    return b""
                raise

        return self._try("read", name, request)

    def write(self, name: str, parts: Sequence[memoryview | bytes], *, sync: bool = False) -> None:
        """Write an object in one request, or as a multi-part upload that appears only once it is complete."""
        self._put(name, parts, "overwrite")

    def create(self, name: str, parts: Sequence[memoryview | bytes], *, sync: bool = False) -> bool:
        """Write an object unless there is one of that name; returns whether it was written.

        If the answer to a request that succeeded was lost, the object counts as somebody else's.
        """
        try:
            self._put(name, parts, "create")
        except FileExistsError:
            return False
        return True

    def _put(self, name: str, parts: Sequence[memoryview | bytes], mode: str) -> None:
        """Write an object in one of fsspec's modes."""
        if (lease := _leases.get(self._root)) is not None:
            lease.require()
        data = bytes(parts[0]) if len(parts) == 1 else b"".join(parts)
        path = self._path(name)
        if not self._is_s3 or len(data) < 2 * PART_BYTES:
            self._try("write", name, lambda: self._system.pipe_file(path, data, mode=mode))
            return
        # Whoever creates an object may be one of several: their uploads stay.
        known = self._uploads.abort(path) if mode == "overwrite" else self._uploads.find(path)
        try:
            self._try("write", name, lambda: self._upload(path, data, mode))
        except FileExistsError:
            raise
        except BaseException:  # Ctrl-C too, which leaves the library's own upload running
            self._uploads.abort(path, known=known)
            raise

    def _upload(self, path: str, data: bytes, mode: str) -> None:
        """Upload a large object in parts.

        Raises:
            TimeoutError: If another writer of the same object aborted the upload; it may be sent again.
        """
        try:
            self._system.pipe_file(path, data, chunksize=PART_BYTES, mode=mode)
        except FileNotFoundError as error:
            raise TimeoutError(f"the upload is gone: {error}") from error

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects; missing ones are ignored. On S3 a thousand with a request, elsewhere several at once."""
        left = list(names)
        if self._is_s3:
            left = [
                name
                for start in range(0, len(left), _DELETED_AT_ONCE)
                for name in self._delete_some(left[start : start + _DELETED_AT_ONCE])
            ]
        if left:
            for _ in map_requests(self, self._remove_one, left):
                pass

    def _delete_some(self, names: Sequence[str]) -> Sequence[str]:
        """Delete objects of S3 with one request; returns those that have to be deleted one by one."""
        paths = [self._path(name).partition("/") for name in names]
        objects = {"Objects": [{"Key": key} for _, _, key in paths], "Quiet": True}
        try:
            answer = self._system.call_s3("delete_objects", Bucket=paths[0][0], Delete=objects)
        except (
            OSError
        ):  # not every server that speaks S3 knows this request; single ones are retried, and say what is wrong
            return names
        failed = {error.get("Key") for error in answer.get("Errors", [])}
        return [name for name, (_, _, key) in zip(names, paths, strict=True) if key in failed]

    def _remove_one(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._try("remove", name, lambda: self._system.rm_file(self._path(name)))

    def sync(self, names: Iterable[str], *, contents: bool = True) -> None:
        """Nothing to do: an acknowledged request is durable."""

    def remove_partials(self, *, of_everyone: bool = False) -> None:
        """Abort the uploads that a killed writer left; incomplete objects themselves never appear."""
        self._uploads.abort(self._root, below=True)

    def delete(self) -> None:
        """Delete every object below the URL, the metadata that marks a complete store first."""
        self.remove(["zarr.json"])
        self.remove(self.names(with_litter=True))
        self.remove_partials()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the exclusive right to write here, by an object beside the store; only S3 has such a lock."""
        if not self._is_s3:
            yield
            return
        lease = self._try("lock", "", lambda: Lease(self._system, f"{self._root}.lock", str(self)))
        if not lease.is_exclusive:
            logger.warning(
                f"the server of '{self}' does not honour the condition `If-None-Match`, so nothing keeps another build "
                "from writing to the same store: make sure that there is none"
            )
        _leases[self._root] = lease
        try:
            yield
            lease.require()
        finally:
            del _leases[self._root]
            lease.release()

    def _path(self, name: str) -> str:
        if ".." in name.split("/") or name.startswith("/"):
            raise StoreCorruptError(f"'{name}' leads out of the store '{self}'; it is not followed")
        return f"{self._root}/{name}"

    def _try(self, what: str, name: str, request: Callable[[], T]) -> T:
        """Send a request; retry after growing pauses if the error may be temporary."""
        for attempt in range(N_ATTEMPTS):
            try:
                return request()
            except _PERMANENT:
                raise
            except (OSError, TimeoutError) as error:
                if attempt == N_ATTEMPTS - 1:
                    raise StoreUnreachableError(
                        f"cannot {what} '{self}/{name}' after {N_ATTEMPTS} attempts: {error}. Finished work is "
                        "kept; run the same command again once the storage responds"
                    ) from error
                time.sleep(_FIRST_PAUSE_S * 2**attempt * random.uniform(0.5, 1.5))  # noqa: S311 - not cryptographic
        raise AssertionError


class RemoteFile:
    """An open object.

    Args:
        storage: Where it is stored.
        name: Its name.
        n_bytes: Its length, if it is known.
    """

    n_descriptors = 0
    stamp = (0, 0)

    def __init__(self, storage: RemoteStorage, name: str, n_bytes: int | None) -> None:
        self._storage, self._name, self._n_bytes = storage, name, n_bytes

    @property
    def n_bytes(self) -> int:
        """Length, requested once if it is not known."""
        if self._n_bytes is None:
            self._n_bytes = self._storage.size(self._name)
        if self._n_bytes is None:
            raise FileNotFoundError(f"{self._storage}/{self._name}")
        return self._n_bytes

    def read_at(self, offset: int, view: memoryview) -> None:
        """Fill memory with the bytes that start at `offset`."""
        data = self._storage.read_range(self._name, offset, offset + len(view))
        if len(data) != len(view):
            raise StoreCorruptError(
                f"'{self._storage}/{self._name}' ends before byte {offset + len(view)}: it was truncated"
            )
        view[:] = data
