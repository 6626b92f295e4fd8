"""The patients of a report, and the subjects that are compared."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from cytosae.analysis.equal_cells import draw_equal
from cytosae.analysis.latents import order_by_group
from cytosae.analysis.subjects import pool_samples, subject_groups
from cytosae_pipeline.config import PageConfig, StatisticsOptions
from cytosae_pipeline.errors import UserError, quote, say_count
from cytosae_pipeline.report.data.pseudonyms import pseudonymise
from cytosae_pipeline.statistics.counts import Counts
from cytosae_pipeline.statistics.covariates import read_covariates
from cytosae_pipeline.statistics.groups import PatientGroups, find_groups
from cytosae_pipeline.statistics.inputs import Inputs
from cytosae_pipeline.statistics.label_index import LabelIndex, number_names
from cytosae_pipeline.statistics.patient_columns import Column, collect_columns, require_column
from cytosae_pipeline.statistics.some_rows import count_rows
from cytosae_pipeline.statistics.subjects import Subjects, find_subjects, require_one_group

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cohort:
    """The patients, in the order in which the page shows them."""

    names: list[str]
    """Their names on the page."""
    counts: npt.NDArray[np.float64]
    """Tokens above the threshold per image, shape `(P, S)`."""
    raw: npt.NDArray[np.int64]
    """Tokens above the threshold, shape `(P, S)`."""
    n_images: npt.NDArray[np.int64]
    """Readable images of each patient, shape `(P,)`."""
    threshold: float
    """Activation above which a token counts."""
    groups: PatientGroups
    """Their groups."""
    subjects: Subjects | None = None
    """The persons behind them, where several patients are one; each is in one group."""
    compared: "Cohort | None" = None
    """What is compared instead of all subjects with all their images; None for these."""
    n_each: int = 0
    """In `compared`: images of every subject if their number is equal; else 0."""
    columns: Mapping[str, Column] = field(default_factory=dict)
    """What else is known about them."""
    strata: str | None = None
    """The column within whose levels groups are compared."""
    adjust: tuple[str, ...] = ()
    """Columns of the linear model in which groups are compared."""
    n_passed: int | None = None
    """Latents over which groups are compared, those that passed their rating; None for all."""

    @property
    def units(self) -> "Cohort":
        """What is compared and classified: the subjects, or the patients if every patient is a person."""
        return self.pooled if self.compared is None else self.compared

    @cached_property
    def pooled(self) -> "Cohort":
        """The subjects with all their images; of their patients, those without a group are left out."""
        if self.subjects is None:
            return self
        of = np.where(self.groups.of >= 0, self.subjects.of, -1)
        kept = np.unique(of[of >= 0])
        slots = np.where(of >= 0, np.searchsorted(kept, of), -1)
        names = [self.subjects.names[at] for at in kept.tolist()]
        pooled = pool_samples(self.raw, self.n_images, slots, len(kept))
        groups = subject_groups(self.groups.of, slots, len(kept))
        columns = {name: column.pool(slots, len(kept)) for name, column in self.columns.items()}
        every = replace(
            self,
            names=names,
            counts=pooled.counts,
            raw=pooled.raw,
            n_images=pooled.n_images,
            groups=self.groups._replace(of=groups),
            subjects=None,
            columns={name: column for name, column in columns.items() if column is not None},
        )
        return every.take(order_by_group(groups, names))

    def take(self, units: npt.NDArray[np.int64]) -> "Cohort":
        """Some of the patients only, in the order given."""
        return replace(
            self,
            names=[self.names[at] for at in units.tolist()],
            counts=self.counts[units],
            raw=self.raw[units],
            n_images=self.n_images[units],
            groups=self.groups._replace(of=self.groups.of[units]),
            subjects=None,
            columns={name: column.take(units) for name, column in self.columns.items()},
        )

    @property
    def unit_of(self) -> npt.NDArray[np.int64]:
        """The subject in `pooled` of each patient, shape `(P,)`; -1 for none."""
        if self.subjects is None:
            return np.arange(len(self.names))
        names = [self.subjects.names[at] for at in self.subjects.of.tolist()]
        return np.where(self.groups.of >= 0, number_names(names, self.pooled.names), -1)

    @property
    def unit(self) -> str:
        """What a unit is called."""
        return "patient" if self.subjects is None else "subject"


def open_cohort(
    counts: Counts | None, inputs: Inputs, config: PageConfig, key: bytes | None
) -> tuple[Cohort | None, npt.NDArray[np.int64]]:
    """The patients in the page's order, under pseudonyms if there is a key, and the index of each image's patient.

    Args:
        counts: Counts of all patients; None if the images have no patients.
        inputs: The store.
        config: Options.
        key: Key of the pseudonyms.

    Raises:
        UserError: If a table of patients is not one, does not fit the store, or gives a subject two groups.
    """
    images = inputs.store.images
    if counts is None or not counts.n_images.any():
        for name in ("groups", "covariates", "subject_column", "strata", "adjust"):
            given = getattr(config, name)
            if given not in (None, ()):
                shown = ", ".join(given) if isinstance(given, tuple) else given
                raise UserError(
                    f"--{name} '{shown}' cannot be used: the store has no patient column. Build it "
                    "from a CSV with a patient column, or from folders with --layout patient or class/patient"
                )
        return None, np.full(len(images.patient), -1)
    # Without a readable image there are no counts, which is not the same as counts of zero.
    seen = np.flatnonzero(counts.n_images > 0)
    unseen = np.flatnonzero(counts.n_images == 0)
    names = [counts.names[at] for at in seen.tolist()]
    if len(unseen):
        n = say_count(len(counts.names), "patient")
        logger.info(
            f"{say_count(len(unseen), f'of {n} has', f'of {n} have')} no readable image and "
            f"{'is' if len(unseen) == 1 else 'are'} left out, such as {quote(counts.names[unseen[0]])}"
        )
    groups = find_groups(names, images.take(inputs.store.valid_rows), config.groups)
    if groups.gaps:
        logger.info(groups.gaps)
    covariates = None if config.covariates is None else read_covariates(config.covariates, counts.names)
    subjects = find_subjects(counts.names, inputs.store, covariates, config.subject_column)
    if subjects is not None:
        subjects = _take(subjects, seen, key)
    shown = names if key is None else pseudonymise(names, key)
    # Ordered by the names shown: the order of the real names would leak information about them.
    order = order_by_group(groups.of, shown)
    patients = number_names(images.patient, [names[at] for at in order.tolist()])
    cohort = arrange_cohort(counts, seen, shown, groups, order, subjects, pseudonymous=key is not None)
    columns = collect_columns(counts.names, inputs.store, covariates)
    strata, *adjust = (
        None if name is None else require_column(columns, name, option, covariates, inputs.store)
        for option, name in (("strata", config.strata), *(("adjust", name) for name in config.adjust))
    )
    cohort = replace(
        cohort,
        columns={name: column.take(seen[order]) for name, column in columns.items()},
        strata=strata,
        adjust=tuple(name for name in adjust if name is not None),
    )
    return choose_compared(cohort, patients, inputs, config, config.cells, config.min_images, config.seed), patients


def arrange_cohort(
    counts: Counts,
    seen: npt.NDArray[np.int64],
    names: Sequence[str],
    groups: PatientGroups,
    order: npt.NDArray[np.int64],
    subjects: Subjects | None = None,
    *,
    pseudonymous: bool = False,
) -> Cohort:
    """The patients with readable images in an order.

    Args:
        counts: Counts of all patients.
        seen: Rows of those with readable images, shape `(P,)`.
        names: Their names, as they are shown.
        groups: Their groups.
        order: The order, indices into these, shape `(P,)`.
        subjects: The persons behind them.
        pseudonymous: Whether the names are pseudonyms.

    Raises:
        UserError: If patients of one subject are in two groups.
    """
    if subjects is not None:
        require_one_group(subjects, groups, names, pseudonymous=pseudonymous)
        logger.info(
            f"{subjects.column}: {len(names):,} patients of {len(subjects.names):,} subjects, and subjects are compared"
        )
    raw, n_images = counts.counts[0][seen[order]], counts.n_images[seen[order]]
    return Cohort(
        names=[names[at] for at in order.tolist()],
        counts=raw / n_images[:, None],
        raw=raw,
        n_images=n_images,
        threshold=float(counts.thresholds[0]),
        groups=groups._replace(of=groups.of[order]),
        subjects=None if subjects is None else subjects._replace(of=subjects.of[order]),
    )


def choose_compared(
    cohort: Cohort,
    patients: npt.NDArray[np.int64],
    inputs: Inputs,
    config: StatisticsOptions,
    cells: Literal["all", "equal"],
    min_images: int,
    seed: int,
) -> Cohort:
    """The cohort with what is compared: subjects with enough images, and equal numbers of them if asked for.

    Args:
        cohort: The patients.
        patients: Place of each image's patient in the cohort, shape `(n_images,)`; -1 for none.
        inputs: Autoencoder and store.
        config: How images are read and encoded, where equal numbers of them are counted.
        cells: `equal` counts as many images of every subject as the one with fewest has.
        min_images: Subjects with fewer readable images are left out.
        seed: Seed of the draw.

    Raises:
        UserError: If every subject has fewer images.
    """
    every = cohort.pooled
    if not cohort.groups.names or (cells == "all" and min_images <= 1):
        return cohort
    kept = np.flatnonzero((every.groups.of >= 0) & (every.n_images >= min_images))
    n_grouped = int((every.groups.of >= 0).sum())
    if not len(kept):
        raise UserError(
            f"--min_images {min_images} leaves none of {n_grouped:,} {cohort.unit}s: the one with most has "
            f"{every.n_images.max():,} readable images. Give a smaller number"
        )
    if len(kept) < n_grouped:
        logger.info(
            f"{n_grouped - len(kept):,} of {n_grouped:,} {cohort.unit}s have fewer than {min_images:,} readable images "
            "(--min_images) and are not compared"
        )
    units = every.take(kept)
    if cells == "all":
        return replace(cohort, compared=units)
    n_each = int(units.n_images.min())
    numbers = np.full(len(every.names) + 1, -1, dtype=np.int64)
    numbers[kept] = np.arange(len(kept))
    unit_of = np.append(cohort.unit_of, -1)
    subjects = np.where(inputs.store.valid, numbers[unit_of[patients]], -1)
    rows = draw_equal(subjects, len(kept), n_each, seed=seed)
    logger.info(f"{n_each:,} images of each of {len(kept):,} {cohort.unit}s, drawn at random, are compared")
    raw = count_rows(inputs, config, rows, subjects[rows], len(kept), cohort.threshold)
    n_images = np.full(len(kept), n_each, dtype=np.int64)
    return replace(cohort, compared=replace(units, raw=raw, n_images=n_images, counts=raw / n_each, n_each=n_each))


def limit_cohort(cohort: Cohort, latents: npt.NDArray[np.int64]) -> Cohort:
    """The cohort of which only some latents are compared: counts of the others are 0, which is never tested.

    Args:
        cohort: The patients; what they show of themselves stays as it is.
        latents: The latents.
    """
    units, kept = cohort.units, np.zeros(cohort.counts.shape[1], dtype=np.bool_)
    kept[latents] = True
    limited = replace(units, raw=np.where(kept, units.raw, 0), counts=np.where(kept, units.counts, 0))
    return replace(cohort, compared=limited, n_passed=len(latents))


def _take(subjects: Subjects, patients: npt.NDArray[np.int64], key: bytes | None) -> Subjects | None:
    """The subjects of some patients, under pseudonyms if there is a key; None if every patient is a person."""
    names = [subjects.names[at] for at in subjects.of[patients].tolist()]
    if key is not None:
        different = list(dict.fromkeys(names))
        pseudonyms = dict(zip(different, pseudonymise(different, key, what="subject"), strict=True))
        names = [pseudonyms[name] for name in names]
    index = LabelIndex.of(names)
    return subjects._replace(names=index.names, of=index.numbers) if len(index.names) < len(names) else None
