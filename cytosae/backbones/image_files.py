"""Image files that Pillow opens but reads wrong, or only in part: refused, or remarked on."""

from collections.abc import Mapping
from typing import Any

from PIL import Image, TiffImagePlugin

from cytosae.backbones.image_values import (
    BITS_PER_SAMPLE,
    COMPRESSION,
    PHOTOMETRIC,
    SAMPLE_FORMAT,
    SAMPLES,
    SUBFILE_TYPE,
    UNREAD_COMPRESSIONS,
    UnreadableImageError,
)

_OLD_SUBFILE_TYPE, _PLANAR, _EXTRA_SAMPLES = 255, 284, 338  # TIFF tag numbers
_GREY, _RGB = (0, 1), 2
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, b"\xff\xd9"
_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})


def check_file(picture: Image.Image, data: bytes) -> list[str]:
    """Refuse a file whose pixels Pillow would read wrong; called before they are loaded.

    Args:
        picture: The picture as Pillow opened it.
        data: The file's bytes.

    Returns:
        What should be known about the picture.

    Raises:
        UnreadableImageError: If it is such a file.
    """
    if picture.format in ("JPEG", "MPO"):
        _check_jpeg(data)
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        return _check_tiff(picture.tag_v2)
    return []


def _check_jpeg(data: bytes) -> None:
    """Refuse a JPEG without an end; libjpeg fills what is missing with grey."""
    start = _find_scan(data)
    if start and data.rfind(_END_OF_IMAGE) < start:
        raise UnreadableImageError("broken image: truncated JPEG without an end marker, a part of it is missing")


def _find_scan(data: bytes) -> int:
    """Where the pixels of a JPEG begin, behind metadata that may contain a whole JPEG; 0 if that cannot be told."""
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == _START_OF_SCAN:
            return place
        if marker == 0xFF:
            place += 1
        elif marker in _WITHOUT_LENGTH:
            place += 2
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return 0


def _check_tiff(tags: Mapping[int, Any]) -> list[str]:
    """Refuse a TIFF by its tags, or remark on it."""
    bits = tuple(tags.get(BITS_PER_SAMPLE, (1,)))
    n_samples = int(tags.get(SAMPLES, len(bits)))
    compression = int(tags.get(COMPRESSION, 1))
    if compression in UNREAD_COMPRESSIONS:
        raise UnreadableImageError(
            f"TIFF compressed as {UNREAD_COMPRESSIONS[compression]}, which is not read: save it with LZW or without "
            "compression"
        )
    if int(tags.get(SUBFILE_TYPE, 0)) & 1 or int(tags.get(_OLD_SUBFILE_TYPE, 1)) == 2:
        raise UnreadableImageError(
            "the first page of the TIFF is a preview of another page: save the full picture as a file of its own"
        )
    if int(tags.get(_PLANAR, 1)) != 1 and n_samples > 1 and compression == 1 and max(bits) > 8:
        raise UnreadableImageError(
            f"TIFF with {max(bits)}-bit colours in separate planes without compression, which Pillow reads wrong: save "
            "it with LZW or with 8 bits"
        )
    if next(iter(tags.get(SAMPLE_FORMAT, (1,)))) == 2 and max(bits) <= 8:
        raise UnreadableImageError("TIFF of signed 8-bit numbers, which have no known scale: save it as unsigned")
    photometric = tags.get(PHOTOMETRIC)
    n_colours = 1 if photometric in _GREY else 3 if photometric == _RGB else n_samples
    extra = tuple(tags.get(_EXTRA_SAMPLES, ()))
    if n_samples == n_colours + 1 and not set(extra) & {1, 2}:
        return [
            f"{n_samples} samples per pixel, of which only the first {'one was' if n_colours == 1 else '3 were'} read: "
            "the last is not said to be transparency"
        ]
    return []
