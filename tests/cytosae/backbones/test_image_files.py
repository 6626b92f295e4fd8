"""Files that Pillow opens but reads wrong, or only in part: refused or remarked on, never read in silence."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from cytosae.backbones.images import UnreadableImageError, decode_image

COLOURS = np.random.default_rng(0).integers(0, 256, (24, 24, 3)).astype(np.uint8)


def _save(picture: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def _tiff(pixels: bytes, *, bits: int, n_samples: int, photometric: int, **tags: int) -> bytes:
    """A TIFF of 24 x 24 pixels whose tags are written as they are given."""
    names = {"subfile": 254, "old_subfile": 255, "compression": 259, "planar": 284, "extra": 338}
    fields = {
        256: 24, 257: 24, 259: 1, 262: photometric, 277: n_samples, 278: 24,
        **{names[name]: value for name, value in tags.items() if name in names},
    }  # fmt: skip
    n_strips = n_samples if tags.get("planar") == 2 else 1
    lists = {
        258: [bits] * n_samples,
        339: [tags.get("sample_format", 1)] * n_samples,
        273: [8 + n * (len(pixels) // n_strips) for n in range(n_strips)],
        279: [len(pixels) // n_strips] * n_strips,
    }
    entries, behind = [], b""
    place = 8 + len(pixels)
    after = place + 2 + 12 * (len(fields) + len(lists)) + 4
    for tag, values in sorted({**{tag: [value] for tag, value in fields.items()}, **lists}.items()):
        packed = struct.pack(f"<{len(values)}I", *values)
        entries.append(
            struct.pack("<HHI", tag, 4, len(values))
            + (packed if len(values) == 1 else struct.pack("<I", after + len(behind)))
        )
        behind += packed if len(values) > 1 else b""
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + struct.pack("<I", 0)
    return struct.pack("<4sI", b"II*\0", place) + pixels + directory + behind


def _reason(data: bytes) -> str:
    with pytest.raises(UnreadableImageError) as caught:
        decode_image(data)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) <= 150
    return text


def _remarks(data: bytes, **options) -> list[str]:
    remarks: list[str] = []
    decode_image(data, remarks=remarks, **options)
    return remarks


# JPEG


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("has_thumbnail", [False, True])
def test_a_jpeg_whose_end_is_missing_or_zeros(progressive, has_thumbnail):
    thumbnail = _save(Image.new("RGB", (8, 8)), "JPEG")
    exif = b"Exif\0\0" + thumbnail if has_thumbnail else b""
    data = _save(Image.fromarray(COLOURS), "JPEG", quality=95, progressive=progressive, exif=exif)
    assert decode_image(data).shape == (224, 224, 3)
    assert decode_image(data + b"trailing bytes").shape == (224, 224, 3)
    half = len(data) * 3 // 4
    for broken in (data[:half] + bytes(len(data) - half), data[:half], data[:-2]):
        assert "truncated JPEG without an end marker" in _reason(broken)


# TIFF


@pytest.mark.parametrize("n_samples", [3, 4])
def test_16_bit_planes_without_compression_are_refused(n_samples):
    planes = np.random.default_rng(0).integers(0, 65536, (n_samples, 24, 24)).astype("<u2")
    data = _tiff(planes.tobytes(), bits=16, n_samples=n_samples, photometric=2, planar=2)
    assert "16-bit colours in separate planes without compression, which Pillow reads wrong: save it with" in _reason(
        data
    )


def test_8_bit_planes_are_read():
    data = _tiff(COLOURS.transpose(2, 0, 1).tobytes(), bits=8, n_samples=3, photometric=2, planar=2)
    np.testing.assert_array_equal(decode_image(data), decode_image(_save(Image.fromarray(COLOURS), "PNG")))


@pytest.mark.parametrize("tags", [{"subfile": 1}, {"old_subfile": 2}])
def test_a_first_page_that_is_a_preview(tags):
    data = _tiff(COLOURS.tobytes(), bits=8, n_samples=3, photometric=2, **tags)
    assert "the first page of the TIFF is a preview of another page: save the full picture" in _reason(data)


def test_signed_8_bits_are_refused():
    data = _tiff(bytes(576), bits=8, n_samples=1, photometric=1, sample_format=2)
    assert "signed 8-bit numbers, which have no known scale: save it as unsigned" in _reason(data)


def test_signed_16_bits_are_remarked():
    values = np.linspace(0, 32767, 576).astype("<i2")
    data = _tiff(values.tobytes(), bits=16, n_samples=1, photometric=1, sample_format=2)
    assert _remarks(data) == [
        "signed 16-bit values end at 32,767, and white was taken as 65,535: dark if white is 32,767 "
        "(--white-level 32767)"
    ]
    assert not _remarks(data, white_level=32767)


def test_unsigned_32_bits_are_named_as_they_are():
    values = np.full(576, 4_000_000_000, "<u4")
    assert "from 4000000000 to 4000000000" in _reason(_tiff(values.tobytes(), bits=32, n_samples=1, photometric=1))


@pytest.mark.parametrize(
    ("n_samples", "photometric", "extra", "said"),
    [(4, 2, 0, True), (4, 2, 2, False), (2, 1, 0, True), (2, 1, 2, False), (3, 2, None, False)],
)
def test_a_sample_that_is_not_said_to_be_transparency(n_samples, photometric, extra, said):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, n_samples)).astype(np.uint8)
    tags = {} if extra is None else {"extra": extra}
    remarks = _remarks(_tiff(pixels.tobytes(), bits=8, n_samples=n_samples, photometric=photometric, **tags))
    expected = (
        f"{n_samples} samples per pixel, of which only the first {'3 were' if n_samples == 4 else 'one was'} read"
    )
    assert bool(remarks) == said
    assert all(remark.startswith(expected) for remark in remarks)


@pytest.mark.parametrize(("top", "said"), [(0.0039, True), (0.24, True), (0.9, False)])
def test_dark_floats_are_remarked(top, said):
    data = _save(Image.fromarray(np.linspace(0, top, 64, dtype=np.float32).reshape(8, 8)), "TIFF")
    expected = [f"nearly black: floating-point values end at {top:.4g}, and white was taken as 1"]
    assert _remarks(data) == (expected if said else [])


@pytest.mark.parametrize(("code", "name"), [(34712, "JPEG 2000"), (33005, "JPEG 2000"), (50001, "WebP")])
def test_compressions_that_are_not_read(code, name, capfd):
    data = _tiff(COLOURS.tobytes(), bits=8, n_samples=3, photometric=2, compression=code)
    assert f"TIFF compressed as {name}, which is not read: save it with LZW or without" in _reason(data)
    assert capfd.readouterr() == ("", "")


def test_a_tiff_that_is_cut_off():
    data = _save(Image.fromarray(COLOURS), "TIFF", compression="tiff_lzw")
    assert "its tags cannot be read, perhaps because the file is cut off" in _reason(data[: len(data) // 2])
    broken = bytearray(data)
    broken[12 : len(data) // 2] = bytes(len(data) // 2 - 12)
    assert "broken image: its compressed data are damaged or cut off (decoder error" in _reason(bytes(broken))


# Several frames


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_further_frames_are_remarked(kind):
    frames = [Image.fromarray(COLOURS), Image.fromarray(255 - COLOURS)]
    data = _save(frames[0], kind, save_all=True, append_images=frames[1:])
    assert _remarks(data) == ["several frames: only the first was read; save each as a file to use them all"]
    assert not _remarks(_save(frames[0], kind))
