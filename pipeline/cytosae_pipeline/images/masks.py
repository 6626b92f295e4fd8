"""The masks of `--masks`: label images of the store's images, as shares of the pixels of every patch."""

import logging
import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cytosae.analysis.compartments import patch_shares
from cytosae.backbones.image_values import UnreadableImageError
from cytosae.backbones.label_images import MAX_COMPARTMENTS, decode_label_image, read_image_size
from cytosae_cache.reading.permutation import IntArray, spread_rows
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.config.masks import MaskChoice, parse_names
from cytosae_pipeline.config.store import StoreSource
from cytosae_pipeline.errors import UserError, quote, say_count
from cytosae_pipeline.images.files import UnusableFileError, read_file
from cytosae_pipeline.images.image_list import DatasetError, ImageList
from cytosae_pipeline.images.listing import list_stored_images, resolve_inside
from cytosae_pipeline.runtime.progress import Progress

logger = logging.getLogger(__name__)

_ENDINGS = (".png", ".tif", ".tiff", ".bmp")
_MISSING = "has no mask"


class Masks(NamedTuple):
    """Masks of some images."""

    names: tuple[str, ...]
    """Names of the compartments, without the background."""
    rows: npt.NDArray[np.int64]
    """Rows of the images that have one, rising, shape `(n,)`."""
    shares: npt.NDArray[np.float32]
    """Share of each patch's pixels in the background and each compartment, shape `(n, n_patches, C + 1)`."""
    n_without: int
    """Images that were looked at and have no usable mask."""


def find_masks(store: ActivationStore, config: MaskChoice, candidates: IntArray | None = None) -> Masks | None:
    """Read the masks of up to `--mask_images` images, spread evenly; None without the option.

    Args:
        store: The store.
        config: Where the masks are and, if it says it, where the images are.
        candidates: Rows of readable images that masks are wanted of, increasing, shape `(n,)`; default all.

    Raises:
        UserError: If there is no such folder, no mask can be used, or the store's images have no known patches.
    """
    if config.masks is None:
        return None
    if store.spec.imported or not math.prod(store.spec.tokens.grid):
        raise UserError(
            f"--masks needs patches of pictures, but store '{store.path}' was imported or has none. Build the store "
            "from the images"
        )
    if not config.masks.is_dir():
        raise UserError(
            f"--masks '{config.masks}' is not a folder: expected one with label images that are named as the images, "
            f"such as '{config.masks / store.images.path[0]}' or the same with .png"
        )
    images = list_stored_images(store, config) if isinstance(config, StoreSource) else None
    if images is None:
        logger.info("the images were not found, so that the sizes of masks are not compared with theirs")
    names = parse_names(config.mask_names)
    candidates = store.valid_rows if candidates is None else candidates
    rows = candidates[spread_rows(len(candidates), config.mask_images)]
    size, grid = store.spec.preprocessing.image_size, (store.spec.tokens.grid[0], store.spec.tokens.grid[1])
    kept, shares, largest, reasons, examples = [], [], 0, Counter[str](), dict[str, str]()
    with Progress("masks", len(rows), "images") as bar:
        for row in rows.tolist():
            path = store.images.path[row]
            try:
                mask = _read_mask(config.masks, path, images)
                largest = max(largest, int(mask.max()))
                shares.append(patch_shares(mask, grid, size, MAX_COMPARTMENTS))
                kept.append(row)
            except (UnreadableImageError, UnusableFileError, DatasetError) as error:
                reasons[str(error)] += 1
                examples.setdefault(str(error), path)
            bar.advance()
    n, told = say_count(len(rows), "image"), _tell(reasons, examples)
    if not kept:
        raise UserError(
            f"none of {n} has a usable mask in '{config.masks}': {told}. Expected label images that are named as the "
            "images, with the same folders, as PNG, TIFF or BMP"
        )
    if reasons:
        logger.warning(f"{len(rows) - len(kept):,} of {n} have no usable mask in '{config.masks}': {told}")
    names = (*names, *(f"compartment {number}" for number in range(len(names) + 1, largest + 1)))
    found = np.stack(shares)[..., : len(names) + 1]
    return Masks(names, np.array(kept, dtype=np.int64), found, len(rows) - len(kept))


def _read_mask(folder: Path, path: str, images: ImageList | None) -> npt.NDArray[np.uint8]:
    """The mask of an image.

    Raises:
        ValueError: If there is none, or it cannot be used.
    """
    names = dict.fromkeys([path, *(str(Path(path).with_suffix(ending)) for ending in _ENDINGS)])
    place = next((found for name in names if (found := resolve_inside(folder, name)).is_file()), None)
    if place is None:
        raise UnusableFileError(_MISSING)
    size = None
    if images is not None:
        try:
            size = read_image_size(read_file(resolve_inside(images.root, path), None, path))
        except (UnreadableImageError, UnusableFileError, DatasetError):
            size = None  # the image is gone: its page says so
    return decode_label_image(read_file(place, None, path), image_size=size)


def _tell(reasons: Counter[str], examples: dict[str, str]) -> str:
    """The most frequent reasons, each with an example."""
    return "; ".join(f"{n:,} {reason}, such as {quote(examples[reason])}" for reason, n in reasons.most_common(3))
