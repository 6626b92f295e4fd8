"""The reference patients of an atlas, under pseudonyms."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from cytosae.analysis.classification import classify_groups
from cytosae.analysis.subjects import pool_samples, subject_groups
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.atlas.contents import Barcodes, GroupQuality, Unit
from cytosae_pipeline.config import ExportConfig
from cytosae_pipeline.errors import UserError, join_few, quote, say_count
from cytosae_pipeline.report.data.pseudonyms import pseudonymise
from cytosae_pipeline.statistics.counts import Counts
from cytosae_pipeline.statistics.covariates import read_covariates
from cytosae_pipeline.statistics.groups import find_groups
from cytosae_pipeline.statistics.notes import LatentNote
from cytosae_pipeline.statistics.subjects import Subjects, find_subjects, require_one_group

logger = logging.getLogger(__name__)

_SHOWN = 3


def no_barcodes(n_latents: int) -> Barcodes:
    """Barcodes of a store whose images have no patient."""
    none = np.zeros(0, dtype=np.int64)
    return Barcodes("patient", (), np.zeros((0, n_latents), dtype=np.int64), none, (), none)


def collect_barcodes(
    counts: Counts, store: ActivationStore, config: ExportConfig, key: bytes
) -> tuple[Barcodes, list[str]]:
    """The patients with readable images, pooled by subject where these are known, in the order of their pseudonyms.

    Args:
        counts: Counts of all patients.
        store: The store.
        config: Where groups and subjects stand.
        key: Key of the pseudonyms.

    Returns:
        The barcodes, and all real names of patients and subjects.

    Raises:
        UserError: If a table does not fit the store, or gives a subject two groups.
    """
    kept = np.flatnonzero(counts.n_images > 0)
    names = [counts.names[at] for at in kept.tolist()]
    groups = find_groups(names, store.images.take(store.valid_rows), config.groups)
    if groups.gaps:
        logger.info(groups.gaps)
    covariates = None if config.covariates is None else read_covariates(config.covariates, counts.names)
    subjects = find_subjects(counts.names, store, covariates, config.subject_column)
    raw, n_images, of = counts.counts[0][kept], counts.n_images[kept], groups.of
    real = [*counts.names, *(() if subjects is None else subjects.names)]
    if subjects is not None:
        here = Subjects(subjects.names, subjects.of[kept], subjects.column)
        require_one_group(here, groups, names)
        wanted = np.unique(here.of)
        slots = np.searchsorted(wanted, here.of)
        pooled = pool_samples(raw, n_images, slots, len(wanted))
        raw, n_images, of = pooled.raw, pooled.n_images, subject_groups(of, slots, len(wanted))
        names = [subjects.names[at] for at in wanted.tolist()]
        logger.info(f"{subjects.column}: {len(kept):,} patients of {len(names):,} subjects, which are pooled")
    unit: Unit = "patient" if subjects is None else "subject"
    pseudonyms = pseudonymise(names, key, what=unit)
    # The order of the real names would tell something about them.
    order = np.array(sorted(range(len(pseudonyms)), key=pseudonyms.__getitem__), dtype=np.int64)
    shown = tuple(pseudonyms[at] for at in order.tolist())
    return Barcodes(unit, shown, raw[order], n_images[order], groups.names, of[order]), real


def measure_quality(barcodes: Barcodes) -> GroupQuality | None:
    """How well the groups are predicted by cross-validation; None unless two groups have two patients each."""
    kept = comparable(barcodes)
    if len(kept) < 2:
        return None
    names = [barcodes.group_names[group] for group in kept]
    rows = np.flatnonzero(np.isin(barcodes.groups, kept))
    groups = np.searchsorted(kept, barcodes.groups[rows])
    found = classify_groups(barcodes.per_image[rows], groups, names)
    return GroupQuality(tuple(names), found.balanced_accuracy)


def comparable(barcodes: Barcodes) -> list[int]:
    """Groups of at least two patients."""
    sizes = np.bincount(barcodes.groups[barcodes.groups >= 0], minlength=len(barcodes.group_names))
    return [group for group, size in enumerate(sizes.tolist()) if size >= 2]


def warn_of_names(
    real: Iterable[str],
    paths: Sequence[str],
    notes: Mapping[int, LatentNote],
    labels: Iterable[str],
    groups: Iterable[str],
) -> None:
    """Warn where a text that goes into the atlas contains the name of a patient, or of an image file.

    Args:
        real: Names of patients and subjects.
        paths: Paths of the images.
        notes: Names and notes of latents.
        labels: Names of labels.
        groups: Names of groups.
    """
    texts = {f"the note of latent {latent}": f"{note['name']}\n{note['note']}" for latent, note in notes.items()}
    texts |= {f"label {quote(name)}": name for name in labels} | {f"group {quote(name)}": name for name in groups}
    found = [
        f"{where} contains {quote(name)}" for name in dict.fromkeys(real) for where, text in texts.items()
        if name in text and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)
    ]  # fmt: skip
    if found:
        logger.warning(
            f"names of patients go into the atlas, {say_count(len(found), 'time')}: {join_few(found, _SHOWN)}. Change "
            "these texts and export again before you pass it on"
        )
    words = {word: where for where, text in texts.items() for word in re.split(r"[\s,;()'\"]+", text) if word}
    known = [path for path in paths if path in words or path.rpartition("/")[2] in words] if words else []
    if known:
        where = [f"{words.get(path) or words[path.rpartition('/')[2]]} contains {quote(path)}" for path in known]
        logger.warning(
            f"names of image files go into the atlas, {say_count(len(known), 'time')}: {join_few(where, _SHOWN)}. "
            "Change these texts and export again before you pass it on"
        )


def require_patients(config: ExportConfig, store: ActivationStore) -> None:
    """Refuse tables of patients for a store without any.

    Raises:
        UserError: If one was given.
    """
    for name in ("groups", "covariates", "subject_column"):
        if getattr(config, name) is not None:
            raise UserError(
                f"--{name} '{getattr(config, name)}' cannot be used: no image of store '{store.path}' has a patient"
            )
