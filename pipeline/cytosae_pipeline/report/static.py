"""`report`: the page as a folder that opens from disk, without a server or a network."""

import itertools
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cytosae_cache.storage.atomic import make_folder, replacing_path
from cytosae_cache.storage.lock import locked
from cytosae_pipeline.config import ReportConfig
from cytosae_pipeline.errors import UserError, say_count
from cytosae_pipeline.images.image_list import ImageList
from cytosae_pipeline.images.listing import list_stored_images
from cytosae_pipeline.report.data.report_data import KEY_NAME, ReportData, make_latent_data, open_report_data
from cytosae_pipeline.report.figures.write import require_matplotlib, write_figures
from cytosae_pipeline.report.measures.extras import Measured, find_extras
from cytosae_pipeline.report.measures.measure import measure_all
from cytosae_pipeline.report.measures.value_correlations import FILE_NAME as VALUES_NAME
from cytosae_pipeline.report.measures.value_correlations import write_values
from cytosae_pipeline.report.records.audit import audit_cohort, audit_record
from cytosae_pipeline.report.records.cards import card_files
from cytosae_pipeline.report.records.cell_map import map_files, measure_map, require_umap
from cytosae_pipeline.report.records.choice import choose_latents, image_rows
from cytosae_pipeline.report.records.comparisons import (
    Comparisons,
    all_groups_record,
    compare_all,
    comparison_record,
    no_groups,
    plan_comparisons,
)
from cytosae_pipeline.report.records.effects import mean_effect_record, open_meter
from cytosae_pipeline.report.records.encoding import to_script
from cytosae_pipeline.report.records.group_tests import IncomparableError
from cytosae_pipeline.report.records.images import book_files, make_image_book
from cytosae_pipeline.report.records.latents import (
    TopMap,
    image_record,
    latent_records,
    measure_images,
    rows_of_latent,
)
from cytosae_pipeline.report.records.masking import measure_masking
from cytosae_pipeline.report.records.overview import overview_record
from cytosae_pipeline.report.records.page_files import read_page_files
from cytosae_pipeline.report.records.patients import patients_record
from cytosae_pipeline.report.records.published import published_latents, published_overview
from cytosae_pipeline.report.records.thumbnails import explain_no_pictures, write_thumbnails
from cytosae_pipeline.runtime.progress import Progress
from cytosae_pipeline.statistics.inputs import PlacedInputs
from cytosae_pipeline.statistics.notes import FILE_NAME as NOTES_NAME
from cytosae_pipeline.statistics.published import find_published, read_published
from cytosae_pipeline.statistics.results import Statistics
from cytosae_pipeline.workspace.runs import resolve_sae
from cytosae_pipeline.workspace.targets import resolve_target

logger = logging.getLogger(__name__)

MARK = "cytosae-report"
"""File that marks a folder as a report, which a newer report may replace."""


@dataclass(frozen=True)
class ReportResult:
    """What `report` wrote."""

    index: Path
    """The page."""
    n_latents: int
    """Latents with a page."""
    n_images: int
    """Images with a page."""
    n_without_picture: int
    """Those of them whose file is missing or has changed."""
    figures: list[Path]
    """Figures for papers."""
    key: Path | None
    """Key of the pseudonyms, stored outside the report."""
    classification: dict[str, Any] | None = None
    """How well groups of patients are predicted, as the page shows it; None if there are not enough."""


def write_report(
    config: ReportConfig, *, inputs: PlacedInputs | None = None, statistics: Statistics | None = None
) -> ReportResult:
    """Write the page atomically: an older one stays until the new one is complete.

    Args:
        config: Options.
        inputs: As for `open_report_data`.
        statistics: As for `open_report_data`.

    Raises:
        ValueError: If the autoencoder or store is missing, they do not fit, or an option does not fit them.
    """
    require_umap(config)
    if config.figures:
        require_matplotlib()
    config = resolve_sae(config)
    published = find_published(config) if inputs is None else None
    if published is not None:
        return _write_published(config, published)
    data = open_report_data(config, pseudonymous=config.pseudonymize, inputs=inputs, statistics=statistics)
    extras = find_extras(data)
    comparisons = _compare(data)
    latents, reason = choose_latents(data, comparisons.found)
    target = config.out or data.inputs.folder / "report"
    with _new_page(target) as folder:
        for name in ("data/images", "data/comparisons", "data/rows", "data/listings", "data/mapped", "thumbnails"):
            (folder / name).mkdir(parents=True)
        profiles, measured = measure_all(data, latents, extras)
        rows = image_rows(data, latents, measured.evidence)
        book = make_image_book(data)
        cell_map = measure_map(data, latents)
        mapped = map_files(data, cell_map) if cell_map is not None else ()
        for name, record in itertools.chain(book_files(book), card_files(data, data.numbers), mapped):
            _write_data(folder, name, record)
        maps = _write_images(folder, data, latents, rows, measured)
        records = latent_records(data, latents, profiles, maps, extras, measured)
        _write_latents(folder, data, latents, records, measured)
        classification = _write_patients(folder, data, latents, comparisons)
        images = list_stored_images(data.store, config)
        missing, messages = _write_thumbnails(folder, data, images, rows)
        masking, notes = measure_masking(data)
        overview = overview_record(
            data,
            latents,
            reason,
            rows,
            thumbnails=len(missing) < len(rows),
            masking=masking,
            messages=messages + notes,
            book=book,
            has_map=cell_map is not None,
            extras=extras,
        )
        _write_data(folder, "overview", overview)
        figures: list[Path] = []
        if config.figures:
            figures = write_figures(
                folder / "figures",
                data,
                latents,
                images,
                comparisons=list(zip(comparisons.pairs, comparisons.found, strict=True)),
                masking=masking,
            )
    key = data.inputs.folder / KEY_NAME if config.pseudonymize and data.cohort else None
    # The figures were written before the folder got its final name.
    figures = [target / path.relative_to(folder) for path in figures]
    return ReportResult(target / "index.html", len(latents), len(rows), len(missing), figures, key, classification)


@contextmanager
def _new_page(target: Path) -> Iterator[Path]:
    """A folder with the page's own files that becomes the target, or where that leads, once it is complete.

    Raises:
        UserError: If something else is there.
        StoreBusyError: If another process is writing it.
        WriteError: If the disk is full, read-only or fails; an older page is unchanged.
    """
    if target.exists() and not (target / MARK).is_file():
        raise UserError(f"'{target}' already exists and is not a report. Give another --out")
    place = resolve_target(target)
    make_folder(place.parent)
    # Not synced to disk: these are thousands of small files that the same command can write again.
    with (
        locked(place.with_name(f"{place.name}.lock"), str(target)),
        replacing_path(place, durable=False) as folder,
    ):
        for name in ("latents", "cards"):
            (folder / "data" / name).mkdir(parents=True)
        copy_page(folder)
        (folder / MARK).write_text("written by cytosae-cache report, which replaces this folder on its next run\n")
        yield folder


def _write_published(config: ReportConfig, results: Path) -> ReportResult:
    """Write the page of feature data that another program published."""
    refused = {
        **{
            name: getattr(config, name) is not None
            for name in ("groups", "covariates", "subject_column", "site_column", "image_values", "masks")
        },
        "other_sae_path": bool(config.other_sae_path),
        "figures": config.figures,
        "pseudonymize": config.pseudonymize,
    }
    for name, is_given in refused.items():
        if is_given:
            raise UserError(f"--{name} needs a store, but '{results}' contains results of another program alone")
    logger.info(
        f"'{results}' contains results of another program: the page shows these, without images. To compute results of "
        "your own beside them, give another --vit_type"
    )
    data = make_latent_data(config, read_published(results), results / NOTES_NAME)
    latents, reason = choose_latents(data)
    target = config.out or results / "report"
    assert config.dataset_name is not None
    with _new_page(target) as folder:
        n_files = sum(path.suffix == ".pt" for path in results.iterdir())
        _write_data(folder, "overview", published_overview(data, latents, reason, config.dataset_name, n_files))
        for record in published_latents(data, latents):
            _write_data(folder, f"latents/{record['latent']}", record)
        for name, card in card_files(data, None):
            _write_data(folder, name, card)
    return ReportResult(target / "index.html", len(latents), 0, 0, [], None)


def copy_page(folder: Path) -> None:
    """Copy the page's own files: `index.html`, and scripts and styles in `page/`."""
    for address, data in read_page_files().items():
        (folder / address).parent.mkdir(parents=True, exist_ok=True)
        (folder / address).write_bytes(data)


def _write_data(folder: Path, name: str, value: object) -> None:
    """Write one data file."""
    (folder / "data" / f"{name}.js").write_bytes(to_script(name, value))


def _write_images(
    folder: Path,
    data: ReportData,
    latents: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int64],
    measured: Measured,
) -> dict[tuple[int, int], TopMap]:
    """Write the images' pages; collect the maps of latents on the images of their pages in the same pass."""
    wanted: dict[int, list[int]] = {}
    for latent, evidence in zip(latents.tolist(), measured.evidence, strict=True):
        for row in rows_of_latent(data, latent, evidence).tolist():
            wanted.setdefault(row, []).append(latent)
    maps: dict[tuple[int, int], TopMap] = {}
    with Progress("images", len(rows), "images") as bar:
        for row, found in measure_images(data, rows, wanted):
            for at, latent in enumerate(wanted[row]):
                maps[latent, row] = found.top.levels[at], float(found.top.peaks[at])
            _write_data(folder, f"images/{data.numbers[row]}", image_record(data, found.record, row))
            bar.advance()
    return maps


def _write_latents(
    folder: Path,
    data: ReportData,
    latents: npt.NDArray[np.int64],
    records: Iterable[dict[str, Any]],
    measured: Measured,
) -> None:
    """Write the latents' pages, and the table of their correlations with image values."""
    meter = open_meter(data)
    with data.store.open_reader(verify=not data.config.no_verify) as reader:
        for record in records:
            effect = mean_effect_record(data, meter, reader, record["latent"])
            _write_data(folder, f"latents/{record['latent']}", {**record, "effect": effect})
    if measured.correlations is not None:
        write_values(folder / VALUES_NAME, measured.correlations, latents)


def _compare(data: ReportData) -> Comparisons:
    """Compare all groups."""
    nothing = Comparisons([], [], [], None)
    if data.cohort is None:
        return nothing
    n_pairs = len(plan_comparisons(data.cohort))
    if not n_pairs:
        logger.info(no_groups(data.cohort))
        return nothing
    test, seed = data.config.group_test, data.config.seed
    with Progress("compare groups", n_pairs, "comparisons") as bar:
        made = compare_all(data.cohort, test=test, seed=seed, advance=bar.advance)
    if all(made.why_not):
        raise IncomparableError(made.why_not[0])
    for reason in (*filter(None, made.why_not), made.why_not_all):
        if reason:
            logger.info(reason)
    return made


def _write_patients(
    folder: Path, data: ReportData, latents: npt.NDArray[np.int64], comparisons: Comparisons
) -> dict[str, Any] | None:
    """Write the patients' views; returns the classification of groups."""
    if data.cohort is None:
        return None
    config = data.config
    audit = audit_cohort(data.cohort, seed=config.seed)
    _write_data(folder, "audit", audit_record(audit, data.cohort))
    for number in range(len(comparisons.pairs)):
        record = comparison_record(comparisons, number, data.cohort, config.group_test, audit)
        _write_data(folder, f"comparisons/{number}", record)
    if comparisons.all_groups is not None:
        _write_data(folder, "comparisons/all", all_groups_record(comparisons, data.cohort))
    if comparisons.pairs:
        logger.info("patients: classifying groups by nested cross-validation")
    record = patients_record(data.cohort, latents, comparisons.pairs, seed=config.seed, shuffles=config.shuffles)
    _write_data(folder, "patients", record)
    classification: dict[str, Any] | None = record["classification"]
    return classification


def _write_thumbnails(
    folder: Path, data: ReportData, images: ImageList | None, rows: npt.NDArray[np.int64]
) -> tuple[list[int], list[str]]:
    """Write the pictures; returns the rows without one, and messages for the page."""
    if images is None:
        text, advice = explain_no_pictures(data.store)
        logger.info(text + advice)
        return rows.tolist(), [f"{text[0].upper()}{text[1:]}."]
    with Progress("pictures", len(rows), "images") as bar:
        missing = write_thumbnails(folder / "thumbnails", data.store, images, rows.tolist(), data.numbers, bar.advance)
    if not missing:
        return missing, []
    n = say_count(len(rows), "image")
    counted = say_count(len(missing), f"of {n} has", f"of {n} have")
    text = f"{counted} no picture: files are missing or have changed"
    logger.info(text)
    return missing, [text + "."]
