"""The JSON that describes a store: written atomically, and trusted only after every check."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cytosae_cache.errors import StoreCorruptError, StoreNotFoundError
from cytosae_cache.format.marks import PROGRESS_FOLDER
from cytosae_cache.format.spec import FORMAT_VERSION, Compression, StoreSpec, canonical_json
from cytosae_cache.storage.base import StorageBackend, is_litter

ATTRIBUTES_KEY = "cytosae_cache"
"""Name of the group attribute that contains all our metadata."""

MAX_METADATA_BYTES = 1 << 20
"""Largest allowed size of a JSON file of a store."""

_MAX_IMAGES = 1 << 31


@dataclass(frozen=True)
class Provenance:
    """Where a store came from, in addition to its spec."""

    dataset: str
    """Name of the data set."""
    list_digest: str
    """SHA-256 of the list of images with labels and patients."""
    package_version: str
    """Version of cytosae-cache that built the store."""
    created: str
    """UTC time at which the build started, ISO 8601."""
    device: str = ""
    """Kind of device that computed the activations."""
    batch_size: int = 0
    """Images per forward pass, on which the last bits of the activations depend; 0 where it is not known."""


def write_attributes(
    storage: StorageBackend,
    spec: StoreSpec,
    provenance: Provenance,
    *,
    complete: bool,
    files: Mapping[str, str] | None = None,
    contents: str = "",
) -> None:
    """Write the group's metadata file, atomically.

    Args:
        storage: The store's files.
        spec: What identifies the store.
        provenance: Where it comes from.
        complete: Whether the store is complete and everything else is on disk.
        files: SHA-256 of every file by relative POSIX path, except shards and this file.
        contents: Identity of the contents (`digest_contents`), known once the store is complete.
    """
    known = {name: value for name, value in vars(provenance).items() if name != "batch_size" or value}
    ours: dict[str, Any] = {"format": FORMAT_VERSION, "complete": complete, "spec": spec.to_json(), **known}
    ours["files"] = dict(sorted((files or {}).items()))
    if contents:
        ours["contents"] = contents
    ours["digest"] = _digest(ours)
    metadata = {"zarr_format": 3, "node_type": "group", "attributes": {ATTRIBUTES_KEY: ours}}
    storage.write("zarr.json", [(json.dumps(metadata, indent=1, ensure_ascii=False) + "\n").encode()], sync=True)
    storage.sync(["zarr.json"], contents=False)


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        StoreCorruptError: If the bytes are something else.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StoreCorruptError(f"'{where}' is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise StoreCorruptError(f"'{where}' must contain a JSON object, found {type(value).__name__}")
    return value


def read_attributes(storage: StorageBackend) -> dict[str, Any]:
    """Read our attributes of a store's group and check their format and digest.

    Raises:
        StoreNotFoundError: If there is no group.
        StoreCorruptError: If the group is not a store, has another format, or was changed.
    """
    try:
        data = storage.read("zarr.json", max_bytes=MAX_METADATA_BYTES)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise StoreNotFoundError(
            f"no activation store at '{storage}' (no zarr.json there). "
            "Check the path; `cytosae-cache list --root_dir ROOT` lists the stores below a root folder"
        ) from error
    attributes = parse_json(data, f"{storage}/zarr.json").get("attributes")
    ours = attributes.get(ATTRIBUTES_KEY) if isinstance(attributes, dict) else None
    if not isinstance(ours, dict):
        raise StoreCorruptError(
            f"'{storage}' is a Zarr group but not an activation store (it has no attribute '{ATTRIBUTES_KEY}')"
        )
    if ours.get("format") != FORMAT_VERSION or type(ours["format"]) is not int:
        raise StoreCorruptError(
            f"store '{storage}' has format {ours.get('format')!r}, this version reads format {FORMAT_VERSION}. "
            "Update cytosae-cache, or rebuild the store with --overwrite"
        )
    files = ours.get("files")
    try:
        digest = _digest(ours)
    except (ValueError, RecursionError) as error:
        raise StoreCorruptError(
            f"the metadata of store '{storage}' contains values that are not valid JSON: {error}"
        ) from error
    if ours.get("digest") != digest or not isinstance(files, dict):
        raise StoreCorruptError(
            f"the metadata of store '{storage}' was changed after it was written. "
            "Repair it by rebuilding with --overwrite"
        )
    return ours


def hash_tables(storage: StorageBackend) -> dict[str, str]:
    """SHA-256 of every file of a store, except shards, the group's metadata and completion marks."""
    return {name: hashlib.sha256(storage.read(name)).hexdigest() for name in table_names(storage.names())}


def table_names(names: Iterable[str]) -> list[str]:
    """Those of a store's files that are neither shards nor the group's metadata, completion marks or litter."""
    outside = ("activations/c/", f"{PROGRESS_FOLDER}/")
    return [name for name in names if name != "zarr.json" and not name.startswith(outside) and not is_litter(name)]


def _digest(attributes: Mapping[str, Any]) -> str:
    """SHA-256 of all our attributes except the digest itself, so that no changed character goes unnoticed."""
    rest = {name: value for name, value in attributes.items() if name != "digest"}
    return hashlib.sha256(canonical_json(rest)).hexdigest()


def read_provenance(attributes: Mapping[str, Any]) -> Provenance:
    """Read the provenance from our attributes."""
    texts = {name: attributes.get(name, "") for name in Provenance.__dataclass_fields__ if name != "batch_size"}
    batch_size = attributes.get("batch_size", 0)
    if not all(isinstance(value, str) for value in texts.values()):
        raise StoreCorruptError(f"provenance must be text, found {texts}")
    if type(batch_size) is not int or batch_size < 0:
        raise StoreCorruptError(f"the batch size of a build must be a whole number from 0 on, found {batch_size!r}")
    return Provenance(**texts, batch_size=batch_size)


def check_activations(array: Mapping[str, Any], spec: StoreSpec, where: str) -> tuple[int, int, Compression]:
    """Check the metadata of the large array; returns the number of images, the images per shard and the codec.

    Raises:
        StoreCorruptError: If the array is not laid out as the format and the spec require.
    """
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
            f"'{where}/activations' is not laid out as format {FORMAT_VERSION} requires: {error!r}"
        ) from error
    expected = {
        "dtype": spec.store_dtype,
        "image": spec.record_shape,
        "shard": spec.record_shape,
        "chunk": (1, *spec.record_shape),
        "codec": "sharding_indexed",
        "index": "end",
        # Single bytes have no byte order.
        "bytes": {"name": "bytes", **({} if spec.store_dtype == "int8" else {"configuration": {"endian": "little"}})},
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
        raise StoreCorruptError(f"'{where}/activations' is not laid out as its spec requires: " + "; ".join(wrong))
    return n_images, shard_images, codecs[tuple(names)]
