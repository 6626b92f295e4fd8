"""Reads torch checkpoints that contain pickled objects, without executing anything in them.

The reference saves its config object inside the checkpoint. Unpickling it would import and run any code that the file
names. Here every name outside a short list becomes an inert record that only keeps the stored values.
"""

import collections
import io
import itertools
import math
import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cytosae.pickles import UnsafePickleError, check_members

_MAX_PICKLE_BYTES = 1 << 22
_MAX_NUMBER = 1 << 63
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
    """The file is not a torch checkpoint, or has a structure that torch never writes."""


class Record:
    """Replaces an object of a class that is not on the list: keeps arguments and state, does nothing."""

    # On the class: a pickle may create the object without calling `__init__` and without setting a state.
    arguments: tuple[object, ...] = ()
    state: object = None

    def __init__(self, *arguments: object, **named: object) -> None:
        self.arguments = arguments
        self.state = named

    def __setstate__(self, state: object) -> None:
        """Keep the state."""
        self.state = state

    def __call__(self, *arguments: object, **named: object) -> "Record":
        """Keep the arguments instead of calling anything."""
        return Record(*arguments, **named)


class _OpaqueTensor:
    """A tensor that the pickle cannot access.

    A pickle may call some methods of the objects that it creates: `__setstate__`, `__setitem__`, `add`, `append`. With
    those of a tensor it could allocate any amount of memory.
    """

    __slots__ = ("tensor",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __setstate__(self, state: object) -> None:
        """Refuse: torch never writes this."""
        raise RestrictedPickleError("it changes a tensor after creating it")


def check_archive(path: Path) -> None:
    """Refuse an archive that unpacks to more than its size, which torch would do. Other files are accepted.

    Raises:
        RestrictedPickleError: If a member is compressed, or the members claim more bytes than the file has.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            check_members(archive, path.stat().st_size)
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError):
        return
    except UnsafePickleError as error:
        raise RestrictedPickleError(f"'{path}' cannot be read: {error}") from error


def read_restricted(path: Path) -> Any:  # noqa: ANN401 - any contents
    """The contents of a checkpoint in torch's zip format: plain values, tensors, and inert records for the rest.

    Tensors that are values of (nested) dicts are returned as tensors, others as placeholders.

    Args:
        path: The file.

    Raises:
        RestrictedPickleError: If the file is damaged, too large, compressed, or refers outside itself.
    """
    try:
        check_archive(path)
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(names) != 1:
                raise RestrictedPickleError(f"it contains {len(names)} pickles; a torch checkpoint contains one")
            prefix = names[0].removesuffix("data.pkl")
            data = _read_member(archive, names[0], _MAX_PICKLE_BYTES)
            if (
                f"{prefix}byteorder" in archive.namelist()
                and _read_member(archive, f"{prefix}byteorder", 16) != b"little"
            ):
                raise RestrictedPickleError("it was written on a big-endian machine")
            _check_memo(data)
            return _release(_RestrictedUnpickler(data, archive, prefix).load())
    except RestrictedPickleError as error:
        text = str(error)
        raise RestrictedPickleError(text if str(path) in text else f"'{path}' cannot be read: {text}") from error
    except zipfile.BadZipFile as error:
        raise RestrictedPickleError(
            f"'{path}' is not a torch checkpoint in zip format (torch 1.6 or later), or is damaged: {error}"
        ) from error
    except Exception as error:  # a crafted pickle can make the unpickler raise anything
        raise RestrictedPickleError(f"'{path}' cannot be read: {type(error).__name__}: {error}") from error


def to_plain(value: object) -> Any:  # noqa: ANN401 - JSON values
    """JSON values for the contents of a pickle; values without a JSON form become text, at least their type's name.

    Raises:
        RestrictedPickleError: If the value is nested too deeply or contains too many values.
    """
    return _to_plain(value, 0, itertools.count())


def _to_plain(value: object, depth: int, counter: Iterator[int]) -> Any:  # noqa: ANN401 - JSON values
    """`to_plain` at a depth. A few bytes can refer to one list twice at every depth, hence the counter."""
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
            return {str(_to_plain(name, depth, counter)): _to_plain(item, depth + 1, counter) for name, item in named}
        case list() | tuple():
            return [_to_plain(item, depth + 1, counter) for item in value]
        case Record(state=None, arguments=()):
            return {}
        case Record():
            state = value.state or (value.arguments[0] if len(value.arguments) == 1 else list(value.arguments))
            return _to_plain(state, depth + 1, counter)
        case _OpaqueTensor():
            return "<Tensor>"
    return f"<{type(value).__name__}>"


class _RestrictedUnpickler(pickle.Unpickler):
    """An unpickler that resolves every global itself."""

    def __init__(self, data: bytes, archive: zipfile.ZipFile, prefix: str) -> None:
        super().__init__(io.BytesIO(data))
        self._archive, self._prefix = archive, prefix
        self._storages: dict[str, _OpaqueTensor] = {}

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
        """Resolve a global of the pickle; nothing is ever imported."""
        # A new function each time: a pickle may set attributes of what it gets, `__defaults__` among them. `Record`
        # prevents that with its `__setstate__`.
        match module, name:
            case "collections", "OrderedDict":
                return collections.OrderedDict
            case "torch._utils", "_rebuild_tensor_v2":
                return lambda *arguments: _rebuild_tensor(*arguments)
            case "torch._utils", "_rebuild_parameter":
                return lambda data, *_: data
            case "torch", storage if storage in _STORAGES:
                return _STORAGES[storage]
            # Not getattr: torch imports some of its modules on attribute access.
            case "torch", dtype if isinstance(vars(torch).get(dtype), torch.dtype):
                return vars(torch)[dtype]
        return Record

    def persistent_load(self, pid: object) -> _OpaqueTensor:
        """A tensor's memory, from its member of the archive."""
        match pid:
            case ("storage", torch.dtype() as dtype, str() as key, str(), int() as count) if count >= 0:
                pass
            case _:
                # Without the value: a few bytes can nest a tuple so deeply that its text never ends.
                raise RestrictedPickleError("it refers to a kind of memory that torch does not write")
        if key not in self._storages:
            n_bytes = count * dtype.itemsize
            data = _read_member(self._archive, f"{self._prefix}data/{key}", n_bytes)
            if len(data) != n_bytes:
                raise RestrictedPickleError(f"memory {key!r} has {len(data)} bytes, expected {n_bytes}")
            tensor = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
            self._storages[key] = _OpaqueTensor(tensor)
        return self._storages[key]


def _rebuild_tensor(
    memory: object,
    offset: Any,  # noqa: ANN401 - checked below
    size: object,
    stride: object,
    *_: object,
) -> _OpaqueTensor:
    """A tensor over its memory, with checked bounds. A view: copies of one memory could exhaust any machine."""
    if not isinstance(memory, _OpaqueTensor) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise RestrictedPickleError("it builds a tensor from something other than memory, size and stride")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or any(type(n) is not int or not 0 <= n < _MAX_NUMBER for n in numbers):
        raise RestrictedPickleError("a tensor's offset, size or stride is invalid")
    storage = memory.tensor
    if math.prod(size) > storage.numel():
        # With a stride of 0, one number would become a copy of any size.
        raise RestrictedPickleError(f"a tensor of size {size} over a memory of {storage.numel()} numbers")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if 0 not in size and last >= storage.numel():
        raise RestrictedPickleError(f"a tensor of size {size} reaches beyond its memory of {storage.numel()} numbers")
    return _OpaqueTensor(torch.as_strided(storage, size, stride, offset))


def _release(value: object) -> object:
    """Replace opaque tensors in dicts by the tensors, in place."""
    if isinstance(value, _OpaqueTensor):
        return value.tensor
    pending, seen = [value], set[int]()
    while pending:
        item = pending.pop()
        if not isinstance(item, dict) or id(item) in seen:
            continue
        seen.add(id(item))
        for name, inner in item.items():
            if isinstance(inner, _OpaqueTensor):
                item[name] = inner.tensor
            else:
                pending.append(inner)
    return value


def _check_memo(data: bytes) -> None:
    """Refuse a pickle with a memo index beyond its length: the unpickler allocates a table up to the largest index."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name.endswith("PUT") and argument is not None and argument > len(data):
            raise RestrictedPickleError(f"its {len(data)} bytes claim to contain {argument} values")


def _read_member(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """A member of the archive, which must be uncompressed, as torch writes it, and not longer than the limit."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > limit:
        raise RestrictedPickleError(f"member {name!r} is compressed or has {info.file_size} bytes, more than {limit}")
    return archive.read(info)
