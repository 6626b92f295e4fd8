"""docs/definitions.md, section 1, to the last bit; every kind of image of a microscope; files that are not images."""

import gc
import io
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import BmpImagePlugin, Image, ImageFile, ImageOps, JpegImagePlugin, PngImagePlugin, TiffImagePlugin

from cytosae.backbones import images
from cytosae.backbones.image_values import FORMATS
from cytosae.backbones.images import IMAGE_SIZE, MAX_PIXELS, UnreadableImageError, decode_image, to_tensor

ROOT = Path(__file__).parents[3]
ORIENTATION = 0x0112


def _noise(height: int = 30, width: int = 20, channels: int | None = 3, *, top: int = 256, seed: int = 0) -> np.ndarray:
    shape = (height, width) if channels is None else (height, width, channels)
    return np.random.default_rng(seed).integers(0, top, shape).astype(np.uint8 if top == 256 else np.uint16)


def _saved(picture: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def _png(width: int, height: int, bits: int, colour: int, raw: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG written by hand, because Pillow does not write 16-bit colour; `raw` is packed data without filter bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    stride = len(raw) // height
    lines = b"".join(b"\0" + raw[y * stride : (y + 1) * stride] for y in range(min(height, len(raw))))
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in body)


def _tiff(values: np.ndarray, *, photometric: int, bits: int, sample_format: int = 1, size=None, order="<") -> bytes:
    """An uncompressed TIFF written by hand; `size` (width, height) overrides the size in the header."""
    height, width = values.shape[:2]
    n = values.shape[2] if values.ndim == 3 else 1
    width_said, height_said = size or (width, height)
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    tags = {
        256: (4, [width_said]), 257: (4, [height_said]), 258: (3, [bits] * n), 259: (3, [1]), 262: (3, [photometric]),
        273: (4, [8]), 277: (3, [n]), 278: (4, [height_said]), 279: (4, [len(data)]), 339: (3, [sample_format] * n),
    }  # fmt: skip
    start, entries, far = 8 + len(data), b"", b""
    far_start = start + 2 + 12 * len(tags) + 4
    for tag, (kind, numbers) in tags.items():
        packed = struct.pack(f"{order}{len(numbers)}{'H' if kind == 3 else 'I'}", *numbers)
        if len(packed) > 4:
            place, far = struct.pack(order + "I", far_start + len(far)), far + packed
        else:
            place = packed.ljust(4, b"\0")
        entries += struct.pack(order + "HHI", tag, kind, len(numbers)) + place
    magic = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, start)
    return magic + data + struct.pack(order + "H", len(tags)) + entries + struct.pack(order + "I", 0) + far


def _bilinear(pixels: np.ndarray, size: int) -> np.ndarray:
    """Antialiased bilinear along the first axis: a triangle as wide as the step, 22-bit weights, rounded to bytes."""
    n = len(pixels)
    step = n / size
    reach = max(step, 1.0)
    out = np.empty((size, *pixels.shape[1:]), np.uint8)
    for i in range(size):
        centre = (i + 0.5) * step
        lo, hi = max(0, int(centre - reach + 0.5)), min(n, int(centre + reach + 0.5))
        weights = np.maximum(0, 1 - np.abs((np.arange(lo, hi) + 0.5 - centre) * (1 / reach)))
        fixed = np.floor(weights * (1 / weights.sum()) * 2**22 + 0.5).astype(np.int64)
        total = np.tensordot(fixed, pixels[lo:hi].astype(np.int64), axes=1)
        out[i] = np.clip((total + 2**21) >> 22, 0, 255)
    return out


def _defined(pixels: np.ndarray, size: int = IMAGE_SIZE) -> np.ndarray:
    """docs/definitions.md, section 1, on RGB bytes without Pillow: first the width, then the height."""
    return _bilinear(_bilinear(pixels.swapaxes(0, 1), size).swapaxes(0, 1), size)


# docs/definitions.md, section 1


@pytest.mark.parametrize(("height", "width"), [(224, 224), (300, 451), (30, 20), (1, 1), (223, 225), (240, 600)])
def test_resize_is_the_definition_bit_for_bit(height, width):
    pixels = _noise(height, width)
    for kind in ("PNG", "BMP", "TIFF"):
        decoded = decode_image(_saved(Image.fromarray(pixels), kind))
        assert decoded.dtype == np.uint8
        assert decoded.shape == (224, 224, 3)
        np.testing.assert_array_equal(decoded, _defined(pixels))


def test_tall_pictures_are_resized_in_width_first_by_every_pillow():
    # Pillow 13 by itself would resize the height of tall images first, and some bytes would differ by 1.
    pixels = _noise(500, 7)
    rows_first = _defined(pixels.swapaxes(0, 1)).swapaxes(0, 1)
    assert np.abs(_defined(pixels).astype(int) - rows_first).max() == 1
    np.testing.assert_array_equal(decode_image(_saved(Image.fromarray(pixels), "PNG")), _defined(pixels))


@pytest.mark.parametrize("size", [1, 17, 224, 518])
def test_size_can_be_chosen(size):
    pixels = _noise(60, 90)
    np.testing.assert_array_equal(
        decode_image(_saved(Image.fromarray(pixels), "PNG"), size=size), _defined(pixels, size)
    )


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30, "subsampling": 0}, {"optimize": True}])
def test_jpeg_is_the_definition(options):
    # smooth, because noise would hide the difference of a wrong filter
    y, x = np.mgrid[:120, :90]
    pixels = np.stack([2 * y, x, (x + y) % 200], axis=-1).astype(np.uint8)
    data = _saved(Image.fromarray(pixels), "JPEG", **options)
    np.testing.assert_array_equal(decode_image(data), _defined(np.asarray(Image.open(io.BytesIO(data)))))


def test_result_can_be_written_and_is_contiguous():
    decoded = decode_image(_saved(Image.fromarray(_noise()), "PNG"))
    assert decoded.flags.writeable
    assert decoded.flags.c_contiguous


def test_to_tensor_is_the_definition():
    pixels = np.stack([_noise(11, 13, seed=seed) for seed in range(3)])
    expected = (pixels / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    x = to_tensor(pixels)
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    assert x.shape == (3, 3, 11, 13)
    np.testing.assert_allclose(x.numpy(), expected.transpose(0, 3, 1, 2), rtol=0, atol=1e-6)


def test_to_tensor_keeps_its_input_and_accepts_other_constants():
    pixels = _noise(4, 4)[None]
    before = pixels.copy()
    x = to_tensor(pixels, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    np.testing.assert_array_equal(pixels, before)
    np.testing.assert_allclose(x.numpy(), (pixels / 127.5 - 1).transpose(0, 3, 1, 2), atol=1e-6)


def test_to_tensor_of_no_images_has_no_rows():
    assert to_tensor(np.empty((0, 5, 5, 3), np.uint8)).shape == (0, 3, 5, 5)


# Kinds of images

SQUARE = _noise(24, 24)
GREY = SQUARE[..., 0]
ALPHA = _noise(24, 24, None, seed=1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF"])
def test_grey_becomes_three_equal_channels(kind):
    data = _saved(Image.fromarray(GREY), kind)
    expected = np.asarray(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(decode_image(data, size=24), np.repeat(expected[..., None], 3, axis=-1))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_alpha_is_dropped_not_blended(kind):
    colour = _saved(Image.fromarray(np.dstack([SQUARE, ALPHA])), kind)
    np.testing.assert_array_equal(decode_image(colour, size=24), SQUARE)
    grey = _saved(Image.fromarray(np.dstack([GREY, ALPHA]), "LA"), kind)
    np.testing.assert_array_equal(decode_image(grey, size=24), np.repeat(GREY[..., None], 3, axis=-1))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_palette_is_looked_up_before_resizing(kind):
    picture = Image.fromarray(SQUARE).quantize(64)
    expected = np.asarray(picture.convert("RGB"))
    data = _saved(picture, kind)
    np.testing.assert_array_equal(decode_image(data, size=24), expected)
    np.testing.assert_array_equal(decode_image(data), _defined(expected))


@pytest.mark.parametrize("transparency", [3, bytes(range(64))])
def test_palette_with_transparency_keeps_its_colours(transparency):
    picture = Image.fromarray(SQUARE).quantize(64)
    data = _saved(picture, "PNG", transparency=transparency)
    np.testing.assert_array_equal(decode_image(data, size=24), np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGB"), ("PNG", "L")])
def test_transparent_colour_keeps_its_colour(kind, mode):
    pixels = SQUARE if mode == "RGB" else GREY
    value = tuple(int(v) for v in pixels[3, 3]) if mode == "RGB" else int(pixels[3, 3])
    expected = np.asarray(Image.fromarray(pixels).convert("RGB"))
    data = _saved(Image.fromarray(pixels), kind, transparency=value)
    np.testing.assert_array_equal(decode_image(data, size=24), expected)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_one_bit_is_black_and_white_and_resized_in_grey(kind):
    bits = GREY > 127
    data = _saved(Image.fromarray(bits), kind)
    expected = np.repeat(np.where(bits, 255, 0).astype(np.uint8)[..., None], 3, axis=-1)
    np.testing.assert_array_equal(decode_image(data, size=24), expected)
    np.testing.assert_array_equal(decode_image(data, size=10), _defined(expected, 10))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind):
    flat = {"red": (0, 255, 255, 0), "white": (0, 0, 0, 0), "black": (0, 0, 0, 255)}
    wanted = {"red": (255, 0, 0), "white": (255, 255, 255), "black": (0, 0, 0)}
    for name, inks in flat.items():
        decoded = decode_image(_saved(Image.new("CMYK", (16, 16), inks), kind), size=4)
        np.testing.assert_allclose(decoded.reshape(-1, 3), [wanted[name]] * 16, atol=3, err_msg=name)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_deflate", "packbits", "jpeg"])
def test_tiff_compressions(compression):
    data = _saved(Image.fromarray(SQUARE), "TIFF", compression=compression)
    expected = np.asarray(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(decode_image(data, size=24), expected)


def test_first_page_of_a_stack():
    pages = [Image.fromarray(_noise(24, 24, seed=seed)) for seed in range(3)]
    data = _saved(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    np.testing.assert_array_equal(decode_image(data, size=24), np.asarray(pages[0]))


def test_first_frame_of_an_animated_png_and_of_a_two_lens_jpeg():
    frames = [Image.fromarray(_noise(24, 24, seed=seed)) for seed in range(2)]
    np.testing.assert_array_equal(
        decode_image(_saved(frames[0], "PNG", save_all=True, append_images=frames[1:]), size=24), np.asarray(frames[0])
    )
    data = _saved(frames[0], "MPO", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode_image(data, size=24), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


# More than 8 bits


def _scaled(values: np.ndarray) -> np.ndarray:
    return np.floor(values.astype(np.float64) * 255 / 65535 + 0.5).astype(np.uint8)


ALL_16 = np.arange(65536, dtype=np.uint16).reshape(256, 256)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(_png(256, 256, 16, 0, ALL_16.astype(">u2").tobytes()), id="png"),
        pytest.param(_tiff(ALL_16, photometric=1, bits=16), id="tiff"),
        pytest.param(_tiff(ALL_16, photometric=1, bits=16, order=">"), id="tiff-big-endian"),
        pytest.param(_saved(Image.fromarray(ALL_16), "TIFF", compression="tiff_lzw"), id="tiff-lzw"),
    ],
)
def test_every_16_bit_grey_value_is_scaled_not_clipped(data):
    np.testing.assert_array_equal(decode_image(data, size=256), np.repeat(_scaled(ALL_16)[..., None], 3, axis=-1))


def test_16_bit_grey_is_scaled_before_resizing():
    values = _noise(50, 40, None, top=65536)
    expected = _defined(np.repeat(_scaled(values)[..., None], 3, axis=-1))
    np.testing.assert_array_equal(decode_image(_saved(Image.fromarray(values), "PNG")), expected)


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_colour_tiff_loses_its_low_byte_only(order):
    values = _noise(24, 24, top=65536)
    decoded = decode_image(_tiff(values, photometric=2, bits=16, order=order), size=24)
    np.testing.assert_array_equal(decoded, values >> 8)


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (6, 4), (4, 2)])
def test_16_bit_colour_png_loses_its_low_byte_only(colour, channels):
    values = _noise(24, 24, channels, top=65536)
    decoded = decode_image(_png(24, 24, 16, colour, values.astype(">u2").tobytes()), size=24)
    expected = (values if channels > 2 else values[..., [0, 0, 0]])[..., :3]
    np.testing.assert_array_equal(decoded, expected >> 8)


@pytest.mark.parametrize(("bits", "per_byte"), [(1, 8), (2, 4), (4, 2)])
def test_grey_of_few_bits_spans_black_to_white(bits, per_byte):
    packed = _noise(8, 8 // per_byte, None)
    values = np.unpackbits(packed, axis=1).reshape(8, 8, bits) @ (1 << np.arange(bits)[::-1])
    decoded = decode_image(_png(8, 8, bits, 0, packed.tobytes()), size=8)
    np.testing.assert_array_equal(decoded[..., 0], values * 255 // (2**bits - 1))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (_saved(Image.fromarray(GREY.astype(np.float32)), "TIFF"), "floating-point values from 0 to 255 have no known"),
        (_saved(Image.fromarray(GREY / np.float32(-255)), "TIFF"), "floating-point values from -1 to -0 have no known"),
        (
            _saved(Image.fromarray(GREY * np.float32(np.nan)), "TIFF"),
            "from nan to nan have .* save them with 8 or 16 bits",
        ),
        (
            _tiff(GREY.astype(np.float16), photometric=1, bits=16, sample_format=3),
            "TIFF with 1 sample of 16-bit floating-point numbers per pixel cannot be read: save it as RGB or grey",
        ),
        (
            _tiff(SQUARE.astype(np.float32), photometric=2, bits=32, sample_format=3),
            "TIFF with 3 samples of 32-bit floating-point numbers per pixel",
        ),
        (
            _tiff(_noise(24, 24, 5, top=65536), photometric=1, bits=16),
            "TIFF with 5 samples of 16-bit unsigned numbers per pixel",
        ),
        (_tiff(GREY.astype(np.int16) - 9, photometric=1, bits=16, sample_format=2), "no known scale"),
        (
            _tiff(GREY.astype(np.uint32) << 12, photometric=1, bits=32),
            "beyond 0..65535 and have no known scale: save them",
        ),
    ],
    ids=["float-255", "float-negative", "float-nan", "float16", "float-rgb", "5-samples", "negative", "32-bit"],
)
def test_values_without_a_known_scale_are_refused(data, reason):
    with pytest.raises(UnreadableImageError, match=reason):
        decode_image(data)


def test_grey_floats_from_0_to_1_are_scaled():
    values = np.linspace(0, 1, 24 * 24, dtype=np.float32).reshape(24, 24)
    decoded = decode_image(_saved(Image.fromarray(values), "TIFF"), size=24)
    np.testing.assert_array_equal(decoded[..., 0], np.floor(values * 255.0 + 0.5))
    inverted = decode_image(_tiff(values, photometric=0, bits=32, sample_format=3), size=24)
    np.testing.assert_array_equal(inverted[..., 0], np.floor((1 - values) * 255.0 + 0.5))


def test_packed_12_bits_are_scaled_from_4095():
    values = np.arange(4096).reshape(64, 64)
    packed = np.stack(
        [values[:, ::2] >> 4, (values[:, ::2] & 15) << 4 | values[:, 1::2] >> 8, values[:, 1::2] & 255], -1
    )
    data = _tiff(packed.reshape(64, 96).astype(np.uint8), photometric=1, bits=12, size=(64, 64))
    remarks: list[str] = []
    decoded = decode_image(data, size=64, remarks=remarks)
    np.testing.assert_array_equal(decoded[..., 0], np.floor(values * 255 / 4095 + 0.5))
    assert remarks == []


def test_inverted_16_bit_grey_is_inverted_back():
    decoded = decode_image(_tiff(ALL_16, photometric=0, bits=16), size=256)
    np.testing.assert_array_equal(decoded[..., 0], _scaled(65535 - ALL_16))


def _remarks(data: bytes) -> list[str]:
    found: list[str] = []
    np.testing.assert_array_equal(decode_image(data, remarks=found), decode_image(data))
    assert all(len(remark) < 150 and remark.isprintable() for remark in found)
    return found


DARK = _noise(24, 24, top=4096)


@pytest.mark.parametrize(
    "data",
    [
        _saved(Image.fromarray(DARK[..., 0]), "PNG"),
        _saved(Image.fromarray(DARK[..., 0]), "TIFF"),
        _tiff(DARK, photometric=2, bits=16),
        _png(24, 24, 16, 2, DARK.astype(">u2").tobytes()),
        _png(24, 24, 16, 6, np.dstack([DARK, np.full((24, 24), 65535)]).astype(">u2").tobytes()),
    ],
    ids=["png", "tiff", "tiff-rgb", "png-rgb", "png-rgba"],
)
def test_12_bit_values_in_16_bits_are_remarked(data):
    (remark,) = _remarks(data)
    assert remark.startswith("nearly black: 16-bit values end at 4,0")
    assert "of 65,535, perhaps a camera's 12 bits" in remark


@pytest.mark.parametrize(
    "data",
    [
        _saved(Image.fromarray(_noise(24, 24, None, top=65536)), "PNG"),
        _tiff(_noise(24, 24, top=65536), photometric=2, bits=16),
        _saved(Image.fromarray(SQUARE // 99), "PNG"),
        _saved(Image.fromarray(np.zeros((9, 9), np.uint16)), "PNG"),
    ],
    ids=["full", "full-rgb", "dark-8-bit", "black"],
)
def test_other_pictures_have_no_remark(data):
    assert _remarks(data) == []


def test_planes_stored_as_pages_are_remarked():
    planes = [Image.fromarray(SQUARE[..., channel]) for channel in range(3)]
    (remark,) = _remarks(_saved(planes[0], "TIFF", save_all=True, append_images=planes[1:]))
    assert remark.startswith("several pages: only the first")
    assert "colour planes, save them as one RGB page" in remark
    pages = [Image.fromarray(SQUARE), Image.fromarray(255 - SQUARE)]
    assert "save each as a file" in _remarks(_saved(pages[0], "TIFF", save_all=True, append_images=pages[1:]))[0]


def test_previews_are_not_remarked():
    pages = [Image.fromarray(SQUARE), Image.fromarray(SQUARE[::2, ::2])]
    assert _remarks(_saved(pages[0], "TIFF", save_all=True, append_images=pages[1:])) == []


def test_a_broken_second_page_does_not_matter():
    data = bytearray(_tiff(SQUARE, photometric=2, bits=8))
    (tags,) = struct.unpack_from("<I", data, 4)
    (n_tags,) = struct.unpack_from("<H", data, tags)
    for place in (len(data) - 1, 5_000_000, tags):
        struct.pack_into("<I", data, tags + 2 + 12 * n_tags, place)
        np.testing.assert_array_equal(decode_image(bytes(data), size=24), SQUARE)
        assert _remarks(bytes(data)) == []


@pytest.mark.parametrize("kind", ["WEBP", "JPEG2000"])
def test_webp_and_jpeg_2000_are_read(kind):
    options = {"lossless": True} if kind == "WEBP" else {"irreversible": False}
    np.testing.assert_array_equal(decode_image(_saved(Image.fromarray(SQUARE), kind, **options), size=24), SQUARE)
    data = _saved(Image.fromarray(_noise(100, 100)), kind)
    _reason(data[: len(data) // 2])


def test_16_bit_jpeg_2000_is_scaled():
    data = _saved(Image.fromarray(ALL_16), "JPEG2000", irreversible=False)
    np.testing.assert_array_equal(decode_image(data, size=256)[..., 0], _scaled(ALL_16))


def test_tiff_whose_tags_cannot_be_read():
    assert "TIFF" in _reason(b"II*\0" + struct.pack("<I", 8) + b"\xff" * 40)
    assert "TIFF" in _reason(b"MM\0+" + b"\0" * 40)


def test_inverted_8_bit_grey_is_inverted_back():
    decoded = decode_image(_tiff(GREY, photometric=0, bits=8), size=24)
    np.testing.assert_array_equal(decoded[..., 0], 255 - GREY)


# Orientation

# What a viewer must do with the stored pixels, from the EXIF standard.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_orientation_is_applied_once(kind, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    picture = Image.fromarray(_noise(24, 16))
    stored = np.asarray(Image.open(io.BytesIO(_saved(picture, kind))))
    expected = _defined(np.ascontiguousarray(UPRIGHT[orientation](stored)))
    np.testing.assert_array_equal(decode_image(_saved(picture, kind, exif=exif)), expected)


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_orientation_of_16_bit_grey(kind, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    values = _noise(24, 24, None, top=65536)
    data = _saved(Image.fromarray(values), kind, exif=exif)
    np.testing.assert_array_equal(decode_image(data, size=24)[..., 0], _scaled(UPRIGHT[orientation](values)))


def test_invalid_orientation_is_ignored():
    exif = Image.Exif()
    exif[ORIENTATION] = 77
    data = _saved(Image.fromarray(SQUARE), "PNG", exif=exif)
    np.testing.assert_array_equal(decode_image(data, size=24), SQUARE)


# Files that cannot be used


def _check_reason(reason: str) -> None:
    assert reason
    assert len(reason) <= 150
    assert reason.isprintable()
    assert "0x" not in reason, "an address differs from run to run"
    assert "BytesIO" not in reason


def _reason(data: bytes) -> str:
    with pytest.raises(UnreadableImageError) as caught:
        decode_image(data)
    _check_reason(str(caught.value))
    return str(caught.value)


def test_empty_file():
    assert _reason(b"") == "the file is empty"


@pytest.mark.parametrize(
    "data", [b"\0", b"hello", b"path,label\n", b"\0" * 5000, b"II", b"BM", b"\xff\xd8", b"\x89PNG"]
)
def test_not_an_image(data):
    _reason(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_truncated(kind, part):
    data = _saved(Image.fromarray(_noise(100, 100)), kind)
    _reason(data[: int(len(data) * part)])


def test_truncated_files_are_named_so():
    data = _saved(Image.fromarray(_noise(100, 100)), "JPEG")
    assert "truncated" in _reason(data[: len(data) // 2])


@pytest.mark.parametrize("kind", ["GIF", "PPM", "ICO", "TGA", "PCX", "EPS", "PDF", "SGI", "AVIF"])
def test_other_formats_are_never_parsed(kind, monkeypatch):
    data = _saved(Image.fromarray(SQUARE), kind)
    Image.init()
    parsed = []
    for name in Image.OPEN:
        if name not in FORMATS:
            monkeypatch.setitem(Image.OPEN, name, (lambda *args, name=name: parsed.append(name), None))
    assert _reason(data) == "not a JPEG, PNG, BMP, TIFF, WebP or JPEG 2000 image"
    assert not parsed


@pytest.fixture
def loads(monkeypatch):
    """Records every attempt to decode pixels."""
    calls = []
    kinds = [ImageFile.ImageFile, TiffImagePlugin.TiffImageFile, BmpImagePlugin.BmpImageFile]
    for kind in [*kinds, PngImagePlugin.PngImageFile, JpegImagePlugin.JpegImageFile]:
        real = kind.load
        monkeypatch.setattr(kind, "load", lambda self, real=real: calls.append(self.size) or real(self))
    return calls


HUGE = [(60_000, 60_000), (2**31 - 1, 2**31 - 1), (11_600, 11_600), (13_000, 13_000), (MAX_PIXELS + 1, 1)]


def _bmp_of(width: int, height: int) -> bytes:
    data = bytearray(_saved(Image.fromarray(SQUARE), "BMP"))
    data[18:26] = struct.pack("<II", width, height)
    return bytes(data)


def _jpeg_of(width: int, height: int) -> bytes:
    data = _saved(Image.fromarray(SQUARE), "JPEG")
    place = data.index(b"\xff\xc0") + 5
    return data[:place] + struct.pack(">HH", height, width) + data[place + 4 :]


@pytest.mark.parametrize("size", HUGE)
@pytest.mark.parametrize("kind", ["png", "tiff", "tiff16", "bmp"])
def test_bombs_are_refused_before_decoding(kind, size, loads):
    data = {
        "png": lambda: _png(*size, 8, 2, b"\0" * 100),
        "tiff": lambda: _tiff(SQUARE, photometric=2, bits=8, size=size),
        "tiff16": lambda: _tiff(GREY.astype(np.uint16), photometric=1, bits=16, size=size),
        "bmp": lambda: _bmp_of(*size),
    }[kind]()
    assert len(data) < 4000
    assert "pixels" in _reason(data)
    assert not loads


def test_jpeg_bomb(loads):
    assert "pixels" in _reason(_jpeg_of(65_500, 65_500))
    assert not loads


def test_bomb_of_text(loads):
    bomb = b"k\0\0" + zlib.compress(b"\0" * (1 << 26), 9)
    _reason(_png(8, 8, 8, 2, b"\0" * 192, (b"zTXt", bomb)))
    assert not loads


def test_limit_does_not_depend_on_pillows_global_one(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert _reason(_png(60_000, 60_000, 8, 2, b"\0" * 100)) == (
        f"60000 x 60000 pixels exceed the limit of {MAX_PIXELS}"
    )


def test_limit_is_below_pillows():
    # otherwise Pillow would refuse images between the two limits
    assert 2 * Image.MAX_IMAGE_PIXELS > MAX_PIXELS


def test_pictures_as_large_as_the_limit_pass(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 24 * 24)
    decode_image(_saved(Image.fromarray(SQUARE), "PNG"))
    with pytest.raises(UnreadableImageError, match="24 x 25 pixels exceed the limit of 576"):
        decode_image(_saved(Image.fromarray(_noise(25, 24)), "PNG"))


@pytest.mark.parametrize("message", ["", "\n", "one\ntwo", "x" * 5000])
def test_reasons_are_short_for_any_message_of_pillow(message, monkeypatch):
    def fail(self):
        raise OSError(message)

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    reason = _reason(_saved(Image.fromarray(SQUARE), "PNG"))
    assert reason.startswith("broken image: ")
    assert len(reason) > len("broken image: ")


def test_warnings_of_pillow_are_suppressed():
    data = bytearray(_saved(Image.fromarray(SQUARE), "TIFF"))
    start = struct.unpack("<I", data[4:8])[0]
    # an entry that claims more numbers than the file contains, in an irrelevant tag
    n_tags = struct.unpack("<H", data[start : start + 2])[0]
    last = start + 2 + 12 * (n_tags - 1)
    data[last : last + 12] = struct.pack("<HHII", 33432, 2, 90_000, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decode_image(bytes(data))
    assert not caught


# Random damage


def _specimens() -> list[bytes]:
    colour, grey = Image.fromarray(SQUARE), Image.fromarray(GREY)
    deep = Image.fromarray(_noise(24, 24, None, top=65536))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    return [
        _saved(colour, "JPEG", exif=exif),
        _saved(grey, "JPEG", progressive=True),
        _saved(colour.convert("CMYK"), "JPEG"),
        _saved(colour, "PNG", exif=exif),
        _saved(deep, "PNG"),
        _saved(colour.quantize(16), "PNG", transparency=1),
        _saved(colour, "BMP"),
        _saved(grey, "BMP"),
        _saved(colour.quantize(16), "BMP"),
        _saved(colour, "TIFF", exif=exif),
        _saved(deep, "TIFF"),
        _saved(colour, "TIFF", compression="tiff_lzw"),
        _saved(colour, "TIFF", compression="jpeg"),
        _saved(grey.convert("1"), "TIFF", compression="group4"),
        _saved(colour, "TIFF", save_all=True, append_images=[grey]),
    ]


@pytest.mark.parametrize("number", range(15))
def test_damaged_files_are_read_or_refused(number):
    data = _specimens()[number]
    decode_image(data)
    rng = np.random.default_rng(number)
    n_refused = 0
    for case in range(30):
        damaged = bytearray(data)
        # headers are at the start, a TIFF's and the end of a file's at the end
        reach = len(data) if case % 2 else min(len(data), 200)
        for _ in range(rng.integers(1, 8)):
            place = int(rng.integers(reach))
            damaged[-1 - place if case % 4 == 2 else place] = rng.integers(256)
        if case % 5 == 0:
            damaged = damaged[: rng.integers(len(damaged))]
        if case % 10 == 1:
            damaged = damaged[: rng.integers(len(damaged))] + damaged[rng.integers(len(damaged)) :]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                decoded = decode_image(bytes(damaged), size=16)
            except UnreadableImageError as error:
                n_refused += 1
                _check_reason(str(error))
            else:
                assert decoded.shape == (16, 16, 3)
                assert decoded.dtype == np.uint8
        assert not caught
    assert n_refused > 3
    gc.collect()  # a file that is still open would warn now


def test_png_damage_is_always_noticed():
    data = _saved(Image.fromarray(_noise(40, 40)), "PNG")
    place = data.index(b"IDAT") + 500
    _reason(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])


def test_importing_does_not_need_torch():
    code = "import sys, cytosae.backbones.images; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={"PYTHONPATH": ".:cache:pipeline"}, check=True)


def test_real_crops_are_the_definition(test_data):
    paths = sorted((test_data / "bccd_cells").rglob("*.jpg"))[::300]
    assert paths
    for path in paths:
        pixels = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
        np.testing.assert_array_equal(decode_image(path.read_bytes()), _defined(pixels))


def test_a_white_level_scales_more_than_eight_bits():
    values = np.linspace(0, 4095, 64, dtype=np.uint16).reshape(8, 8)
    data = io.BytesIO()
    Image.fromarray(values).save(data, format="TIFF")
    found = decode_image(data.getvalue(), size=8, white_level=4095)
    np.testing.assert_array_equal(found[:, :, 0], np.round(values / 4095 * 255))
    remarks: list[str] = []
    decode_image(data.getvalue(), size=8, white_level=4095, remarks=remarks)
    assert not remarks
    decode_image(data.getvalue(), size=8, remarks=remarks)
    assert "perhaps a camera's 12 bits (--white-level 4095)" in remarks[0]
    with pytest.raises(UnreadableImageError, match="grey values end at 4095, above the white level of 1023"):
        decode_image(data.getvalue(), size=8, white_level=1023)
