"""The JSON record beside a verb's files: what they were made from. It is there only while all of them are complete."""

import csv
import errno
import hashlib
import json
import logging
import pickle
import tokenize
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from cytosae_cache.errors import StoreBusyError
from cytosae_cache.storage.atomic import make_folder, remove_strays
from cytosae_cache.storage.disk import reading
from cytosae_cache.storage.file_set import is_half_named, replacing_set, undo_set
from cytosae_cache.storage.lock import locked
from cytosae_pipeline import __version__
from cytosae_pipeline.config import PassOptions, StatisticsConfig
from cytosae_pipeline.config.commands import command
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.statistics.inputs import Inputs

logger = logging.getLogger(__name__)

_Value = TypeVar("_Value")

_DIGESTS = "sha256"
"""Field of a record on disk: SHA-256 of each file beside it."""

_UNREADABLE = (
    OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError, RecursionError,
    OverflowError, SyntaxError, tokenize.TokenError,
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
    source = inputs.sae.source
    return {
        "verb": verb,
        "package_version": __version__,
        "sae_sha256": inputs.sae_sha256,
        "sae_activation": None if source is None else source.activation,
        "store_spec_hash": inputs.store.spec.hash,
        "store_list_digest": inputs.store.provenance.list_digest,
        "store_contents": inputs.store.contents,
        "dataset": inputs.store.provenance.dataset,
        "precision": config.precision,
        **more,
    }


def require_ours(folder: Path, names: Iterable[str], record: Mapping[str, Any], *, replace_foreign: bool) -> None:
    """Refuse to replace files that the verb did not write, and results beside those of another activation function.

    Args:
        folder: Folder of the verb's files, where published results may have been copied.
        names: Names of the verb's files.
        record: What the new files are made from, see `make_record`.
        replace_foreign: Allow it nevertheless.

    Raises:
        UserError: If there is such a file; the message names it.
    """
    verb = record["verb"]
    if replace_foreign:
        return
    _require_same_activation(folder, record)
    if has_record(folder, verb):
        return
    foreign = next((folder / name for name in names if (folder / name).exists()), None)
    if foreign is not None:
        raise UserError(
            f"'{foreign}' was not written by `cytosae-cache {verb}` (there is no {verb}.json beside it), so it is not "
            "replaced. Give another --vit_type or --root_dir, or --replace_foreign if it is not needed"
        )


def _require_same_activation(folder: Path, record: Mapping[str, Any]) -> None:
    """Refuse a folder with results, of any verb, of the same file under another stated activation function.

    Raises:
        UserError: If there are such results; the message names both.
    """
    for path in sorted(folder.glob("*.json")):
        before = _try_read(path)
        if before is None or before["sae_sha256"] == record["sae_sha256"]:
            continue
        there, now = before.get("sae_activation"), record["sae_activation"]
        is_known = "sae_activation" in before or now is None
        if not is_known or there != now:
            raise UserError(
                f"'{folder}' contains results of `{path.stem}` for {_describe_activation(there, is_known=is_known)}; "
                f"those for {_describe_activation(now)} do not belong beside them. Give another --vit_type or "
                "--root_dir, or --replace_foreign to replace them"
            )
        if path.stem == record["verb"]:
            logger.info(f"the results of `{path.stem}` in '{folder}' belong to another autoencoder: replacing them")


def _try_read(path: Path) -> dict[str, Any] | None:
    """A verb's record; None if the file is anything else."""
    try:
        record = json.loads(path.read_bytes())
    except _UNREADABLE:
        return None
    return record if isinstance(record, dict) and "sae_sha256" in record else None


def _describe_activation(activation: object, *, is_known: bool = True) -> str:
    """The options that state an activation function."""
    if not isinstance(activation, dict):
        return "an autoencoder without --sae_arch" if is_known else "another autoencoder or --sae_arch"
    names = {"sae_arch": "architecture", "sae_k": "k", "sae_threshold": "threshold"}
    return " ".join(f"--{name} {activation[key]}" for name, key in names.items() if activation.get(key) is not None)


@contextmanager
def lock_results(folder: Path, results: Mapping[str, Iterable[str]]) -> Iterator[None]:
    """Hold the exclusive right to write the results of verbs; what a killed process left half-written is undone.

    Args:
        folder: Folder of the results.
        results: Names of all files that a verb may write, beside its record.

    Raises:
        StoreBusyError: If another process computes them.
    """
    with ExitStack() as stack:
        for verb, names in sorted(results.items()):
            stack.enter_context(locked(folder / f"{verb}.lock", f"{folder / verb}.json"))
            undo_set([folder / name for name in (*names, f"{verb}.json")])
        yield


def tidy_results(folder: Path, results: Mapping[str, Iterable[str]]) -> None:
    """Remove what a killed process left beside complete results, as far as the folder can be written.

    Args:
        folder: Folder of the results.
        results: As for `lock_results`.
    """
    starts = tuple(name for verb, names in results.items() for name in (*names, f"{verb}."))
    kept = {name for verb, names in results.items() for name in (*names, f"{verb}.json")}
    if all(path.name in kept or not path.name.startswith(starts) for path in folder.iterdir()):
        return
    with suppress(OSError, StoreBusyError), lock_results(folder, results):
        for name in kept:
            remove_strays(folder / name)


@contextmanager
def replacing_results(folder: Path, names: Iterable[str], record: Mapping[str, Any]) -> Iterator[dict[str, Path]]:
    """Replace a verb's files together, its record included; until all are complete the old ones stay.

    Args:
        folder: Folder of the results, which is made.
        names: Names of the files.
        record: What they are made from; the digests of the files are added to it on disk.

    Yields:
        Temporary path of each file.
    """
    every = [*names, f"{record['verb']}.json"]
    make_folder(folder)
    with replacing_set([folder / name for name in every]) as places:
        yield dict(zip(every, places, strict=True))
        files = {name: _hash_file(place) for name, place in zip(every[:-1], places[:-1], strict=True)}
        places[-1].write_text(json.dumps({**record, _DIGESTS: files}, indent=1) + "\n")


def has_record(folder: Path, verb: str) -> bool:
    """Whether the verb wrote its files in a folder, or was killed while it did."""
    path = folder / f"{verb}.json"
    return path.exists() or is_half_named(path)


def read_record(folder: Path, verb: str) -> dict[str, Any]:
    """A verb's record, without the digests of its files.

    Raises:
        UnusableResultsError: If it is missing or damaged.
    """
    return {name: value for name, value in _read_whole_record(folder, verb).items() if name != _DIGESTS}


def require_unchanged(folder: Path, verb: str, names: Iterable[str]) -> None:
    """Compare a verb's files with the digests in its record, which older versions did not write.

    Args:
        folder: Folder of the results.
        verb: The verb.
        names: Names of the files, as far as they are there.

    Raises:
        UnusableResultsError: If a file is not the one that the verb wrote.
    """
    digests = _read_whole_record(folder, verb).get(_DIGESTS, {})
    if not isinstance(digests, dict):
        path = folder / f"{verb}.json"
        raise UnusableResultsError(f"'{path}' must name files and their digests, found {type(digests).__name__}", verb)
    for path in (folder / name for name in names if name in digests):
        if path.is_file() and read_result(path, _hash_file, verb) != digests[path.name]:
            raise UnusableResultsError(f"'{path}' was changed or damaged after it was written", verb)


def _read_whole_record(folder: Path, verb: str) -> dict[str, Any]:
    path = folder / f"{verb}.json"
    value = read_result(path, lambda path: json.loads(path.read_bytes()), verb)
    if not isinstance(value, dict):
        raise UnusableResultsError(f"'{path}' must be a JSON object, found {type(value).__name__}", verb)
    return value


def _hash_file(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_IDENTITIES = {
    "sae_sha256": "another autoencoder",
    "store_spec_hash": "another kind of activations",
    "store_list_digest": "another list of images",
    "store_contents": "a store with other contents, which was made again since",
}
"""What a difference in a field of the record means."""


def find_difference(record: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What results belong to, if that is not the autoencoder and the store of now; '' if it is.

    Args:
        record: The record of the results.
        now: The record that results of now would have, see `make_record`.
    """
    if "store_contents" not in record:
        return "an older version of cytosae-cache, which did not record the contents of the store"
    return next((text for name, text in _IDENTITIES.items() if record.get(name) != now[name]), "")


def read_result(path: Path, load: Callable[[Path], _Value], verb: str) -> _Value:
    """The contents of one of a verb's files.

    Raises:
        UnusableResultsError: If it is missing or damaged in any way.
        OSError: If the disk does not let it be read.
    """
    if not path.is_file():
        raise UnusableResultsError(f"'{path}' is missing", verb)
    try:
        with reading(path):
            return load(path)
    except _UNREADABLE as error:
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE):
            raise  # of the disk: what is in the file is not known
        raise UnusableResultsError(f"'{path}' cannot be read ({type(error).__name__}: {error})", verb) from error


def all_within(array: npt.NDArray[Any], low: float, high: float) -> bool:
    """Whether all numbers are finite and inside a closed range."""
    return bool(np.isfinite(array).all() and (array >= low).all() and (array <= high).all())
