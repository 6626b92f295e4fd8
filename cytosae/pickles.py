"""The one reader of torch's pickles: looked through before torch's own loader, which would allocate what they ask for.

`torch.load(weights_only=True)` runs a pickle with a list of allowed names. Some of them take memory by a number alone:
170 bytes can ask for `bytearray(6 << 30)`. Here the operations are followed first, without running any.
"""

import pickle
import pickletools
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

_MAX_PICKLE_BYTES = 1 << 26
_PIECE_BYTES = 1 << 20
_LEGACY_PICKLES = 5
"""Pickles at the start of a file of torch before 1.6: magic number, protocol, system, contents, order of the memory."""

_CALLED = frozenset(
    {
        ("collections", "OrderedDict"), ("collections", "Counter"), ("builtins", "set"), ("builtins", "complex"),
        ("torch", "Size"), ("torch", "device"), ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_tensor_v3"), ("torch._utils", "_rebuild_sparse_tensor"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch._utils", "_rebuild_parameter_with_state"), ("torch._tensor", "_rebuild_from_type_v2"),
        ("torch.serialization", "_get_layout"), ("torch.nn.parameter", "Parameter"),
    }
)  # fmt: skip
"""What a pickle may call of torch and of Python itself: none takes more memory than its arguments have."""

_NEW_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg"}
"""Modules that protocol 2 writes under their names in Python 2."""

_OURS_TO_JUDGE = ("torch", "builtins", "_codecs", "copyreg")
"""Modules of the names that torch allows; others are refused by torch."""

_ITEM_BYTES = {
    "Float": 4, "Double": 8, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1,
    "ComplexFloat": 8, "ComplexDouble": 16, "QInt8": 1, "QUInt8": 1, "QInt32": 4, "QUInt4x2": 1, "QUInt2x4": 1,
    "Untyped": 1,
}  # fmt: skip


class UnsafePickleError(pickle.UnpicklingError):
    """A pickle that torch never writes: it is damaged, or would take more memory than the file has bytes."""


class _Name(NamedTuple):
    """A name that a pickle refers to."""

    module: str
    name: str


_MARK, _OTHER = object(), object()


def load_torch(path: Path, *, device: torch.device | str = "cpu", mmap: bool = False) -> Any:  # noqa: ANN401 - tensors
    """`torch.load` with `weights_only`, after `check_pickle`.

    Args:
        path: The file.
        device: Device of the tensors.
        mmap: Whether tensors are read when they are first used; for files in torch's zip format.

    Raises:
        UnsafePickleError: As for `check_pickle`.
        Exception: What torch raises for damaged files.
    """
    check_pickle(path)
    return torch.load(path, map_location=device, weights_only=True, mmap=mmap)


def check_pickle(path: Path) -> None:
    """Refuse a file of torch whose pickle would take more memory than the file has bytes; nothing in it is run.

    Raises:
        UnsafePickleError: If it would, if it cannot be followed, or if a member fails its checksum.
        OSError: If the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) == b"PK\x03\x04":
                _check_zip(path)
            else:
                file.seek(0)
                _check_legacy(file, path.stat().st_size)
    except (UnsafePickleError, OSError):
        raise
    except Exception as error:  # a damaged pickle can make pickletools and zipfile raise anything
        raise UnsafePickleError(f"the pickle is damaged: {type(error).__name__}: {error}") from error


def check_members(archive: zipfile.ZipFile, n_bytes: int) -> None:
    """Refuse an archive that unpacks to more than its size.

    Args:
        archive: The open archive.
        n_bytes: Size of its file.

    Raises:
        UnsafePickleError: If a member is compressed, or the members claim more bytes than the file has.
    """
    members = archive.infolist()
    if any(info.compress_type != zipfile.ZIP_STORED for info in members):
        raise UnsafePickleError("it is compressed, which torch never does")
    claimed = sum(info.file_size for info in members)
    if claimed > n_bytes:
        raise UnsafePickleError(f"its members claim {claimed} bytes, it has {n_bytes}")


def _check_zip(path: Path) -> None:
    """A file in torch's zip format: its members are stored as they are, and their pickle refers to those alone."""
    with zipfile.ZipFile(path) as archive:
        check_members(archive, path.stat().st_size)
        _ignore_missing_checksums(archive)
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        for name in sizes:
            if name.endswith(".pkl"):
                if sizes[name] > _MAX_PICKLE_BYTES:
                    raise UnsafePickleError(f"{name!r} has {sizes[name]:,} bytes, more than a pickle of tensors has")
                _follow(archive.read(name), partial(_member_size, sizes, name.rpartition("/")[0]))
        _check_checksums(archive)


def _check_checksums(archive: zipfile.ZipFile) -> None:
    """Compare every member with its checksum: torch's own reader does not, so damaged weights would go unnoticed."""
    for info in archive.infolist():
        with archive.open(info) as member:  # zipfile compares when it comes to the end
            while member.read(_PIECE_BYTES):
                pass


def _ignore_missing_checksums(archive: zipfile.ZipFile) -> None:
    """Let files of `torch.serialization.set_crc32_options(False)` pass: zeros are in place of all their checksums."""
    if not any(info.CRC for info in archive.infolist()):
        for info in archive.infolist():
            info.CRC = None  # type: ignore[assignment] # zipfile then compares nothing


def _member_size(sizes: dict[str, int], prefix: str, key: str) -> int:
    """Bytes of the member with a tensor's memory; 0 if there is none."""
    return sizes.get(f"{prefix}/data/{key}", 0)


def _check_legacy(file: BinaryIO, n_bytes: int) -> None:
    """A file of torch before 1.6: pickles, then the memory of all tensors."""
    for _ in range(_LEGACY_PICKLES):
        _follow(file, lambda key: n_bytes)


def _follow(data: bytes | BinaryIO, size_of: Callable[[str], int]) -> None:
    """Follow a pickle's operations with their constants, tuples and names; everything else is one opaque value.

    Args:
        data: The pickle.
        size_of: Bytes that the file has for a tensor's memory, by its key.
    """
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    for operation, argument, _ in pickletools.genops(data):
        name = operation.name
        if name == "GLOBAL":
            module, _, attribute = str(argument).partition(" ")
            stack.append(_Name(_NEW_NAMES.get(module, module), attribute))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_Name(_NEW_NAMES.get(str(module), str(module)), str(attribute)))
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "TUPLE":
            stack.append(tuple(_pop_to_mark(stack)))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            n = int(name[-1])
            stack[-n:] = [tuple(stack[-n:])]
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, called = stack.pop(), stack.pop()
            _check_call(called, arguments)
            stack.append(_OTHER)
        elif name in ("INST", "OBJ", "NEWOBJ_EX", "PERSID", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"):
            raise UnsafePickleError(f"it uses {name}, which torch never does")
        elif name == "BINPERSID":
            _check_memory(stack.pop(), size_of)
            stack.append(_OTHER)
        else:
            _apply(stack, operation, argument)


def _apply(stack: list[Any], operation: Any, argument: object) -> None:  # noqa: ANN401 - of pickletools
    """The effect of any other operation: what it takes from the stack, and what it puts there."""
    before = operation.stack_before
    if pickletools.markobject in before:
        _pop_to_mark(stack)
        before = before[: before.index(pickletools.markobject)]
    if len(before) > len(stack):
        raise UnsafePickleError("the pickle is damaged: it takes more values than there are")
    del stack[len(stack) - len(before) :]
    is_constant = not before and isinstance(argument, int | str) and not isinstance(argument, bool)
    stack.extend([argument if is_constant else _OTHER] * len(operation.stack_after))


def _pop_to_mark(stack: list[Any]) -> list[Any]:
    """The values above the last mark; the mark is removed, too."""
    items = []
    while (item := stack.pop()) is not _MARK:
        items.append(item)
    return items[::-1]


def _check_call(called: object, arguments: object) -> None:
    """Refuse to call what could take memory by a number alone."""
    if not isinstance(called, _Name):
        raise UnsafePickleError("it calls a value that is no name")
    if called == ("_codecs", "encode"):
        # Other encodings multiply the length, or import modules.
        if isinstance(arguments, tuple) and len(arguments) == 2 and arguments[1] in ("latin1", "latin-1"):
            return
    elif called in _CALLED or called.module.partition(".")[0] not in _OURS_TO_JUDGE:
        return
    raise UnsafePickleError(f"GLOBAL {called.module}.{called.name} is called, which could take any amount of memory")


def _check_memory(pid: object, size_of: Callable[[str], int]) -> None:
    """Refuse memory of a tensor that is larger than what the file has for it."""
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
        raise UnsafePickleError("it refers to a kind of memory that torch does not write")
    kind, key, count = pid[1], pid[2], pid[4]
    name = kind.name.removesuffix("Storage") if isinstance(kind, _Name) else ""
    item_bytes = _ITEM_BYTES.get(name)
    if item_bytes is None and isinstance(kind, _Name) and isinstance(dtype := vars(torch).get(kind.name), torch.dtype):
        item_bytes = dtype.itemsize
    if item_bytes is None or not isinstance(key, str) or type(count) is not int or count < 0:
        raise UnsafePickleError("it refers to a kind of memory that torch does not write")
    if count * item_bytes > size_of(key):
        raise UnsafePickleError(
            f"a tensor's memory of {count * item_bytes:,} bytes is claimed, the file has {size_of(key):,} for it"
        )
