"""Headers of JPEG 2000 files: what decoding costs is in numbers that Pillow does not look at."""

import struct

from cytosae.backbones.errors import shown
from cytosae.backbones.image_values import UnreadableImageError

_CODESTREAM = b"\xff\x4f\xff\x51"
_COD, _COC, _START_OF_TILE = 0xFF52, 0xFF53, 0xFF90
_BLOCK_BYTES = 450
"""Memory of a code block beside its samples."""

_PRECINCT_BYTES = 600
"""Memory of a precinct of one resolution beside its code blocks."""

_TILE_BYTES, _TILE_COLOUR_BYTES = 6000, 1200
"""Memory of the parameters of each tile, and of each of its components."""


def measure_jpeg_2000(data: bytes, n_pixels: int) -> int:
    """Memory that OpenJPEG takes to decode a file one tile after another, without the picture itself.

    Args:
        data: The file's bytes.
        n_pixels: Pixels of the picture as Pillow opened it.

    Raises:
        UnreadableImageError: If the header is damaged.
    """
    try:
        start = _find_codestream(data)
        return _measure(data, start, n_pixels)
    except (struct.error, ValueError, IndexError) as error:
        raise UnreadableImageError(f"broken image: damaged JPEG 2000 header ({shown(str(error), 60)})") from error


def _find_codestream(data: bytes) -> int:
    """Where the code stream begins, behind the boxes of a JP2 file."""
    if data.startswith(_CODESTREAM):
        return 0
    place = 0
    while True:
        length, kind = struct.unpack_from(">I4s", data, place)
        header = 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, place + 8)
            header = 16
        if kind == b"jp2c":
            if data[place + header : place + header + 4] != _CODESTREAM:
                raise ValueError("no code stream")
            return place + header
        if length < header:
            raise ValueError("no code stream")
        place += length


def _measure(data: bytes, start: int, n_pixels: int) -> int:
    """The memory, from the main header of a code stream."""
    x1, y1, x0, y0, width, height, _, _, n_colours = map(int, struct.unpack_from(">8IH", data, start + 8))
    if not (x1 > x0 and y1 > y0 and width and height and n_colours):
        raise ValueError("no pixels")
    depth = max((value & 0x7F) + 1 for value in data[start + 42 : start + 42 + 3 * n_colours : 3])
    columns, rows = min(width, x1 - x0), min(height, y1 - y0)
    tile = min(columns * rows, max(n_pixels, (x1 - x0) * (y1 - y0)))
    n_tiles = -(-x1 // width) * -(-y1 // height)
    # Samples of 32 bits, and those of 8, 16 or 32 that Pillow takes from them.
    colour = tile * (4 + (1 if depth <= 8 else 2 if depth <= 16 else 4))
    colour += _count_structures(data, start, tile)
    return n_tiles * (_TILE_BYTES + n_colours * _TILE_COLOUR_BYTES) + n_colours * colour


def _count_structures(data: bytes, start: int, tile: int) -> int:
    """Memory of the code blocks and precincts of a component of a tile, the smallest ones taken for all."""
    block, precinct, n_levels = 64 * 64, 1 << 30, 0
    place = start + 2
    while True:
        marker, length = struct.unpack_from(">HH", data, place)
        if marker == _START_OF_TILE:
            break
        if marker >> 8 != 0xFF or length < 2:
            raise ValueError("damaged markers")
        if marker in (_COD, _COC):
            (n_colours,) = struct.unpack_from(">H", data, start + 40)
            skip = 4 + (5 if marker == _COD else 1 + (1 if n_colours < 257 else 2))
            has_precincts = data[place + (4 if marker == _COD else skip - 1)] & 1
            n_levels = max(n_levels, data[place + skip])
            block = min(block, 1 << ((data[place + skip + 1] & 15) + (data[place + skip + 2] & 15) + 4))
            if has_precincts:
                sizes = data[place + skip + 5 : place + 2 + length]
                precinct = min([precinct, *(1 << ((size & 15) + (size >> 4)) for size in sizes)])
        place += 2 + length
    if n_levels > 32:
        raise ValueError("too many resolutions")
    block = max(1, min(block, precinct))
    n_blocks: int = 2 * (tile // block) + 4 * (n_levels + 1)
    n_precincts = 2 * (tile // precinct) + 4 * (n_levels + 1)
    return n_blocks * _BLOCK_BYTES + n_precincts * _PRECINCT_BYTES
