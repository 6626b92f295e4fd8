"""Activations as 8-bit codes: channels standardised by fixed numbers, then one scale per token.

An image's *record* is int8 of shape `(n_tokens, d_model + 4)`: each token's codes, then its scale as the four bytes of
a little-endian float32. `x ~ mean + std * scale * code` with `scale = max |(x - mean) / std| / 127` over the token.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

SCALE_BYTES = 4
"""Bytes of a token's scale, after its codes."""

_TOP = 127

Records = npt.NDArray[np.int8]


class Channels(NamedTuple):
    """Parameters that standardise the channels; fixed for a whole store, so that any image can be decoded alone."""

    mean: npt.NDArray[np.float32]
    """Subtracted, shape `(d_model,)`."""
    std: npt.NDArray[np.float32]
    """Divided by, positive, shape `(d_model,)`."""


def measure_channels(images: npt.NDArray[Any]) -> Channels:
    """Mean and standard deviation of every channel over a sample of images.

    Any finite mean and positive deviation give a valid store; those of the data give the smallest error.

    Args:
        images: Finite activations, shape `(n, n_tokens, d_model)`; n may be 0.
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
    """Encode an image as its record.

    Args:
        image: Activations, shape `(n_tokens, d_model)`; all NaN for an unreadable image.
        channels: Parameters that standardise the channels.
        record: Memory for the record, shape `(n_tokens, d_model + 4)`. Codes lie in -127..127. A token equal to the
            mean gets scale 0. A token that contains NaN or infinity gets that as its scale, and codes of 0.
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
    """Decode a record into activations; the error is at most `std * scale / 2` plus the rounding of `out`.

    Args:
        record: Shape `(n_tokens, d_model + 4)`.
        channels: Parameters that standardised the channels.
        out: Memory for the activations, shape `(n_tokens, d_model)`.
        wide: Scratch memory of the same shape, float32; reused from image to image.
    """
    scales = np.ascontiguousarray(record[:, -SCALE_BYTES:]).view("<f4")
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity come out as they went in
        np.multiply(record[:, :-SCALE_BYTES], scales, out=wide)
        wide *= channels.std
        wide += channels.mean
        # Half a step above the largest stored number may exceed the range of float16.
        most = np.finfo(out.dtype).max
        if not _TOP * scales.max() * channels.std.max() + np.abs(channels.mean).max() < most:
            np.clip(wide, -most, most, out=wide)
        out[...] = wide
