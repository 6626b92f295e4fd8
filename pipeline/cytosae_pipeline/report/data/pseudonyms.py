"""Keyed hashes in place of patients' names."""

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cytosae_cache.storage.atomic import create_file
from cytosae_pipeline.errors import UserError

KEY_BYTES = 32
_DIGITS = 12


def ensure_key(path: Path) -> bytes:
    """The key in a file, created at random the first time, so that a patient keeps the same pseudonym.

    Raises:
        UserError: If the file does not contain a key.
        WriteError: If it cannot be created.
    """
    key = secrets.token_bytes(KEY_BYTES)
    if create_file(path, key, mode=0o600):
        return key
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise UserError(
            f"'{path}' must contain a key of {KEY_BYTES} bytes, found {len(key)}: delete it to get new pseudonyms"
        )
    return key


def shuffled_numbers(n: int, key: bytes) -> npt.NDArray[np.int64]:
    """Numbers 0 to n - 1 in an order that only the key determines: the rows of a store are ordered by path.

    Args:
        n: Rows.
        key: The secret key.

    Returns:
        Number of each row, shape `(n,)`.
    """
    digests = (hmac.digest(key, b"image %d" % row, "sha256")[:8] for row in range(n))
    drawn = np.fromiter((int.from_bytes(digest, "big") for digest in digests), dtype=np.uint64, count=n)
    numbers = np.empty(n, dtype=np.int64)
    numbers[np.argsort(drawn, kind="stable")] = np.arange(n)
    return numbers


def pseudonymise(names: Sequence[str], key: bytes, *, what: str = "patient") -> list[str]:
    """HMAC-SHA256 (RFC 2104) of each name, 12 hex digits; without the key, names cannot be guessed and tried.

    Args:
        names: The names.
        key: The secret key.
        what: What they are names of: how the pseudonyms begin.

    Raises:
        UserError: If two names get the same digits.
    """
    hashes = [hmac.new(key, name.encode(), hashlib.sha256).hexdigest()[:_DIGITS] for name in names]
    if len(set(hashes)) != len(set(names)):
        raise UserError(f"two {what}s got the same pseudonym: delete the key file and run the command again")
    return [f"{what}-{digits}" for digits in hashes]
