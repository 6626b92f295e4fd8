"""Figures in Python: those of `report --figures`, from statistics in memory. Needs matplotlib.

Every function returns a matplotlib `Figure`: a notebook shows it, `figure.savefig("latent.pdf")` writes it. Pyplot is
not used, so no window opens and nothing has to be closed.
"""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from cytosae.analysis.differential import Method
from cytosae.analysis.latents import order_by_group
from cytosae_pipeline.api.statistics import FeatureStats, GroupStats
from cytosae_pipeline.config import PageConfig, StoreSource
from cytosae_pipeline.errors import UserError, join_few, quote
from cytosae_pipeline.images.listing import list_stored_images
from cytosae_pipeline.report.data.cohort import Cohort, arrange_cohort, choose_compared
from cytosae_pipeline.report.data.report_data import ReportData, make_latent_data
from cytosae_pipeline.report.figures.write import require_matplotlib
from cytosae_pipeline.report.records.comparisons import GroupPair, compare_pair
from cytosae_pipeline.statistics.groups import PatientGroups, find_groups
from cytosae_pipeline.statistics.inputs import PlacedInputs
from cytosae_pipeline.statistics.label_index import LabelIndex, number_names
from cytosae_pipeline.statistics.subjects import Subjects, find_subjects

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Groups = Mapping[str, str]
"""Group of each patient by name; patients without a group may be missing."""

Persons = Mapping[str, str]
"""Person of each patient by name: a person's patients are pooled wherever patients are compared."""


def latent(stats: FeatureStats, latents: int | Sequence[int], *, images: str | PathLike[str] | None = None) -> "Figure":
    """The top images of one latent or several, one row each, with heat maps over the cells.

    Args:
        stats: Results of `feature_stats`.
        latents: One latent or several.
        images: Folder of the pictures, or the CSV that lists them, of joined stores those of the first; without it maps
            are drawn on grey.

    Raises:
        UserError: If a latent does not exist, the folder is missing, or matplotlib is not installed.
    """
    require_matplotlib()
    from cytosae_pipeline.report.figures.latents import draw_reference_images
    from cytosae_pipeline.report.figures.style import figure_style

    chosen = _check_latents(latents, len(stats.sparsity))
    found = None
    if images is not None:
        found = list_stored_images(stats.inputs.store, StoreSource(images=Path(images)))
        if found is None or not Path(images).exists():
            raise UserError(f"no images at '{images}'")
    with figure_style():
        return draw_reference_images(_page_data(stats), chosen, found)


def scatter(stats: FeatureStats, latents: int | Sequence[int] = ()) -> "Figure":
    """All latents by sparsity and mean activation, coloured by label entropy.

    Args:
        stats: Results of `feature_stats`.
        latents: Latents that are ringed.

    Raises:
        UserError: If a latent does not exist, or matplotlib is not installed.
    """
    require_matplotlib()
    from cytosae_pipeline.report.figures.latents import draw_latents
    from cytosae_pipeline.report.figures.style import figure_style

    with figure_style():
        return draw_latents(_page_data(stats), _check_latents(latents, len(stats.sparsity)))


def barcodes(
    counts: GroupStats,
    latents: int | Sequence[int],
    *,
    groups: Groups | None = None,
    subjects: Persons | None = None,
) -> "Figure":
    """Counts of some latents, per patient and per group, as shares of the latent's largest count.

    Args:
        counts: Results of `patient_counts` or `class_counts`.
        latents: The latents, in the order of the columns.
        groups: Group of each patient. [default: the label, if every patient has exactly one]
        subjects: Person of each patient. [default: the column `subject` of the store's images, if there is one]

    Raises:
        UserError: If a latent does not exist, or matplotlib is not installed.
    """
    require_matplotlib()
    from cytosae_pipeline.report.figures.patients import draw_barcodes
    from cytosae_pipeline.report.figures.style import figure_style

    with figure_style():
        return draw_barcodes(make_cohort(counts, groups, subjects), _check_latents(latents, counts.counts.shape[2]))


def volcano(
    counts: GroupStats,
    first: str,
    second: str | None = None,
    *,
    groups: Groups | None = None,
    subjects: Persons | None = None,
    group_test: Method = "mann-whitney",
    cells: Literal["all", "equal"] = "all",
    min_images: int = 1,
    seed: int = 0,
) -> "Figure":
    """Every latent by fold change and p between two groups of subjects; coloured where q is below 0.05.

    Args:
        counts: Results of `patient_counts`.
        first: A group.
        second: Another group; all other patients if None.
        groups: Group of each patient. [default: the label, if every patient has exactly one]
        subjects: Person of each patient. [default: the column `subject` of the store's images, if there is one]
        group_test: Test that compares the groups.
        cells: `equal` counts as many images of every subject as the one with fewest has, drawn at random.
        min_images: Subjects with fewer readable images are left out.
        seed: Seed of the permutations and of the draw.

    Raises:
        UserError: If there is no such group, a group has fewer than two subjects, a subject is in two groups, or
            matplotlib is not installed.
    """
    require_matplotlib()
    from cytosae_pipeline.report.figures.patients import draw_comparison
    from cytosae_pipeline.report.figures.style import figure_style

    cohort = make_cohort(counts, groups, subjects)
    names, inputs = cohort.groups.names, counts.inputs
    images = inputs.store.images
    places = number_names(images.patient if counts.kind == "patient" else images.label, cohort.names)
    cohort = choose_compared(cohort, places, inputs, counts.options, cells, min_images, seed)
    for name in (first, *([] if second is None else [second])):
        if name not in names:
            raise UserError(f"there is no group {quote(name)}; there are: {join_few(map(quote, names), 8) or 'none'}")
    pair = GroupPair(names.index(first), None if second is None else names.index(second))
    try:
        found = compare_pair(cohort, pair, test=group_test, seed=seed)
    except ValueError as error:
        raise UserError(f"the groups cannot be compared: {error}") from error
    with figure_style():
        return draw_comparison(cohort, pair, found)


def correlation(counts: GroupStats, *, groups: Groups | None = None) -> "Figure":
    """Correlation matrix of the patients' counts, ordered by group.

    Args:
        counts: Results of `patient_counts` or `class_counts`.
        groups: Group of each patient. [default: the label, if every patient has exactly one]

    Raises:
        UserError: If there are fewer than two patients, or matplotlib is not installed.
    """
    require_matplotlib()
    from cytosae_pipeline.report.figures.patients import draw_correlation
    from cytosae_pipeline.report.figures.style import figure_style

    cohort = make_cohort(counts, groups)
    if len(cohort.names) < 2:
        raise UserError(f"a correlation matrix needs at least two {counts.kind}s, found {len(cohort.names)}")
    with figure_style():
        return draw_correlation(cohort)


def make_cohort(counts: GroupStats, groups: Groups | None = None, subjects: Persons | None = None) -> Cohort:
    """The patients with readable images, ordered by group, as the figures take them.

    Args:
        counts: Results of `patient_counts` or `class_counts`.
        groups: Group of each patient. [default: the label, if every patient has exactly one]
        subjects: Person of each patient. [default: the column `subject` of the store's images, if there is one]

    Raises:
        UserError: If `groups` names none of the patients, `subjects` lacks one, or a subject is in two groups.
    """
    seen = np.flatnonzero(counts.n_images > 0)
    names = [counts.names[at] for at in seen.tolist()]
    if groups is not None:
        if not set(groups) & set(names):
            raise UserError(f"groups names none of the {len(names)} patients, such as {join_few(map(quote, names), 3)}")
        found = PatientGroups(*LabelIndex.of([groups.get(name, "") for name in names]), "")
    elif counts.kind == "patient":
        store = counts.inputs.store
        found = find_groups(names, store.images.take(store.valid_rows), None)
    else:
        found = PatientGroups((), np.full(len(names), -1), "these are labels")
    persons = _find_persons(counts, names, subjects)
    return arrange_cohort(counts, seen, names, found, order_by_group(found.of, names), persons)


def _find_persons(counts: GroupStats, names: Sequence[str], subjects: Persons | None) -> Subjects | None:
    """The person behind each patient.

    Raises:
        UserError: If it is not known of one.
    """
    if subjects is None:
        return find_subjects(names, counts.inputs.store, None, None) if counts.kind == "patient" else None
    without = [name for name in names if not subjects.get(name)]
    if without:
        raise UserError(
            f"subjects names no person for {len(without):,} of {len(names):,} {counts.kind}s, such as "
            f"{join_few(map(quote, without), 3)}: name the person of each, where nothing is known by its own name"
        )
    index = LabelIndex.of([subjects[name] for name in names])
    return Subjects(index.names, index.numbers, "subjects") if len(index.names) < len(names) else None


def _check_latents(latents: int | Sequence[int], n_latents: int) -> npt.NDArray[np.int64]:
    """Latents as an array.

    Raises:
        UserError: If one does not exist.
    """
    chosen = np.atleast_1d(np.asarray(latents, dtype=np.int64))
    wrong = chosen[(chosen < 0) | (chosen >= n_latents)]
    if len(wrong):
        raise UserError(f"latents must lie in 0..{n_latents - 1:,}, found {wrong[0]}")
    return chosen


def _page_data(stats: FeatureStats) -> ReportData:
    """What the figures are drawn from."""
    store = stats.inputs.store
    nowhere = Path("notes of statistics in memory")
    return ReportData(
        **vars(make_latent_data(PageConfig(), stats, nowhere)),
        inputs=PlacedInputs(store, stats.inputs.sae, nowhere),
        labels=number_names(store.images.label, stats.labels),
        patients=np.full(store.n_images, -1),
        numbers=np.arange(store.n_images),
        profiles=None,
        cohort=None,
        pseudonymous=False,
    )
