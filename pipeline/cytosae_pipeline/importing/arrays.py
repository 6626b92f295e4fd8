"""Embeddings in files of plain arrays: .npy, .npz and .pt. Nothing in them is executed."""

import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from cytosae_pipeline.errors import UserError
from cytosae_pipeline.importing.part import Blocks, Part, as_rows, choose_key, is_float


def open_npy(path: Path, key: str | None) -> Part:
    """A .npy, read as a stream.

    Args:
        path: The file.
        key: Name of the array, if the user gave one.

    Raises:
        UserError: If it is no array of floating-point numbers, or a key was given.
    """
    with path.open("rb") as file:
        shape, dtype = _read_header(path, file)
    if key is not None or not is_float(dtype):
        raise UserError(f"'{path}' contains one array of {dtype}; expected floating-point numbers, and no --key")

    def read(n_at_once: int) -> Blocks:
        with path.open("rb") as file:
            _read_header(path, file)
            yield from _stream(path, file, as_rows(path, shape), dtype, n_at_once)

    return Part(path, as_rows(path, shape), read)


def open_npz(path: Path, key: str | None) -> Part:
    """One array of a .npz, read as a stream without unpacking the others.

    Args:
        path: The file.
        key: Name of the array, if the user gave one.

    Raises:
        UserError: If it is damaged, or does not contain one array that is meant.
    """
    headers: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as file:
                    headers[member.removesuffix(".npy")] = _read_header(path, file)
    except (zipfile.BadZipFile, RuntimeError) as error:
        raise UserError(f"'{path}' cannot be read as .npz: {error}") from error
    name = choose_key(path, {name: shape for name, (shape, dtype) in headers.items() if is_float(dtype)}, key)
    coords = next((headers[other][0] for other in ("coords", "coordinates") if other in headers), None)
    shape = as_rows(path, headers[name][0], coords[0] if coords else None)

    def read(n_at_once: int) -> Blocks:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
            _, dtype = _read_header(path, file)
            yield from _stream(path, file, shape, dtype, n_at_once)

    return Part(path, shape, read)


def open_pt(path: Path, key: str | None) -> Part:
    """A tensor in a .pt, alone or in a dict of tensors; mapped into memory where the file allows it.

    Args:
        path: The file.
        key: Name of the array, if the user gave one.

    Raises:
        UserError: If it contains anything but tensors and plain values, or not one tensor that is meant.
    """
    found = _load_pt(path)
    tensors = found if isinstance(found, dict) else {"": found}
    floats = {
        str(name): tensor
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.layout == torch.strided
    }
    if not floats:
        raise UserError(f"'{path}' must contain a tensor of floating-point numbers, found {type(found).__name__}")
    if isinstance(found, torch.Tensor):
        if key is not None:
            raise UserError(f"'{path}' contains one tensor: leave out --key")
        name = ""
    else:
        name = choose_key(path, {name: tuple(tensor.shape) for name, tensor in floats.items()}, key)
    shape = as_rows(path, tuple(floats[name].shape))

    def read(n_at_once: int) -> Blocks:
        loaded = _load_pt(path)
        tensor = (loaded[name] if isinstance(loaded, dict) else loaded).detach().reshape(shape)
        for start in range(0, shape[0], n_at_once):
            part = tensor[start : start + n_at_once]
            # numpy has no bfloat16, and every bfloat16 is a float32.
            yield (part.float() if part.dtype == torch.bfloat16 else part).numpy()

    return Part(path, shape, read)


def _load_pt(path: Path) -> Any:  # noqa: ANN401 - whatever the file contains
    """The contents of a .pt.

    Raises:
        UserError: If it contains anything but tensors and plain values, or is damaged.
    """
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written before torch 1.6
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged files
        first = str(error).splitlines()[0] if str(error) else ""
        raise UserError(f"'{path}' cannot be read ({type(error).__name__}: {first}). Expected tensors alone") from error


def _read_header(path: Path, file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of the array that a stream contains; the stream then stands at its numbers.

    Raises:
        UserError: If it is not an array, or one in Fortran order.
    """
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read(file)
    except (ValueError, OSError) as error:
        raise UserError(f"'{path}' is not an array of numpy: {error}") from error
    if is_fortran and len(shape) > 1:
        raise UserError(f"'{path}' is in Fortran order: save it with numpy.save(path, numpy.ascontiguousarray(array))")
    return shape, dtype


def _stream(path: Path, file: IO[bytes], shape: tuple[int, int, int], dtype: np.dtype[Any], n_at_once: int) -> Blocks:
    """The numbers of a stream in order.

    Raises:
        UserError: If the stream ends too soon.
    """
    n, *row = shape
    row_bytes = row[0] * row[1] * dtype.itemsize
    for start in range(0, n, n_at_once):
        n_rows = min(n_at_once, n - start)
        data = file.read(n_rows * row_bytes)
        if len(data) != n_rows * row_bytes:
            raise UserError(f"'{path}' ends before row {start + len(data) // row_bytes:,} of {n:,}: it was truncated")
        yield np.frombuffer(data, dtype=dtype).reshape(n_rows, *row)
