"""Reading a torch checkpoint that pickled foreign objects, without running anything in it.

The reference saves its config object inside the checkpoint. Unpickling that would import and run whatever the file
names; here every name outside a short list becomes an inert record that only keeps what was stored in it.
"""

import collections
import io
import itertools
import math
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_MAX_PICKLE_BYTES = 1 << 26
_MAX_DEPTH = 50
_MAX_VALUES = 100_000

_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class RestrictedPickleError(ValueError):
    """The file is no torch checkpoint, or is put together in a way that no honest one is."""


class Record:
    """Stands for an object of a class that is not on the list: keeps arguments and state, does nothing."""

    # On the class: a pickle may make the object without calling `__init__`, and give it no state.
    arguments: tuple[object, ...] = ()
    state: object = None

    def __init__(self, *arguments: object, **named: object) -> None:
        self.arguments = arguments
        self.state = named

    def __setstate__(self, state: object) -> None:
        """Keep the state."""
        self.state = state

    def __call__(self, *arguments: object, **named: object) -> "Record":
        """Keep the arguments of a call that is not made."""
        return Record(*arguments, **named)


def read_restricted(path: Path) -> Any:  # noqa: ANN401 - whatever the file holds
    """Everything in a checkpoint of torch's zip format: plain values, tensors, and inert records for the rest.

    Args:
        path: The file.

    Raises:
        RestrictedPickleError: If the file is damaged, too large, compressed, or refers outside itself.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(names) != 1:
                raise RestrictedPickleError(f"it holds {len(names)} pickles where a torch checkpoint holds one")
            prefix = names[0].removesuffix("data.pkl")
            data = _read_member(archive, names[0], _MAX_PICKLE_BYTES)
            if (
                f"{prefix}byteorder" in archive.namelist()
                and _read_member(archive, f"{prefix}byteorder", 16) != b"little"
            ):
                raise RestrictedPickleError("it was written on a big-endian machine")
            return _Reader(data, archive, prefix).load()
    except RestrictedPickleError as error:
        raise RestrictedPickleError(f"'{path}' cannot be read: {error}") from error
    except zipfile.BadZipFile as error:
        raise RestrictedPickleError(
            f"'{path}' is no torch checkpoint of the zip format (torch 1.6 or later)"
        ) from error
    except Exception as error:  # a crafted pickle can make the machine raise anything
        raise RestrictedPickleError(f"'{path}' cannot be read: {type(error).__name__}: {error}") from error


def to_plain(value: object) -> Any:  # noqa: ANN401 - JSON values
    """JSON values for what a pickle held; what has none becomes text, the name of its type at the least.

    Raises:
        RestrictedPickleError: If it is nested too deeply, or has too many values.
    """
    return _to_plain(value, 0, itertools.count())


def _to_plain(value: object, depth: int, counter: Iterator[int]) -> Any:  # noqa: ANN401 - JSON values
    """`to_plain` at a depth. A few bytes can name one list twice at every depth, hence the counter."""
    if depth > _MAX_DEPTH:
        raise RestrictedPickleError("the config is nested too deeply")
    if next(counter) > _MAX_VALUES:
        raise RestrictedPickleError(f"the config has more than {_MAX_VALUES:,} values")
    match value:
        case float() if not math.isfinite(value):
            return repr(value)
        case int() if not -(1 << 63) <= value < 1 << 63:
            return f"<integer of {value.bit_length()} bits>"
        case None | bool() | int() | float() | str():
            return value
        case torch.dtype() | torch.device():
            return str(value)
        case dict():
            named = ((name, item) for name, item in value.items() if isinstance(name, str | int))
            return {str(name): _to_plain(item, depth + 1, counter) for name, item in named}
        case list() | tuple():
            return [_to_plain(item, depth + 1, counter) for item in value]
        case Record(state=None, arguments=()):
            return {}
        case Record():
            state = value.state or (value.arguments[0] if len(value.arguments) == 1 else list(value.arguments))
            return _to_plain(state, depth + 1, counter)
    return f"<{type(value).__name__}>"


class _Reader(pickle.Unpickler):
    """The unpickler's machine with every global under control."""

    def __init__(self, data: bytes, archive: zipfile.ZipFile, prefix: str) -> None:
        super().__init__(io.BytesIO(data))
        self._archive, self._prefix = archive, prefix
        self._storages: dict[str, torch.Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
        """What a global of the pickle stands for; nothing is ever imported."""
        match module, name:
            case "collections", "OrderedDict":
                return collections.OrderedDict
            case "torch._utils", "_rebuild_tensor_v2":
                return _rebuild_tensor
            case "torch._utils", "_rebuild_parameter":
                return _rebuild_parameter
            case "torch", "device":
                return Record
            case "torch", storage if storage in _STORAGES:
                return _STORAGES[storage]
            case "torch", dtype if isinstance(getattr(torch, dtype, None), torch.dtype):
                return getattr(torch, dtype)
        return type(name.rpartition(".")[2] or "Record", (Record,), {"__module__": "restricted"})

    def persistent_load(self, pid: object) -> torch.Tensor:
        """A tensor's memory, from its own member of the archive."""
        match pid:
            case ("storage", torch.dtype() as dtype, str() as key, str(), int() as count) if count >= 0:
                pass
            case _:
                raise RestrictedPickleError(f"unknown kind of stored memory: {str(pid)[:80]}")
        if key not in self._storages:
            n_bytes = count * dtype.itemsize
            data = _read_member(self._archive, f"{self._prefix}data/{key}", n_bytes)
            if len(data) != n_bytes:
                raise RestrictedPickleError(f"memory {key!r} has {len(data)} bytes, expected {n_bytes}")
            self._storages[key] = (
                torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
            )
        return self._storages[key]


def _rebuild_tensor(
    storage: torch.Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> torch.Tensor:
    """A tensor over its memory, its bounds checked."""
    numbers = (offset, *size, *stride)
    if (
        not isinstance(storage, torch.Tensor)
        or len(size) != len(stride)
        or any(type(n) is not int or n < 0 for n in numbers)
    ):
        raise RestrictedPickleError(f"a tensor of size {size}, stride {stride} makes no sense")
    if math.prod(size) > storage.numel():
        # A stride of 0 would make a copy of any size out of one number.
        raise RestrictedPickleError(f"a tensor of size {size} over a memory of {storage.numel()} numbers")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if 0 not in size and last >= storage.numel():
        raise RestrictedPickleError(f"a tensor of size {size} reaches beyond its memory of {storage.numel()} numbers")
    return torch.as_strided(storage, size, stride, offset).clone()


def _rebuild_parameter(data: torch.Tensor, *_: object) -> torch.Tensor:
    """A parameter is its tensor."""
    return data


def _read_member(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """A member of the archive, stored uncompressed as torch does and no longer than expected."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > limit:
        raise RestrictedPickleError(f"member {name!r} is compressed or has {info.file_size} bytes, more than {limit}")
    return archive.read(info)
