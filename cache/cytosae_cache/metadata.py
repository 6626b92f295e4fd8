"""The JSON that describes a store: written in one step, read with suspicion."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cytosae_cache.errors import StoreCorruptError, StoreNotFoundError
from cytosae_cache.shard import write_file
from cytosae_cache.spec import FORMAT_VERSION, Compression, StoreSpec, canonical_json

ATTRIBUTES_KEY = "cytosae_cache"
"""Name of the group attribute that holds everything of ours."""

_MAX_METADATA_BYTES = 1 << 20
_MAX_IMAGES = 1 << 31


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


def write_attributes(
    path: Path, spec: StoreSpec, provenance: Provenance, *, complete: bool, files: Mapping[str, str] | None = None
) -> None:
    """The group's own metadata file, in one step.

    Args:
        path: Folder of the store.
        spec: What identifies the store.
        provenance: Where it comes from.
        complete: Whether everything else is on disk.
        files: SHA-256 of every file that is neither a shard nor this one, by relative POSIX path.
    """
    ours: dict[str, Any] = {"format": FORMAT_VERSION, "complete": complete, "spec": spec.to_json(), **vars(provenance)}
    ours["files"] = dict(sorted((files or {}).items()))
    ours["digest"] = _digest(ours)
    metadata = {"zarr_format": 3, "node_type": "group", "attributes": {ATTRIBUTES_KEY: ours}}
    write_file(path / "zarr.json", (json.dumps(metadata, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
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


def read_attributes(path: Path) -> dict[str, Any]:
    """Our attributes of the group at `path`, their format and digest checked."""
    if not (path / "zarr.json").is_file():
        raise StoreNotFoundError(
            f"no activation store at '{path}' (no zarr.json there). "
            "List those there are with: cytosae-cache list; make one with: cytosae-cache build"
        )
    attributes = read_json(path / "zarr.json").get("attributes")
    ours = attributes.get(ATTRIBUTES_KEY) if isinstance(attributes, dict) else None
    if not isinstance(ours, dict):
        raise StoreCorruptError(f"'{path}' is a Zarr group but no activation store (no '{ATTRIBUTES_KEY}' attribute)")
    if ours.get("format") != FORMAT_VERSION:
        raise StoreCorruptError(
            f"store '{path}' has format {ours.get('format')!r}, this version reads format {FORMAT_VERSION}. "
            "Update cytosae-cache, or build the store again"
        )
    files = ours.get("files")
    if ours.get("digest") != _digest(ours) or not isinstance(files, dict):
        raise StoreCorruptError(f"the metadata of store '{path}' were changed after they were written")
    return ours


def hash_tables(path: Path) -> dict[str, str]:
    """SHA-256 of every file of a store that is neither a shard, the group's own metadata, nor progress of a build."""
    digests = {}
    for item in sorted(path.rglob("*")):
        relative = item.relative_to(path).as_posix()
        if item.is_file() and relative != "zarr.json" and not relative.startswith(("activations/c/", "progress/")):
            digests[relative] = hash_file(item)
    return digests


def hash_file(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(attributes: Mapping[str, Any]) -> str:
    """SHA-256 over our attributes apart from the digest itself, so that no changed character goes unnoticed."""
    rest = {name: value for name, value in attributes.items() if name != "digest"}
    return hashlib.sha256(canonical_json(rest)).hexdigest()


def read_provenance(attributes: Mapping[str, Any]) -> Provenance:
    """The provenance among our attributes."""
    values = {name: attributes.get(name, "") for name in Provenance.__dataclass_fields__}
    if not all(isinstance(value, str) for value in values.values()):
        raise StoreCorruptError(f"provenance must be text, found {values}")
    return Provenance(**values)


def check_activations(array: Mapping[str, Any], spec: StoreSpec, path: Path) -> tuple[int, int, Compression]:
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
