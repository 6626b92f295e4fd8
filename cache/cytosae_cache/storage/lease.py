"""Exclusive rights to write on S3: an object that names its owner, who renews it; an expired one is taken over."""

import contextlib
import errno
import json
import logging
import secrets
import threading
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from cytosae_cache.errors import StoreBusyError
from cytosae_cache.storage.lock import Owner

logger = logging.getLogger(__name__)

EXPIRY_S = 300.0
"""Age of an owner's last sign of life, by the server's clock, after which another may take its place."""

_SECONDS_BETWEEN_SIGNS = 30.0
_MARK = "cytosae-cache lease"
_MOST_BYTES = 4096
_TRIALS = 8
_UNKNOWN = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


@dataclass(frozen=True)
class _Held:
    """What the object says, and how old it is."""

    owner: Owner | None
    """Its owner; None if the object is not one of ours."""
    token: str
    """The owner's token; '' if the object is not one of ours."""
    etag: str
    """Its version."""
    age_s: float
    """Time since it was written, by the server's clock."""


class Lease:
    """The right to write, from its object's creation to `release`; a thread renews it.

    Whoever reads the same token back owns it: the answer to a request that succeeded may have been lost. Not safe
    against a process that sleeps for longer than `EXPIRY_S` and wakes up in the middle of a write; `require` refuses
    all its later ones.

    Args:
        system: fsspec's file system of S3.
        path: Bucket and key of the object.
        what: What is written, for messages.

    Raises:
        StoreBusyError: If another process holds it; the message names it.
    """

    def __init__(self, system: Any, path: str, what: str) -> None:  # noqa: ANN401 - fsspec has no types
        self._system, self._path, self._what = system, path, what
        self._bucket, _, self._key = path.partition("/")
        self._token, self._owner, self._n_signs = secrets.token_hex(16), Owner.this(), 0
        self._etag = self._take()
        self.is_exclusive = self._server_refuses()
        """Whether the server honours conditions; if not, nothing keeps others from writing."""
        self._lost, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def require(self) -> None:
        """Refuse to write if another process has taken over.

        Raises:
            StoreBusyError: If it has.
        """
        if self._lost.is_set():
            raise StoreBusyError(
                f"another process has taken over '{self._what}', because this one gave no sign of life for "
                f"{EXPIRY_S:.0f} s. Wait for it to finish, then run the command again"
            )

    def release(self) -> None:
        """Give it up; its object is deleted unless another process has taken over."""
        self._stop.set()
        self._thread.join()
        if not self._lost.is_set():
            with contextlib.suppress(OSError):  # it expires
                if (held := self._look()) is not None and held.token == self._token:
                    self._system.call_s3("delete_object", Bucket=self._bucket, Key=self._key)

    def _take(self) -> str:
        """Create the object, or take over one whose owner is gone; returns its version.

        Raises:
            StoreBusyError: If its owner is alive, or the object is not one of ours.
        """
        for _ in range(_TRIALS):
            if (etag := self._put(IfNoneMatch="*")) is not None:
                return etag
            held = self._look()
            if held is None:  # released meanwhile
                continue
            if held.token == self._token:
                return held.etag
            if held.owner is None:
                raise StoreBusyError(
                    f"'s3://{self._path}' is not an object of cytosae-cache, but the lock of '{self._what}' needs that "
                    "name. Move it away"
                )
            if not held.owner.is_gone() and held.age_s < EXPIRY_S:
                raise StoreBusyError(
                    f"another process ({held.owner.describe()}) is writing '{self._what}'. Wait for it to finish, then "
                    f"run the command again. If it was killed, its right ends {EXPIRY_S - held.age_s:.0f} s from now"
                )
            if (etag := self._put(IfMatch=held.etag)) is not None:
                return etag
        raise StoreBusyError(f"other processes are writing '{self._what}'. Run the command again later")

    def _put(self, **condition: str) -> str | None:
        """Write the object under a condition; returns its version, or None if the condition does not hold."""
        self._n_signs += 1  # every version differs from the ones before, and so does its ETag
        about = {"mark": _MARK, "token": self._token, "signs": self._n_signs, **asdict(self._owner)}
        body = json.dumps(about).encode()
        try:
            answer = self._system.call_s3("put_object", Bucket=self._bucket, Key=self._key, Body=body, **condition)
        except (FileExistsError, FileNotFoundError):
            return None
        except OSError as error:
            if is_unmet(error):
                return None
            raise
        return str(answer["ETag"])

    def _look(self) -> _Held | None:
        """What the object says; None if there is none."""
        try:
            about = self._system.call_s3("head_object", Bucket=self._bucket, Key=self._key)
            text = self._system.cat_file(self._path, start=0, end=_MOST_BYTES)
        except FileNotFoundError:
            return None
        now = about["ResponseMetadata"]["HTTPHeaders"].get("date")
        age = 0.0 if now is None else (parsedate_to_datetime(now) - about["LastModified"]).total_seconds()
        owner, token = _parse(text)
        return _Held(owner, token, str(about["ETag"]), age)

    def _server_refuses(self) -> bool:
        """Whether the server refuses to create what is there."""
        etag = self._put(IfNoneMatch="*")
        if etag is None:
            return True
        self._etag = etag
        return False

    def _renew(self) -> None:
        """Write the object again and again; the thread."""
        while not self._stop.wait(_SECONDS_BETWEEN_SIGNS):
            try:
                etag = self._put(IfMatch=self._etag)
                if etag is None:
                    held = self._look()
                    if held is None or held.token != self._token:
                        self._lost.set()
                        return
                    etag = held.etag
                self._etag = etag
            except Exception as error:  # noqa: BLE001 - the next one may succeed
                logger.debug(f"the lock of '{self._what}' could not be renewed: {error}")


def is_unmet(error: OSError) -> bool:
    """Whether a request failed because its condition does not hold."""
    response = getattr(error.__cause__, "response", None)
    return isinstance(response, dict) and response.get("Error", {}).get("Code") in ("PreconditionFailed", "412")


def _parse(text: bytes) -> tuple[Owner | None, str]:
    """Owner and token that an object states; None and '' if it is not one of ours."""
    try:
        value: Any = json.loads(text)
        if value.pop("mark") != _MARK:
            return None, ""
        token = value.pop("token")
        del value["signs"]
        owner = Owner(**value)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return None, ""
    if (type(token), type(owner.host), type(owner.pid), type(owner.since)) != (str, str, int, str):
        return None, ""
    return owner, token
