"""Activations as 8-bit codes: channels standardised by fixed numbers, then a scale a token.

An image's *record* is int8 of shape `(n_tokens, d_model + 4)`: a token's codes, then its scale as the four bytes of a
little-endian float32. `x ~ mean + std * scale * code` with `scale = max |(x - mean) / std| / 127` over the token.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

SCALE_BYTES = 4
"""Bytes of a token's scale, behind its codes."""

_TOP = 127

Records = npt.NDArray[np.int8]


class Channels(NamedTuple):
    """What channels are standardised by; fixed for a whole store, so that any image can be decoded alone."""

    mean: npt.NDArray[np.float32]
    """Subtracted, shape `(d_model,)`."""
    std: npt.NDArray[np.float32]
    """Divided by, positive, shape `(d_model,)`."""


def measure_channels(images: npt.NDArray[Any]) -> Channels:
    """Mean and standard deviation of every channel over a sample of images.

    Any finite mean and positive deviation make a sound store; those of the data make the smallest error.

    Args:
        images: Finite activations, shape `(n, n_tokens, d_model)`, n of 0 or more.
    """
    d_model = images.shape[-1]
    count, total, squares = 0, np.zeros(d_model), np.zeros(d_model)
    for image in images:
        wide = image.astype(np.float64)
        count, total = count + len(wide), total + wide.sum(axis=0)
        squares += np.einsum("td,td->d", wide, wide)
    mean = total / max(count, 1)
    std = np.sqrt(np.maximum(squares / max(count, 1) - mean**2, 0)).astype(np.float32)
    return Channels(mean.astype(np.float32), np.where(std > 0, std, np.float32(1)))


def quantize(image: npt.NDArray[Any], channels: Channels, record: Records) -> None:
    """Turn an image into its record.

    Args:
        image: Activations, shape `(n_tokens, d_model)`; those of an unreadable image are NaN throughout.
        channels: What channels are standardised by.
        record: Memory for the record, shape `(n_tokens, d_model + 4)`. Codes lie in -127..127. A token equal to the
            mean gets scale 0; one with a number that is not finite gets that as its scale, and codes of 0.
    """
    with np.errstate(invalid="ignore"):
        z = (image.astype(np.float32) - channels.mean) / channels.std
        scales = np.abs(z).max(axis=-1) / np.float32(_TOP)
    sound = np.isfinite(scales) & (scales > 0)
    z /= np.where(sound, scales, np.float32(1))[:, None]
    z[~sound] = 0
    np.rint(z, out=z)
    record[:, :-SCALE_BYTES] = z
    record[:, -SCALE_BYTES:] = scales.astype("<f4").view(np.int8).reshape(-1, SCALE_BYTES)


def dequantize(record: Records, channels: Channels, out: npt.NDArray[Any], wide: npt.NDArray[np.float32]) -> None:
    """Turn a record back into activations, off by `std * scale / 2` at the most, and by the rounding of `out`.

    Args:
        record: Shape `(n_tokens, d_model + 4)`.
        channels: What channels were standardised by.
        out: Memory for the activations, shape `(n_tokens, d_model)`.
        wide: Memory of the same shape as float32, reused from image to image.
    """
    scales = np.ascontiguousarray(record[:, -SCALE_BYTES:]).view("<f4")
    with np.errstate(invalid="ignore", over="ignore"):  # numbers that are not finite come out as they went in
        np.multiply(record[:, :-SCALE_BYTES], scales, out=wide)
        wide *= channels.std
        wide += channels.mean
        # Half a step above the largest number that was stored may lie beyond what float16 holds.
        most = np.finfo(out.dtype).max
        if not _TOP * scales.max() * channels.std.max() + np.abs(channels.mean).max() < most:
            np.clip(wide, -most, most, out=wide)
        out[...] = wide
