"""Lossless codecs of single images, run directly on the caller's memory.

The bytes are those of zarr-python, which runs the same numcodecs codecs behind a slower path.
"""

import struct
from typing import Any, Protocol

from numcodecs import Blosc, Zstd

from cytosae_cache.errors import StoreCorruptError
from cytosae_cache.format.spec import Compression

_LZ4_LEVEL = 5
_ZSTD_LEVEL = 3


class ImageCodec(Protocol):
    """Encodes and decodes one image; both release the GIL."""

    def encode(self, buf: Any) -> bytes:  # noqa: ANN401 - any object with a buffer
        """Encode into new bytes."""

    def decode(self, buf: Any, out: Any = None) -> Any:  # noqa: ANN401
        """Decode into `out`."""


def make_codec(compression: Compression, itemsize: int) -> ImageCodec | None:
    """The codec of a store's images; None if they are raw.

    Args:
        compression: Name of the codec.
        itemsize: Bytes per number; lz4 groups bytes of equal significance.
    """
    match compression:
        case "none":
            return None
        case "lz4":
            return Blosc(cname="lz4", clevel=_LZ4_LEVEL, shuffle=Blosc.SHUFFLE, typesize=itemsize)  # type: ignore[no-any-return]
        case "zstd":
            return Zstd(level=_ZSTD_LEVEL)  # type: ignore[no-any-return]
    raise ValueError(f"compression must be none, lz4 or zstd, found {compression!r}")


def make_compressors(compression: Compression, itemsize: int) -> tuple[Any, ...] | None:
    """The same codec as arguments for zarr-python; it follows `bytes` inside every shard."""
    from zarr.codecs import BloscCodec, BloscShuffle, ZstdCodec

    match compression:
        case "none":
            return None
        case "lz4":
            return (BloscCodec(cname="lz4", clevel=_LZ4_LEVEL, typesize=itemsize, shuffle=BloscShuffle.shuffle),)
        case "zstd":
            return (ZstdCodec(level=_ZSTD_LEVEL),)
    raise ValueError(f"compression must be none, lz4 or zstd, found {compression!r}")


def decode_into(codec: ImageCodec, data: memoryview, out: memoryview, where: str) -> None:
    """Decode one image into the caller's memory.

    Raises:
        StoreCorruptError: If the bytes do not decode to an image of this size.
    """
    if isinstance(codec, Blosc) and not _is_one_blosc_chunk(data, out.nbytes):
        raise StoreCorruptError(
            f"{where} cannot be decoded: its header does not state its own {len(data):,} bytes and the image's "
            f"{out.nbytes:,}"
        )
    try:
        codec.decode(data, out)
    except (ValueError, RuntimeError) as error:
        raise StoreCorruptError(f"{where} cannot be decoded: {error}") from error


def _is_one_blosc_chunk(data: memoryview, n_bytes: int) -> bool:
    """Whether the header of a Blosc chunk states the sizes that it has: the decoder trusts it.

    Args:
        data: The chunk.
        n_bytes: Bytes that it is decoded to.
    """
    # Version, version of the format, flags, item size; then decoded bytes, bytes per block, encoded bytes.
    return (
        len(data) >= 16
        and struct.unpack_from("<II", data, 4)[0] == n_bytes
        and (struct.unpack_from("<I", data, 12)[0] == len(data))
    )


def zstd_content_size(data: bytes) -> int | None:
    """Bytes that a Zstandard frame states to contain (RFC 8878, section 3.1.1.1); None if it states nothing."""
    if len(data) < 5 or data[:4] != b"\x28\xb5\x2f\xfd":
        return None
    flags = data[4]
    is_single, width = bool(flags & 0x20), (0, 2, 4, 8)[flags >> 6]
    if not width and is_single:
        width = 1
    start = 5 + (not is_single) + (0, 1, 2, 4)[flags & 3]
    if not width or len(data) < start + width:
        return None
    return int.from_bytes(data[start : start + width], "little") + (256 if width == 2 else 0)
