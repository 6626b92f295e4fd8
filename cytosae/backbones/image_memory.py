"""Memory that decoding an image file takes, from the numbers in its headers and before any of it is allocated.

Bytes per pixel were measured with Pillow 13 by `scripts/measure_decoding.py`.
"""

import math
import struct

from PIL import Image, TiffImagePlugin

from cytosae.backbones.image_bands import BAND_PIXELS, read_orientation, upright_size
from cytosae.backbones.image_values import BITS_PER_SAMPLE, COMPRESSION, SAMPLES, UnreadableImageError
from cytosae.backbones.jpeg2000_header import measure_jpeg_2000

MAX_BYTES = 1_400_000_000
"""Files that need more memory than this are refused."""

MAX_SCANS = 100
"""A JPEG of `MAX_PIXELS` may have so many scans, a smaller one more: each passes over all pixels again."""

_MAX_SCANNED_PIXELS = MAX_SCANS << 27
_MAX_TIFF_PARTS, _TIFF_PART_BYTES = 1 << 18, 2000
"""Most strips or tiles of a TIFF, and the memory of the objects that Pillow makes of each."""

_ROWS_PER_STRIP, _TILE_WIDTH, _TILE_LENGTH, _TIFF_PARTS = 278, 322, 323, (273, 279, 324, 325)
_SUPPORT = {"nearest": 0.0, "box": 0.5, "bilinear": 1.0, "hamming": 1.0, "bicubic": 2.0, "lanczos": 3.0}
_FIXED_BYTES = 32 << 20
"""What no number in a file changes: a band and its copies, and a decoder's own buffers."""


def check_parts(data: bytes) -> None:
    """Refuse a TIFF of too many strips or tiles; called before Pillow reads its header.

    Raises:
        UnreadableImageError: If it is one.
    """
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None or len(data) < 16 or data[2:4] not in (b"*\0", b"\0*", b"+\0", b"\0+"):
        return
    is_big = 43 in data[2:4]
    place, n_entries = _read(data, order + ("Q" if is_big else "I"), 8 if is_big else 4), 0
    n_entries = _read(data, order + ("Q" if is_big else "H"), place)
    start, step, count = (place + 8, 20, order + "Q") if is_big else (place + 2, 12, order + "I")
    for number in range(min(n_entries, len(data) // step)):
        entry = start + number * step
        if _read(data, order + "H", entry) in _TIFF_PARTS and _read(data, count, entry + 4) > _MAX_TIFF_PARTS:
            raise UnreadableImageError(
                f"TIFF of more than {_MAX_TIFF_PARTS:,} strips or tiles: save it with larger ones"
            )


def decoding_bytes(picture: Image.Image, data: bytes, size: int, resample: str, orientation: int | None = None) -> int:
    """Largest memory that decoding and resizing a file takes, with the file itself.

    Args:
        picture: The picture as Pillow opened it.
        data: The file's bytes.
        size: Height and width of the result in pixels.
        resample: Filter of the resize.
        orientation: EXIF orientation that will be applied; None: as far as it is known before the pixels are loaded.

    Raises:
        UnreadableImageError: If its headers are damaged, or it is a JPEG of too many scans.
    """
    n_pixels = picture.width * picture.height
    pixels = n_pixels * _pixel_bytes(picture.mode)
    width, height = upright_size(picture, _stated_orientation(picture) if orientation is None else orientation)
    wide = 4 * size * height
    per_pixel = 40 if picture.mode.startswith(("I", "F")) else 8
    band = per_pixel * max(width, min(BAND_PIXELS, n_pixels))
    resizing = max(band + _coefficient_bytes(width, size, resample), _coefficient_bytes(height, size, resample))
    loading = _working_bytes(picture, data, n_pixels)
    kept = loading if picture.format == "WEBP" else 0  # its decoder lives as long as the picture
    return len(data) + pixels + max(loading, kept + wide + resizing) + _FIXED_BYTES


def require_memory(picture: Image.Image, n_bytes: int) -> None:
    """Refuse a picture that needs too much memory.

    Args:
        picture: The picture.
        n_bytes: What it needs.

    Raises:
        UnreadableImageError: If that is more than `MAX_BYTES`.
    """
    if n_bytes > MAX_BYTES:
        raise UnreadableImageError(
            f"too large: {picture.width} x {picture.height} pixels of this kind need {n_bytes / 1e9:.2f} GB of memory, "
            f"the limit is {MAX_BYTES / 1e9:.2f} GB: save a smaller picture"
        )


def _stated_orientation(picture: Image.Image) -> int:
    """EXIF orientation; 1 for a PNG, which Pillow would load to look for it."""
    return 1 if picture.format == "PNG" else read_orientation(picture)


def _pixel_bytes(mode: str) -> int:
    """Bytes of one decoded pixel."""
    return 1 if mode in ("1", "L", "P") else 2 if mode.startswith("I;16") else 4


def _working_bytes(picture: Image.Image, data: bytes, n_pixels: int) -> int:
    """What a decoder needs beside the decoded pixels."""
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        return _tiff_bytes(picture, n_pixels)
    if picture.format in ("JPEG", "MPO"):
        return _jpeg_bytes(picture, data, n_pixels)
    if picture.format == "WEBP":
        return 13 * n_pixels + len(data)
    if picture.format == "JPEG2000":
        return measure_jpeg_2000(data, n_pixels)
    is_packed = any(tile[0] == "bmp_rle" for tile in getattr(picture, "tile", []))
    return 4 * n_pixels if is_packed else 0


def _tiff_bytes(picture: TiffImagePlugin.TiffImageFile, n_pixels: int) -> int:
    """A decoded strip or tile, and a second picture while it is turned upright."""
    tags = picture.tag_v2
    turned = n_pixels * _pixel_bytes(picture.mode) if _stated_orientation(picture) != 1 else 0
    turned += _TIFF_PART_BYTES * max((len(tags[tag]) for tag in _TIFF_PARTS if tag in tags), default=0)
    if int(tags.get(COMPRESSION, 1)) == 1:
        return turned
    bits = tuple(tags.get(BITS_PER_SAMPLE, (1,)))
    sample_bits = max(int(n) for n in bits) * int(tags.get(SAMPLES, len(bits)))
    if _TILE_WIDTH in tags:
        part = int(tags[_TILE_WIDTH]) * int(tags.get(_TILE_LENGTH, 1))
    else:
        part = picture.width * min(int(tags.get(_ROWS_PER_STRIP, picture.height)), picture.height)
    # LZMA and Zstandard keep up to as much again; colours of JPEGs take 4 bytes.
    return max(turned, 2 * part * max(4, sample_bits // 8))


def _jpeg_bytes(picture: Image.Image, data: bytes, n_pixels: int) -> int:
    """The coefficients of a JPEG of several scans, which are kept until the last one."""
    n_scans = data.count(b"\xff\xda")
    if n_scans * n_pixels > _MAX_SCANNED_PIXELS:
        raise UnreadableImageError(f"JPEG of {n_scans:,} scans, which take too long to decode: save it with fewer")
    n_colours = len(picture.getbands())
    return 2 * n_colours * n_pixels if n_scans > 1 else 0


def _coefficient_bytes(n_in: int, n_out: int, resample: str) -> int:
    """The weights of a resize along one axis."""
    reach = math.ceil(_SUPPORT[resample] * max(n_in / n_out, 1.0))
    return n_out * (2 * reach + 1) * 8


def _read(data: bytes, form: str, place: int) -> int:
    """A number in a file; 0 beyond its end."""
    n = struct.calcsize(form)
    return int(struct.unpack(form, data[place : place + n])[0]) if 0 <= place <= len(data) - n else 0
