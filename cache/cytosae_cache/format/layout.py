"""What a store on disk or behind a URL contains: metadata, tables and the place of every image."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from cytosae_cache.errors import StoreCorruptError, StoreIncompleteError
from cytosae_cache.format.columns import read_table
from cytosae_cache.format.contents import CONTENTS_COLUMNS, digest_contents
from cytosae_cache.format.marks import PROGRESS_FOLDER
from cytosae_cache.format.metadata import (
    MAX_METADATA_BYTES,
    check_activations,
    parse_json,
    read_attributes,
    read_provenance,
)
from cytosae_cache.format.moments import Moments
from cytosae_cache.format.quantize import Channels
from cytosae_cache.format.shard import index_bytes, shard_name
from cytosae_cache.format.spec import FORMAT_VERSION, StoreSpec
from cytosae_cache.format.texts import Names, Texts, as_texts
from cytosae_cache.storage.base import Location
from cytosae_cache.storage.open import open_storage

COLUMNS_FOLDER = "images/columns"
"""Place of further columns of images: `names`, and one array for each, called by its number."""

NAMES_FILE = f"{COLUMNS_FOLDER}/names/zarr.json"
"""File that exists if there are further columns."""

MAX_COLUMNS = 64
"""Most further columns."""

_LOOKED_SHARDS = 8
"""Most shard files that opening looks at."""


class ImageTable(NamedTuple):
    """What is known about the images before the first one is read, one entry per row."""

    path: Sequence[str]
    """POSIX paths relative to the data set's root, in byte order."""
    label: Sequence[str]
    """Class names; '' if unknown."""
    patient: Sequence[str]
    """Patient identifiers; '' if unknown."""

    def take(self, rows: npt.NDArray[np.integer]) -> "ImageTable":
        """The table of the given rows only, in their order."""
        return ImageTable(*(as_texts(column).take(rows) for column in self))


class StoreLayout:
    """The description of an existing store, finished or not, as it was when this object was made.

    Opening reads the metadata and looks at one shard file, however many there are; tables are read on first access, and
    each shard is checked when it is first read. Pickles as its absolute location, so unpickling opens the store
    again.

    Args:
        location: Folder or URL of the store.

    Raises:
        StoreNotFoundError: If there is no store.
        StoreCorruptError: If its metadata is not that of a store of this format.
    """

    def __init__(self, location: Location) -> None:
        self.storage = open_storage(location)
        self.path = self.storage.location
        """Where the store is: a path, or the URL of a remote one."""
        attributes = read_attributes(self.storage)
        self.spec = StoreSpec.from_json(attributes.get("spec"))
        self.complete = attributes.get("complete") is True
        self.provenance = read_provenance(attributes)
        self.files: dict[str, str] = attributes["files"]
        """SHA-256 of every file that is neither a shard nor the group's metadata; until complete, of those so far."""
        self._contents = str(attributes.get("contents", "")) if self.complete else ""
        name = "activations/zarr.json"
        array = parse_json(self.read_file(name, max_bytes=MAX_METADATA_BYTES), f"{self.path}/{name}")
        self.n_images, self.shard_images, self.compression = check_activations(array, self.spec, str(self.path))
        if self.complete and self.n_images:
            self._require_shards()

    @classmethod
    def open(cls, location: Location) -> Self:
        """Open a complete store.

        Raises:
            StoreNotFoundError: If there is no store at `location`.
            StoreIncompleteError: If its build has not finished.
            StoreCorruptError: If its metadata is not that of a store of this format.
        """
        store = cls(location)
        store.require_complete()
        return store

    def __reduce__(self) -> tuple[type[Self], tuple[Location]]:
        return type(self), (self.absolute_location,)

    @property
    def absolute_location(self) -> Location:
        """The store's path from the root of this machine, or its URL: what another process can open."""
        return self.path.absolute() if isinstance(self.path, Path) else self.path

    def require_complete(self) -> None:
        """Refuse an unfinished store.

        Raises:
            StoreIncompleteError: If the store's build has not finished.
        """
        if not self.complete:
            shards = f"{self.n_shards} shard{'s' * (self.n_shards != 1)}"
            raise StoreIncompleteError(
                f"store '{self.path}' is unfinished: {self.n_finished_shards} of {shards} written. Finish it by "
                f"running the same `cytosae-cache build` command of data set '{self.provenance.dataset}' again"
            )

    def _require_shards(self) -> None:
        """Refuse a shape that no shard file has room for, before memory is taken for it.

        Looks at one file, or at a few spread over the store if that is missing: the time does not grow with the shards.

        Raises:
            StoreCorruptError: If none of them is there and large enough.
        """
        n_looked, n_bytes = min(self.n_shards, _LOOKED_SHARDS), 0
        for number in range(n_looked):
            size = self.storage.size(shard_name((2 * number + 1) * self.n_shards // (2 * n_looked))) or 0
            if size >= index_bytes(self.shard_images):
                return
            n_bytes += size
        raise StoreCorruptError(
            f"the metadata of store '{self.path}' promises {self.n_images:,} images, but its shard files have only "
            f"{n_bytes:,} bytes ({n_looked:,} of {self.n_shards:,} looked at): files are missing or the shape is wrong"
        )

    def read_file(self, name: str, *, max_bytes: int | None = None) -> bytes:
        """Read a small file of the store and compare it with its recorded digest; shards have checksums of their own.

        Raises:
            StoreCorruptError: If it is missing or was changed.
        """
        where = f"{self.path}/{name}"
        try:
            data = self.storage.read(name, max_bytes=max_bytes)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise StoreCorruptError(f"'{where}' is missing: the store was not copied completely") from error
        # Until the store is complete, files are added.
        if (self.complete or name in self.files) and hashlib.sha256(data).hexdigest() != self.files.get(name):
            raise StoreCorruptError(
                f"'{where}' was changed or damaged after it was written. Repair it by rebuilding with --overwrite"
            )
        return data

    def column(self, place: str, *, lengths: Sequence[int] | None = None) -> npt.NDArray[Any]:
        """Read one of the small arrays completely, for example `images/label` or `shards/crc32c`.

        Args:
            place: The array's place in the store.
            lengths: Allowed lengths of the first axis; images, shards or channels if not given.

        Raises:
            StoreCorruptError: If it is missing, was changed or cannot be decoded.
        """
        names = self.files if self.complete else self.storage.names(f"{place}/")
        # Its metadata in any case, so that a missing one is an error that names the file.
        ours = dict.fromkeys([f"{place}/zarr.json", *(name for name in names if name.startswith(f"{place}/"))])
        files = {name: self.read_file(name) for name in ours}
        lengths = lengths or (self.n_images, self.n_shards, self.d_model)
        return read_table(files, place, lengths=lengths, widths=(32, self.d_model), where=str(self.path))

    @property
    def n_tokens(self) -> int:
        """Tokens per image."""
        return self.spec.tokens.n_tokens

    @property
    def d_model(self) -> int:
        """Channels of an activation."""
        return self.spec.d_model

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Little-endian dtype that readers return."""
        return np.dtype(self.spec.value_dtype).newbyteorder("<")

    @property
    def image_bytes(self) -> int:
        """Bytes of one image's activations in the dtype that readers return."""
        return self.n_tokens * self.d_model * self.dtype.itemsize

    @property
    def n_shards(self) -> int:
        """Shard files of the complete store."""
        return -(-self.n_images // self.shard_images)

    @property
    def n_finished_shards(self) -> int:
        """Shards that have a completion mark."""
        if self.complete:
            return self.n_shards
        return sum(name.endswith(".json") for name in self.storage.names(f"{PROGRESS_FOLDER}/"))

    @property
    def shard_starts(self) -> npt.NDArray[np.int64]:
        """First row of each shard, shape `(n_shards,)`."""
        return np.arange(self.n_shards, dtype=np.int64) * self.shard_images

    def shard_rows(self, shard: int) -> range:
        """Rows in a shard."""
        return range(shard * self.shard_images, min((shard + 1) * self.shard_images, self.n_images))

    @cached_property
    def images(self) -> ImageTable:
        """Path, label and patient of every row, kept as arrays.

        Raises:
            StoreCorruptError: If they cannot be read, or are not texts.
        """
        columns = [self.column(f"images/{name}", lengths=[self.n_images]) for name in ImageTable._fields]
        if any(column.dtype.kind != "T" or column.ndim != 1 for column in columns):
            raise StoreCorruptError(
                f"path, label and patient of store '{self.path}' must be texts, one for each image, found "
                f"{', '.join(f'{column.dtype} {column.shape}' for column in columns)}"
            )
        path, label, patient = map(Texts, columns)
        return ImageTable(path, Names.of(label), Names.of(patient))

    @cached_property
    def image_columns(self) -> dict[str, npt.NDArray[Any]]:
        """What else is known about the images, by name: int64, float64 (NaN where unknown) or text, one entry per row.

        Raises:
            StoreCorruptError: If names or columns are not as the format requires.
        """
        # A store without further columns has no such folder.
        if NAMES_FILE not in (self.files if self.complete else self.storage.names(f"{COLUMNS_FOLDER}/")):
            return {}
        names = [str(name) for name in self.column(f"{COLUMNS_FOLDER}/names", lengths=range(1, MAX_COLUMNS + 1))]
        columns = [self.column(f"{COLUMNS_FOLDER}/{number}", lengths=[self.n_images]) for number in range(len(names))]
        if len(set(names)) != len(names) or any(c.dtype.char not in "qlTd" or c.ndim != 1 for c in columns):
            raise StoreCorruptError(
                f"'{COLUMNS_FOLDER}' of store '{self.path}' must contain different names and columns of int64, float64 "
                f"or text, found {names} of {[str(column.dtype) for column in columns]}"
            )
        return dict(zip(names, columns, strict=True))

    @cached_property
    def valid(self) -> npt.NDArray[np.bool_]:
        """Whether each image could be read, shape `(n_images,)`; the others never reach a batch or a statistic."""
        return self.column("images/valid", lengths=[self.n_images]).astype(bool)

    @cached_property
    def valid_rows(self) -> npt.NDArray[np.int64]:
        """Rows of the images that could be read, increasing."""
        return np.flatnonzero(self.valid).astype(np.int64)

    @cached_property
    def image_checksums(self) -> npt.NDArray[np.uint32]:
        """CRC-32C of each image's stored bytes, shape `(n_images,)`."""
        return self.column("images/crc32c", lengths=[self.n_images]).astype(np.uint32)

    @cached_property
    def shard_bytes(self) -> npt.NDArray[np.uint64]:
        """Recorded length of each shard file, shape `(n_shards,)`."""
        return self.column("shards/n_bytes", lengths=[self.n_shards]).astype(np.uint64)

    @cached_property
    def channels(self) -> Channels | None:
        """Decoding parameters of an int8 store; None for other stores, and before the first shard is written.

        Raises:
            StoreCorruptError: If they cannot be read or are out of range.
        """
        if self.spec.store_dtype != "int8" or not (self.complete or self.storage.names("channels/")):
            return None
        channels = Channels(*(self.column(f"channels/{name}").astype(np.float32) for name in Channels._fields))
        sound = np.isfinite(channels.mean).all() and np.isfinite(channels.std).all() and (channels.std > 0).all()
        if {len(column) for column in channels} != {self.d_model} or not sound:
            raise StoreCorruptError(
                f"channels of store '{self.path}' must be {self.d_model} finite means and positive deviations, "
                "found other values. Repair it by rebuilding with --overwrite"
            )
        return channels

    @cached_property
    def contents(self) -> str:
        """Identity of what a complete store contains (`digest_contents`), 64 hex digits.

        Stores of earlier versions do not state it: there, it is computed from their tables.

        Raises:
            StoreIncompleteError: If the store is unfinished.
        """
        self.require_complete()
        return self._contents or self.compute_contents()

    def compute_contents(self) -> str:
        """The identity of the contents, from the tables."""
        names = [*CONTENTS_COLUMNS, *(f"channels/{name}" for name in Channels._fields)]
        there = {name: self.column(name) for name in names if f"{name}/zarr.json" in self.files}
        return digest_contents(there)

    @cached_property
    def moments(self) -> Moments:
        """Exact sums per shard."""
        return Moments(*(self.column(f"moments/{name}") for name in Moments.__dataclass_fields__))

    def describe(self) -> dict[str, Any]:
        """Everything that `info` shows, as JSON values."""
        skipped = int((~self.valid).sum()) if self.complete else None
        columns = {
            name: "text" if column.dtype.kind == "T" else column.dtype.name
            for name, column in self.image_columns.items()
        }
        return {
            "path": str(self.path),
            "format": FORMAT_VERSION,
            "complete": self.complete,
            **vars(self.provenance),
            "contents": self.contents if self.complete else None,
            "spec_hash": self.spec.hash,
            "spec": self.spec.to_json(),
            "shape": [self.n_images, self.n_tokens, self.d_model],
            "shard_images": self.shard_images,
            "n_shards": self.n_shards,
            "n_finished_shards": self.n_finished_shards,
            "compression": self.compression,
            **({"image_columns": columns} if columns else {}),
            "n_skipped": skipped,
            "activation_bytes": self.n_images * self.spec.record_bytes,
        }
