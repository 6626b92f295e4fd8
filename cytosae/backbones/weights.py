"""Checkpoint files: tensors only, from one file or a folder with an index, nothing in them executed."""

import argparse
import hashlib
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cytosae.backbones.errors import BackboneError, BackboneNotFoundError, listed, shown
from cytosae.backbones.preprocessing import read_json
from cytosae.backbones.timm import is_dinov2
from cytosae.pickles import load_torch

State = Mapping[str, torch.Tensor]

_FOLDER_FILES = ("config.json", "model*.safetensors", "pytorch_model*.bin")
"""Files of a folder that have always been part of its hash."""

_WEIGHT_NAMES = (
    "model.safetensors",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
"""Names of weights in a folder, in the order in which they are preferred; each may be split, with an index beside."""

_PART_NAME = re.compile(r"-\d{5}-of-\d{5}\.|\.index\.json$")
"""Names of the parts of a split checkpoint, and of its index."""

_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".torch", ".ckpt")
_WRAPPERS = re.compile(r"(?<![^.])(?:_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")
"""What wrappers of torch put into names of parameters."""

_MAX_NESTING = 4
_OPEN_CLIP = "open_clip_config.json"


@dataclass(frozen=True)
class Checkpoint:
    """Tensors of a checkpoint, and what is stated about their network."""

    path: Path
    """File or folder as it was named."""
    tensors: dict[str, torch.Tensor]
    """Tensors by name, memory-mapped where possible; names of nested dictionaries are joined by dots."""
    stated: dict[str, Any] | None = None
    """Architecture that the file states in our own form."""
    config: dict[str, Any] = field(default_factory=dict)
    """Contents of the `config.json` beside the weights, or of open_clip's under its file's name; empty without one."""

    @property
    def folder(self) -> Path:
        """Folder in which other descriptions of the network can lie."""
        return self.path if self.path.is_dir() else self.path.parent


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint file, or the weights of a folder.

    Raises:
        BackboneNotFoundError: If nothing is there.
        BackboneError: If a file is missing, damaged, contains no tensors, or contains Python objects.
    """
    if not path.exists():
        raise BackboneNotFoundError(
            f"no vision transformer at '{path}'. Give the path of its checkpoint with --model_path, "
            "or try the small one in the package with --model_path embedded"
        )
    if path.is_dir():
        files = weight_files(path)
        tensors: dict[str, torch.Tensor] = {}
        for file in files:
            tensors |= _read_file(file)[0]
        return Checkpoint(path, tensors, config=_read_description(path, files[0]))
    if _PART_NAME.search(path.name):
        raise BackboneError(f"'{path}' is one of several files of a checkpoint: pass their folder, '{path.parent}'")
    tensors, stated = _read_file(path)
    return Checkpoint(path, tensors, stated, _read_description(path.parent, path) if stated is None else {})


def weight_files(folder: Path) -> list[Path]:
    """Files with the weights of a folder: the one with a usual name, all that an index names, or the only one.

    Raises:
        BackboneError: If there are none, if several could be meant, or if an index names files that are missing.
    """
    for name in _WEIGHT_NAMES:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            return _indexed_files(index)
    found = sorted(item for item in folder.iterdir() if item.suffix.lower() in _SUFFIXES and item.is_file())
    if len(found) == 1:
        return found
    what = f"several could be meant: {', '.join(item.name for item in found[:6])}" if found else "found none"
    raise BackboneError(
        f"'{folder}' has no weights under a usual name ({', '.join(_WEIGHT_NAMES)}); {what}. "
        "Pass the checkpoint itself with --model_path"
    )


def weights_sha256(path: Path) -> str:
    """SHA-256 of a checkpoint file, or over names and digests of all files that say what the network computes.

    These are a folder's description and weights. A file under a usual name counts together with the description beside
    it, unless that only repeats what the shapes of DINOv2 say.
    """
    if path.is_dir():
        files = {item for pattern in _FOLDER_FILES for item in path.glob(pattern) if item.is_file()}
        used = weight_files(path)
        described = _description_of(path, used[0])
        return _hash_files(files | set(used) | ({described} if described else set()))
    described = _description_of(path.parent, path)
    if described is not None and not is_dinov2(read_json(described)):
        return _hash_files({path, described})
    return _hash_file(path)


def _hash_files(files: set[Path]) -> str:
    """SHA-256 over names and digests."""
    return hashlib.sha256("".join(f"{item.name} {_hash_file(item)}\n" for item in sorted(files)).encode()).hexdigest()


def _hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _description_of(folder: Path, weights: Path) -> Path | None:
    """The file that describes the network of some weights, if there is one.

    Only under a usual name is a file taken for part of the folder that it lies in.
    """
    usual = weights.name in _WEIGHT_NAMES or _PART_NAME.search(weights.name)
    names = ("config.json", "open_clip_config.json")
    for name in reversed(names) if weights.name.startswith("open_clip") else names:
        if usual and (folder / name).is_file():
            return folder / name
    return None


def _read_description(folder: Path, weights: Path) -> dict[str, Any]:
    """What describes the network of some weights; that of open_clip stands under `open_clip`."""
    path = _description_of(folder, weights)
    if path is None:
        return {}
    config = read_json(path)
    if not config:
        raise BackboneError(f"'{path}' is empty: expected a description of transformers, timm or open_clip")
    return {_OPEN_CLIP: config} if path.name.startswith("open_clip") else config


def _indexed_files(index: Path) -> list[Path]:
    """Files that an index names, each a plain name in the index's own folder."""
    weight_map = read_json(index).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) and weight_map else {None}
    if not all(isinstance(name, str) and Path(name).name == name and name not in (".", "..") for name in names):
        raise BackboneError(f"'{index}' has no weight_map from tensors to files in its folder")
    files = [index.parent / str(name) for name in sorted(map(str, names))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise BackboneError(
            f"'{index}' names {len(files)} files, of which {len(missing)} are missing: "
            f"{', '.join(missing[:6])}. Was the download complete?"
        )
    return files


def _read_file(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """Tensors of a file by dotted name, and the architecture that it states in our own form, if any."""
    try:
        if path.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file

            value: Any = load_file(path)
        else:
            # Training scripts save their arguments beside the tensors: a Namespace has attributes and no behaviour.
            with torch.serialization.safe_globals([argparse.Namespace]):
                value = load_torch(path, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise BackboneError(
            f"'{path}' contains Python objects{f' ({shown(named[1])})' if named else ''} or is not a torch checkpoint; "
            "nothing in it was executed. Save the tensors alone: torch.save(model.state_dict(), PATH)"
        ) from error
    except Exception as error:  # errors of torch and safetensors have no common base class
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise BackboneError(f"'{path}' is not a readable checkpoint: {shown(first, 200)}") from error
    stated = value.get("architecture") if isinstance(value, dict) else None
    tensors = dict(_flatten(value))
    if not tensors:
        found = listed(sorted(map(str, value))) if isinstance(value, dict) else type(value).__name__
        raise BackboneError(f"'{path}' does not contain a state dict of tensors; found {found}")
    return tensors, stated if isinstance(stated, dict) else None


def _flatten(value: object, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of nested dictionaries under dotted names; other values are passed over."""
    if not isinstance(value, dict) or depth > _MAX_NESTING:
        return
    for key, item in value.items():
        if isinstance(item, torch.Tensor):
            yield _WRAPPERS.sub("", f"{prefix}{key}"), item
        else:
            yield from _flatten(item, f"{prefix}{key}.", depth + 1)


def _is_zip(path: Path) -> bool:
    """Whether a file has torch's zip format, which can be memory-mapped."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"
