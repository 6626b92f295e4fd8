"""`apply`: places new images and patients in an atlas."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cytosae.analysis.classification import predict_groups
from cytosae.analysis.placement import correlate_with, find_nearest
from cytosae_cache.storage.atomic import make_folder
from cytosae_cache.storage.file_set import replacing_set, undo_set
from cytosae_cache.storage.lock import locked
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.atlas.contents import Atlas
from cytosae_pipeline.atlas.new_images import open_new_store
from cytosae_pipeline.atlas.passes import judge_images
from cytosae_pipeline.atlas.reading import read_atlas
from cytosae_pipeline.atlas.tables import cell_columns, cell_rows, judge, unread_row
from cytosae_pipeline.config import ApplyConfig
from cytosae_pipeline.errors import UserError, escape, say_count
from cytosae_pipeline.export.table_files import escape_formula
from cytosae_pipeline.runtime.devices import choose_device
from cytosae_pipeline.runtime.progress import Progress
from cytosae_pipeline.statistics.inputs import Inputs
from cytosae_pipeline.statistics.label_index import LabelIndex
from cytosae_pipeline.workspace.csv_files import CsvWriter, write_csv
from cytosae_pipeline.workspace.targets import resolve_target

logger = logging.getLogger(__name__)

CELLS, PATIENTS, BARCODES = "cells.csv", "patients.csv", "barcodes.csv"
ALL_IMAGES = "(all images)"
"""Name of the patient of all images, where none has one."""

_SHOWN = 20
_ENDING = ".placed"


@dataclass(frozen=True)
class Neighbour:
    """A reference patient near a new one."""

    name: str
    """Its pseudonym."""
    group: str
    """Its group; '' for none."""
    correlation: float
    """Pearson correlation of `log(1 + counts per image)`."""


@dataclass(frozen=True)
class PlacedPatient:
    """A new patient in the atlas."""

    name: str
    """Its name."""
    n_images: int
    """Its readable images."""
    n_outside: int
    """Those outside of what the atlas knows."""
    nearest: list[Neighbour]
    """The nearest reference patients, nearest first."""
    probability: dict[str, float]
    """Probability of each group of the atlas, by a model fitted on its patients; no diagnosis. Empty without groups."""


@dataclass(frozen=True)
class ApplyResult:
    """What `apply` found and wrote."""

    folder: Path
    """Folder of the files."""
    files: list[Path]
    """The files."""
    n_images: int
    """Readable new images."""
    n_unreadable: int
    """Images that could not be read."""
    n_outside: int
    """Images outside of what the atlas knows."""
    outside: float
    """Share of known images that is expected outside."""
    unit: str
    """What the reference patients are."""
    balanced_accuracy: float | None
    """Of the groups of the atlas' own patients, cross-validated; None without groups."""
    patients: list[PlacedPatient]
    """The new patients."""

    def describe(self) -> str:
        """The result as text."""
        share = self.n_outside / max(self.n_images, 1)
        lines = [
            f"{self.n_outside:,} of {say_count(self.n_images, 'image')} ({share:.1%}) are outside of what the atlas "
            f"knows; of images like its own, {self.outside:.1%} are expected"
        ]
        if self.n_unreadable:
            lines.append(f"{say_count(self.n_unreadable, 'image')} could not be read")
        for patient in self.patients[:_SHOWN]:
            near = ", ".join(
                f"{escape(one.name)}{f' ({escape(one.group)})' if one.group else ''} {one.correlation:.2f}"
                for one in patient.nearest
            )
            groups = "".join(f"; {escape(name)} {value:.0%}" for name, value in patient.probability.items())
            lines.append(
                f"{escape(patient.name)}: {say_count(patient.n_images, 'image')}, {patient.n_outside:,} outside"
                f"{near and '; nearest '}{near}{groups}"
            )
        if len(self.patients) > _SHOWN:
            lines.append(f"and {len(self.patients) - _SHOWN:,} more in {PATIENTS}")
        if self.balanced_accuracy is not None:
            lines.append(
                "Percentages of groups are of a model of the atlas' patients, no diagnosis. On these patients "
                f"themselves it reaches a balanced accuracy of {self.balanced_accuracy:.1%}, cross-validated; other "
                "stains, scanners or diseases than the atlas' make it worse without a sign"
            )
        return "\n".join([*lines, f"wrote in {self.folder}: {', '.join(path.name for path in self.files)}"])


class _Barcodes(NamedTuple):
    """What was counted of the new patients."""

    names: tuple[str, ...]
    """Their names."""
    counts: npt.NDArray[np.int64]
    """Tokens above the threshold, shape `(Q, S)`."""
    n_images: npt.NDArray[np.int64]
    """Readable images, shape `(Q,)`."""
    n_outside: npt.NDArray[np.int64]
    """Those outside, shape `(Q,)`."""


def run_apply(config: ApplyConfig) -> ApplyResult:
    """Compute the activations of new images, encode them, and place them and their patients in an atlas.

    Memory does not grow with the number of images. The files appear together, once all are complete.

    Raises:
        AtlasError: If the atlas is missing, damaged or made up.
        StoreMismatchError: If the activations are not made as those of the atlas.
        ValueError: If images, checkpoint or store cannot be used, or a target exists already.
        WriteError: If the disk is full, read-only or fails; what was there before is unchanged.
    """
    assert config.atlas is not None
    atlas = read_atlas(config.atlas, device=choose_device(config.device))
    _require_resolution(atlas, config)
    folder = _choose_folder(config)
    make_folder(resolve_target(folder))
    with _reserved(config, folder) as files, open_new_store(config, atlas, resolve_target(folder)) as store:
        if not len(store.valid_rows):
            raise UserError(f"no image of store '{store.path}' could be read, so there is nothing to place")
        with replacing_set([resolve_target(path) for path in files]) as (cells, patients, barcodes):
            found = _write_cells(cells, atlas, store, config)
            placed = place_patients(atlas, found, config)
            _write_patients(patients, placed, atlas, config)
            _write_barcodes(barcodes, found, atlas)
        n_images, n_unreadable = len(store.valid_rows), store.n_images - len(store.valid_rows)
    # Images without a patient are in the table of cells alone.
    return ApplyResult(
        folder, files, n_images, n_unreadable, int(found.n_outside.sum()), config.outside, atlas.barcodes.unit,
        None if atlas.quality is None else atlas.quality.balanced_accuracy, placed,
    )  # fmt: skip


def _require_resolution(atlas: Atlas, config: ApplyConfig) -> None:
    """Refuse a share below which no image can be.

    Raises:
        UserError: If it is too small for the atlas.
    """
    n = len(atlas.reference.unexplained)
    if config.outside * (n + 1) < 1:
        raise UserError(
            f"--outside {config.outside:g} is smaller than any share that {say_count(n, 'reference image')} can show, "
            f"so that no image would be outside: give at least {1 / (n + 1):.3g}"
        )
    if atlas.reference.seen == "trained on":
        logger.warning(
            "the autoencoder of the atlas was trained on the images with which new ones are compared: more known "
            f"images than {config.outside:.1%} count as outside"
        )


def _choose_folder(config: ApplyConfig) -> Path:
    """Folder of the outputs.

    Raises:
        UserError: If it has to be named.
    """
    if config.out is not None:
        return config.out
    place = config.images if config.images is not None else config.store
    if "://" in str(place):
        raise UserError(f"name the folder to write into with --out: '{place}' is a URL")
    path = Path(str(place)).absolute()
    return path.with_name(path.name + _ENDING)


@contextmanager
def _reserved(config: ApplyConfig, folder: Path) -> Iterator[list[Path]]:
    """The files to write, while no other process may write them.

    Raises:
        UserError: If one exists and must not be replaced.
        StoreBusyError: If another process is writing into the folder.
    """
    files = [folder / name for name in (CELLS, PATIENTS, BARCODES)]
    with locked(resolve_target(folder) / "apply.lock", str(folder)):
        undo_set([resolve_target(path) for path in files])
        existing = next((path for path in files if path.exists()), None)
        if existing is not None and not config.overwrite:
            raise UserError(f"'{existing}' exists already. Give another --out, or --overwrite")
        yield files


def _write_cells(path: Path, atlas: Atlas, store: ActivationStore, config: ApplyConfig) -> _Barcodes:
    """Write cells.csv as images are judged, and add up their counts by patient."""
    images = store.images
    index = LabelIndex.of(images.patient)
    if not index.names:
        logger.info("no new image has a patient: all are placed as one. Give patients by a CSV or --layout patient")
        index = LabelIndex((ALL_IMAGES,), np.zeros(store.n_images, dtype=np.int64))
    elif n_without := int((index.numbers[store.valid_rows] < 0).sum()):
        logger.info(f"{say_count(n_without, 'image has', 'images have')} no patient: in {CELLS} alone")
    n = len(index.names)
    counts = np.zeros((n, atlas.n_latents), dtype=np.int64)
    n_images, n_outside = np.zeros(n, dtype=np.int64), np.zeros(n + 1, dtype=np.int64)
    is_folder = config.images is not None and config.images.is_dir()

    def name_of(row: int) -> tuple[str, str]:
        shown = str(config.images / images.path[row]) if is_folder and config.images else images.path[row]
        return shown, images.patient[row]

    with (
        path.open("w", newline="", encoding="utf-8") as file,
        Progress("apply", len(store.valid_rows), "images") as bar,
    ):
        writer, next_row = CsvWriter(file, cell_columns(config.top)), 0
        for judged in judge_images(
            Inputs(store, atlas.sae), store.valid_rows, tokens=atlas.tokens, threshold=atlas.threshold,
            variance=atlas.reference.variance, options=config, advance=bar.advance,
        ):  # fmt: skip
            share, is_outside = judge(atlas, judged, config.outside)
            rows = judged.rows.tolist()
            lines = cell_rows(atlas, judged, share, is_outside, [name_of(row) for row in rows], config.top)
            for row, line in zip(rows, lines, strict=True):
                writer.write(unread_row(*name_of(at), config.top) for at in range(next_row, row))
                writer.write([line])
                next_row = row + 1
            of = index.numbers[judged.rows]
            kept = of >= 0
            np.add.at(counts, of[kept], judged.counts[kept])
            n_images += np.bincount(of[kept], minlength=n)
            n_outside += np.bincount(np.where(kept, of, n), weights=is_outside, minlength=n + 1).astype(np.int64)
        writer.write(unread_row(*name_of(at), config.top) for at in range(next_row, store.n_images))
    return _Barcodes(index.names, counts, n_images, n_outside)


def place_patients(atlas: Atlas, found: _Barcodes, config: ApplyConfig) -> list[PlacedPatient]:
    """The new patients among those of the atlas: the nearest ones, and the probabilities of the groups.

    Args:
        atlas: The atlas.
        found: What was counted of the new patients; those without readable images are left out.
        config: Number of neighbours, and seed of the model.
    """
    rows, reference = np.flatnonzero(found.n_images > 0), atlas.barcodes
    per_image = found.counts[rows] / found.n_images[rows, None]
    correlation = correlate_with(per_image, reference.per_image)
    nearest = find_nearest(correlation, config.nearest)
    names: tuple[str, ...] = () if atlas.quality is None else atlas.quality.names
    probability = np.zeros((len(rows), 0))
    if names:
        of = {reference.group_names.index(name): at for at, name in enumerate(names)}
        groups = np.array([of.get(group, -1) for group in reference.groups.tolist()])
        known = groups >= 0
        probability = predict_groups(reference.per_image[known], groups[known], names, per_image, seed=config.seed)

    def neighbour(row: int, at: int) -> Neighbour:
        group = int(reference.groups[at])
        name = reference.group_names[group] if group >= 0 else ""
        return Neighbour(reference.names[at], name, float(correlation[row, at]))

    return [
        PlacedPatient(
            found.names[at], int(found.n_images[at]), int(found.n_outside[at]),
            [neighbour(row, near) for near in nearest[row].tolist()],
            dict(zip(names, probability[row].tolist(), strict=True)),
        )
        for row, at in enumerate(rows.tolist())
    ]  # fmt: skip


def _write_patients(path: Path, placed: list[PlacedPatient], atlas: Atlas, config: ApplyConfig) -> None:
    """Write patients.csv: one row per new patient."""
    names: tuple[str, ...] = () if atlas.quality is None else atlas.quality.names
    n_near = min(config.nearest, len(atlas.barcodes.names))
    header = ["patient", "n_images", "n_outside"]
    for at in range(1, n_near + 1):
        header += [f"nearest_{at}", f"group_{at}", f"correlation_{at}"]
    header += [escape_formula(f"probability {name}") for name in names]

    def line(patient: PlacedPatient) -> list[object]:
        cells: list[object] = [escape_formula(patient.name), patient.n_images, patient.n_outside]
        for one in patient.nearest:
            cells += [escape_formula(one.name), escape_formula(one.group), f"{one.correlation:.6g}"]
        return cells + [f"{patient.probability[name]:.6g}" for name in names]

    write_csv(path, header, map(line, placed))


def _write_barcodes(path: Path, found: _Barcodes, atlas: Atlas) -> None:
    """Write barcodes.csv: one row per new patient and latent with tokens above the threshold."""

    def lines() -> Iterator[list[object]]:
        for name, counts, n in zip(found.names, found.counts, found.n_images.tolist(), strict=True):
            for latent in np.flatnonzero(counts).tolist():
                n_tokens = int(counts[latent])
                yield [
                    escape_formula(name), latent, escape_formula(atlas.name_of(latent)), n_tokens, f"{n_tokens / n:.6g}"
                ]  # fmt: skip

    write_csv(path, ["patient", "latent", "name", "tokens", "tokens_per_image"], lines())
