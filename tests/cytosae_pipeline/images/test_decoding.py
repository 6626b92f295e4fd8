"""Decoding in worker processes: the same rows in the same order, with a reason for what cannot be used."""

import errno
import hashlib
import itertools
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cytosae.backbones.images import decode_image
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.images import decoding
from cytosae_pipeline.images import files as source_files
from cytosae_pipeline.images.decoding import Decoded, ImageDecoder, Wanted, decode_files
from cytosae_pipeline.images.files import SourceError
from cytosae_pipeline.images.image_list import ImageList, ImageRow
from cytosae_pipeline.images.isolation import DecodingError
from cytosae_pipeline.images.listing import open_dataset
from tests.support.patience import patience, wait_until

ROOT = Path(__file__).parents[3]
SIZE = 8


def _write(root: Path, n: int) -> ImageList:
    """A flat folder of pictures, each of its own colour; the fifth, sixth and last are broken, empty and missing."""
    root.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(n):
        pixels = rng.integers(0, 256, (10, 12, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"{number:03d}.png")
    if n > 6:
        (root / "004.png").write_bytes(b"no image")
        (root / "005.png").write_bytes(b"")
        images = open_dataset(root)
        (root / f"{n - 1:03d}.png").unlink()
        return images
    return open_dataset(root)


def _decode(images: ImageList, rows=None, *, n_workers: int = 0) -> list[Decoded]:
    with ImageDecoder(images, n_workers=n_workers, image_size=SIZE) as decoder:
        return list(decoder.iter_rows(range(len(images)) if rows is None else rows))


def _one(root: Path, path: str) -> Decoded:
    (decoded,) = _decode(ImageList(root, (ImageRow(path, "", ""),), "flat"))
    return decoded


def _assert_same(some: list[Decoded], others: list[Decoded]) -> None:
    assert len(some) == len(others)
    for a, b in zip(some, others, strict=True):
        assert (a.row, a.sha256, a.reason) == (b.row, b.sha256, b.reason)
        assert (a.pixels is None) == (b.pixels is None)
        if a.pixels is not None and b.pixels is not None:
            np.testing.assert_array_equal(a.pixels, b.pixels)


# What a row becomes


def test_a_row_is_the_file_decoded(tmp_path):
    images = _write(tmp_path, 3)
    for row, decoded in enumerate(_decode(images)):
        data = (tmp_path / images.paths[row]).read_bytes()
        assert decoded.row == row
        assert decoded.reason == ""
        assert decoded.sha256 == hashlib.sha256(data).digest()
        np.testing.assert_array_equal(decoded.pixels, decode_image(data, size=SIZE))


def test_default_size_is_the_networks(tmp_path):
    with ImageDecoder(_write(tmp_path, 1), n_workers=0) as decoder:
        (decoded,) = decoder.iter_rows([0])
    assert decoded.pixels.shape == (224, 224, 3)


def test_missing_file(tmp_path):
    assert _one(tmp_path, "gone.png") == Decoded(0, None, None, "file not found")
    assert _one(tmp_path, "no/folder/gone.png").reason == "file not found"


@pytest.mark.parametrize("data", [b"", b"no image", b"\x89PNG\r\n\x1a\nbroken"])
def test_broken_file_has_a_digest_and_a_reason(tmp_path, data):
    (tmp_path / "a.png").write_bytes(data)
    decoded = _one(tmp_path, "a.png")
    assert decoded.pixels is None
    assert decoded.sha256 == hashlib.sha256(data).digest()
    assert decoded.reason
    assert decoded.reason.isprintable()
    assert str(tmp_path) not in decoded.reason


def test_cut_off_file(tmp_path):
    _write(tmp_path, 1)
    data = (tmp_path / "000.png").read_bytes()
    (tmp_path / "000.png").write_bytes(data[: len(data) // 2])
    assert "truncated" in _one(tmp_path, "000.png").reason


@pytest.mark.parametrize("target", ["file", "folder"])
def test_link_that_leads_out(tmp_path, target):
    _write(tmp_path / "outside", 1)
    (tmp_path / "data").mkdir()
    if target == "file":
        (tmp_path / "data/a.png").symlink_to(tmp_path / "outside/000.png")
        decoded = _one(tmp_path / "data", "a.png")
    else:
        (tmp_path / "data/x").symlink_to(tmp_path / "outside")
        decoded = _one(tmp_path / "data", "x/000.png")
    assert decoded == Decoded(0, None, None, "leads out of the data set's folder")


def test_link_put_in_place_after_the_list_was_made(tmp_path):
    _write(tmp_path / "outside", 1)
    images = _write(tmp_path / "data", 2)
    (tmp_path / "data/000.png").unlink()
    (tmp_path / "data/000.png").symlink_to(tmp_path / "outside/000.png")
    assert [decoded.reason for decoded in _decode(images)] == ["leads out of the data set's folder", ""]


def test_link_that_stays_inside(tmp_path):
    images = _write(tmp_path, 1)
    (tmp_path / "b.png").symlink_to("000.png")
    assert _one(tmp_path, "b.png").sha256 == _decode(images)[0].sha256


def test_links_in_a_circle(tmp_path):
    (tmp_path / "a.png").symlink_to("b.png")
    (tmp_path / "b.png").symlink_to("a.png")
    decoded = _one(tmp_path, "a.png")
    assert decoded.reason
    assert decoded.sha256 is None


def test_folder_instead_of_a_file(tmp_path):
    (tmp_path / "a.png").mkdir()
    assert _one(tmp_path, "a.png").reason == "cannot be read: not a file"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such files")
def test_pipe_instead_of_a_file_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    assert _one(tmp_path, "a.png").reason == "cannot be read: not a file"


def test_name_too_long_for_the_disk(tmp_path):
    assert _one(tmp_path, "a" * 300 + ".png").reason.startswith("cannot be read: ")


@pytest.mark.skipif(getattr(os, "geteuid", int)() == 0, reason="root may read everything")
def test_file_without_permission(tmp_path):
    _write(tmp_path, 1)
    (tmp_path / "000.png").chmod(0)
    assert _one(tmp_path, "000.png").reason == "cannot be read: Permission denied"


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT, errno.EMFILE])
def test_failing_disk(tmp_path, monkeypatch, code):
    def fail(*arguments):
        attempts.append(arguments)
        raise OSError(code, os.strerror(code))

    attempts = []
    _write(tmp_path, 1)
    monkeypatch.setattr(source_files, "_RETRY_DELAYS_S", (0.0, 0.0))
    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(
        SourceError, match=r"image '000.png' cannot be read at the moment: .* \(3 attempts\).*run the command"
    ):
        _one(tmp_path, "000.png")
    assert len(attempts) == 3


@pytest.mark.parametrize("n_workers", [0, 1])
def test_a_failure_that_passes_leaves_no_trace(tmp_path, monkeypatch, n_workers):
    images = _write(tmp_path, 9)
    once = tmp_path / "once"
    once.touch()
    monkeypatch.setattr(source_files, "_RETRY_DELAYS_S", (0.0,))
    read = os.read

    def fail_once(file, n):
        if once.exists():
            once.unlink()
            raise OSError(errno.EIO, "Input/output error")
        return read(file, n)

    monkeypatch.setattr(os, "read", fail_once)
    decoded = decode_files(images.root, list(enumerate(images.rows)), Wanted(SIZE))
    assert not once.exists()
    monkeypatch.undo()
    _assert_same(decoded, _decode(images, n_workers=n_workers))


def test_a_failing_disk_reaches_the_caller_from_a_worker(tmp_path):
    # It is pickled on its way.
    error = pickle.loads(pickle.dumps(SourceError("image 'a' cannot be read at the moment")))
    assert isinstance(error, UserError)
    with ImageDecoder(_write(tmp_path, 1), n_workers=1, image_size=SIZE) as decoder:
        with pytest.raises(SourceError, match="cannot be read at the moment"):
            list(decoder._iter_tasks(_fail, [0]))


def _fail(root, items, wanted):
    raise SourceError("image cannot be read at the moment")


# The file is still the one that was listed


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda path: path.unlink(), "vanished while the build was running"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-100]),
            r"changed while the build was running: \d+ bytes when it was listed, \d+ now",
        ),
        (
            lambda path: path.write_bytes(path.read_bytes()),
            "changed while the build was running: it was written to after it was listed",
        ),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read: not a file"),
    ],
    ids=["vanishes", "shrinks", "written", "folder"],
)
def test_a_file_that_is_not_the_one_listed(tmp_path, change, reason):
    images = _write(tmp_path, 3)
    change(tmp_path / "001.png")
    decoded = _decode(images)
    assert [bool(one.reason) for one in decoded] == [False, True, False]
    assert re.fullmatch(reason, decoded[1].reason)
    assert decoded[1][1:3] == (None, None)
    assert decoded[1].n_bytes == 0
    with ImageDecoder(images, n_workers=0) as decoder:
        hashed = list(decoder.iter_hashes(range(3)))
    assert [(one.sha256, one.reason) for one in hashed] == [(one.sha256, one.reason) for one in decoded]


@pytest.mark.parametrize("appended", [b"", b"x"])
def test_a_file_written_to_while_it_is_read(tmp_path, monkeypatch, appended):
    images = _write(tmp_path, 1)
    read = os.read

    def write_meanwhile(file, n):
        data = read(file, n)
        with (tmp_path / "000.png").open("r+b") as other:
            other.seek(0, os.SEEK_END)
            other.write(appended)
        os.utime(tmp_path / "000.png", ns=(0, 0))
        return data

    monkeypatch.setattr(os, "read", write_meanwhile)
    assert _decode(images)[0].reason.startswith("changed while the build was running: ")


def test_the_digest_is_of_the_bytes_that_were_decoded(tmp_path):
    images = _write(tmp_path, 9)
    with ImageDecoder(images, n_workers=2) as decoder:
        hashed = list(decoder.iter_hashes(range(9)))
    assert [one.row for one in hashed] == list(range(9))
    decoded = _decode(images)
    assert [one.sha256 for one in hashed] == [one.sha256 for one in decoded]
    sizes = [(tmp_path / path).stat().st_size if (tmp_path / path).exists() else 0 for path in images.paths]
    assert [one.n_bytes for one in decoded] == sizes


def test_file_too_large_is_not_read(tmp_path, monkeypatch):
    _write(tmp_path, 1)
    size = (tmp_path / "000.png").stat().st_size
    monkeypatch.setattr(source_files, "MAX_FILE_BYTES", size)
    assert _one(tmp_path, "000.png").reason == ""
    monkeypatch.setattr(source_files, "MAX_FILE_BYTES", size - 1)
    monkeypatch.setattr(os, "read", lambda *arguments: pytest.fail("was read"))
    assert _one(tmp_path, "000.png") == Decoded(0, None, None, f"the file is larger than {size - 1} bytes")


def test_sparse_giant_is_refused_at_once(tmp_path):
    with (tmp_path / "a.tif").open("wb") as file:
        file.truncate(1 << 34)
    assert "larger than 1073741824 bytes" in _one(tmp_path, "a.tif").reason


def test_decode_files_is_what_workers_do(tmp_path):
    images = _write(tmp_path, 9)
    items = list(enumerate(images.rows))
    _assert_same(decode_files(images.root, items, Wanted(SIZE)), _decode(images))
    assert decode_files(images.root, [], Wanted(SIZE)) == []


# Workers


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> ImageList:
    return _write(tmp_path_factory.mktemp("folder") / "cells", 61)


@pytest.fixture(scope="module")
def plain(folder) -> list[Decoded]:
    return _decode(folder)


def test_plain_path(folder, plain):
    assert [decoded.row for decoded in plain] == list(range(61))
    assert {decoded.row: decoded.reason for decoded in plain if decoded.reason} == {
        4: "not a JPEG, PNG, BMP, TIFF, WebP or JPEG 2000 image",
        5: "the file is empty",
        60: "vanished while the build was running",
    }


@pytest.mark.parametrize("n_workers", [1, 2])
def test_workers_change_nothing(folder, plain, n_workers):
    shuffled = [int(row) for row in np.random.default_rng(0).permutation(61)]
    with ImageDecoder(folder, n_workers=n_workers, image_size=SIZE) as decoder:
        _assert_same(list(decoder.iter_rows(range(61))), plain)
        # the same decoder again, in any order, at odd lengths, from a generator
        _assert_same(list(decoder.iter_rows(shuffled)), [plain[row] for row in shuffled])
        for rows in ([], [60], range(7), range(8), range(9), [3, 3, 3], range(60, -1, -1)):
            _assert_same(list(decoder.iter_rows(row for row in rows)), [plain[row] for row in rows])


def test_no_worker_takes_any_order(folder, plain):
    for rows in ([], [60], [3, 3], range(60, -1, -1)):
        _assert_same(_decode(folder, rows), [plain[row] for row in rows])


@pytest.mark.parametrize("n_workers", [0, 1, 2])
def test_look_ahead_is_bounded(folder, n_workers):
    pulled = []

    def rows():
        for number in itertools.count():  # endless: whoever collects it first never comes back
            pulled.append(number)
            yield number % 61

    # one task more than wait is in hand; with no workers nothing is ahead but its own task
    limit = decoding._IMAGES_PER_TASK * (n_workers * decoding._TASKS_AHEAD_PER_WORKER + 1)
    with ImageDecoder(folder, n_workers=n_workers, image_size=SIZE) as decoder:
        results = decoder.iter_rows(rows())
        assert not pulled, "nothing happens before the first result is asked for"
        for taken in range(1, 101):
            assert next(results).row == (taken - 1) % 61
            assert len(pulled) <= taken + limit
        results.close()


def _kill_a_worker(decoder: ImageDecoder) -> None:
    (process, *_) = decoder._pool.processes
    process.kill()
    wait_until(lambda: not process.is_alive())


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize(("n_workers", "advice"), [(1, "--workers 0"), (2, "--workers 1")])
def test_killed_worker_says_what_to_do(folder, n_workers, advice):
    with ImageDecoder(folder, n_workers=n_workers, image_size=SIZE) as decoder:
        results = decoder.iter_rows(row % 61 for row in itertools.count())
        next(results)
        _kill_a_worker(decoder)
        with pytest.raises(DecodingError, match=f"{advice}$") as caught:
            for _ in results:
                pass
        assert isinstance(caught.value, UserError)
        assert "memory" in str(caught.value)
        assert "Run the command again" in str(caught.value)


@pytest.mark.parametrize("n_workers", [0, 2])
def test_leaving_early_does_not_hang(folder, n_workers):
    with ImageDecoder(folder, n_workers=n_workers, image_size=SIZE) as decoder:
        results = decoder.iter_rows(row % 61 for row in itertools.count())
        next(results)
        processes = list(decoder._pool.processes) if n_workers else []
        started = time.monotonic()
    assert time.monotonic() - started < patience()
    assert not any(process.is_alive() for process in processes)


@pytest.mark.parametrize("n_workers", [0, 1])
def test_errors_of_the_caller_pass_through(folder, n_workers):
    def rows():
        yield from range(20)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), ImageDecoder(folder, n_workers=n_workers, image_size=SIZE) as decoder:
        list(decoder.iter_rows(rows()))


@pytest.mark.skipif(sys.platform == "win32", reason="no process groups")
def test_workers_ignore_ctrl_c_and_polite_kills(folder, plain):
    with ImageDecoder(folder, n_workers=2, image_size=SIZE) as decoder:
        results = decoder.iter_rows(range(61))
        decoded = [next(results)]
        for process, number in itertools.product(list(decoder._pool.processes), (signal.SIGINT, signal.SIGTERM)):
            wait_until(lambda process=process, number=number: _ignores(process.pid, number))
            os.kill(process.pid, number)
        decoded += results
    _assert_same(decoded, plain)


def _ignores(pid: int, number: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        time.sleep(1)
        return True
    (mask,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("SigIgn"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_in_a_program_of_its_own(tmp_path, folder):
    """The decoder in a program of its own, which ends with no process and no word left over."""
    script = tmp_path / "program.py"
    script.write_text(
        textwrap.dedent(f"""
            import sys
            from pathlib import Path
            from cytosae_pipeline.images.listing import open_dataset
            from cytosae_pipeline.images.decoding import ImageDecoder
            if __name__ == "__main__":
                with ImageDecoder(open_dataset(Path({str(folder.root)!r})), n_workers=2, image_size=8) as decoder:
                    print(sum(decoded.pixels is not None for decoded in decoder.iter_rows(range(60))))
                print("torch" in sys.modules)
        """)
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [ROOT, ROOT / "cache", ROOT / "pipeline"]))}
    done = subprocess.run(
        [sys.executable, "-W", "error", script], env=environment, capture_output=True, text=True, timeout=patience()
    )
    assert done.stderr == ""
    assert done.stdout.split() == ["58", "False"]


def test_real_crops(test_data):
    images = open_dataset(test_data / "bccd_cells").spread(5)
    decoded = _decode(images)
    assert [one.reason for one in decoded] == [""] * 5
    assert all(one.pixels.shape == (SIZE, SIZE, 3) for one in decoded)
    assert len({one.sha256 for one in decoded}) == 5
    _assert_same(_decode(images, n_workers=1), decoded)
