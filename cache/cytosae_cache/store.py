"""The activation store on disk: create, open, check, describe. The format is written down in docs/store-format.md."""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from cytosae_cache.errors import StoreCorruptError, StoreIncompleteError, StoreNotFoundError
from cytosae_cache.shard import TEMPORARY_SUFFIX, sync_folder, write_file
from cytosae_cache.spec import FORMAT_VERSION, Compression, StoreSpec

if TYPE_CHECKING:
    import zarr

ATTRIBUTES_KEY = "cytosae_cache"
"""Name of the group attribute that holds everything of ours."""

PROGRESS_FOLDER = "progress"
"""Folder of the marks of written shards while a store is being built; gone when it is complete."""

_MAX_METADATA_BYTES = 1 << 20
_MAX_IMAGES = 1 << 31
_ROWS_PER_CHUNK = 1 << 16


class ImageTable(NamedTuple):
    """What is known of the images before the first is read, one entry a row."""

    path: Sequence[str]
    """POSIX paths relative to the data set's root, in byte order."""
    label: Sequence[str]
    """Class names, '' where unknown."""
    patient: Sequence[str]
    """Patient identifiers, '' where unknown."""


@dataclass(frozen=True)
class Moments:
    """Exact sums over valid tokens; adding the shards up gives the whole store."""

    count: npt.NDArray[np.int64]
    """Tokens a shard, shape `(n_shards,)`."""
    sum: npt.NDArray[np.float64]
    """Sum a channel, shape `(n_shards, d_model)`."""
    sum_sq: npt.NDArray[np.float64]
    """Sum of squares a channel, shape `(n_shards, d_model)`."""


@dataclass(frozen=True)
class Provenance:
    """Where a store came from, beside its spec."""

    dataset: str
    """Name of the data set."""
    list_digest: str
    """SHA-256 of the list of images with labels and patients."""
    package_version: str
    """Version of cytosae-cache that built the store."""
    created: str
    """UTC time at which the build began, ISO 8601."""
    device: str = ""
    """Kind of device that computed the activations."""


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
        attributes = _read_attributes(self.path)
        self.spec = StoreSpec.from_json(attributes.get("spec"))
        self.complete = attributes.get("complete") is True
        self.provenance = _read_provenance(attributes)
        array = _read_json(self.path / "activations" / "zarr.json")
        self.n_images, self.shard_images, self.compression = _check_activations(array, self.spec, self.path)

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
        _write_attributes(path, spec, provenance, complete=False)
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
        _write_attributes(self.path, self.spec, self.provenance, complete=True)
        self.complete = True

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
            StoreCorruptError: If it is missing or cannot be decoded.
        """
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
    """Sync every small file of a store, and the folders that hold them, to disk. Shards are synced as written."""
    for folder, names, files in _walk(path):
        for name in files:
            with (folder / name).open("rb+") as file:
                _sync(file.fileno())
        sync_folder(folder)
        if folder.name == "activations":
            names[:] = [name for name in names if name != "c"]


def iter_stores(folder: Path) -> Iterator[Path]:
    """Folders below `folder` (one level) that are named like stores, in order of name."""
    if folder.is_dir():
        yield from sorted(path for path in folder.iterdir() if path.suffix == ".zarr" and path.is_dir())


def _walk(path: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """`os.walk` with paths; editing the list of folders prunes the walk."""
    import os

    for folder, names, files in os.walk(path):
        yield Path(folder), names, [name for name in files if not name.endswith(TEMPORARY_SUFFIX)]


def _sync(file: int) -> None:
    import os

    os.fsync(file)


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


def _write_attributes(path: Path, spec: StoreSpec, provenance: Provenance, *, complete: bool) -> None:
    """The group's own metadata file, in one step."""
    ours = {"format": FORMAT_VERSION, "complete": complete, "spec": spec.to_json(), **vars(provenance)}
    metadata = {"zarr_format": 3, "node_type": "group", "attributes": {ATTRIBUTES_KEY: ours}}
    write_file(path / "zarr.json", (json.dumps(metadata, indent=1, ensure_ascii=False) + "\n").encode())


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object of bounded size."""
    try:
        if path.stat().st_size > _MAX_METADATA_BYTES:
            raise StoreCorruptError(
                f"'{path}' is larger than any metadata of this format ({_MAX_METADATA_BYTES} bytes)"
            )
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise StoreCorruptError(f"'{path}' is missing: the store was not copied whole") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, StoreCorruptError):
            raise
        raise StoreCorruptError(f"'{path}' is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise StoreCorruptError(f"'{path}' must hold a JSON object, found {type(value).__name__}")
    return value


def _read_attributes(path: Path) -> dict[str, Any]:
    """Our attributes of the group at `path`, their format checked."""
    if not (path / "zarr.json").is_file():
        raise StoreNotFoundError(
            f"no activation store at '{path}' (no zarr.json there). "
            "List those there are with: cytosae-cache list; make one with: cytosae-cache build"
        )
    attributes = _read_json(path / "zarr.json").get("attributes")
    ours = attributes.get(ATTRIBUTES_KEY) if isinstance(attributes, dict) else None
    if not isinstance(ours, dict):
        raise StoreCorruptError(f"'{path}' is a Zarr group but no activation store (no '{ATTRIBUTES_KEY}' attribute)")
    if ours.get("format") != FORMAT_VERSION:
        raise StoreCorruptError(
            f"store '{path}' has format {ours.get('format')!r}, this version reads format {FORMAT_VERSION}. "
            "Update cytosae-cache, or build the store again"
        )
    return ours


def _read_provenance(attributes: Mapping[str, Any]) -> Provenance:
    """The provenance among our attributes."""
    values = {name: attributes.get(name, "") for name in Provenance.__dataclass_fields__}
    if not all(isinstance(value, str) for value in values.values()):
        raise StoreCorruptError(f"provenance must be text, found {values}")
    return Provenance(**values)


def _check_activations(array: Mapping[str, Any], spec: StoreSpec, path: Path) -> tuple[int, int, Compression]:
    """Images, images a shard and codec, if the array is laid out as the format says."""
    try:
        n_images, *image_shape = array["shape"]
        shard_images, *shard_shape = array["chunk_grid"]["configuration"]["chunk_shape"]
        (sharding,) = array["codecs"]
        inner = sharding["configuration"]
        names = [codec["name"] for codec in inner["codecs"]]
        found = {
            "dtype": array["data_type"],
            "image": tuple(image_shape),
            "shard": tuple(shard_shape),
            "chunk": tuple(inner["chunk_shape"]),
            "codec": sharding["name"],
            "index": inner["index_location"],
            "bytes": inner["codecs"][0],
            "index codecs": [codec["name"] for codec in inner["index_codecs"]],
            "keys": array["chunk_key_encoding"],
        }
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise StoreCorruptError(
            f"'{path}/activations' is not laid out as format {FORMAT_VERSION} says: {error!r}"
        ) from error
    expected = {
        "dtype": spec.store_dtype,
        "image": spec.image_shape,
        "shard": spec.image_shape,
        "chunk": (1, *spec.image_shape),
        "codec": "sharding_indexed",
        "index": "end",
        "bytes": {"name": "bytes", "configuration": {"endian": "little"}},
        "index codecs": ["bytes", "crc32c"],
        "keys": {"name": "default", "configuration": {"separator": "/"}},
    }
    wrong = [
        f"{name}: found {found[name]}, expected {expected[name]}" for name in expected if found[name] != expected[name]
    ]
    codecs: dict[tuple[str, ...], Compression] = {
        ("bytes",): "none",
        ("bytes", "zstd"): "zstd",
        ("bytes", "blosc"): "lz4",
    }
    if tuple(names) not in codecs:
        wrong.append(f"codecs: found {names}, expected one of {[list(known) for known in codecs]}")
    for name, value, top in (("images", n_images, _MAX_IMAGES), ("shard images", shard_images, _MAX_IMAGES)):
        if type(value) is not int or not 0 <= value < top:
            wrong.append(f"{name}: found {value!r}, expected 0 to {top}")
    if wrong or shard_images < 1:
        raise StoreCorruptError(f"'{path}/activations' is not laid out as its spec says: " + "; ".join(wrong))
    return n_images, shard_images, codecs[tuple(names)]
