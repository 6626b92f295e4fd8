"""Label images: masks whose values are the numbers of compartments, from files of any lossless kind."""

import io
import warnings

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from cytosae.backbones.image_bands import read_orientation, upright_size
from cytosae.backbones.image_files import check_file
from cytosae.backbones.image_memory import check_parts, decoding_bytes, require_memory
from cytosae.backbones.image_values import FORMATS, UnreadableImageError, describe_unidentified
from cytosae.backbones.images import MAX_PIXELS

MAX_COMPARTMENTS = 16
"""Largest value of a mask."""

_LOSSLESS = ("PNG", "TIFF", "BMP")
_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")


def decode_label_image(data: bytes, *, image_size: tuple[int, int] | None = None) -> npt.NDArray[np.uint8]:
    """Decode a mask: grey of 1, 8, 16 or 32 bits, or a palette, whose indices are the values.

    Args:
        data: The file's bytes.
        image_size: Width and height of its image in pixels, upright; None if not known.

    Returns:
        Values 0 to `MAX_COMPARTMENTS`, uint8, shape `(H, W)`.

    Raises:
        UnreadableImageError: If the file is broken, too large, lossy or in colours, differs in size from its image, or
            has a value that is too large.
        MemoryError: If a decoder could not allocate what it needs.
    """
    if not data:
        raise UnreadableImageError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as for images: MAX_PIXELS is the limit
            check_parts(data)
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                _check(picture, image_size)
                check_file(picture, data)
                require_memory(picture, decoding_bytes(picture, data, 1, "nearest"))
                values = np.asarray(picture)
    except (UnreadableImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImageError(describe_unidentified(data)) from error
    except Image.DecompressionBombError as error:
        raise UnreadableImageError("too many pixels (decompression bomb)") from error
    except Exception as error:  # Pillow's parsers can raise anything on a broken file
        raise UnreadableImageError(f"broken image: {type(error).__name__}") from error
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > MAX_COMPARTMENTS:
        raise UnreadableImageError(
            f"found the value {high if high > MAX_COMPARTMENTS else low}, expected 0 for the background and 1 to "
            f"{MAX_COMPARTMENTS} for compartments"
        )
    return values.astype(np.uint8)


def read_image_size(data: bytes) -> tuple[int, int]:
    """Width and height of an image file as it is shown, from its header alone.

    Raises:
        UnreadableImageError: If the header cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check_parts(data)
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                return upright_size(picture, read_orientation(picture))
    except UnreadableImageError:
        raise
    except Exception as error:  # as above
        raise UnreadableImageError("its size cannot be read") from error


def _check(picture: Image.Image, image_size: tuple[int, int] | None) -> None:
    """Refuse what cannot be a mask of an image of this size; called before the pixels are loaded."""
    if picture.width * picture.height > MAX_PIXELS:
        raise UnreadableImageError(f"{picture.width} x {picture.height} pixels exceed the limit of {MAX_PIXELS}")
    if picture.format not in _LOSSLESS:
        raise UnreadableImageError(f"{picture.format}, which changes values: save masks as PNG or TIFF")
    if picture.mode not in _MODES:
        raise UnreadableImageError(f"found colours ({picture.mode}), expected one number per pixel: grey or a palette")
    if image_size is not None and picture.size != image_size:
        found, expected = (f"{width} x {height}" for width, height in (picture.size, image_size))
        raise UnreadableImageError(f"found {found} pixels, expected {expected} as its image has")
