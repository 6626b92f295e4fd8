"""Pictures that crash their decoder, take too long or too much memory cost themselves and no other."""

import io
import os
import resource
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from cytosae.backbones.images import UnreadableImageError
from cytosae_pipeline.images import decoding, isolation
from cytosae_pipeline.images.decoding import ImageDecoder, decode_files, shared_bytes
from cytosae_pipeline.images.image_list import ImageList
from cytosae_pipeline.images.isolation import DecodingError, Isolation, Limits, describe_end, limit_process
from cytosae_pipeline.images.listing import open_dataset
from cytosae_pipeline.runtime import workers
from cytosae_pipeline.runtime.workers import WorkerDiedError

SIZE = 8


@pytest.fixture
def folder(tmp_path) -> ImageList:
    rng = np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(rng.integers(0, 256, (10, 12, 3)).astype(np.uint8)).save(tmp_path / f"{number:02d}.png")
    return open_dataset(tmp_path)


def _slow_picture() -> bytes:
    """A JPEG of many scans, which takes several seconds."""
    stream = io.BytesIO()
    Image.new("RGB", (8000, 8000)).save(stream, "JPEG", progressive=True)
    data = stream.getvalue()
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * 180 + b"\xff\xd9"


@pytest.fixture
def with_slow(tmp_path, folder) -> ImageList:
    (tmp_path / "05.jpg").write_bytes(_slow_picture())
    return open_dataset(tmp_path)


@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_picture_that_takes_too_long_is_set_aside_alone(with_slow, n_workers):
    with ImageDecoder(with_slow, n_workers=n_workers, image_size=SIZE, limits=Limits(cpu_s=1)) as decoder:
        decoded = list(decoder.iter_rows(range(13)))
    assert [one.row for one in decoded] == list(range(13))
    assert {one.row: one.reason for one in decoded if one.reason} == {5: "takes longer than 1 s to decode"}
    assert decoded[5].sha256 is not None
    assert decoded[5].n_bytes == (with_slow.root / "05.jpg").stat().st_size


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process")
@pytest.mark.parametrize("n_workers", [0, 1])
def test_a_picture_that_takes_too_much_memory_is_set_aside(tmp_path, folder, n_workers):
    Image.new("RGB", (9000, 9000)).save(tmp_path / "03.bmp")
    images = open_dataset(tmp_path)
    with ImageDecoder(images, n_workers=n_workers, image_size=SIZE, limits=Limits(n_bytes=100 << 20)) as decoder:
        decoded = list(decoder.iter_rows(range(13)))
    assert {one.row: one.reason for one in decoded if one.reason} == {3: "needs more than 0.1 GB of memory to decode"}
    assert decoded[3].sha256 is not None


@pytest.mark.parametrize("n_workers", [0, 2])
def test_large_pictures_are_decoded_one_at_a_time_with_the_same_pixels(folder, n_workers, monkeypatch):
    with ImageDecoder(folder, n_workers=n_workers, image_size=SIZE) as decoder:
        plain = list(decoder.iter_rows(range(12)))
        assert decoder._alone._pool is None, "none was large"
    monkeypatch.setattr(decoding, "shared_bytes", lambda free, n_workers: 1)
    with ImageDecoder(folder, n_workers=n_workers, image_size=SIZE) as decoder:
        alone = list(decoder.iter_rows(range(12)))
        assert len(decoder._alone._pool.processes) == 1
    for one, other in zip(plain, alone, strict=True):
        assert (one.row, one.sha256, one.reason, one.n_bytes) == (other.row, other.sha256, other.reason, other.n_bytes)
        np.testing.assert_array_equal(one.pixels, other.pixels)


def test_a_large_picture_that_does_not_fit_stops_and_is_not_set_aside(folder, monkeypatch):
    monkeypatch.setattr(decoding, "shared_bytes", lambda free, n_workers: 1)
    monkeypatch.setattr(isolation, "available_ram", lambda: 10_000_000)
    with ImageDecoder(folder, n_workers=0, image_size=SIZE) as decoder:
        with pytest.raises(DecodingError, match=r"'00.png' needs 0.03 GB of memory to decode, and 0.01 GB are free"):
            list(decoder.iter_rows([0]))


def test_memory_is_shared_among_the_workers():
    gb = 1_000_000_000
    assert shared_bytes(None, 8) == shared_bytes(100 * gb, 0) == 256 << 20
    assert shared_bytes(16 * gb, 8) == gb
    assert shared_bytes(gb, 64) == 64 << 20


def _crash_at_row_5(root, items, wanted):
    if any(number == 5 for number, _ in items):
        os.kill(os.getpid(), signal.SIGSEGV)
    return decode_files(root, items, wanted)


def test_other_pictures_of_a_process_that_crashed_are_decoded_again(folder):
    with ImageDecoder(folder, n_workers=2, image_size=SIZE) as decoder:
        plain = list(decoder.iter_rows(range(12)))
        items = list(decoder._iter_tasks(_crash_at_row_5, range(12), decoder._defer))
        assert [type(item).__name__ for item in items] == ["Deferred"] * 8 + ["Decoded"] * 4
        again = [decoder._decode_alone(item) for item in items[:8]]
    for one, other in zip(plain, again, strict=False):
        np.testing.assert_array_equal(one.pixels, other.pixels)


def _end(number: int, place: str = "") -> str:
    if place:
        with open(place, "a") as file:  # noqa: PTH123
            file.write("x")
    os.kill(os.getpid(), number)
    return "unharmed"


@pytest.mark.parametrize(("number", "n_calls"), [(signal.SIGSEGV, 2), (signal.SIGABRT, 2), (signal.SIGXCPU, 1)])
def test_the_picture_that_ends_its_process_is_to_blame(number, n_calls, tmp_path):
    with Isolation(Limits(cpu_s=7)) as alone:
        with pytest.raises(UnreadableImageError) as caught:
            alone.run(_end, number, str(tmp_path / "calls"))
        assert (tmp_path / "calls").read_text() == "x" * n_calls
        reason = "takes longer than 7 s to decode" if number == signal.SIGXCPU else "its decoder crashed"
        assert str(caught.value) == reason
        assert alone.run(divmod, 9, 7) == (1, 2), "the process was replaced"


def test_a_process_that_was_killed_is_no_fault_of_the_picture():
    with Isolation(Limits()) as alone, pytest.raises(DecodingError, match="perhaps for lack of memory"):
        alone.run(_end, signal.SIGKILL)
    assert describe_end(WorkerDiedError(1), Limits()) == "", "nor is one that could not start"
    assert describe_end(WorkerDiedError(None), Limits()) == ""


@pytest.fixture
def stillborn(monkeypatch):
    """Child processes end before they are sent anything."""

    def start(*arguments, **options):
        process = subprocess.Popen(*arguments, **options)
        process.wait()
        return process

    monkeypatch.setattr(workers.spawn, "get_executable", lambda: os.fsencode(shutil.which("false")))
    monkeypatch.setattr(workers, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": start}))


@pytest.mark.usefixtures("stillborn")
def test_a_process_that_ends_while_it_starts_is_named(folder):
    with pytest.raises(DecodingError, match=r"a decoding process was killed.*--workers 2"):
        ImageDecoder(folder, n_workers=4, image_size=SIZE)
    with Isolation(Limits()) as alone, pytest.raises(DecodingError, match=r"a decoding process was killed"):
        alone.run(divmod, 9, 7)


def _limits_now(limits: Limits) -> list[tuple[int, int]]:
    limit_process(limits)
    limit_process(limits)
    return [resource.getrlimit(kind) for kind in (resource.RLIMIT_CPU, resource.RLIMIT_CORE, resource.RLIMIT_DATA)]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process")
def test_a_process_limits_itself_again_for_every_picture():
    with Isolation(Limits()) as alone:
        (cpu_s, hard), (core, _), (n_bytes, _) = alone.run(_limits_now, Limits(5, 1 << 30))
    assert 5 < cpu_s < 60
    assert hard == resource.getrlimit(resource.RLIMIT_CPU)[1]
    assert core == 0
    assert 1 << 30 < n_bytes < 1 << 32
