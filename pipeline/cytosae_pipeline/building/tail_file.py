"""The file with the rest of the network: the blocks after the stored one and the final norm, beside a store.

It lies beside the store, never in it, so that a copy of the store's folder does not pass the weights on.
"""

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cytosae.backbones.backbone import BackboneInfo
from cytosae.backbones.errors import shown
from cytosae.backbones.tail import POOLINGS, Tail, TailInfo, make_tail, read_tail
from cytosae.backbones.vit import ACTIVATIONS, Architecture
from cytosae.formats.tensor_file import digest_tensors
from cytosae_cache.errors import StoreCorruptError, StoreError, StoreMismatchError
from cytosae_cache.format.layout import StoreLayout
from cytosae_cache.format.spec import StoreSpec
from cytosae_cache.storage.atomic import write_file
from cytosae_cache.storage.base import Location, StorageBackend
from cytosae_cache.storage.open import open_storage
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.config import StoreChoice
from cytosae_pipeline.config.store import StorePlace
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.runtime.memory import available_ram
from cytosae_pipeline.runtime.shortage import require_memory
from cytosae_pipeline.workspace.find import build_again_command

SUFFIX = ".tail.safetensors"
"""What follows the store's name."""

FORMAT_VERSION = 1
METADATA_KEY = "cytosae_cache_tail"
"""Entry of the file's metadata that says, as JSON, what it is of."""

_MAX_HEADER_BYTES = 1 << 20
_TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_FACTS: dict[str, tuple[type, ...]] = {
    "heads": (int,),
    "mlp_hidden": (int,),
    "swiglu": (bool,),
    "activation": (str, type(None)),
    "eps": (float,),
    "layer_scale": (bool,),
    "qkv_bias": (bool,),
    "rope_theta": (float, type(None)),
}
"""What the file says of the network; the store's spec says the rest."""


class TailNotFoundError(UserError):
    """There is no tail beside the store; the message says what to type."""


@dataclass(frozen=True)
class _Place:
    """Where the tail of a store is."""

    storage: StorageBackend
    """The folder or URL that the store is in."""
    name: str
    """Name of the file there."""

    @property
    def location(self) -> Location:
        """Path or URL of the file."""
        folder = self.storage.location
        return f"{folder}/{self.name}" if isinstance(folder, str) else folder / self.name


@dataclass(frozen=True)
class _Header:
    """A file's header, checked against the store and the file's length."""

    info: TailInfo
    """What the tail consists of."""
    parts: dict[str, tuple[torch.dtype, tuple[int, ...], int]]
    """Type, shape and first byte of each tensor, counted from the start of the data."""
    start: int
    """First byte of the data."""
    n_bytes: int
    """Bytes of the data."""
    text: str
    """The entry of the metadata, without its digest."""
    sha256: str
    """Digest of tensors and text."""


def tail_location(store: Location) -> Location:
    """Where the tail of a store is, or would be.

    Args:
        store: Place of the store; of a link, where it leads.
    """
    return _place_of(store).location


def tail_bytes(store: Location) -> int | None:
    """Length of the tail of a store in bytes; None if there is none."""
    place = _place_of(store)
    return place.storage.size(place.name)


def find_tail(store: ActivationStore) -> ActivationStore:
    """The store itself; of joined ones the first that has a tail, which is that of all, or else the first."""
    return next((part for part in store.parts if tail_bytes(part.path) is not None), store.parts[0])


def write_tail(store: StoreLayout, model_path: Path, info: BackboneInfo, config: StorePlace) -> Location:
    """Write the tail of a store's encoder beside the store, unless it is there and sound.

    The file appears only once it is complete.

    Args:
        store: The store, built with the checkpoint.
        model_path: The checkpoint.
        info: Its description.
        config: Options by which the store was found, for messages.

    Returns:
        Place of the file.

    Raises:
        BackboneError: If the checkpoint cannot be read, or a weight is NaN or infinity.
        WriteError: If the disk is full, read-only or fails; what was there is unchanged.
    """
    place = _place_of(store.path)
    if place.storage.size(place.name) is not None:
        try:
            open_tail(store, config)
        except StoreError:
            pass  # damaged, or of another encoder: replaced
        else:
            return place.location
    from safetensors.torch import save

    tail, tensors = read_tail(model_path, info)
    facts = {"format_version": FORMAT_VERSION, "spec": store.spec.to_json(), **_facts_of(tail)}
    text = json.dumps(facts, sort_keys=True)
    entry = json.dumps({"facts": text, "sha256": digest_tensors(tensors, text)})
    data = save(tensors, metadata={METADATA_KEY: entry})
    if isinstance(place.location, Path):
        write_file(place.location, data)
    else:
        place.storage.write(place.name, [data], sync=True)
    return place.location


def open_tail(store: StoreLayout, config: StorePlace | None = None, *, device: torch.device | str = "cpu") -> Tail:
    """The tail beside a store, checked: its sizes before memory is taken, then its digest.

    Args:
        store: The store.
        config: Options by which the store was found, for the command in messages; None if there are none.
        device: Device of the tail.

    Raises:
        TailNotFoundError: If there is none.
        StoreMismatchError: If it is of another encoder, block or store.
        StoreCorruptError: If it is damaged, or not such a file.
        NotEnoughMemoryError: If it does not fit into memory.
    """
    if store.spec.imported:
        raise TailNotFoundError(
            f"store '{store.path}' was imported ('{store.spec.model_name}'): there is no network whose tail "
            "could be kept"
        )
    place, again = _place_of(store.path), _command(store, config)
    try:
        file = place.storage.open(place.name)
        n_bytes = file.n_bytes
    except FileNotFoundError as error:
        raise TailNotFoundError(
            f"store '{store.path}' has no tail, the blocks of the network after the stored one, which is looked for at "
            f"'{place.location}'. Add it to the finished store, nothing is computed again: {again}"
        ) from error
    try:
        header = _read_header(file, n_bytes, store)
        require_memory(2 * header.n_bytes, available_ram(), f"reading the tail '{place.location}'", "Free some memory")
        data = np.empty(header.n_bytes, dtype=np.uint8)
        file.read_at(header.start, memoryview(data))  # type: ignore[arg-type] # of numpy's stubs
        tensors = _split(data, header)
        if digest_tensors(tensors, header.text) != header.sha256:
            raise ValueError("its tensors have another digest than the one in its metadata")
    except StoreMismatchError as error:
        raise StoreMismatchError(f"'{place.location}' {error}. Write the store's own: {again}") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise StoreCorruptError(
            f"'{place.location}' is not a sound tail of store '{store.path}': {shown(str(error), 300)}. Write it "
            f"again: {again}"
        ) from error
    return make_tail(header.info, tensors, device=device)


def describe_tail(store: StoreLayout, config: StorePlace | None = None) -> tuple[str, str]:
    """What `info` and `verify` say of a store's tail: its place ('' if there is none), and what is wrong ('' if sound).

    Args:
        store: The store.
        config: As for `open_tail`.
    """
    if tail_bytes(store.path) is None:
        return "", ""
    where = str(tail_location(store.path))
    try:
        open_tail(store, config)
    except (StoreError, UserError) as error:
        return where, str(error)
    return where, ""


def _place_of(store: Location) -> _Place:
    """Where the tail of a store is."""
    if isinstance(store, Path):
        real = Path(os.path.realpath(store))
        return _Place(open_storage(real.parent), f"{real.name}{SUFFIX}")
    folder, _, name = store.rstrip("/").rpartition("/")
    return _Place(open_storage(folder), f"{name}{SUFFIX}")


def _command(store: StoreLayout, config: StorePlace | None) -> str:
    """The command that writes the tail of a store."""
    choice = config if isinstance(config, StoreChoice) else StoreChoice(store=str(store.path))
    if config is not None and config is not choice:
        choice = dataclasses.replace(choice, root_dir=config.root_dir, dataset_name=config.dataset_name)
    return build_again_command(store, choice, keep_tail=True)  # type: ignore[arg-type] # only describes the store


def _facts_of(tail: TailInfo) -> dict[str, Any]:
    """What the file says of the network."""
    architecture = dataclasses.replace(tail.architecture, mlp_hidden=tail.architecture.hidden)
    facts = {name: getattr(architecture, name) for name in _FACTS}
    facts["eps"] = float(facts["eps"])
    if facts["rope_theta"] is not None:
        facts["rope_theta"] = float(facts["rope_theta"])
    return {"network": facts, "pooling": tail.pooling, "has_norm": tail.has_norm}


def _read_header(file: Any, n_bytes: int, store: StoreLayout) -> _Header:  # noqa: ANN401 - a ReadableFile
    """The header of a file, every size of it checked.

    Raises:
        StoreMismatchError: If it is of another encoder or store; the message continues one that names the file.
        ValueError: If it is damaged, or not such a file.
    """
    size = np.zeros(8, dtype=np.uint8)
    if n_bytes < 8:
        raise ValueError(f"it has {n_bytes} bytes")
    file.read_at(0, memoryview(size))  # type: ignore[arg-type] # of numpy's stubs
    n_header = int.from_bytes(size.tobytes(), "little")
    if not 2 <= n_header <= min(_MAX_HEADER_BYTES, n_bytes - 8):
        raise ValueError(f"its header would have {n_header:,} bytes, of {n_bytes:,} in the file")
    raw = np.empty(n_header, dtype=np.uint8)
    file.read_at(8, memoryview(raw))  # type: ignore[arg-type] # of numpy's stubs
    header = json.loads(raw.tobytes())
    metadata = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not isinstance(metadata.get(METADATA_KEY), str):
        raise ValueError("it is no file that `build --keep_tail` wrote")
    entry = json.loads(metadata[METADATA_KEY])
    text, sha256 = str(entry["facts"]), str(entry["sha256"])
    info = _read_info(json.loads(text), store.spec)
    parts = _read_parts(header, info, n_bytes - 8 - n_header)
    return _Header(info, parts, 8 + n_header, n_bytes - 8 - n_header, text, sha256)


def _read_info(facts: Any, spec: StoreSpec) -> TailInfo:  # noqa: ANN401 - any JSON
    """What the tail consists of, if it is that of a spec.

    Raises:
        StoreMismatchError: If it is not.
        ValueError: If a fact is impossible, or of another version of the format.
    """
    if facts["format_version"] != FORMAT_VERSION:
        raise ValueError(f"its format is version {shown(facts['format_version'])}, expected {FORMAT_VERSION}")
    theirs = StoreSpec.from_json(facts["spec"])
    if theirs != spec:
        lines = "; ".join(shown(line, 200) for line in spec.differences(theirs))
        raise StoreMismatchError(f"is the tail of another store (store, tail): {lines}")
    network, pooling, has_norm = facts["network"], facts["pooling"], facts["has_norm"]
    wrong = [name for name, kinds in _FACTS.items() if type(network.get(name)) not in kinds]
    fits = not wrong and set(network) == set(_FACTS) and pooling in POOLINGS and type(has_norm) is bool
    fits = fits and 1 <= network["heads"] <= 1 << 10 and spec.d_model % network["heads"] == 0
    fits = fits and 1 <= network["mlp_hidden"] <= 64 * spec.d_model and 0 < network["eps"] < 1
    fits = fits and network["activation"] in (None, *ACTIVATIONS)
    fits = fits and (network["rope_theta"] is None or 0 < network["rope_theta"] < math.inf)
    if not fits or (pooling == "cls" and not spec.tokens.n_cls):
        raise ValueError(f"its metadata describes an impossible network: {network!r}, pooling {pooling!r}")
    architecture = Architecture(
        spec.model_name, spec.d_model, spec.n_blocks, **network, n_cls=spec.tokens.n_cls,
        n_registers=spec.tokens.n_registers,
    )  # fmt: skip
    return TailInfo(architecture, spec.block, spec.tokens.grid, pooling, has_norm)


def _read_parts(
    header: dict[str, Any], info: TailInfo, n_bytes: int
) -> dict[str, tuple[torch.dtype, tuple[int, ...], int]]:
    """Type, shape and first byte of every tensor: exactly those of the tail, which fill the file.

    Raises:
        ValueError: If one is missing, unknown, or has another shape or place.
    """
    if info.n_blocks > len(header):
        raise ValueError(f"it has {len(header)} tensors for {info.n_blocks:,} blocks")
    shapes = info.shapes()
    if set(header) != set(shapes):
        raise ValueError(
            f"missing tensors {sorted(set(shapes) - set(header))}, unknown {sorted(set(header) - {*shapes})}"
        )
    parts, spans = {}, []
    for name, shape in shapes.items():
        item = header[name]
        dtype, (start, stop) = _TYPES.get(item["dtype"]), item["data_offsets"]
        if dtype is None or item["shape"] != list(shape) or type(start) is not int or type(stop) is not int:
            raise ValueError(
                f"{name} is {item['dtype']} {item['shape']} at {item['data_offsets']}, expected {list(shape)}"
            )
        if stop - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} has {stop - start} bytes, expected {math.prod(shape) * dtype.itemsize}")
        parts[name] = dtype, shape, start
        spans.append((start, stop))
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ValueError(f"its tensors overlap, or leave a gap, at byte {end}")
        end = stop
    if end != n_bytes:
        raise ValueError(f"its tensors have {end:,} bytes, found {n_bytes:,}")
    return parts


def _split(data: "np.ndarray[Any, np.dtype[np.uint8]]", header: _Header) -> dict[str, torch.Tensor]:
    """The tensors in the data of a file; views."""
    whole = torch.from_numpy(data)
    tensors = {}
    for name, (dtype, shape, start) in header.parts.items():
        piece = whole[start : start + math.prod(shape) * dtype.itemsize]
        tensors[name] = (piece if start % dtype.itemsize == 0 else piece.clone()).view(dtype).reshape(shape)
    return tensors
