"""Image files to the network's input (docs/definitions.md, section 1). Decoding needs numpy and Pillow only."""

import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

if TYPE_CHECKING:
    import torch

IMAGE_SIZE = 224
"""Height and width of the network's input in pixels."""

IMAGE_MEAN = (0.485, 0.456, 0.406)
"""ImageNet's mean of each RGB channel, in units of the 0-1 range."""

IMAGE_STD = (0.229, 0.224, 0.225)
"""ImageNet's standard deviation of each RGB channel."""

MAX_PIXELS = 1 << 27
"""Larger pictures are refused unread: no single cell needs them, but a crafted file of a few bytes may declare them."""

FORMATS = ("JPEG", "PNG", "BMP", "TIFF")
"""Pillow's readers that are ever run; the others stay off."""

_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # TIFF's numbers of its tags


class UnreadableImageError(ValueError):
    """An image cannot be used; the message is a short reason without path or contents."""


def decode_image(data: bytes, *, size: int = IMAGE_SIZE) -> npt.NDArray[np.uint8]:
    """Decode an image file and resize it.

    EXIF-transposed, first page, `convert('RGB')` (which drops an alpha channel), Pillow's antialiased bilinear resize
    without keeping the aspect. 16-bit grey is scaled from 0..65535 to 0..255 first, where Pillow alone would clip it.

    Args:
        data: The file's bytes.
        size: Height and width wanted, in pixels.

    Returns:
        RGB, uint8, shape `(size, size, 3)`.

    Raises:
        UnreadableImageError: If the file is empty, broken, cut off, too large or of an unknown kind.
    """
    if not data:
        raise UnreadableImageError("the file is empty")
    try:
        with warnings.catch_warnings():
            # Pillow warns of odd metadata and of merely suspicious sizes; we have a limit of our own.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise UnreadableImageError(
                        f"{picture.width} x {picture.height} pixels are more than the limit of {MAX_PIXELS}"
                    )
                _check_scale(picture)
                picture.load()
                upright = ImageOps.exif_transpose(picture)
                rgb = _to_eight_bits(upright).convert("RGB")
                # First the width, then the height, as Pillow itself did up to version 12; 13 turns the order round for
                # tall pictures, and one grey level with it, while the store's spec would stay the same.
                wide = rgb.resize((size, rgb.height), Image.Resampling.BILINEAR)
                resized = wide.resize((size, size), Image.Resampling.BILINEAR)
    except UnreadableImageError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImageError(f"not a {', '.join(FORMATS)} image") from error
    except Image.DecompressionBombError as error:
        raise UnreadableImageError("too many pixels (decompression bomb)") from error
    except Exception as error:  # a broken file makes Pillow's parsers raise anything
        raise UnreadableImageError(f"broken image: {_short(error)}") from error
    return np.array(resized)


def to_tensor(
    pixels: npt.NDArray[np.uint8],
    *,
    mean: Sequence[float] = IMAGE_MEAN,
    std: Sequence[float] = IMAGE_STD,
    device: "torch.device | str" = "cpu",
) -> "torch.Tensor":
    """Pixels as the network's input: divided by 255, mean and standard deviation taken out, channels first.

    Args:
        pixels: RGB, uint8, shape `(B, H, W, 3)`.
        mean: Mean of each channel.
        std: Standard deviation of each channel.
        device: Where the arithmetic is done.

    Returns:
        Float32, shape `(B, 3, H, W)`.
    """
    import torch

    # Bytes travel to the device, a quarter of the floats' volume.
    x = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).contiguous().float().div_(255)
    shape = (1, 3, 1, 1)
    return x.sub_(torch.tensor(mean, device=device).view(shape)).div_(torch.tensor(std, device=device).view(shape))


def _check_scale(picture: Image.Image) -> None:
    """Refuse grey TIFFs whose numbers Pillow hands on as they are, though they do not mean 0 = black, 65535 = white."""
    tags = picture.tag_v2 if isinstance(picture, TiffImagePlugin.TiffImageFile) else {}
    if picture.mode.startswith("I;16"):
        if tags.get(_BITS_PER_SAMPLE) == (12,):
            raise UnreadableImageError("12-bit grey TIFF is not supported: save it with 8 or 16 bits")
        if tags.get(_PHOTOMETRIC) == 0:
            raise UnreadableImageError("16-bit grey TIFF with 0 as white is not supported: save it with 0 as black")


def _to_eight_bits(picture: Image.Image) -> Image.Image:
    """Scale pictures of more than 8 bits a channel to 8."""
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise UnreadableImageError("32-bit grey values beyond 0..65535 have no known scale")
        # 65535 / 255 = 257
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if picture.mode == "F":
        raise UnreadableImageError("floating-point grey values have no known scale")
    return picture


def _short(error: Exception) -> str:
    """The first line of an error's text, without anything long."""
    lines = str(error).strip().splitlines()
    return lines[0][:120] if lines else type(error).__name__
