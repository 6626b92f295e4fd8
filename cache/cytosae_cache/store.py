"""The activation store: create, open, check, describe. The format is written down in docs/store-format.md."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from cytosae_cache.errors import StoreCorruptError, StoreError, StoreIncompleteError
from cytosae_cache.format.columns import BAD_METADATA, encode_hierarchy, read_table
from cytosae_cache.format.metadata import (
    MAX_METADATA_BYTES,
    Provenance,
    check_activations,
    hash_tables,
    parse_json,
    read_attributes,
    read_provenance,
    write_attributes,
)
from cytosae_cache.format.moments import Moments
from cytosae_cache.format.quantize import Channels
from cytosae_cache.format.spec import FORMAT_VERSION, Compression, StoreSpec
from cytosae_cache.storage.local import Location, StorageBackend, open_storage

if TYPE_CHECKING:
    import dask.array
    import xarray
    import zarr

PROGRESS_FOLDER = "progress"
"""StorageBackend of the marks of written shards while a store is being built; gone when it is complete."""

_OURS = ("activations/", "channels/", "images/", "moments/", "shards/", f"{PROGRESS_FOLDER}/")


class ImageTable(NamedTuple):
    """What is known of the images before the first is read, one entry a row."""

    path: Sequence[str]
    """POSIX paths relative to the data set's root, in byte order."""
    label: Sequence[str]
    """Class names, '' where unknown."""
    patient: Sequence[str]
    """Patient identifiers, '' where unknown."""

    def take(self, rows: npt.NDArray[np.integer]) -> "ImageTable":
        """The table of some rows only, in their order."""
        wanted = rows.tolist()
        return ImageTable(*([column[row] for row in wanted] for column in self))


class ActivationStore:
    """A store that exists, opened for reading; cheap to make, tables are read when asked for.

    `store[row]` and `store[rows]` give activations as arrays and read only those images' bytes.

    Args:
        location: StorageBackend or URL of the store.

    Raises:
        StoreNotFoundError: If there is no store.
        StoreCorruptError: If its metadata is not that of a store of this format.
    """

    def __init__(self, location: Location) -> None:
        self.storage = open_storage(location)
        self.path = self.storage.location
        """Where the store is: a path, or the URL of a remote one."""
        attributes = read_attributes(self.storage)
        n_bytes = self.storage.scan()
        self.spec = StoreSpec.from_json(attributes.get("spec"))
        self.complete = attributes.get("complete") is True
        self.provenance = read_provenance(attributes)
        self.files: dict[str, str] = attributes["files"] if self.complete else {}
        """SHA-256 of every file that is neither a shard nor the group's metadata; empty until complete."""
        name = "activations/zarr.json"
        array = parse_json(self.read_file(name, max_bytes=MAX_METADATA_BYTES), f"{self.path}/{name}")
        self.n_images, self.shard_images, self.compression = check_activations(array, self.spec, str(self.path))
        # Every image has 16 bytes in its shard's index, so a shape that no memory could hold is found out here.
        if self.complete and n_bytes < 16 * self.n_images:
            raise StoreCorruptError(
                f"store '{self.path}' says that it holds {self.n_images:,} images, but its shard files have "
                f"{n_bytes:,} bytes in all: they are missing or the shape is wrong"
            )

    @classmethod
    def open(cls, location: Location) -> Self:
        """Open a store that is fit for use.

        Raises:
            StoreNotFoundError: If there is no store at `location`.
            StoreIncompleteError: If its build has not finished.
            StoreCorruptError: If its metadata is not that of a store of this format.
        """
        return cls(location).require_complete()

    def require_complete(self) -> Self:
        """The store itself, if its build has finished.

        Raises:
            StoreIncompleteError: If it has not.
        """
        if not self.complete:
            raise StoreIncompleteError(
                f"store '{self.path}' is unfinished: {self.n_finished_shards} of {self.n_shards} shards are written. "
                f"Type the same build command again to finish it: "
                f"cytosae-cache build --dataset_name {self.provenance.dataset} ..."
            )
        return self

    @classmethod
    def create(
        cls,
        location: Location,
        spec: StoreSpec,
        images: ImageTable,
        provenance: Provenance,
        *,
        shard_images: int,
        compression: Compression = "none",
    ) -> Self:
        """Lay out an empty, unfinished store: metadata and the table of images, no activations.

        Args:
            location: StorageBackend to make, or a URL; must hold neither a store nor anything else.
            spec: What identifies the store.
            images: One entry a row.
            provenance: Where the store comes from.
            shard_images: Images a shard file; at least 1.
            compression: Lossless codec of every image.

        Raises:
            ValueError: If `shard_images` is below 1 or the table's columns differ in length.
            StoreError: If the folder holds files of something else.
        """
        if shard_images < 1 or len({len(column) for column in images}) != 1:
            raise ValueError(f"need shard_images >= 1 and equal columns, found {shard_images} and {images._fields}")
        folder = open_storage(location)
        clear_leftovers(folder)
        tables = {
            f"images/{name}": np.array(list(column), dtype=np.dtypes.StringDType())
            for name, column in zip(images._fields, images, strict=True)
        }
        layout = (len(images.path), shard_images, compression)
        for name, data in encode_hierarchy(tables, activations=(spec, *layout)).items():
            folder.write(name, [data])
        folder.sync()
        # Written last: a folder without it is not a store, so a build killed before this line starts anew.
        write_attributes(folder, spec, provenance, complete=False)
        return cls(location)

    def finish(self, columns: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Write the arrays known only after the build, then mark the store complete.

        Args:
            columns: Arrays by their place in the store, for example `images/valid`.
        """
        for name, data in encode_hierarchy(columns).items():
            self.storage.write(name, [data])
        self.storage.sync()
        self.files = hash_tables(self.storage)
        write_attributes(self.storage, self.spec, self.provenance, complete=True, files=self.files)
        self.complete = True

    def read_file(self, name: str, *, max_bytes: int | None = None) -> bytes:
        """A small file of the store, compared with its recorded digest; shards have their own.

        Raises:
            StoreCorruptError: If it is missing or was changed.
        """
        where = f"{self.path}/{name}"
        try:
            data = self.storage.read(name, max_bytes=max_bytes)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise StoreCorruptError(f"'{where}' is missing: the store was not copied whole") from error
        if self.complete and hashlib.sha256(data).hexdigest() != self.files.get(name):
            raise StoreCorruptError(
                f"'{where}' was changed or damaged after it was written. Repair by building again with --overwrite"
            )
        return data

    def __getitem__(self, rows: "int | slice | Sequence[int] | npt.NDArray[np.integer[Any]]") -> npt.NDArray[Any]:
        """Activations of one row, shape `(n_tokens, d_model)`, or of several, `(n, n_tokens, d_model)`; checked.

        Raises:
            IndexError: If a row is out of range.
        """
        from cytosae_cache.reading.reader import StoreReader

        wanted = np.arange(self.n_images)[rows]
        with StoreReader(self, n_threads=min(self.storage.n_threads, max(wanted.size, 1))) as reader:
            found = reader.read(np.atleast_1d(wanted))
        return found if wanted.ndim else found[0]

    def __len__(self) -> int:
        return self.n_images

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
        """Little-endian type of activations as they are read."""
        return np.dtype(self.spec.value_dtype).newbyteorder("<")

    @property
    def image_bytes(self) -> int:
        """Bytes of one image's activations as they are read."""
        return self.n_tokens * self.d_model * self.dtype.itemsize

    @property
    def n_shards(self) -> int:
        """Shard files of the whole store."""
        return -(-self.n_images // self.shard_images)

    @property
    def n_finished_shards(self) -> int:
        """Shards whose completion mark is there."""
        if self.complete:
            return self.n_shards
        return sum(name.endswith(".json") for name in self.storage.names(f"{PROGRESS_FOLDER}/"))

    def shard_rows(self, shard: int) -> range:
        """Rows that a shard holds."""
        return range(shard * self.shard_images, min((shard + 1) * self.shard_images, self.n_images))

    def column(self, place: str) -> npt.NDArray[Any]:
        """One of the small arrays, whole, for example `images/label` or `shards/crc32c`.

        Raises:
            StoreCorruptError: If it is missing, was changed or cannot be decoded.
        """
        names = self.files if self.complete else self.storage.names(f"{place}/")
        files = {name: self.read_file(name) for name in names if name.startswith(f"{place}/")}
        lengths = (self.n_images, self.n_shards, self.d_model)
        return read_table(files, place, lengths=lengths, widths=(32, self.d_model), where=str(self.path))

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

    @cached_property
    def channels(self) -> Channels | None:
        """What the codes of an int8 store are decoded with; None for other stores, and before the first shard is there.

        Raises:
            StoreCorruptError: If they cannot be read or are out of range.
        """
        if self.spec.store_dtype != "int8" or not (self.complete or self.storage.names("channels/")):
            return None
        channels = Channels(*(self.column(f"channels/{name}").astype(np.float32) for name in Channels._fields))
        sound = np.isfinite(channels.mean).all() and np.isfinite(channels.std).all() and (channels.std > 0).all()
        if {len(column) for column in channels} != {self.d_model} or not sound:
            raise StoreCorruptError(f"channels of store '{self.path}' must be {self.d_model} finite numbers")
        return channels

    def set_channels(self, channels: Channels) -> None:
        """Fix, before the first shard is written, what the codes of an int8 store are decoded with."""
        columns = zip(Channels._fields, channels, strict=True)
        for name, data in encode_hierarchy({f"channels/{name}": values for name, values in columns}).items():
            self.storage.write(name, [data], sync=True)
        self.storage.sync()
        self.channels = channels

    @cached_property
    def moments(self) -> Moments:
        """Exact sums a shard."""
        return Moments(*(self.column(f"moments/{name}") for name in Moments.__dataclass_fields__))

    def zarr_array(self) -> "zarr.Array[Any]":
        """The stored numbers as zarr-python sees them, shape `(n_images, n_tokens, d_model)`; records where int8.

        Raises:
            StoreCorruptError: If zarr-python cannot make sense of its metadata.
        """
        import zarr

        try:
            return zarr.open_array(str(self.path), path="activations", mode="r", zarr_format=3)
        except BAD_METADATA as error:
            raise StoreCorruptError(f"the activations of store '{self.path}' cannot be opened: {error}") from error

    def dask(self) -> "dask.array.Array":
        """The activations as a lazy dask array whose chunks are whole shards, `(n_images, n_tokens, d_model)`."""
        from cytosae_cache.views import dask_view

        return dask_view(self)

    def xarray(self) -> "xarray.Dataset":
        """The store as a lazy labelled data set: activations over `image`, `token`, `channel` with the image table.

        Raises:
            StoreError: If xarray is not installed.
        """
        from cytosae_cache.views import xarray_view

        return xarray_view(self)

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
            "activation_bytes": self.n_images * self.spec.record_bytes,
        }


def clear_leftovers(storage: StorageBackend) -> None:
    """Remove what a build left that was killed before it made a store.

    Raises:
        StoreError: If there is anything else in the storage.
    """
    storage.remove_partials()
    names = storage.names()
    strangers = [name for name in names if not name.startswith(_OURS)]
    if strangers:
        raise StoreError(
            f"'{storage}' is not empty and holds no unfinished store (found '{strangers[0]}'). Choose another place"
        )
    storage.remove(names)


def iter_stores(folder: Path) -> Iterator[Path]:
    """Folders below `folder` (one level) that are named like stores, in order of name."""
    if folder.is_dir():
        yield from sorted(path for path in folder.iterdir() if path.suffix == ".zarr" and path.is_dir())
