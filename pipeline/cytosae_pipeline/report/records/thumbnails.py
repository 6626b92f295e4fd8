"""Pictures of cells as the encoder saw them, as small JPEG files."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from cytosae_cache.store import ActivationStore
from cytosae_pipeline.images.decoding import Decoded, open_decoder
from cytosae_pipeline.images.image_list import ImageList

_QUALITY = 85


def encode_jpeg(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Pixels, RGB, shape `(H, W, 3)`, as a JPEG file without any metadata."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def read_jpeg(store: ActivationStore, images: ImageList, row: int, digest: npt.NDArray[np.uint8]) -> bytes | None:
    """The picture of a row as a JPEG file; None if its file is missing, broken, or has changed.

    Args:
        store: The store.
        images: Location of its images.
        row: The row.
        digest: Digest of the file that the store was built from.

    Raises:
        SourceError: If the disk fails repeatedly.
    """
    with open_decoder(store, images) as decoder:
        (image,) = decoder.iter_rows([row])
    if not is_same(image, digest):
        return None
    assert image.pixels is not None
    return encode_jpeg(image.pixels)


def write_thumbnails(
    folder: Path,
    store: ActivationStore,
    images: ImageList,
    rows: Sequence[int],
    numbers: npt.NDArray[np.int64],
    on_image: Callable[[], None],
) -> list[int]:
    """Write `<number>.jpg` for each row whose file is still the one that the store was built from.

    Args:
        folder: Target folder.
        store: The store.
        images: Location of its images.
        rows: Rows to write.
        numbers: Number of each row on the page, shape `(n_images,)`.
        on_image: Called after each image.

    Returns:
        Rows without a picture: the file is missing, broken, or has changed.

    Raises:
        SourceError: If the disk fails repeatedly.
    """
    digests = store.column("images/sha256")
    missing = []
    with open_decoder(store, images) as decoder:
        for image in decoder.iter_rows(rows):
            if is_same(image, digests[image.row]):
                assert image.pixels is not None
                (folder / f"{numbers[image.row]}.jpg").write_bytes(encode_jpeg(image.pixels))
            else:
                missing.append(image.row)
            on_image()
    return missing


def explain_no_pictures(store: ActivationStore) -> tuple[str, str]:
    """Why a store whose images were not found has no pictures, and what to do about it; '' if nothing can be done."""
    if store.spec.imported:
        return "the store was imported, so it has no pictures", ""
    return "the images were not found, so maps are shown without cells", ": pass their location with --images PATH"


def is_same(image: Decoded, digest: npt.NDArray[np.uint8]) -> bool:
    """Whether an image could be decoded and has the digest: a map over another cell would mislead."""
    return image.pixels is not None and image.sha256 == bytes(digest)
