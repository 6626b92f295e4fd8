"""Small files that unpack to a lot."""

import struct
import zlib

_LARGEST_BLOCK = 1 << 17


def make_zstd_of_zeros(n: int) -> bytes:
    """A frame of Zstandard of n zeros, written without them: each of its blocks repeats one byte."""
    made = bytearray(struct.pack("<IBQ", 0xFD2FB528, 0b11100000, n))
    while n:
        length = min(n, _LARGEST_BLOCK)
        n -= length
        made += struct.pack("<I", length << 3 | 0b10 | (n == 0))[:3] + b"\0"
    return bytes(made)


def make_png_of_zeros(width: int, height: int) -> bytes:
    """A black PNG of 8-bit grey."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer = zlib.compressobj(9)
    lines_at_once = max(1, (1 << 20) // (width + 1))
    body = b""
    for first in range(0, height, lines_at_once):
        body += packer.compress(bytes((width + 1) * min(lines_at_once, height - first)))
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body + packer.flush()) + chunk(b"IEND", b"")
