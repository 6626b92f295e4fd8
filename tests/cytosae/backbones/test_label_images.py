"""Masks as label images: every kind gives its own values, and what is no mask is refused with a reason."""

import io

import numpy as np
import pytest
from PIL import Image

from cytosae.backbones.image_values import UnreadableImageError
from cytosae.backbones.label_images import decode_label_image, read_image_size

VALUES = np.random.default_rng(0).integers(0, 4, (9, 13)).astype(np.uint8)


def saved(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _palette():
    picture = Image.fromarray(VALUES).convert("P")
    picture.putdata(VALUES.ravel().tolist())
    picture.putpalette([200, 10, 10, 0, 255, 0, 9, 9, 9, 1, 2, 3])
    return picture


@pytest.mark.parametrize(
    "data",
    [
        saved(Image.fromarray(VALUES)),
        saved(_palette()),
        saved(Image.fromarray(VALUES.astype(np.uint16))),
        saved(Image.fromarray(VALUES.astype(np.uint16)), "TIFF"),
        saved(Image.fromarray(VALUES.astype(np.int32)), "TIFF"),
        saved(Image.fromarray(VALUES), "TIFF", compression="tiff_lzw"),
        saved(Image.fromarray(VALUES), "BMP"),
    ],
    ids=["grey", "palette", "16 bits", "TIFF of 16 bits", "TIFF of 32 bits", "LZW", "BMP"],
)
def test_values_are_those_that_were_saved(data):
    found = decode_label_image(data, image_size=(13, 9))
    assert found.dtype == np.uint8
    assert np.array_equal(found, VALUES)


def test_a_mask_of_one_bit_has_one_compartment():
    found = decode_label_image(saved(Image.fromarray(VALUES > 1)))
    assert np.array_equal(found, VALUES > 1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"no image", "not a JPEG, PNG"),
        (saved(Image.fromarray(VALUES), "JPEG"), "JPEG, which changes values: save masks as PNG or TIFF"),
        (saved(Image.fromarray(VALUES).convert("RGB")), r"found colours \(RGB\), expected one number per pixel"),
        (saved(Image.fromarray(VALUES * 85)), "found the value 255, expected 0 for the background and 1 to 16"),
        (saved(Image.fromarray(-VALUES.astype(np.int32)), "TIFF"), "found the value -3, expected 0"),
        (saved(Image.fromarray(VALUES[:5])), "found 13 x 5 pixels, expected 13 x 9 as its image has"),
        (saved(Image.fromarray(VALUES))[:60], "broken image"),
        (saved(Image.new("1", (15_000, 10_000))), "15000 x 10000 pixels exceed the limit"),
    ],
)
def test_what_is_no_mask_is_refused(data, message):
    with pytest.raises(UnreadableImageError, match=message):
        decode_label_image(data, image_size=(13, 9))


def test_the_size_of_an_image_is_the_one_it_is_shown_in():
    picture = Image.fromarray(VALUES)
    assert read_image_size(saved(picture)) == (13, 9)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_image_size(saved(picture, "JPEG", exif=exif)) == (9, 13)
    with pytest.raises(UnreadableImageError, match="its size cannot be read"):
        read_image_size(b"no image")
