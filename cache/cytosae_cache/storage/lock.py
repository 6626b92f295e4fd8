"""Exclusive rights to write in one place of this machine: held by one process, and gone with it."""

import contextlib
import errno
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cytosae_cache.errors import StoreBusyError
from cytosae_cache.storage.atomic import remove_strays, temporary_name
from cytosae_cache.storage.disk import writing

_MARK = "cytosae-cache lock"
_MOST_BYTES = 4096
_OWNER_BYTES = 512
_OWNER_SUFFIX = ".owner"
_SECONDS_BETWEEN_SIGNS = 30.0
_EXPIRY_S = 600.0
"""Age of an owner's last sign of life after which it counts as gone, where the system has no locks of its own."""

_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock."""

    host: str
    """Name of its machine."""
    pid: int
    """Its number there."""
    since: str
    """When it took the lock, UTC."""

    @classmethod
    def this(cls) -> "Owner":
        """This process."""
        return cls(platform.node(), os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()))

    def describe(self) -> str:
        """Who it is, for a message; safe on a terminal."""
        host = "".join(c if c.isprintable() else "?" for c in self.host[:80])
        return f"process {self.pid} on {host}, since {self.since[:40]}"

    def is_gone(self) -> bool:
        """Whether it was on this machine and has ended."""
        if self.host != platform.node() or os.name == "nt":
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except (PermissionError, OverflowError):
            return False
        return False


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the exclusive right to write something.

    The right ends with the process, however it ends. A file that this function did not make is neither changed nor
    removed, and a link is not followed. Where the file system has no locks, a file that only one process can create
    names the owner; it counts as left over if its process has ended or has given no sign of life for ten minutes.

    Args:
        path: The lock's file, beside what is written; removed at the end.
        what: What is written, for the message.

    Raises:
        StoreBusyError: If another process holds the lock; the message names it.
        WriteError: If the file cannot be created.
    """
    with writing(path, what):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        with _owned(path, what):
            yield
        return
    with contextlib.closing(_LockFile(path, what)) as lock:
        try:
            while not lock.is_named():  # removed by its owner between our opening and locking it
                lock.close()
                with writing(path, what):
                    lock.open()
                fcntl.flock(lock.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, BlockingIOError):
                raise _busy(what, _read_owner(lock.file)) from None
            if error.errno not in _UNSUPPORTED:
                raise
            lock.remove()
            with _owned(path, what):
                yield
            return
        try:
            with writing(path, what):
                lock.name_owner()
            yield
        finally:
            lock.remove()


class _LockFile:
    """The file of a lock; never changed or removed if it was there before and is not ours.

    Args:
        path: The file.
        what: What is written, for messages.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path, self._what = path, what
        self.file = -1
        self._is_ours = False

    def open(self) -> None:
        """Open the file, or create it.

        Raises:
            StoreBusyError: If the name belongs to a link or a folder.
        """
        flags = os.O_RDWR | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
        while self.file < 0:
            try:
                self.file = _create_named(self.path, flags)
                self._is_ours = True
            except FileExistsError:
                with contextlib.suppress(FileNotFoundError):  # removed since
                    self._open_existing(flags)

    def _open_existing(self, flags: int) -> None:
        try:
            self.file = os.open(self.path, flags)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.EMLINK):
                raise StoreBusyError(
                    f"'{self.path}' is a link or a folder, but the lock of '{self._what}' must be a file. Move it away"
                ) from error
            raise
        self._is_ours = _read_owner(self.file) is not None

    def is_named(self) -> bool:
        """Whether the open file is the one that has the name now."""
        if self.file < 0:
            return False
        try:
            there = self.path.lstat()
        except FileNotFoundError:
            return False
        return os.path.samestat(there, os.fstat(self.file))

    def name_owner(self) -> None:
        """Name this process in the file."""
        if self._is_ours:
            _write_owner(self.file)

    def remove(self) -> None:
        """Remove the file."""
        if self._is_ours:
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Give up the lock."""
        if self.file >= 0:
            os.close(self.file)
            self.file = -1


def _busy(what: str, owner: Owner | None) -> StoreBusyError:
    """The error that names the owner."""
    who = "another process" if owner is None else f"another process ({owner.describe()})"
    return StoreBusyError(f"{who} is writing '{what}'. Wait for it to finish, then run the command again")


def _read_owner(file: int) -> Owner | None:
    """The owner that a lock's file names; None if it is not one of ours."""
    try:
        value: Any = json.loads(os.pread(file, _MOST_BYTES, 0))
        if value.pop("mark") != _MARK:
            return None
        owner = Owner(**value)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return None
    return owner if (type(owner.host), type(owner.pid), type(owner.since)) == (str, int, str) else None


def _write_owner(file: int) -> None:
    """Name this process as the owner, in a file that is empty or ours: in one call, so that it always names one."""
    os.pwrite(file, json.dumps({"mark": _MARK, **asdict(Owner.this())}).encode().ljust(_OWNER_BYTES), 0)


def _create_named(path: Path, flags: int) -> int:
    """Create a file that names this process as the owner from its first instant on; returns its descriptor.

    Raises:
        FileExistsError: If there is a file.
    """
    remove_strays(path)
    temporary = temporary_name(path)
    file = os.open(temporary, flags | os.O_CREAT, 0o666)
    try:
        _write_owner(file)
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            os.close(os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666))
            temporary.replace(path)
    except BaseException:
        os.close(file)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    return file


@contextlib.contextmanager
def _owned(path: Path, what: str) -> Iterator[None]:
    """The same right by a file that only one process can create."""
    place = path.with_name(path.name + _OWNER_SUFFIX)
    for _ in range(2):
        try:
            file = os.open(place, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
            break
        except FileExistsError:
            owner = _find_owner(place)
            if owner is not None and not owner.is_gone() and time.time() - place.stat().st_mtime < _EXPIRY_S:
                raise _busy(what, owner) from None
            if owner is None:
                raise StoreBusyError(
                    f"'{place}' is not a file of cytosae-cache, but the lock of '{what}' needs that name. Move it away"
                ) from None
            place.unlink(missing_ok=True)
    else:
        raise _busy(what, _find_owner(place))
    try:
        with writing(place, what):
            _write_owner(file)
        with _signs_of_life(place):
            yield
    finally:
        place.unlink(missing_ok=True)
        os.close(file)


def _find_owner(place: Path) -> Owner | None:
    """The owner that a file names; None if there is none."""
    try:
        file = os.open(place, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return None
    try:
        return _read_owner(file)
    finally:
        os.close(file)


@contextlib.contextmanager
def _signs_of_life(place: Path) -> Iterator[None]:
    """Renew the file's time in a thread."""
    stop = threading.Event()
    thread = threading.Thread(target=_give_signs, args=(place, stop), name="lock-owner", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _give_signs(place: Path, stop: threading.Event) -> None:
    """Renew the file's time until told to stop."""
    while not stop.wait(_SECONDS_BETWEEN_SIGNS):
        with contextlib.suppress(OSError):
            os.utime(place)
