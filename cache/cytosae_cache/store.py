"""The activation store on disk: create, open, check, describe. The format is written down in docs/store-format.md."""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from cytosae_cache.errors import StoreCorruptError, StoreIncompleteError
from cytosae_cache.metadata import (
    Provenance,
    check_activations,
    hash_file,
    hash_tables,
    read_attributes,
    read_json,
    read_provenance,
    write_attributes,
)
from cytosae_cache.moments import Moments
from cytosae_cache.shard import sync_folder
from cytosae_cache.spec import FORMAT_VERSION, Compression, StoreSpec

if TYPE_CHECKING:
    import dask.array
    import zarr

PROGRESS_FOLDER = "progress"
"""Folder of the marks of written shards while a store is being built; gone when it is complete."""

_ROWS_PER_CHUNK = 1 << 16


class ImageTable(NamedTuple):
    """What is known of the images before the first is read, one entry a row."""

    path: Sequence[str]
    """POSIX paths relative to the data set's root, in byte order."""
    label: Sequence[str]
    """Class names, '' where unknown."""
    patient: Sequence[str]
    """Patient identifiers, '' where unknown."""


class ActivationStore:
    """A store that exists on disk, opened for reading; cheap to make, tables are read when asked for.

    Args:
        path: Folder of the store.

    Raises:
        StoreNotFoundError: If there is no store at `path`.
        StoreCorruptError: If its metadata is not that of a store of this format.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        attributes = read_attributes(self.path)
        self.spec = StoreSpec.from_json(attributes.get("spec"))
        self.complete = attributes.get("complete") is True
        self.provenance = read_provenance(attributes)
        self.files: dict[str, str] = attributes["files"] if self.complete else {}
        """SHA-256 of every file that is neither a shard nor the group's metadata; empty until complete."""
        self.check_files("activations/zarr.json")
        array = read_json(self.path / "activations" / "zarr.json")
        self.n_images, self.shard_images, self.compression = check_activations(array, self.spec, self.path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a store that is fit for use.

        Raises:
            StoreNotFoundError: If there is no store at `path`.
            StoreIncompleteError: If its build has not finished.
            StoreCorruptError: If its metadata is not that of a store of this format.
        """
        store = cls(path)
        if not store.complete:
            raise StoreIncompleteError(
                f"store '{path}' is unfinished: {store.n_finished_shards} of {store.n_shards} shards are written. "
                f"Type the same build command again to finish it: "
                f"cytosae-cache build --dataset_name {store.provenance.dataset} ..."
            )
        return store

    @classmethod
    def create(
        cls,
        path: Path,
        spec: StoreSpec,
        images: ImageTable,
        provenance: Provenance,
        *,
        shard_images: int,
        compression: Compression = "none",
    ) -> Self:
        """Lay out an empty, unfinished store: metadata and the table of images, no activations.

        Args:
            path: Folder to make; must not hold a store.
            spec: What identifies the store.
            images: One entry a row.
            provenance: Where the store comes from.
            shard_images: Images a shard file; at least 1.
            compression: Lossless codec of every image.

        Raises:
            ValueError: If `shard_images` is below 1 or the table's columns differ in length.
        """
        n_images = len(images.path)
        if shard_images < 1 or len({len(column) for column in images}) != 1:
            raise ValueError(f"need shard_images >= 1 and equal columns, found {shard_images} and {images._fields}")
        path.mkdir(parents=True, exist_ok=True)
        group = _open_group(path, mode="w")
        shape = (n_images, *spec.image_shape)
        group.create_array(
            "activations",
            shape=shape,
            dtype=spec.store_dtype,
            shards=(shard_images, *spec.image_shape),
            chunks=(1, *spec.image_shape),
            fill_value=float("nan"),
            filters=None,
            compressors=_make_compressors(compression),
            dimension_names=("image", "token", "channel"),
        )
        table = group.create_group("images")
        for name, column in zip(images._fields, images, strict=True):
            _write_array(table, name, np.array(list(column), dtype=np.dtypes.StringDType()))
        sync_tree(path)
        # Written last: a folder without it is not a store, so a build killed before this line starts anew.
        write_attributes(path, spec, provenance, complete=False)
        sync_folder(path.parent)
        return cls(path)

    def finish(self, columns: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Write the arrays known only after the build, then mark the store complete.

        Args:
            columns: Arrays by their place in the store, for example `images/valid`.
        """
        group = _open_group(self.path, mode="r+")
        for place, values in columns.items():
            folder, _, name = place.rpartition("/")
            _write_array(group.require_group(folder), name, values)
        sync_tree(self.path)
        self.files = hash_tables(self.path)
        write_attributes(self.path, self.spec, self.provenance, complete=True, files=self.files)
        self.complete = True

    def check_files(self, prefix: str) -> None:
        """Compare the files whose path begins with `prefix` with their recorded digests; shards have their own.

        Raises:
            StoreCorruptError: If one is missing or was changed.
        """
        for relative in (name for name in self.files if name.startswith(prefix)):
            path = self.path / relative
            if not path.resolve().is_relative_to(self.path.resolve()) or not path.is_file():
                raise StoreCorruptError(f"'{path}' is missing: the store was not copied whole")
            if hash_file(path) != self.files[relative]:
                raise StoreCorruptError(
                    f"'{path}' was changed or damaged after it was written. Repair by building again with --overwrite"
                )

    @property
    def n_tokens(self) -> int:
        """Tokens an image."""
        return self.spec.tokens.n_tokens

    @property
    def d_model(self) -> int:
        """Channels of an activation."""
        return self.spec.d_model

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Little-endian type of the stored numbers."""
        return np.dtype(self.spec.store_dtype).newbyteorder("<")

    @property
    def image_bytes(self) -> int:
        """Bytes of one image's activations, uncompressed."""
        return self.n_tokens * self.d_model * self.dtype.itemsize

    @property
    def n_shards(self) -> int:
        """Shard files of the whole store."""
        return -(-self.n_images // self.shard_images)

    @property
    def n_finished_shards(self) -> int:
        """Shards whose completion mark is there."""
        return self.n_shards if self.complete else len(list((self.path / PROGRESS_FOLDER).glob("*.json")))

    def shard_rows(self, shard: int) -> range:
        """Rows that a shard holds."""
        return range(shard * self.shard_images, min((shard + 1) * self.shard_images, self.n_images))

    def column(self, place: str) -> npt.NDArray[Any]:
        """One of the small arrays, whole, for example `images/label` or `shards/crc32c`.

        Raises:
            StoreCorruptError: If it is missing, was changed or cannot be decoded.
        """
        self.check_files(f"{place}/")
        try:
            array: Any = _open_group(self.path, mode="r")[place]
            if array.shape[:1] not in ((self.n_images,), (self.n_shards,)) or array.ndim > 2:
                raise StoreCorruptError(f"array '{place}' of store '{self.path}' has shape {array.shape}")
            return np.asarray(array[...])
        except (KeyError, TypeError, RuntimeError, OSError, ValueError) as error:
            if isinstance(error, StoreCorruptError):
                raise
            raise StoreCorruptError(f"array '{place}' of store '{self.path}' cannot be read: {error}") from error

    @cached_property
    def images(self) -> ImageTable:
        """The table of images: path, label and patient of every row."""
        return ImageTable(*([str(item) for item in self.column(f"images/{name}")] for name in ImageTable._fields))

    @cached_property
    def valid(self) -> npt.NDArray[np.bool_]:
        """Whether each image could be read, shape `(n_images,)`; the others never reach a batch or a statistic."""
        return self.column("images/valid").astype(bool)

    @cached_property
    def valid_rows(self) -> npt.NDArray[np.int64]:
        """Rows of the images that could be read, increasing."""
        return np.flatnonzero(self.valid).astype(np.int64)

    @cached_property
    def image_checksums(self) -> npt.NDArray[np.uint32]:
        """CRC-32C of each image's stored bytes, shape `(n_images,)`."""
        return self.column("images/crc32c").astype(np.uint32)

    @property
    def moments(self) -> Moments:
        """Exact sums a shard."""
        return Moments(*(self.column(f"moments/{name}") for name in Moments.__dataclass_fields__))

    def zarr_array(self) -> "zarr.Array[Any]":
        """The activations as zarr-python sees them, shape `(n_images, n_tokens, d_model)`."""
        return _open_group(self.path, mode="r")["activations"]  # type: ignore[return-value]

    def dask(self) -> "dask.array.Array":
        """The activations as a lazy dask array whose chunks are whole shards, `(n_images, n_tokens, d_model)`."""
        from cytosae_cache.views import dask_view

        return dask_view(self)

    def describe(self) -> dict[str, Any]:
        """Everything that `info` shows, as JSON values."""
        skipped = int((~self.valid).sum()) if self.complete else None
        return {
            "path": str(self.path),
            "format": FORMAT_VERSION,
            "complete": self.complete,
            **vars(self.provenance),
            "spec_hash": self.spec.hash,
            "spec": self.spec.to_json(),
            "shape": [self.n_images, self.n_tokens, self.d_model],
            "shard_images": self.shard_images,
            "n_shards": self.n_shards,
            "n_finished_shards": self.n_finished_shards,
            "compression": self.compression,
            "n_skipped": skipped,
            "activation_bytes": self.n_images * self.image_bytes,
        }


def sync_tree(path: Path) -> None:
    """Sync a store's small files and all its folders, the shards' too; shards are synced as they are written."""
    for folder, _, files in os.walk(path):
        if "/activations/c/" not in f"{Path(folder).as_posix()}/":
            for name in files:
                with (Path(folder) / name).open("rb+") as file:
                    os.fsync(file.fileno())
        sync_folder(Path(folder))


def iter_stores(folder: Path) -> Iterator[Path]:
    """Folders below `folder` (one level) that are named like stores, in order of name."""
    if folder.is_dir():
        yield from sorted(path for path in folder.iterdir() if path.suffix == ".zarr" and path.is_dir())


def _open_group(path: Path, *, mode: str) -> "zarr.Group":
    """The store's Zarr group; zarr is imported here because it takes a third of a second."""
    import zarr

    with warnings.catch_warnings():
        # Object not recognised: our own progress folder in an unfinished store.
        warnings.simplefilter("ignore")
        return zarr.open_group(path, mode=mode, zarr_format=3)  # type: ignore[arg-type]


def _make_compressors(compression: Compression) -> "tuple[Any, ...] | None":
    """Codecs behind `bytes` inside every shard."""
    from zarr.codecs import BloscCodec, BloscShuffle, ZstdCodec

    match compression:
        case "none":
            return None
        case "lz4":
            return (BloscCodec(cname="lz4", clevel=5, typesize=2, shuffle=BloscShuffle.shuffle),)
        case "zstd":
            return (ZstdCodec(level=3),)
    raise ValueError(f"compression must be none, lz4 or zstd, found {compression!r}")


def _write_array(group: "zarr.Group", name: str, values: npt.NDArray[Any]) -> None:
    """A small array, replacing one of the same name."""
    chunks = tuple(max(1, min(size, _ROWS_PER_CHUNK)) for size in values.shape)
    dtype: Any = str if values.dtype.kind == "T" else values.dtype
    array = group.create_array(name, shape=values.shape, chunks=chunks, dtype=dtype, overwrite=True)
    if values.size:
        array[...] = values
