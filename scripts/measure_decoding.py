"""Peak memory and time of decoding large pictures of every kind that is read: `python scripts/measure_decoding.py`.

Each picture is decoded in a process of its own. It needs about 3 GB of memory and 1 GB of disk.
"""

import io
import json
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

Image.MAX_IMAGE_PIXELS = None
LIMIT = 1 << 27
"""Pixels of the largest pictures that are read."""

LARGE = (11585, 11585)
"""Width and height of a picture of almost so many."""

SMALLER = (10000, 10000)


def _png(size: tuple[int, int], depth: int, colour: int) -> bytes:
    """A black PNG, written without its pixels in memory."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    n_samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    line, packer = bytes(1 + (size[0] * depth * n_samples + 7) // 8), zlib.compressobj(9)
    n_lines = max(1, (1 << 16) // len(line))
    counts = [n_lines] * (size[1] // n_lines) + [size[1] % n_lines]
    body = b"".join(packer.compress(line * n) for n in counts) + packer.flush()
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    palette = [(b"PLTE", bytes(768))] if colour == 3 else []
    parts = [(b"IHDR", header), *palette, (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def _saved(kind: str, mode: str, size: tuple[int, int], **options: Any) -> bytes:  # noqa: ANN401 - Pillow's options
    stream = io.BytesIO()
    Image.new(mode, size).save(stream, kind, **options)
    return stream.getvalue()


def _scans(n: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    data = _saved("JPEG", "RGB", (8000, 8000), progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * n + b"\xff\xd9"


def _rle(size: tuple[int, int], body: bytes) -> bytes:
    """A BMP with packed lines of 8 bits."""
    header = struct.pack("<IiiHHIIiiII", 40, *size, 1, 8, 1, len(body), 0, 0, 256, 0)
    start = 14 + len(header) + 1024
    return struct.pack("<2sIHHI", b"BM", start + len(body), 0, 0, start) + header + bytes(1024) + body


def _strips(n: int) -> bytes:
    """A TIFF of one byte per strip, which all lie at one place."""
    tags = [(256, 4, 1, 1), (257, 4, 1, n), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1)]
    far = 8 + 2 + 12 * (len(tags) + 3) + 4
    tags += [(273, 4, n, far), (278, 4, 1, 1), (279, 4, n, far + 4 * n)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    numbers = struct.pack("<I", 8) * n + struct.pack("<I", 1) * n
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + numbers


def _turned() -> dict[str, Any]:
    exif = Image.Exif()
    exif[0x112] = 6
    return {"exif": exif}


_ONE_STRIP = {"compression": "tiff_lzw", "tiffinfo": {278: 1 << 20}}
_ALL_COLOURS = {"progressive": True, "subsampling": 0}
_QUICK = {"lossless": True, "quality": 0, "method": 0}
PICTURES: dict[str, Callable[[], bytes]] = {
    "PNG, RGB": lambda: _png(LARGE, 8, 2),
    "PNG, RGBA": lambda: _png(LARGE, 8, 6),
    "PNG, 16-bit grey": lambda: _png(LARGE, 16, 0),
    "PNG, 16-bit RGBA": lambda: _png(LARGE, 16, 6),
    "PNG, palette": lambda: _png(LARGE, 8, 3),
    "PNG, 1 bit": lambda: _png(LARGE, 1, 0),
    "PNG, grey, 1 column": lambda: _png((1, LIMIT), 8, 0),
    "PNG, grey, 120 columns": lambda: _png((120, LIMIT // 120), 8, 0),
    "PNG, grey, 1 row": lambda: _png((LIMIT, 1), 8, 0),
    "PNG, RGB, 8 rows": lambda: _png((LIMIT // 8, 8), 8, 2),
    "JPEG, RGB": lambda: _saved("JPEG", "RGB", LARGE),
    "JPEG, RGB, turned": lambda: _saved("JPEG", "RGB", LARGE, **_turned()),
    "JPEG, progressive RGB": lambda: _saved("JPEG", "RGB", LARGE, **_ALL_COLOURS),
    "JPEG, progressive CMYK": lambda: _saved("JPEG", "CMYK", LARGE, **_ALL_COLOURS),
    "JPEG, progressive CMYK, 100 MP": lambda: _saved("JPEG", "CMYK", SMALLER, **_ALL_COLOURS),
    "JPEG, 150 scans": lambda: _scans(140),
    "JPEG, 1,000 scans": lambda: _scans(990),
    "BMP, RGB": lambda: _saved("BMP", "RGB", LARGE),
    "BMP, packed": lambda: _rle(LARGE, (b"\xff\0" * (LARGE[0] // 255) + bytes([LARGE[0] % 255, 0, 0, 0])) * LARGE[1]),
    "BMP, packed, skipping": lambda: _rle((LIMIT // 2, 2), b"\0\2\0\xff" * 1000),
    "TIFF, RGB": lambda: _saved("TIFF", "RGB", LARGE),
    "TIFF, RGB, turned": lambda: _saved("TIFF", "RGB", LARGE, **_turned()),
    "TIFF, 16-bit grey": lambda: _saved("TIFF", "I;16", LARGE),
    "TIFF, floats": lambda: _saved("TIFF", "F", LARGE),
    "TIFF, CMYK": lambda: _saved("TIFF", "CMYK", LARGE),
    "TIFF, LZW": lambda: _saved("TIFF", "RGB", LARGE, compression="tiff_lzw"),
    "TIFF, LZW, one strip": lambda: _saved("TIFF", "RGB", LARGE, **_ONE_STRIP),
    "TIFF, LZW, one strip, 100 MP": lambda: _saved("TIFF", "RGB", SMALLER, **_ONE_STRIP),
    "TIFF, JPEG": lambda: _saved("TIFF", "RGB", LARGE, compression="jpeg"),
    "TIFF, Group 4": lambda: _saved("TIFF", "1", LARGE, compression="group4"),
    "TIFF, 260,000 strips": lambda: _strips(260_000),
    "TIFF, 1,000,000 strips": lambda: _strips(1_000_000),
    "WebP, 75 MP": lambda: _saved("WEBP", "RGB", (10000, 7500), **_QUICK),
    "WebP, 90 MP": lambda: _saved("WEBP", "RGB", (10000, 9000), **_QUICK),
    "JPEG 2000, RGB, 60 MP": lambda: _saved("JPEG2000", "RGB", (10000, 6000)),
    "JPEG 2000, RGB, 100 MP": lambda: _saved("JPEG2000", "RGB", SMALLER),
    "JPEG 2000, 16-bit grey": lambda: _saved("JPEG2000", "I;16", LARGE),
    "JPEG 2000, RGB in tiles": lambda: _saved("JPEG2000", "RGB", LARGE, tile_size=(1024, 1024)),
}
"""Files by name, written when they are measured."""


def _peak() -> int:
    """Largest memory of this process so far, in bytes; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def _decode(path: Path) -> None:
    """Decode a file and print what that took."""
    from cytosae.backbones.images import UnreadableImageError, decode_image

    decode_image(_png((8, 8), 8, 2))
    before = _peak()
    started = time.process_time()
    try:
        decode_image(path.read_bytes())
        result = "decoded"
    except UnreadableImageError as error:
        result = f"refused: {error}"
    print(
        json.dumps(
            {"peak_gb": round((_peak() - before) / 1e9, 2), "s": round(time.process_time() - started, 1), "is": result}
        )
    )


def main() -> None:
    """Measure all pictures, or those whose name starts with the argument."""
    if sys.argv[1:2] == ["--decode"]:
        _decode(Path(sys.argv[2]))
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, make in PICTURES.items():
            if not name.startswith(sys.argv[1] if len(sys.argv) > 1 else ""):
                continue
            path = Path(folder) / "picture"
            path.write_bytes(make())
            command = [sys.executable, __file__, "--decode", str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            answer = done.stdout.strip() or f"ended with {done.returncode}: {done.stderr[-200:]}"
            print(f"{name:32} {path.stat().st_size / 1e6:8.1f} MB  {answer}", flush=True)


if __name__ == "__main__":
    main()
