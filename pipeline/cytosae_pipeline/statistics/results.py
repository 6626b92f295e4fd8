"""Statistics of an autoencoder on a store: computed together in one pass, saved, and reused where they are current."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from cytosae.statistics.histograms import ProfileResult
from cytosae_cache.storage.file_set import is_half_named
from cytosae_pipeline.config import StatisticsConfig, StatisticsOptions
from cytosae_pipeline.config.commands import command
from cytosae_pipeline.statistics.collecting import Asked, collect
from cytosae_pipeline.statistics.counts import (
    COUNT_FILES,
    Counts,
    GroupKind,
    counts_record,
    read_counts,
    save_counts,
)
from cytosae_pipeline.statistics.features import (
    ENTROPY,
    FILES,
    VERB,
    Features,
    features_record,
    read_features,
    save_features,
)
from cytosae_pipeline.statistics.inputs import Inputs, PlacedInputs
from cytosae_pipeline.statistics.records import (
    UnusableResultsError,
    find_difference,
    lock_results,
    read_record,
    require_ours,
    tidy_results,
    with_remedy,
)
from cytosae_pipeline.statistics.specificity import FILE_NAME as SPECIFICITY

logger = logging.getLogger(__name__)

RESULT_FILES: dict[str, tuple[str, ...]] = {
    VERB: (*FILES, ENTROPY, SPECIFICITY),
    **{verb: tuple(names) for verb, *names in COUNT_FILES.values()},
}
"""All files that a verb may write, beside its record."""


@dataclass(frozen=True)
class Statistics:
    """What a pass of the encoder found; only what was asked for."""

    features: Features | None = None
    """Feature data."""
    counts: dict[GroupKind, Counts] = field(default_factory=dict)
    """Counts per patient and per label."""
    profiles: ProfileResult | None = None
    """Histograms and means by label, of all latents."""

    def save(self, inputs: PlacedInputs, *, replace_foreign: bool = False) -> list[Path]:
        """Write feature data and counts into the folder of the inputs; profiles are not saved.

        Args:
            inputs: Autoencoder and store that they are of.
            replace_foreign: Replace files of another program, too.

        Returns:
            The files' paths.

        Raises:
            UserError: If a file exists that another program wrote.
        """
        store, files = inputs.store, list[Path]()
        if self.features is not None:
            files += save_features(inputs.folder, self.features, store, replace_foreign=replace_foreign)
        for kind, counts in self.counts.items():
            files += save_counts(
                inputs.folder, counts, kind, store.images, store.n_tokens, replace_foreign=replace_foreign
            )
        return files


def compute_statistics(
    inputs: Inputs,
    config: StatisticsOptions,
    *,
    features: bool = False,
    counts: Sequence[GroupKind] = (),
    profiles: bool = False,
    what: str,
) -> Statistics:
    """Compute any of the statistics in one pass of the encoder over the store, on a cluster if the options name one.

    Args:
        inputs: Autoencoder and store.
        config: The verb's options.
        features: Whether feature data are requested.
        counts: Kinds of counts that are requested.
        profiles: Whether profiles of all latents are requested.
        what: Name of the work, shown with the progress.

    Raises:
        UserError: If counts are requested of groups that no image has, or the cluster cannot be used.
    """
    found = collect(inputs, config, Asked(features, tuple(counts), profiles), what=what)
    return Statistics(
        found.features.result() if found.features is not None else None,
        {kind: one.result() for kind, one in found.counts.items()},
        found.profiles.result() if found.profiles is not None else None,
    )


def ensure_statistics(
    inputs: PlacedInputs, config: StatisticsConfig, *, counts: Sequence[GroupKind] = (), profiles: bool = False
) -> Statistics:
    """Feature data and counts of the autoencoder on the store: reused where current, else computed together and saved.

    Existing results are reused whatever `top_k`, thresholds and normalisation they were made with.

    Args:
        inputs: Autoencoder and store.
        config: The verb's options.
        counts: Kinds of counts that are requested beside the feature data.
        profiles: Whether profiles are requested, too, if a pass over the store is made anyway.

    Raises:
        ValueError: If no image has a group, or files are damaged.
        StoreBusyError: If another process computes what is missing.
    """
    wanted = [_Wanted.of_features(inputs, config), *(_Wanted.of_counts(inputs, config, kind) for kind in counts)]
    computed = Statistics()
    with with_remedy(config):
        missing = [one for one in wanted if _why_missing(inputs.folder, one)]
        if missing:
            with lock_results(inputs.folder, {one.verb: RESULT_FILES[one.verb] for one in missing}):
                # Once more: another process may have finished some.
                reasons = [(one, _why_missing(inputs.folder, one)) for one in missing]
                missing = [one for one, reason in reasons if reason]
                for _, reason in reasons:
                    if reason:
                        logger.info(reason)
                if missing:
                    computed = _compute(inputs, config, missing, profiles=profiles)
                    computed.save(inputs, replace_foreign=config.replace_foreign)
        features = computed.features or read_features(inputs.folder)
        kinds = {kind: computed.counts.get(kind) or read_counts(inputs.folder, kind) for kind in counts}
    if computed.features is None:
        _log_unused(config, VERB, {"top_k": features.top_values.shape[1]}, inputs.folder)
    for kind in counts:
        if kind not in computed.counts:
            thresholds, normalize = tuple(kinds[kind].thresholds.tolist()), kinds[kind].record.get("normalize")
            made_with = {"threshold": thresholds, "normalize": normalize}
            _log_unused(config, COUNT_FILES[kind].verb, made_with, inputs.folder)
    return Statistics(features, kinds, computed.profiles)


def update_statistics(
    inputs: PlacedInputs, config: StatisticsConfig, *, features: bool = False, counts: Sequence[GroupKind] = ()
) -> tuple[Statistics, list[Path], bool]:
    """What a verb writes: read if this version has made it with these options, else computed and saved.

    Args:
        inputs: Autoencoder and store.
        config: The verb's options.
        features: Whether feature data are requested.
        counts: Kinds of counts that are requested.

    Returns:
        The statistics, their files, and whether they were there already.

    Raises:
        ValueError: If no image has a group, or files of another program are in the way.
        StoreBusyError: If another process computes them.
    """
    wanted = [_Wanted.of_features(inputs, config)] * features
    wanted += [_Wanted.of_counts(inputs, config, kind) for kind in counts]
    results = {one.verb: RESULT_FILES[one.verb] for one in wanted}
    found = _read_exact(inputs.folder, wanted)
    if found is None:
        with lock_results(inputs.folder, results):
            found = _read_exact(inputs.folder, wanted)  # another process may have finished them
            if found is None:
                computed = _compute(inputs, config, wanted)
                return computed, computed.save(inputs, replace_foreign=config.replace_foreign), False
    tidy_results(inputs.folder, results)
    verbs = ", ".join(f"`{one.verb}`" for one in wanted)
    logger.info(
        f"the results of {verbs} in '{inputs.folder}' are of this autoencoder, this store and these options: they are "
        "not computed again"
    )
    return found, [inputs.folder / name for one in wanted for name in (*one.files, f"{one.verb}.json")], True


@dataclass(frozen=True)
class _Wanted:
    """Results of a verb that are requested."""

    verb: str
    """The verb."""
    kind: GroupKind | None
    """Kind of counts; None for feature data."""
    files: tuple[str, ...]
    """Files beside the record."""
    record: dict[str, Any]
    """The record that they have if they are computed now."""

    @classmethod
    def of_features(cls, inputs: Inputs, config: StatisticsOptions) -> Self:
        """Feature data."""
        record = features_record(inputs, config)
        more = (ENTROPY, SPECIFICITY) if record["specificity"] else (ENTROPY,)
        return cls(VERB, None, (*FILES, *more), record)

    @classmethod
    def of_counts(cls, inputs: Inputs, config: StatisticsOptions, kind: GroupKind) -> Self:
        """Counts."""
        verb, *files = COUNT_FILES[kind]
        return cls(verb, kind, tuple(files), counts_record(inputs, config, kind))


def _why_missing(folder: Path, wanted: _Wanted) -> str:
    """Why results have to be computed, as a message; '' if those in the folder are current."""
    needed = [name for name in wanted.files if name != ENTROPY and name != SPECIFICITY]
    if is_half_named(folder / f"{wanted.verb}.json") or not all(
        (folder / name).is_file() for name in (*needed, f"{wanted.verb}.json")
    ):
        return f"no results of `{wanted.verb}` in '{folder}' yet: computing them first"
    difference = find_difference(read_record(folder, wanted.verb), wanted.record)
    return difference and f"the results of `{wanted.verb}` in '{folder}' belong to {difference}: recomputing them"


def _read_exact(folder: Path, wanted: Sequence[_Wanted]) -> Statistics | None:
    """Results that this version has made with the options of now; None if any are missing or damaged."""
    features, counts = None, dict[GroupKind, Counts]()
    try:
        for one in wanted:
            is_there = all((folder / name).is_file() for name in one.files)
            if (
                not is_there
                or is_half_named(folder / f"{one.verb}.json")
                or read_record(folder, one.verb) != one.record
            ):
                return None
            if one.kind is None:
                features = read_features(folder)
            else:
                counts[one.kind] = read_counts(folder, one.kind)
    except UnusableResultsError:
        return None
    return Statistics(features, counts)


def _compute(
    inputs: PlacedInputs, config: StatisticsConfig, wanted: Sequence[_Wanted], *, profiles: bool = False
) -> Statistics:
    """Compute results in one pass, unless they would replace those of another program."""
    features = any(one.kind is None for one in wanted)
    counts = [one.kind for one in wanted if one.kind is not None]
    for one in wanted:
        require_ours(inputs.folder, one.files, one.record, replace_foreign=config.replace_foreign)
    what = " + ".join(one.verb for one in wanted)
    return compute_statistics(inputs, config, features=features, counts=counts, profiles=profiles, what=what)


def _log_unused(config: StatisticsConfig, verb: str, made_with: dict[str, object], folder: Path) -> None:
    """Name options that were given but that the reused results were not made with."""
    defaults = {field.name: field.default for field in fields(config)}
    given = {name: value for name in made_with if (value := getattr(config, name)) != defaults[name]}
    for name, wanted in given.items():
        if wanted != made_with[name]:
            text, there = (
                " ".join(map(str, item)) if isinstance(item, tuple) else item for item in (wanted, made_with[name])
            )
            logger.info(
                f"--{name} {text} has no effect: existing results of `{verb}` in '{folder}' are reused, made with "
                f"{there}. To recompute them: {command(verb, config, **given)}"
            )
