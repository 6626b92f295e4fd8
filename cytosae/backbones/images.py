"""Image files to the network's input (docs/definitions.md, section 1). Decoding needs only numpy and Pillow."""

import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from cytosae.backbones.image_bands import iter_bands, read_orientation, upright_size
from cytosae.backbones.image_files import check_file
from cytosae.backbones.image_memory import check_parts, decoding_bytes, require_memory
from cytosae.backbones.image_values import FORMATS, Scale, UnreadableImageError, describe_unidentified, remark_on_pages

if TYPE_CHECKING:
    import torch

__all__ = ["IMAGE_SIZE", "LargeImageError", "UnreadableImageError", "decode_image", "to_tensor"]

IMAGE_SIZE = 224
"""Height and width of the network's input in pixels."""

IMAGE_MEAN = (0.485, 0.456, 0.406)
"""ImageNet's mean of each RGB channel, in units of the 0-1 range."""

IMAGE_STD = (0.229, 0.224, 0.225)
"""ImageNet's standard deviation of each RGB channel."""

MAX_PIXELS = 1 << 27
"""Larger images are refused before decoding: a cell never needs them, but a crafted file may declare them."""


FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
"""Pillow's filters by name; all are antialiased apart from `nearest`."""


def decode_image(
    data: bytes,
    *,
    size: int = IMAGE_SIZE,
    resample: str = "bilinear",
    white_level: int | None = None,
    most_bytes: int | None = None,
    remarks: list[str] | None = None,
) -> npt.NDArray[np.uint8]:
    """Decode an image file and resize it.

    First page, EXIF orientation applied, `convert('RGB')` (which drops an alpha channel), Pillow's antialiased
    resize that does not keep the aspect ratio. 16-bit grey is scaled from 0..65535 to 0..255 first; Pillow would clip
    it. So are packed 12 bits from 0..4095 and floats from 0..1.

    Args:
        data: The file's bytes.
        size: Height and width of the result in pixels.
        resample: One of `FILTERS`.
        white_level: Value that stands for white in greyscale of more than 8 bits; None: the largest of its bits.
        most_bytes: Memory that decoding may take; None: as much as for any picture that is not refused.
        remarks: If given, what should be known about the picture is added to it, in a few words each.

    Returns:
        RGB, uint8, shape `(size, size, 3)`.

    Raises:
        UnreadableImageError: If the file is empty, broken, truncated, too large, of an unknown kind, or a kind that
            Pillow reads wrong, its first page is a preview, or its values have no known scale.
        LargeImageError: If it would take more than `most_bytes`.
        MemoryError: If a decoder could not allocate what it needs.
    """
    if not data:
        raise UnreadableImageError("the file is empty")
    try:
        with warnings.catch_warnings():
            # Pillow warns of odd metadata and of merely suspicious sizes; MAX_PIXELS is the limit here.
            warnings.simplefilter("ignore")
            check_parts(data)
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise UnreadableImageError(
                        f"{picture.width} x {picture.height} pixels exceed the limit of {MAX_PIXELS}"
                    )
                known = check_file(picture, data)
                n_bytes = decoding_bytes(picture, data, size, resample)
                require_memory(picture, n_bytes)
                if most_bytes is not None and n_bytes > most_bytes:
                    raise LargeImageError(n_bytes)
                scale = Scale(picture, white_level)
                picture.load()
                orientation = read_orientation(picture)
                require_memory(picture, decoding_bytes(picture, data, size, resample, orientation))
                scale.measure(picture)
                resized = _resize(picture, orientation, scale, size, FILTERS[resample])
                if remarks is not None:
                    remarks += filter(None, [*known, *scale.remarks, remark_on_pages(picture)])
    except (UnreadableImageError, LargeImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImageError(describe_unidentified(data)) from error
    except Image.DecompressionBombError as error:
        raise UnreadableImageError("too many pixels (decompression bomb)") from error
    except Exception as error:  # Pillow's parsers can raise anything on a broken file
        raise UnreadableImageError(f"broken image: {_short(error)}") from error
    return np.array(resized)


class LargeImageError(Exception):
    """Decoding an image would take more memory than the caller allows; it is no fault of the image.

    Args:
        n_bytes: What it would take.
    """

    def __init__(self, n_bytes: int) -> None:
        super().__init__(n_bytes)
        self.n_bytes = n_bytes


def to_tensor(
    pixels: npt.NDArray[np.uint8],
    *,
    mean: Sequence[float] = IMAGE_MEAN,
    std: Sequence[float] = IMAGE_STD,
    scale: float = 1 / 255,
    device: "torch.device | str" = "cpu",
) -> "torch.Tensor":
    """The network's input from pixels: scaled, minus the mean, over the standard deviation, channels first.

    Args:
        pixels: RGB, uint8, shape `(B, H, W, 3)`.
        mean: Mean of each channel.
        std: Standard deviation of each channel.
        scale: Factor of the pixel values.
        device: Device of the result, on which it is computed.

    Returns:
        Float32, shape `(B, 3, H, W)`.
    """
    import torch

    # Bytes are copied to the device, a quarter of the volume of floats.
    x = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).contiguous().float()
    # A division, as ever: multiplying by the rounded 1/255 would change last digits.
    x = x.div_(255) if scale == 1 / 255 else x.mul_(scale)
    shape = (1, 3, 1, 1)
    return x.sub_(torch.tensor(mean, device=device).view(shape)).div_(torch.tensor(std, device=device).view(shape))


def _resize(picture: Image.Image, orientation: int, scale: Scale, size: int, resample: Image.Resampling) -> Image.Image:
    """The upright picture in RGB at its final size."""
    _, height = upright_size(picture, orientation)
    wide = Image.new("RGB", (size, height))
    # First the width, then the height, as Pillow did up to version 12. Version 13 reverses the order for tall images,
    # which can change a value by one grey level, while the store's spec would stay the same.
    for start, band in iter_bands(picture, orientation):
        rgb = scale.to_eight_bits(band).convert("RGB")
        wide.paste(rgb.resize((size, rgb.height), resample), (0, start))
    return wide.resize((size, size), resample)


def _short(error: Exception) -> str:
    """The first line of an error's text, shortened."""
    lines = str(error).strip().splitlines()
    text = lines[0][:120] if lines else type(error).__name__
    return f"its compressed data are damaged or cut off ({text})" if text.startswith("decoder error") else text
