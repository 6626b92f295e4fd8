"""Pictures that cost more than their files say: refused before memory is allocated, or converted in bands."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from cytosae.backbones import image_bands, image_memory
from cytosae.backbones.images import LargeImageError, UnreadableImageError, decode_image
from cytosae.backbones.jpeg2000_header import measure_jpeg_2000

ROOT = Path(__file__).parents[3]
RNG = np.random.default_rng(0)
RGBA = Image.fromarray(RNG.integers(0, 256, (43, 61, 4)).astype(np.uint8))
RGB, GREY = RGBA.convert("RGB"), RGBA.convert("L")
DEEP = Image.fromarray(RNG.integers(0, 65536, (43, 61)).astype(np.uint16))
PICTURES = {
    "png": (RGB, "PNG"), "rgba": (RGBA, "PNG"), "la": (RGBA.convert("LA"), "PNG"), "p": (RGB.quantize(16), "PNG"),
    "one": (GREY.convert("1"), "PNG"), "deep": (DEEP, "PNG"), "jpeg": (RGB, "JPEG"),
    "cmyk": (RGB.convert("CMYK"), "JPEG"),
    "tiff": (RGB, "TIFF"), "deep-tiff": (DEEP, "TIFF"), "p-tiff": (RGB.quantize(16), "TIFF"),
    "big": (Image.frombytes("I;16B", (61, 43), np.asarray(DEEP).astype(">u2").tobytes()), "TIFF"),
    "floats": (Image.fromarray(RNG.random((43, 61)).astype(np.float32)), "TIFF"),
    "int32": (Image.fromarray(RNG.integers(0, 65536, (43, 61)).astype(np.int32)), "TIFF"), "webp": (RGBA, "WEBP"),
}  # fmt: skip


def _saved(picture: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def _png(width: int, height: int, *, depth: int = 8) -> bytes:
    """A black grey PNG, written without its pixels in memory."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    line = bytes(1 + width * depth // 8)
    n_lines, packer = max(1, (1 << 16) // len(line)), zlib.compressobj(9)
    counts = [n_lines] * (height // n_lines) + [height % n_lines]
    body = b"".join(packer.compress(line * n) for n in counts) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def _strips(n: int, order: str = "<", *, big: bool = False) -> bytes:
    """A TIFF of one byte per strip, which all lie at one place."""
    tags = [(256, 1, 1), (257, 1, n), (258, 1, 8), (259, 1, 1), (262, 1, 1), (277, 1, 1), (278, 1, 1)]
    entry, head = (
        ("HHQQ", struct.pack(order + "HHHQ", 43, 8, 0, 16)) if big else ("HHII", struct.pack(order + "HI", 42, 8))
    )
    size = struct.calcsize("=" + entry)
    start = 2 + len(head)
    far = start + (8 if big else 2) + size * (len(tags) + 2) + (8 if big else 4)
    tags += [(273, n, far), (279, n, far + 4 * n)]
    entries = b"".join(struct.pack(order + entry, tag, 4, count, value) for tag, count, value in sorted(tags))
    if order == ">" or big:  # values shorter than their place lie at its start
        entries = b"".join(
            struct.pack(order + entry[:3], tag, 4, count)
            + struct.pack(order + "I", value).ljust(8 if big else 4, b"\0")
            for tag, count, value in sorted(tags)
        )
    numbers = struct.pack(order + f"{n}I", *[start] * n) + struct.pack(order + f"{n}I", *[1] * n)
    count = struct.pack(order + ("Q" if big else "H"), len(tags))
    return (b"II" if order == "<" else b"MM") + head + count + entries + bytes(8 if big else 4) + numbers


def _reason(data: bytes, **options) -> str:
    with pytest.raises(UnreadableImageError) as caught:
        decode_image(data, **options)
    assert len(str(caught.value)) <= 150
    return str(caught.value)


# Bands


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", PICTURES)
def test_bands_change_no_pixel(name, orientation, monkeypatch):
    exif = Image.Exif()
    exif[0x112] = orientation
    picture, kind = PICTURES[name]
    data = _saved(picture, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    options = [{"size": 24}, {"size": 61}, {"size": 100, "resample": "lanczos"}, {"size": 9, "resample": "nearest"}]
    whole = [decode_image(data, **option) for option in options]
    for n_pixels in (1, 150, 2000):
        monkeypatch.setattr(image_bands, "BAND_PIXELS", n_pixels)
        for option, expected in zip(options, whole, strict=True):
            np.testing.assert_array_equal(decode_image(data, **option), expected)


def test_the_range_of_values_is_that_of_all_bands(monkeypatch):
    monkeypatch.setattr(image_bands, "BAND_PIXELS", 61)
    values = np.full((43, 61), 0.5, np.float32)
    for value, named in ((np.nan, "nan"), (-2, "-2 to 0.5"), (3, "0.5 to 3")):
        values[20, 20] = value
        assert named in _reason(_saved(Image.fromarray(values), "TIFF"))
    whole = np.zeros((43, 61), np.int32)
    whole[3, 3], whole[40, 7] = -5, 70000
    assert "from -5 to 70000" in _reason(_saved(Image.fromarray(whole), "TIFF"))


# Estimates


def _peak(data: bytes, tmp_path: Path, **options) -> tuple[int, str]:
    """Bytes that decoding a file in a process of its own adds to what the process has, and how it ended."""
    (tmp_path / "picture").write_bytes(data)
    code = (
        "import pathlib, sys\n"
        "from cytosae.backbones.images import UnreadableImageError, decode_image\n"
        "def peak():\n"
        "    lines = pathlib.Path('/proc/self/status').read_text().splitlines()\n"
        "    return int(next(line for line in lines if line.startswith('VmHWM')).split()[1]) * 1024\n"
        "before = peak()\n"
        "try: decode_image(open(sys.argv[1], 'rb').read()); result = 'decoded'\n"
        "except UnreadableImageError as error: result = str(error)\n"
        "print(peak() - before, result)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "picture"], cwd=ROOT, env={"PYTHONPATH": ".:cache:pipeline"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    n_bytes, _, result = done.stdout.strip().partition(" ")
    return int(n_bytes), result


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says the peak of a process")
@pytest.mark.parametrize(
    ("make", "result"),
    [
        (lambda: _png(11585, 11584, depth=16), "decoded"),
        (lambda: _png(1, (1 << 27) - 1), "too large: 1 x 134217727 pixels of this kind need"),
        (lambda: _png((1 << 27) - 1, 1), "too large: 134217727 x 1 pixels of this kind need"),
    ],
    ids=["grey16", "column", "row"],
)
def test_pictures_just_inside_the_limit_of_pixels(make, result, tmp_path):
    n_bytes, found = _peak(make(), tmp_path)
    assert found.startswith(result)
    assert n_bytes < (1_000_000_000 if result == "decoded" else 100_000_000)


def _estimate(data: bytes) -> int:
    with pytest.raises(LargeImageError) as caught:
        decode_image(data, most_bytes=0)
    return caught.value.n_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says the peak of a process")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}), ("BMP", {}), ("TIFF", {}), ("JPEG", {}), ("JPEG", {"progressive": True, "subsampling": 0}),
        ("TIFF", {"compression": "tiff_lzw", "tiffinfo": {278: 3000}}), ("TIFF", {"compression": "jpeg"}),
        ("WEBP", {"lossless": True, "method": 0, "quality": 0}), ("JPEG2000", {}),
        ("JPEG2000", {"codeblock_size": (4, 4)}),
    ],
)  # fmt: skip
def test_no_picture_takes_more_than_the_estimate(kind, options, tmp_path):
    side = 1000 if "codeblock_size" in options else 3000
    pattern = (np.arange(side)[:, None] * np.arange(side) // 97).astype(np.uint8)
    picture = Image.fromarray(np.dstack([pattern, pattern.T, pattern // 2]))
    data = _saved(picture, kind, **options)
    n_bytes, found = _peak(data, tmp_path)
    assert found == "decoded"
    assert n_bytes < _estimate(data) < 2 * n_bytes + (64 << 20)


def test_nothing_is_loaded_before_the_estimate(monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("loaded"))
    exif = Image.Exif()
    exif[0x112] = 6
    for picture, kind in PICTURES.values():
        if kind != "WEBP":
            assert _estimate(_saved(picture, kind, exif=exif)) > 32 << 20


def test_the_limit_of_memory(monkeypatch):
    data = _saved(RGB, "PNG")
    monkeypatch.setattr(image_memory, "MAX_BYTES", _estimate(data))
    decode_image(data)
    monkeypatch.setattr(image_memory, "MAX_BYTES", _estimate(data) - 1)
    assert _reason(data) == (
        "too large: 61 x 43 pixels of this kind need 0.03 GB of memory, the limit is 0.03 GB: save a smaller picture"
    )


def test_a_turned_png_is_checked_again_once_its_orientation_is_known(monkeypatch):
    exif = Image.Exif()
    exif[0x112] = 6
    picture = Image.new("L", (100_000, 2))
    monkeypatch.setattr(image_memory, "MAX_BYTES", 80_000_000)
    decode_image(_saved(picture, "PNG"))
    assert "too large" in _reason(_saved(picture, "PNG", exif=exif))


def test_lack_of_memory_is_no_fault_of_the_picture(monkeypatch):
    def fail(self):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(MemoryError):
        decode_image(_saved(RGB, "BMP"))


# Numbers that cost time


def test_jpegs_of_many_scans(monkeypatch):
    data = _saved(RGB, "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    many = data[:-2] + scan * 50 + b"\xff\xd9"
    decode_image(many)
    monkeypatch.setattr(image_memory, "_MAX_SCANNED_PIXELS", 50 * 61 * 43)
    decode_image(data)
    assert (
        _reason(many)
        == f"JPEG of {many.count(bytes([255, 218]))} scans, which take too long to decode: save it with fewer"
    )


@pytest.mark.parametrize(("order", "big"), [("<", False), (">", False), ("<", True)])
def test_tiffs_of_many_strips(order, big, monkeypatch):
    data = _strips(300, order, big=big)
    monkeypatch.setattr(image_memory, "_MAX_TIFF_PARTS", 300)
    decode_image(data)
    monkeypatch.setattr(image_memory, "_MAX_TIFF_PARTS", 299)
    assert _reason(data) == "TIFF of more than 299 strips or tiles: save it with larger ones"


# JPEG 2000


def _jp2(**options) -> bytes:
    return _saved(RGB.resize((300, 200)), "JPEG2000", **options)


@pytest.mark.parametrize("raw", [False, True])
def test_headers_of_jpeg_2000(raw):
    data = _jp2()
    data = data[data.index(b"\xff\x4f\xff\x51") :] if raw else data
    plain = measure_jpeg_2000(data, 60_000)
    assert 15 * 60_000 < plain < 18 * 60_000 + 50_000
    decode_image(data)
    small = _jp2(codeblock_size=(4, 4))
    assert measure_jpeg_2000(small, 60_000) > 3 * plain
    assert measure_jpeg_2000(_jp2(precinct_size=(32, 32), codeblock_size=(16, 16)), 60_000) > plain
    assert measure_jpeg_2000(_jp2(tile_size=(64, 64)), 60_000) < plain


def test_damaged_headers_of_jpeg_2000():
    data = _jp2()
    start = data.index(b"\xff\x4f\xff\x51")
    for damaged in (
        data[:start], data[: start + 20], data[:start] + bytes(200), data[: start + 60],
        data[: start + 8] + bytes(16) + data[start + 24 :], b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(50),
    ):  # fmt: skip
        with pytest.raises(UnreadableImageError, match="damaged JPEG 2000 header"):
            measure_jpeg_2000(damaged, 60_000)
