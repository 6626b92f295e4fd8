"""Which files make up an autoencoder, and whose they are. A further format is a module of its own and a line below."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from cytosae.formats.dictionary_learning import (
    DICTIONARY_LEARNING_CONFIG,
    DICTIONARY_LEARNING_WEIGHTS,
    is_dictionary_learning,
    read_dictionary_learning,
)
from cytosae.formats.foreign import (
    Activation,
    ForeignSae,
    InteropError,
    Source,
    check_activation,
    read_json,
    show_names,
)
from cytosae.formats.overcomplete import is_overcomplete, read_overcomplete
from cytosae.formats.saelens import SAELENS_CONFIG, SAELENS_WEIGHTS, is_saelens, read_saelens
from cytosae.formats.safe_unpickle import Record
from cytosae.formats.sparsify import SPARSIFY_CONFIG, SPARSIFY_WEIGHTS, is_sparsify, read_sparsify
from cytosae.formats.state_dict import is_state_dict, read_state_dict

_FOLDERS = (
    (SAELENS_WEIGHTS, SAELENS_CONFIG),
    (SPARSIFY_WEIGHTS, SPARSIFY_CONFIG),
    (DICTIONARY_LEARNING_WEIGHTS, DICTIONARY_LEARNING_CONFIG),
)
"""Names of the file with the tensors and of the config beside it."""

_READERS: tuple[tuple[Callable[[Source], bool], Callable[[Source], ForeignSae]], ...] = (
    (is_saelens, read_saelens),
    (is_sparsify, read_sparsify),
    (is_dictionary_learning, read_dictionary_learning),
    (is_overcomplete, read_overcomplete),
    (is_state_dict, read_state_dict),
)
"""Tried in this order: whether the files are of a format, and its reader."""

_DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)  # fmt: skip

_WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which checkpoints of other programs contain the state dict."""


class SaeFiles(NamedTuple):
    """The files of an autoencoder."""

    weights: Path
    """The file with the tensors."""
    config: Path | None
    """The config beside it, if there is one."""


def find_files(path: Path) -> SaeFiles | None:
    """The files that a path names: a file, or the folder of another program; None if there are none.

    Args:
        path: A file or a folder.
    """
    if path.is_dir():
        for weights, config in _FOLDERS:
            if (path / weights).is_file():
                return SaeFiles(path / weights, _existing(path / config))
        # A folder with a config alone is one of SAELens that lacks a file; reading it says so.
        found = _existing(path / SAELENS_CONFIG)
        return None if found is None else SaeFiles(path / SAELENS_WEIGHTS, found)
    if not path.is_file():
        return None
    configs = dict(_FOLDERS)
    if path.name in configs:
        return SaeFiles(path, _existing(path.parent / configs[path.name]))
    # dictionary_learning keeps intermediate autoencoders in checkpoints/ beside the config.
    if path.parent.name == "checkpoints" and (path.parent.parent / DICTIONARY_LEARNING_WEIGHTS).is_file():
        return SaeFiles(path, _existing(path.parent.parent / DICTIONARY_LEARNING_CONFIG))
    return SaeFiles(path, None)


def read_foreign(files: SaeFiles, value: object, activation: Activation | None, *, config: object = None) -> ForeignSae:
    """The autoencoder in the contents of files that this package or the reference did not write.

    Args:
        files: The files.
        value: What the file with the tensors contains.
        activation: What the user stated.
        config: The config, if it was in the same file.

    Raises:
        InteropError: If no reader knows the contents, or its reader does not support them.
    """
    tensors = check_tensors(_unwrap(value), files.weights.stat().st_size)
    if files.config is not None:
        config = read_json(files.config)
    source = Source(files.weights.name, strip_prefix(tensors), config, activation)
    for fits, read in _READERS:
        if fits(source):
            found = read(source)
            if not found.is_stated:
                check_activation(activation, found.cfg)
            return found
    raise InteropError(f"its tensors are those of no known autoencoder: found {show_names(tensors)}")


def strip_prefix(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors without the prefix that all names share, such as `module.` from DistributedDataParallel."""
    names = dict(tensors)
    while names and all("." in name for name in names) and len({name.split(".")[0] for name in names}) == 1:
        names = {name.partition(".")[2]: tensor for name, tensor in names.items()}
    return names


def check_tensors(value: object, n_bytes: int) -> dict[str, torch.Tensor]:
    """The value, if it is a dict of dense tensors of which none is larger than its file.

    A stride of 0 makes a tensor of any size from one number.

    Raises:
        InteropError: If it is anything else.
    """
    if not isinstance(value, dict) or not value:
        raise InteropError(
            f"it is not an autoencoder: found {_describe(value)}, expected 'cfg' and 'state_dict', or a state dict of "
            "tensors"
        )
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise InteropError(
                f"it is not an autoencoder: found {show_names(value)}, expected 'cfg' and 'state_dict', or tensors"
            )
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in _DTYPES:
            raise InteropError(f"tensor {name[:40]!r} is not a dense tensor of whole or floating-point numbers")
        if tensor.numel() * tensor.element_size() > n_bytes:
            raise InteropError(f"tensor {name[:40]!r} of shape {tuple(tensor.shape)} is larger than the file")
    return value


def _unwrap(value: object) -> object:
    """The state dict in a checkpoint that contains other things as well."""
    if isinstance(value, dict):
        for name in _WRAPPERS:
            if isinstance(value.get(name), dict):
                return value[name]
    return value


def _describe(value: object) -> str:
    """What a file contains instead of tensors."""
    if isinstance(value, Record):
        return "a whole pickled object (save its state_dict() instead)"
    return show_names(value)


def _existing(path: Path) -> Path | None:
    """The path, if there is a file."""
    return path if path.is_file() else None
