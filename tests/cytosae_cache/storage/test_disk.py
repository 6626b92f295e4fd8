"""Errors of the disk are one message that names the place, whatever library wrote; other errors pass."""

import errno
import os

import h5py
import pytest
import torch

from cytosae_cache.errors import StoreNotFoundError, WriteError
from cytosae_cache.storage.disk import reading, writing


def _fail(place, error):
    with writing(place):
        raise error


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, r"No space left on device \(.+ free\)\. Free some space, then run the command again"),
        (errno.EDQUOT, r"Disk quota exceeded \(.+ free\)\. Free some space, then run the command again"),
        (
            errno.EFBIG,
            r"File too large\. Raise the limit on the size of files \(ulimit -f\), then run the command again",
        ),
        (errno.EROFS, r"Read-only file system\. Make the folder writable, or use another --root_dir or --out"),
        (errno.EACCES, r"Permission denied\. Make the folder writable, or use another --root_dir or --out"),
        (errno.EIO, r"Input/output error\. Check the disk, then run the command again"),
        (errno.ENOENT, r"No such file or directory\. Check the disk, then run the command again"),
        (errno.ENAMETOOLONG, r"File name too long\. Use another --root_dir or --out"),
    ],
)
def test_each_reason_has_its_advice(tmp_path, code, message):
    place = tmp_path / "x.csv"
    with pytest.raises(WriteError, match=rf"^'{place}' cannot be written: {message}$") as caught:
        _fail(place, OSError(code, "whatever a library says"))
    assert caught.value.errno == code


def test_errors_of_other_places_and_other_kinds_pass(tmp_path):
    place = tmp_path / "x.csv"
    for error in (
        OSError(errno.EIO, "broken", "/elsewhere/x.csv"),
        BrokenPipeError(errno.EPIPE, "the reader of stderr is gone"),
        OSError("an error of our own, without a number"),
        StoreNotFoundError("no store"),
        RuntimeError("shapes do not fit"),
    ):
        with pytest.raises(type(error)) as caught:
            _fail(place, error)
        assert caught.value is error
    for name in (f"{place}.7.partial", str(tmp_path), os.fsencode(place)):
        with pytest.raises(WriteError):
            _fail(place, OSError(errno.EIO, "broken", name))


def test_an_inner_place_becomes_that_of_the_whole(tmp_path):
    with pytest.raises(WriteError, match=f"^'{tmp_path}' cannot be written: Input/output error"), writing(tmp_path):
        _fail(tmp_path / "x.csv", OSError(errno.EIO, "broken"))


def test_torch_hides_the_error_of_the_disk(tmp_path):
    class Full:
        """A file on a full disk."""

        def write(self, data):
            raise OSError(errno.ENOSPC, "full")

        def flush(self):
            pass

    with pytest.raises(WriteError, match="No space left on device"), writing(tmp_path):
        torch.save({"x": torch.zeros(100_000)}, Full())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")  # noqa: PTH110
def test_hdf5_names_the_error_in_its_own_words(tmp_path):
    with pytest.raises(WriteError, match="No space left on device"), writing(tmp_path):
        h5py.File("/dev/full", "w")


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs /proc")  # noqa: PTH110
def test_errors_of_reading_name_the_file(tmp_path):
    path = tmp_path / "x"
    path.symlink_to("/proc/self/mem")  # reading its beginning fails
    with pytest.raises(OSError, match=f"Input/output error: '{path}'"), reading(path):
        path.read_bytes()
