"""What the numbers in an image file mean: more than 8 bits, floats, several samples and pages.

Values are read where they have one possible meaning; where they may have another, a remark says what to look at.
"""

import io
import warnings

import numpy as np
import numpy.typing as npt
from PIL import Image, TiffImagePlugin

from cytosae.backbones.image_bands import iter_bands

FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "JPEG2000")
"""The only readers of Pillow that are used."""

SUBFILE_TYPE, BITS_PER_SAMPLE, COMPRESSION, PHOTOMETRIC, SAMPLES, SAMPLE_FORMAT = 254, 258, 259, 262, 277, 339
"""Numbers of TIFF tags."""

UNREAD_COMPRESSIONS = {
    33003: "JPEG 2000", 33004: "JPEG 2000", 33005: "JPEG 2000", 34712: "JPEG 2000", 50001: "WebP", 50002: "JPEG XL",
    52546: "JPEG XL",
}  # fmt: skip
"""Values of a TIFF's compression that are not read, with their names."""

_SAMPLE_FORMATS = {1: "unsigned", 2: "signed", 3: "floating-point", 5: "complex", 6: "complex"}
_TIFF_HEADERS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_FULL = 65535  # the largest value of 16 bits
_DARK_BITS = 14  # a picture that uses no more of its 16 bits is nearly black
_DARK_FLOAT = 0.25  # the same for numbers from 0 to 1


class UnreadableImageError(ValueError):
    """An image cannot be used; the message is a short reason without the path or contents."""


class Scale:
    """How the values of an opened picture become 8 bits; made before its pixels are loaded.

    Args:
        picture: The picture as Pillow opened it.
        white_level: Value that stands for white in greyscale of more than 8 bits; None: the largest of its bits.
    """

    def __init__(self, picture: Image.Image, white_level: int | None = None) -> None:
        tags = picture.tag_v2 if isinstance(picture, TiffImagePlugin.TiffImageFile) else {}
        packed_12 = tags.get(BITS_PER_SAMPLE) == (12,)
        self._top = white_level or (4095 if packed_12 else _FULL)
        self._is_chosen = white_level is not None
        is_signed = next(iter(tags.get(SAMPLE_FORMAT, (1,)))) == 2
        self._is_signed_16 = is_signed and tags.get(BITS_PER_SAMPLE) == (16,)
        self._is_unsigned_32 = not is_signed and tags.get(BITS_PER_SAMPLE) == (32,)
        self._inverted = tags.get(PHOTOMETRIC) == 0 and picture.mode.startswith(("I;16", "F"))
        tiles = getattr(picture, "tile", [])
        self._is_16_bit_colour = not picture.mode.startswith(("I", "F")) and any(";16" in str(tile) for tile in tiles)
        self.remarks: list[str] = []
        """What should be known about the picture; complete once `measure` was called."""

    def measure(self, picture: Image.Image) -> None:
        """Find out how the values are scaled; called once, with the pixels loaded and before `to_eight_bits`.

        Raises:
            UnreadableImageError: If they have no known scale.
        """
        if picture.mode.startswith("I"):
            self._measure_whole(*self._find_whole_range(picture))
        elif picture.mode == "F":
            self._measure_floats(*self._find_float_range(picture))
        elif self._is_16_bit_colour and self._is_chosen:
            raise UnreadableImageError("16-bit colours cannot be scaled by a white level: save them with 8 bits")
        elif self._is_16_bit_colour:
            # Pillow has kept the high byte of every value.
            extrema = picture.getextrema()
            tops = [pair[1] for pair in extrema] if isinstance(extrema[0], tuple) else [extrema[1]]
            n_colours = len(tops) - (picture.mode in ("LA", "RGBA"))
            self._remark_dark((int(max(tops[:n_colours])) << 8) | 255, is_grey=False)

    def to_eight_bits(self, picture: Image.Image) -> Image.Image:
        """The picture, or a part of it, with at most 8 bits per channel."""
        if picture.mode.startswith("I"):
            values = self._whole(picture)
            if self._inverted:
                values = self._top - values
            # 65535 / 255 = 257
            full = self._top == _FULL
            scaled = (values + 128) // 257 if full else (values * 255 + self._top // 2) // self._top
            return Image.fromarray(scaled.astype(np.uint8))
        if picture.mode == "F":
            floats = np.asarray(picture)
            shown = 1 - floats if self._inverted else floats
            return Image.fromarray(np.asarray(np.floor(shown * 255.0 + 0.5), dtype=np.uint8))
        return picture

    def _whole(self, picture: Image.Image) -> npt.NDArray[np.int64]:
        """A picture's whole numbers."""
        values = np.asarray(picture).astype(np.int64)
        # Pillow reads unsigned ones of 32 bits as signed.
        return values & 0xFFFFFFFF if self._is_unsigned_32 else values

    def _find_whole_range(self, picture: Image.Image) -> tuple[int, int]:
        """Least and largest whole number of a picture."""
        values = (self._whole(band) for _, band in iter_bands(picture))
        ranges = [(int(part.min()), int(part.max())) for part in values if part.size]
        return min((least for least, _ in ranges), default=0), max((most for _, most in ranges), default=0)

    @staticmethod
    def _find_float_range(picture: Image.Image) -> tuple[float, float]:
        """Least and largest number of a picture; both are not a number if one value is none."""
        values = (np.asarray(band) for _, band in iter_bands(picture))
        ranges = np.array([(part.min(), part.max()) for part in values if part.size] or [(0.0, 0.0)])
        return float(ranges[:, 0].min()), float(ranges[:, 1].max())

    def _measure_whole(self, least: int, most: int) -> None:
        """Whole numbers from 0 to the largest that the file can contain."""
        if self._is_chosen and most > self._top:
            raise UnreadableImageError(f"grey values end at {most}, above the white level of {self._top}")
        if least < 0 or most > self._top:
            raise UnreadableImageError(
                f"grey values from {least} to {most} are beyond 0..{self._top} and have no known scale: save them with "
                "8 or 16 bits"
            )
        if self._top == _FULL and not self._inverted:
            self._remark_dark(most, is_grey=True)
            if self._is_signed_16 and most.bit_length() > _DARK_BITS:
                self.remarks.append(
                    f"signed 16-bit values end at {most:,}, and white was taken as {_FULL:,}: dark if white is 32,767 "
                    "(--white-level 32767)"
                )

    def _measure_floats(self, least: float, most: float) -> None:
        """Numbers from 0 to 1."""
        if not (least >= 0 and most <= 1):  # also if one is not a number
            raise UnreadableImageError(
                f"floating-point values from {least:.4g} to {most:.4g} have no known scale: save them with 8 or 16 "
                "bits, or from 0 to 1"
            )
        if 0 < most < _DARK_FLOAT and not self._inverted:
            self.remarks.append(f"nearly black: floating-point values end at {most:.4g}, and white was taken as 1")

    def _remark_dark(self, most: int, *, is_grey: bool) -> None:
        """Remark on a picture that uses only the lowest bits of 16."""
        n_bits = most.bit_length()
        if most > 0 and n_bits <= _DARK_BITS:
            remedy = f" (--white-level {(1 << n_bits) - 1})" if is_grey else ""
            self.remarks.append(
                f"nearly black: 16-bit values end at {most:,} of {_FULL:,}, perhaps a camera's {n_bits} bits{remedy}"
            )


def remark_on_pages(picture: Image.Image) -> str:
    """What should be known about a picture's further pages; '' if nothing. The picture is left at another page."""
    if picture.format in ("PNG", "WEBP") and getattr(picture, "is_animated", False):
        return "several frames: only the first was read; save each as a file to use them all"
    if not isinstance(picture, TiffImagePlugin.TiffImageFile) or not picture.is_animated:
        return ""
    first = picture.size, picture.mode
    try:
        picture.seek(1)
    except Exception:  # noqa: BLE001 - Pillow's parsers can raise anything on a broken page, and the first one is read
        return ""
    is_preview = bool(picture.tag_v2.get(SUBFILE_TYPE, 0) & 1)
    if is_preview or (picture.size, picture.mode) != first:
        return ""
    grey = first[1] in ("1", "L", "I", "F") or first[1].startswith("I;")
    advice = "if they are colour planes, save them as one RGB page" if grey else "save each as a file to use them all"
    return f"several pages: only the first of pages of equal size and kind was read; {advice}"


def describe_unidentified(data: bytes) -> str:
    """Why Pillow knows no reader for a file: its kind, or of a TIFF the numbers that are in it."""
    kinds = "not a JPEG, PNG, BMP, TIFF, WebP or JPEG 2000 image"
    if not data.startswith(_TIFF_HEADERS):
        return kinds
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tags = _read_tags(data)
        bits = tuple(tags.get(BITS_PER_SAMPLE, (1,)))
        formats = tuple(tags.get(SAMPLE_FORMAT, (1,)))
        n_samples = int(tags.get(SAMPLES, len(bits)))
        compression = int(tags.get(COMPRESSION, 1))
        kind = _SAMPLE_FORMATS.get(formats[0], f"kind-{int(formats[0])}")
        text = "/".join(str(int(n)) for n in sorted(set(bits)))
    except Exception:  # noqa: BLE001 - as above
        return "broken TIFF image: its tags cannot be read, perhaps because the file is cut off"
    if not tags or len(text) > 20:
        return "broken TIFF image: its tags cannot be read, perhaps because the file is cut off"
    if compression in UNREAD_COMPRESSIONS:
        return (
            f"TIFF compressed as {UNREAD_COMPRESSIONS[compression]}, which is not read: save it with LZW or without "
            "compression"
        )
    return (
        f"TIFF with {n_samples} sample{'s' * (n_samples != 1)} of {text}-bit {kind} numbers per pixel cannot be read: "
        "save it as RGB or grey with 8 bits"
    )


def _read_tags(data: bytes) -> TiffImagePlugin.ImageFileDirectory_v2:
    """Tags of the first page of a TIFF."""
    header = data[:16] if data[2:4] in (b"+\0", b"\0+") else data[:8]
    tags = TiffImagePlugin.ImageFileDirectory_v2(header)
    stream = io.BytesIO(data)
    stream.seek(tags.next)
    tags.load(stream)
    return tags
