"""Pictures cut into bands, so that converting a large one takes little more memory than its decoded pixels."""

from collections.abc import Iterator

from PIL import ExifTags, Image

BAND_PIXELS = 1 << 20
"""Pixels of a band, if one row has no more."""

_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns a picture upright, by its EXIF orientation; other values need nothing."""

_SWAPS_AXES = frozenset({5, 6, 7, 8})
_FROM_THE_END = frozenset({3, 4, 7, 8})
"""Orientations whose first upright row is the last row or column of the file."""


def read_orientation(picture: Image.Image) -> int:
    """The EXIF orientation that has not been applied yet; 1 if there is none. Pillow itself applies that of a TIFF."""
    orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
    return orientation if orientation in _TRANSPOSITIONS else 1


def upright_size(picture: Image.Image, orientation: int) -> tuple[int, int]:
    """Width and height once the orientation is applied."""
    width, height = picture.size
    return (height, width) if orientation in _SWAPS_AXES else (width, height)


def iter_bands(picture: Image.Image, orientation: int = 1) -> Iterator[tuple[int, Image.Image]]:
    """Rows of the upright picture in order, a few at a time.

    Args:
        picture: A picture whose pixels are loaded; it is not changed.
        orientation: EXIF orientation to apply.

    Yields:
        First row of the band, and the band: all columns of some rows. A picture of one band without an orientation is
        itself the band.
    """
    width, height = upright_size(picture, orientation)
    n_rows = max(1, BAND_PIXELS // max(1, width))
    for start in range(0, height, n_rows):
        stop = min(start + n_rows, height)
        first, last = (height - stop, height - start) if orientation in _FROM_THE_END else (start, stop)
        swapped = orientation in _SWAPS_AXES
        box = (first, 0, last, picture.height) if swapped else (0, first, picture.width, last)
        band = picture if stop - start == height else picture.crop(box)
        transposition = _TRANSPOSITIONS.get(orientation)
        yield start, band if transposition is None else band.transpose(transposition)
