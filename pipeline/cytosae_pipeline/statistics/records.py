"""The JSON record beside a verb's files: what they were made from. It is there only while all of them are complete."""

import csv
import json
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from cytosae_cache.storage.atomic import write_file
from cytosae_pipeline import __version__
from cytosae_pipeline.config import PassOptions, StatisticsConfig
from cytosae_pipeline.config.commands import command
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.statistics.inputs import Inputs

_Value = TypeVar("_Value")

_UNREADABLE = (
    OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError, RecursionError,
    csv.Error, pickle.UnpicklingError, zipfile.BadZipFile,
)  # fmt: skip
"""What damaged files raise in json, csv, numpy and torch."""


class UnusableResultsError(UserError):
    """A verb's files are missing, damaged or do not fit together.

    Args:
        problem: What was found.
        verb: The verb that writes the files.
    """

    def __init__(self, problem: str, verb: str) -> None:
        super().__init__(f"{problem}. Compute them again with `cytosae-cache {verb}`")
        self.problem, self.verb = problem, verb


@contextmanager
def with_remedy(config: StatisticsConfig) -> Iterator[None]:
    """Complete the message of unusable results by the command that computes them again.

    Raises:
        UserError: In place of every `UnusableResultsError`.
    """
    try:
        yield
    except UnusableResultsError as error:
        raise UserError(f"{error.problem}. Compute them again with: {command(error.verb, config)}") from error


def make_record(inputs: Inputs, config: PassOptions, verb: str, **more: Any) -> dict[str, Any]:  # noqa: ANN401
    """What a verb's files are made from, as JSON values."""
    return {
        "verb": verb,
        "package_version": __version__,
        "sae_sha256": inputs.sae_sha256,
        "store_spec_hash": inputs.store.spec.hash,
        "store_list_digest": inputs.store.provenance.list_digest,
        "dataset": inputs.store.provenance.dataset,
        "precision": config.precision,
        **more,
    }


def require_ours(folder: Path, verb: str, names: Iterable[str], *, replace_foreign: bool) -> None:
    """Refuse to replace files that the verb did not write, such as published results that were copied here.

    Args:
        folder: Folder of the verb's files.
        verb: The verb.
        names: Names of its files.
        replace_foreign: Allow it nevertheless.

    Raises:
        UserError: If there is such a file; the message names it.
    """
    if replace_foreign or has_record(folder, verb):
        return
    foreign = next((folder / name for name in names if (folder / name).exists()), None)
    if foreign is not None:
        raise UserError(
            f"'{foreign}' was not written by `cytosae-cache {verb}` (there is no {verb}.json beside it), so it is not "
            "replaced. Give another --vit_type or --root_dir, or --replace_foreign if it is not needed"
        )


def has_record(folder: Path, verb: str) -> bool:
    """Whether the verb wrote its files in a folder, or had begun to."""
    return any((folder / name).exists() for name in (f"{verb}.json", _unfinished(verb)))


def withdraw_record(folder: Path, verb: str) -> None:
    """Remove a verb's record before its files change; a mark shows that what lies there meanwhile is the verb's."""
    write_file(folder / _unfinished(verb), b"")
    (folder / f"{verb}.json").unlink(missing_ok=True)


def write_record(folder: Path, record: Mapping[str, Any]) -> Path:
    """Write a verb's record once its files are complete."""
    path = folder / f"{record['verb']}.json"
    write_file(path, (json.dumps(record, indent=1) + "\n").encode())
    (folder / _unfinished(record["verb"])).unlink(missing_ok=True)
    return path


def _unfinished(verb: str) -> str:
    """File that is there while a verb's files are incomplete."""
    return f"{verb}.unfinished"


def read_record(folder: Path, verb: str) -> dict[str, Any]:
    """A verb's record.

    Raises:
        UnusableResultsError: If it is missing or damaged.
    """
    path = folder / f"{verb}.json"
    value = read_result(path, lambda path: json.loads(path.read_bytes()), verb)
    if not isinstance(value, dict):
        raise UnusableResultsError(f"'{path}' must be a JSON object, found {type(value).__name__}", verb)
    return value


def is_current(inputs: Inputs, record: Mapping[str, Any]) -> bool:
    """Whether a record is of this autoencoder and this store."""
    now = {
        "sae_sha256": inputs.sae_sha256,
        "store_spec_hash": inputs.store.spec.hash,
        "store_list_digest": inputs.store.provenance.list_digest,
    }
    return all(record.get(name) == value for name, value in now.items())


def read_result(path: Path, load: Callable[[Path], _Value], verb: str) -> _Value:
    """The contents of one of a verb's files.

    Raises:
        UnusableResultsError: If it is missing or damaged in any way.
    """
    if not path.is_file():
        raise UnusableResultsError(f"'{path}' is missing", verb)
    try:
        return load(path)
    except _UNREADABLE as error:
        raise UnusableResultsError(f"'{path}' cannot be read ({type(error).__name__}: {error})", verb) from error


def all_within(array: npt.NDArray[Any], low: float, high: float) -> bool:
    """Whether all numbers are finite and inside a closed range."""
    return bool(np.isfinite(array).all() and (array >= low).all() and (array <= high).all())
