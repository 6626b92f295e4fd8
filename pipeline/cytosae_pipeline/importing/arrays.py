"""Embeddings in files of plain arrays: .npy, .npz and .pt. Nothing in them is executed."""

import os
import pickle
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from cytosae.pickles import load_torch
from cytosae_pipeline.config.imports import ImportConfig
from cytosae_pipeline.errors import UserError, join_few
from cytosae_pipeline.importing.part import COORDS, Array, Blocks, Part, as_rows, choose_key, is_float, reading


def open_npy(path: Path, config: ImportConfig) -> Part:
    """A .npy, read as a stream.

    Args:
        path: The file.
        config: Says what several tokens are.

    Raises:
        UserError: If it is no array of floating-point numbers, a key was given, or it has another length than its
            header says.
    """
    with path.open("rb") as file:
        array = _read_header(path, file)
        n_bytes = os.fstat(file.fileno()).st_size - file.tell()
    if config.key is not None or not is_float(array.dtype):
        raise UserError(f"'{path}' contains one array of {array.dtype}; expected floating-point numbers, and no --key")
    shape = as_rows(path, array.shape, config.grid)
    expected = shape[0] * shape[1] * shape[2] * array.dtype.itemsize
    if n_bytes < expected:
        n_rows = n_bytes * shape[0] // expected
        raise UserError(f"'{path}' ends before row {n_rows:,} of {shape[0]:,}: it was truncated")
    if n_bytes > expected:
        raise UserError(
            f"'{path}' goes on for {n_bytes - expected:,} bytes after its array of shape {array.shape}: was it saved "
            "to twice? Save one array in one file"
        )

    def read(n_at_once: int) -> Blocks:
        with path.open("rb") as file:
            _read_header(path, file)
            yield from _stream(path, file, shape, array.dtype, n_at_once)

    return Part(path, shape, read, is_vector=len(array.shape) == 1)


def open_npz(path: Path, config: ImportConfig) -> Part:
    """One array of a .npz, read as a stream without unpacking the others.

    Args:
        path: The file.
        config: Names the array.

    Raises:
        UserError: If it is damaged, or does not contain one array that is meant.
    """
    arrays: dict[str, Array] = {}
    with reading(path, ".npz"), zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            if member.endswith(".npy"):
                with archive.open(member) as file:
                    arrays[member.removesuffix(".npy")] = _read_header(path, file)
    floats = {name: array for name, array in arrays.items() if is_float(array.dtype)}
    name = choose_key(path, floats, arrays, config.key)
    array = arrays[name]
    coords = next((arrays[other].shape for other in COORDS if other in arrays), ())
    shape = as_rows(path, array.shape, config.grid, coords[-2] if len(coords) > 1 else None)

    def read(n_at_once: int) -> Blocks:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
            _read_header(path, file)
            yield from _stream(path, file, shape, array.dtype, n_at_once)

    return Part(path, shape, read, is_vector=len(array.shape) == 1)


def open_pt(path: Path, config: ImportConfig) -> Part:
    """A tensor in a .pt, alone or in a dict of tensors; mapped into memory where the file allows it.

    Args:
        path: The file.
        config: Names the tensor.

    Raises:
        UserError: If it contains anything but tensors and plain values, not one tensor that is meant, or a tensor that
            is larger than the file.
    """
    found = _load_pt(path)
    if isinstance(found, torch.Tensor):
        if config.key is not None:
            raise UserError(f"'{path}' contains one tensor: leave out --key")
        found = {"": found}
    elif not isinstance(found, dict) or not any(isinstance(item, torch.Tensor) for item in found.values()):
        raise UserError(
            f"'{path}' must contain a tensor of floating-point numbers or a dict of tensors, found "
            f"{_describe(found)}. Save one tensor with a row each: torch.save(torch.stack(tensors), path)"
        )
    tensors = {str(name): tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}
    floats = {
        name: Array(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items() if _is_strided_float(tensor)
    }
    others = {name: Array(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    name = "" if list(floats) == [""] else choose_key(path, floats, others, config.key)
    n_bytes, most = tensors[name].numel() * tensors[name].element_size(), path.stat().st_size
    if n_bytes > most:
        raise UserError(
            f"the tensor in '{path}' repeats its numbers: its shape {floats[name].shape} takes {n_bytes:,} bytes, the "
            f"file has {most:,}. Save tensor.contiguous() if that is meant"
        )
    coords = next((tensors[other].shape for other in COORDS if other in tensors), ())
    shape = as_rows(path, floats[name].shape, config.grid, coords[-2] if len(coords) > 1 else None)

    def read(n_at_once: int) -> Blocks:
        loaded = _load_pt(path)
        if isinstance(loaded, dict):
            loaded = next(tensor for key, tensor in loaded.items() if str(key) == name)
        rows = loaded.detach().reshape(shape)  # a view, also where the tensor is transposed
        for start in range(0, shape[0], n_at_once):
            part = rows[start : start + n_at_once].contiguous()
            # numpy has no bfloat16, and every bfloat16 is a float32.
            yield (part.float() if part.dtype == torch.bfloat16 else part).numpy()

    return Part(path, shape, read, is_vector=len(floats[name].shape) == 1)


def _is_strided_float(tensor: torch.Tensor) -> bool:
    """Whether a tensor can be embeddings: of floating-point numbers, and neither sparse nor without data."""
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return tensor.dtype in kinds and tensor.layout == torch.strided and not tensor.is_meta


def _describe(found: object) -> str:
    """What a .pt contains instead of tensors."""
    inside = found.values() if isinstance(found, dict) else found if isinstance(found, list | tuple) else ()
    kinds = sorted({type(item).__name__ for item in inside})
    return type(found).__name__ + (f" of {join_few(kinds, 3)}" if kinds else "")


def _load_pt(path: Path) -> Any:  # noqa: ANN401 - whatever the file contains
    """The contents of a .pt.

    Raises:
        UserError: If it contains anything but tensors and plain values, or is damaged.
    """
    with reading(path, ".pt"):
        try:
            try:
                return load_torch(path, mmap=True)
            except RuntimeError:  # written before torch 1.6
                return load_torch(path)
        except pickle.UnpicklingError as error:
            raise UserError(
                f"'{path}' is damaged or contains Python objects, which are never executed. Expected tensors alone: "
                "torch.save(tensor, path)"
            ) from error


def _read_header(path: Path, file: IO[bytes]) -> Array:
    """Shape and type of the array that a stream contains; the stream then stands at its numbers.

    Raises:
        UserError: If it is not an array, or one in Fortran order.
    """
    with reading(path, "an array of numpy"):
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read(file)
    if is_fortran and len(shape) > 1:
        raise UserError(f"'{path}' is in Fortran order: save it with numpy.save(path, numpy.ascontiguousarray(array))")
    return Array(shape, dtype)


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
