"""`export` of statistics: what an autoencoder found in a data set, for scanpy, spreadsheets and data frames."""

import importlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cytosae_cache.storage.file_set import replacing_set, undo_set
from cytosae_cache.storage.lock import locked
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.config import ExportConfig
from cytosae_pipeline.errors import UserError, install
from cytosae_pipeline.export import anndata_files, table_files
from cytosae_pipeline.export.table_files import ScoreWriter, TableWriter
from cytosae_pipeline.export.tables import Table, Tables, collect_tables, make_latent_table
from cytosae_pipeline.statistics.counts import Counts
from cytosae_pipeline.statistics.covariates import read_covariates
from cytosae_pipeline.statistics.groups import find_groups
from cytosae_pipeline.statistics.inputs import open_inputs
from cytosae_pipeline.statistics.notes import FILE_NAME as NOTES_NAME
from cytosae_pipeline.statistics.notes import Subject, read_notes
from cytosae_pipeline.statistics.published import find_published, read_published
from cytosae_pipeline.statistics.results import ensure_statistics
from cytosae_pipeline.statistics.scores import pass_scores
from cytosae_pipeline.statistics.subjects import find_subjects
from cytosae_pipeline.workspace.runs import resolve_sae
from cytosae_pipeline.workspace.targets import resolve_target

logger = logging.getLogger(__name__)

_NEEDED = {"anndata": ("anndata", "h5py", "pandas"), "parquet": ("pyarrow",), "csv": ()}
"""Packages of a format; the extra has the format's name."""


_ABOUT = "about"
"""Contents of the file that says what tables were made from; in anndata that is part of every file."""


@dataclass(frozen=True)
class TablesResult:
    """Result of an export of statistics."""

    folder: Path
    """Folder of the files."""
    files: list[Path]
    """The files."""
    format: str
    """Their format."""
    n_images: int
    """Readable images."""
    n_patients: int
    """Patients; 0 if no image has one, in which case no file of patients is written."""
    n_latents: int
    """Latents S."""


def export_tables(config: ExportConfig) -> TablesResult:
    """Write the statistics of an autoencoder on a data set as AnnData, CSV or Parquet.

    Files appear only once all are complete; the scores of images are written as they are computed. Existing results of
    `features` and `patients` are reused, and computed first where they are missing or of another autoencoder or store.

    Raises:
        ValueError: If an option or package is missing, a target exists already or is being written by another process,
            or the store does not fit.
        WriteError: If the disk is full, read-only or fails; what was there before is unchanged.
    """
    _check(config)
    config = resolve_sae(config)
    published = find_published(config)
    if published is not None:
        return _export_published(config, published)
    inputs = open_inputs(config)
    folder = config.out or inputs.folder
    has_patients = any(inputs.store.images.patient)
    if not has_patients:
        logger.info(f"no image of store '{inputs.store.path}' has a patient: no file of patients is written")
    names = ("latents", "patients", "images", _ABOUT) if has_patients else ("latents", "images", _ABOUT)
    with _reserved(config, folder, names) as paths:
        found = ensure_statistics(inputs, config, counts=["patient"] if has_patients else [])
        features, counts = found.features, found.counts.get("patient")
        assert features is not None
        notes = read_notes(
            inputs.folder / NOTES_NAME, inputs.n_latents, subject=Subject.of(inputs), keep=config.keep_notes
        )
        groups, known = _groups_of(config, inputs.store, counts), _known_of(config, inputs.store, counts)
        tables = collect_tables(inputs, features, counts, notes=notes, groups=groups, known=known)
        with (
            replacing_set([resolve_target(path) for path in paths.values()]) as temporaries,
            _open(config, dict(zip(paths, temporaries, strict=True)), tables) as writer,
        ):
            pass_scores(inputs, config, writer.append, what="export")
    n_patients = len(counts.names) if counts is not None else 0
    return TablesResult(
        folder, list(paths.values()), config.format, len(tables.images.row), n_patients, len(features.sparsity)
    )


def _export_published(config: ExportConfig, results: Path) -> TablesResult:
    """Write the table of latents of feature data that another program published.

    Raises:
        UserError: If the format has no table of latents alone.
    """
    if config.format == "anndata":
        raise UserError(
            f"'{results}' contains results of another program, which name neither images nor patients, as --format "
            "anndata needs them. Give --format csv or parquet for the latents, or another --vit_type to compute "
            "results of your own"
        )
    logger.info(
        f"'{results}' contains results of another program: they name neither images nor patients, so the latents alone "
        "are written"
    )
    features = read_published(results)
    folder = config.out or results
    notes = read_notes(results / NOTES_NAME, len(features.sparsity))
    table = table_files.make_numbered(make_latent_table(features, notes))
    with (
        _reserved(config, folder, ("latents",)) as paths,
        replacing_set([resolve_target(paths["latents"])]) as (path,),
        _open_table(config, path, table) as writer,
    ):
        writer.write(table)
    return TablesResult(folder, list(paths.values()), config.format, 0, 0, len(features.sparsity))


def _groups_of(config: ExportConfig, store: ActivationStore, counts: Counts | None) -> dict[str, str] | None:
    """Group of each patient by `--groups`; None if it was not given.

    Raises:
        UserError: If the store has no patients, or the file is not a table of their groups.
    """
    if config.groups is None:
        return None
    if counts is None:
        raise UserError(f"--groups '{config.groups}' cannot be used: no image of store '{store.path}' has a patient")
    found = find_groups(counts.names, store.images.take(store.valid_rows), config.groups)
    if found.gaps:
        logger.info(found.gaps)
    return {name: found.names[group] for name, group in zip(counts.names, found.of.tolist(), strict=True) if group >= 0}


def _known_of(config: ExportConfig, store: ActivationStore, counts: Counts | None) -> dict[str, npt.NDArray[Any]]:
    """What is known about each patient beside the group: columns of `--covariates`, and the person as `subject`.

    Raises:
        UserError: If the store has no patients, or the table does not fit them.
    """
    if counts is None:
        for name in ("covariates", "subject_column"):
            if getattr(config, name) is not None:
                raise UserError(
                    f"--{name} '{getattr(config, name)}' cannot be used: no image of store '{store.path}' has a patient"
                )
        return {}
    covariates = None if config.covariates is None else read_covariates(config.covariates, counts.names)
    subjects = find_subjects(counts.names, store, covariates, config.subject_column)
    known = {} if covariates is None else covariates.typed()
    if subjects is None:
        return known
    persons = np.array([subjects.names[at] for at in subjects.of.tolist()], dtype=np.dtypes.StringDType())
    return {"subject": persons} | {name: column for name, column in known.items() if name.casefold() != "subject"}


def _check(config: ExportConfig) -> None:
    """Raise for missing options and packages, before anything is read."""
    if config.dataset_name is None and config.store is None:
        raise UserError(
            f"--format {config.format} exports what an autoencoder found in a data set: name it with "
            "--dataset_name NAME or --store PATH"
        )
    for name in _NEEDED[config.format]:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"--format {config.format} needs {name}: {install(config.format)}") from error


@contextmanager
def _reserved(config: ExportConfig, folder: Path, names: Sequence[str]) -> Iterator[dict[str, Path]]:
    """The files to write, by their contents, while no other process may write them.

    Raises:
        UserError: If an existing file must not be replaced.
        StoreBusyError: If another process is writing into the folder.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out '{folder}' is a file; --format {config.format} writes several files into a folder")
    with locked(resolve_target(folder) / "export.lock", str(folder)):
        paths = _plan(config, folder, names)
        undo_set([resolve_target(path) for path in paths.values()])
        _require_free(config, paths.values())
        yield paths


def _plan(config: ExportConfig, folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """The files to write, by their contents; anndata's have latents as columns, not as a file."""
    if config.format == "anndata":
        return {name: folder / f"{name}.{config.anndata_as}" for name in names if name not in ("latents", _ABOUT)}
    # `features` and `patients` have an images.csv and a patients.csv of their own.
    kind = config.format
    return {
        name: folder / (f"table_{_ABOUT}_{kind}.json" if name == _ABOUT else f"table_{name}.{kind}") for name in names
    }


def _require_free(config: ExportConfig, paths: Iterable[Path]) -> None:
    """Refuse targets that must not be replaced.

    Raises:
        UserError: If one exists, unless `overwrite` allows it and the format writes such a thing.
    """
    for path in paths:
        if path.exists() and not config.overwrite:
            raise UserError(f"'{path}' exists already. Give another --out, or --overwrite")
        if path.exists() and not (_is_anndata_folder(path) if path.suffix == ".zarr" else path.is_file()):
            raise UserError(f"'{path}' is not what --format {config.format} writes. Give another --out")


def _is_anndata_folder(path: Path) -> bool:
    """Whether a folder was written by an export and may be replaced, unlike for example an activation store."""
    try:
        attributes = json.loads((path / ".zattrs").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(attributes, dict) and attributes.get("encoding-type") == "anndata"


@contextmanager
def _open(config: ExportConfig, places: dict[str, Path], tables: Tables) -> Iterator[ScoreWriter]:
    """Write everything except the scores of images, which the writer takes."""
    if config.format == "anndata":
        if "patients" in places:
            anndata_files.write_patients(places["patients"], config.anndata_as, tables)
        with anndata_files.open_images(places["images"], config.anndata_as, tables) as scores:
            yield scores
        return
    places[_ABOUT].write_text(json.dumps(tables.provenance, indent=1, default=np.ndarray.tolist) + "\n")
    whole = {"latents": table_files.make_numbered(tables.latents)}
    if "patients" in places:
        whole["patients"] = table_files.make_wide_table(tables)
    for name, table in whole.items():
        with _open_table(config, places[name], table) as writer:
            writer.write(table)
    with _open_table(config, places["images"], table_files.image_example(tables.images)) as writer:
        yield table_files.LongScores(tables.images, writer)


@contextmanager
def _open_table(config: ExportConfig, path: Path, example: Table) -> Iterator[TableWriter]:
    """A new file of the format with an example's columns."""
    if config.format == "csv":
        with table_files.open_csv(path, list(example)) as lines:
            yield lines
    else:
        with table_files.open_parquet(path, example) as groups:
            yield groups
