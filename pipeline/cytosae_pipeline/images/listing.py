"""Opening a data set: a folder of images, a CSV manifest, or the images of a store."""

import itertools
import logging
import shlex
from dataclasses import replace
from pathlib import Path

from cytosae_cache.store import ActivationStore
from cytosae_pipeline.config import StoreSource
from cytosae_pipeline.config.fields import suggest
from cytosae_pipeline.errors import quote
from cytosae_pipeline.images.folders import resolve, scan_folder
from cytosae_pipeline.images.image_list import (
    STORED,
    DatasetError,
    DatasetNotFoundError,
    ImageList,
    Root,
    SeveralRoots,
    StoredRows,
)
from cytosae_pipeline.images.manifest import read_manifest
from cytosae_pipeline.workspace.build_record import find_images
from cytosae_pipeline.workspace.paths import Workspace

logger = logging.getLogger(__name__)

MANIFEST = "manifest.csv"
"""Name of a manifest inside a folder of images; such a folder is read as the manifest says."""

_MAX_SIBLINGS = 1000  # names that are looked through for a suggestion


def open_dataset(path: Path, layout: str = "auto") -> ImageList:
    """The images of a folder or CSV manifest.

    Args:
        path: A folder, or a CSV with columns `path[,label][,patient]` whose paths start from the CSV's folder.
        layout: What a folder's levels mean, as for `--layout`; `auto` goes by `manifest.csv`, else by the folders'
            depth and names.

    Raises:
        DatasetNotFoundError: If `path` does not exist.
        DatasetError: If there are no images, the manifest or the folders are not as the layout says, or a layout is
            given for a CSV.
    """
    if path.is_file():
        images = read_manifest(path)
        if layout != "auto":
            raise DatasetError(
                f"--layout {shlex.quote(layout)} is for folders, but '{path}' is a CSV: its columns label and patient "
                "say what the images are. Leave out --layout, or give the folder as --images"
            )
        return images
    if not path.is_dir():
        raise DatasetNotFoundError(
            f"no images at '{path}': expected a folder of images or a CSV with columns path[,label][,patient]. "
            f"Pass their location with --images PATH{suggest(path.name, _siblings(path))}"
        )
    if layout == "auto" and (path / MANIFEST).is_file():
        return read_manifest(path / MANIFEST)
    images = scan_folder(path, layout)
    if (path / MANIFEST).is_file():
        images = replace(images, notes=(*images.notes, f"{MANIFEST} is not read, because --layout was given"))
    return images


def _siblings(path: Path) -> list[str]:
    """Names beside a path, for a suggestion; a few if there are very many, none if they cannot be listed."""
    try:
        return [item.name for item in itertools.islice(path.parent.iterdir(), _MAX_SIBLINGS)]
    except OSError:
        return []


def list_stored_images(store: ActivationStore, source: StoreSource) -> ImageList | None:
    """The images of a store where they lie now; None if that place does not exist.

    Args:
        store: The store; of joined ones, those whose images are there.
        source: Names the place of the images (of the first store), if they are not where the store was built from.
    """
    # --images is about the first data set.
    places = [
        find_images(part, source.root_dir, None if number else source.images, advise=not number)
        for number, part in enumerate(store.parts)
    ]
    if len(places) == 1:
        return list_images_of(store, places[0]) if places[0].exists() else None
    folders = {
        part.provenance.dataset: _folder_of(place)
        for part, place in zip(store.parts, places, strict=True)
        if place.exists()
    }
    for number, part in enumerate(store.parts):
        name = part.provenance.dataset
        if folders and name not in folders:
            own = Workspace(source.root_dir).dataset_dir(name)
            advice = f"Put them, or a link to their folder, at '{own}'" if number else "Pass --images PATH"
            logger.warning(
                f"the images of data set {quote(name)} were not found: they are shown without pictures. {advice}"
            )
    return ImageList(SeveralRoots(folders), StoredRows(store.images), STORED) if folders else None


def list_images_of(store: ActivationStore, root: Path) -> ImageList:
    """The images of a store, straight from its own table, whose rows are sorted already.

    Args:
        store: The store, finished or not.
        root: The folder or CSV that it was built from, as it is called now.
    """
    return ImageList(_folder_of(root), StoredRows(store.images), STORED)


def _folder_of(place: Path) -> Path:
    """The folder that paths start from: that of a CSV, or the folder itself."""
    return place.parent if place.is_file() else place


def resolve_inside(root: Root, relative: str) -> Path:
    """The file that a relative path names, if it lies below the root, links followed.

    Raises:
        DatasetError: If it leads out of the root, or belongs to a data set whose images were not found.
    """
    if isinstance(root, SeveralRoots):
        name, _, relative = relative.partition("/")
        if name not in root.folders:
            raise DatasetError(f"the images of data set {quote(name)} were not found")
        root = root.folders[name]
    if "\0" in relative:
        raise DatasetError(f"{relative!r} cannot be a file name")
    path = resolve(root / relative)
    if not path.is_relative_to(resolve(root)):
        raise DatasetError(f"'{relative}' leads out of the data set's folder")
    return path
