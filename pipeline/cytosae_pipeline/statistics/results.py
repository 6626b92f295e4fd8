"""Statistics of an autoencoder on a store: computed together in one pass, saved, and reused where they are current."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch

from cytosae.statistics.histograms import LatentProfiles, ProfileResult
from cytosae_pipeline.config import StatisticsConfig, StatisticsOptions
from cytosae_pipeline.config.commands import command
from cytosae_pipeline.statistics.counts import (
    COUNT_FILES,
    Counts,
    CountsAccumulator,
    GroupKind,
    read_counts,
    require_own_counts,
    save_counts,
)
from cytosae_pipeline.statistics.encode import ActsConsumer, PooledConsumer, encode_store
from cytosae_pipeline.statistics.features import (
    FILES,
    VERB,
    Features,
    FeaturesAccumulator,
    read_features,
    require_own_features,
    save_features,
)
from cytosae_pipeline.statistics.inputs import Inputs, PlacedInputs
from cytosae_pipeline.statistics.label_index import LabelIndex
from cytosae_pipeline.statistics.records import is_current, make_record, read_record, with_remedy

logger = logging.getLogger(__name__)


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


def require_own_results(
    inputs: PlacedInputs, config: StatisticsConfig, *, features: bool = False, counts: Sequence[GroupKind] = ()
) -> None:
    """Refuse to replace results of another program or activation function, before anything is computed.

    Raises:
        UserError: If there are such files, unless `replace_foreign` allows it.
    """
    if features:
        record = make_record(inputs, config, VERB)
        require_own_features(inputs.folder, record, replace_foreign=config.replace_foreign)
    for kind in counts:
        record = make_record(inputs, config, COUNT_FILES[kind].verb)
        require_own_counts(inputs.folder, kind, record, replace_foreign=config.replace_foreign)


def compute_statistics(
    inputs: Inputs,
    config: StatisticsOptions,
    *,
    features: bool = False,
    counts: Sequence[GroupKind] = (),
    profiles: bool = False,
    what: str,
) -> Statistics:
    """Compute any of the statistics in one pass of the encoder over the store.

    Args:
        inputs: Autoencoder and store.
        config: The verb's options.
        features: Whether feature data are requested.
        counts: Kinds of counts that are requested.
        profiles: Whether profiles of all latents are requested.
        what: Name of the work, shown with the progress.

    Raises:
        UserError: If counts are requested of groups that no image has.
    """
    features_of = FeaturesAccumulator(inputs, config) if features else None
    counts_of = {kind: CountsAccumulator(inputs, config, kind) for kind in counts}
    consumers: list[PooledConsumer] = [one.update for one in (features_of, *counts_of.values()) if one is not None]
    on_acts: list[tuple[ActsConsumer, torch.Tensor | None]] = []
    if features_of is not None and features_of.specificity is not None:
        on_acts.append((features_of.specificity.add, features_of.specificity.wanted))
    labels = LabelIndex.of(inputs.store.images.label)
    found = LatentProfiles(inputs.n_latents, len(labels.names)) if profiles else None
    if found is not None:
        numbers = torch.from_numpy(labels.numbers)
        consumers.append(lambda rows, _: found.count_images(numbers[rows]))
        on_acts.append((lambda rows, latents, acts: found.add(acts, numbers[rows], latents), None))
    encode_store(
        inputs,
        config,
        consumers,
        thresholds=config.threshold if counts else (),
        on_acts=on_acts,
        what=what,
    )
    return Statistics(
        features_of.result() if features_of is not None else None,
        {kind: one.result() for kind, one in counts_of.items()},
        found.result() if found is not None else None,
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
    """
    with with_remedy(config):
        features = _reuse_features(inputs, config)
        reused = {kind: _reuse_counts(inputs, config, kind) for kind in counts}
    missing = [kind for kind, found in reused.items() if found is None]
    if features is None or missing:
        verbs = [*([VERB] if features is None else []), *(COUNT_FILES[kind].verb for kind in missing)]
        require_own_results(inputs, config, features=features is None, counts=missing)
        computed = compute_statistics(
            inputs, config, features=features is None, counts=missing, profiles=profiles, what=" + ".join(verbs)
        )
        computed.save(inputs, replace_foreign=config.replace_foreign)
    else:
        computed = Statistics()
    kept = {kind: found for kind, found in reused.items() if found is not None}
    return Statistics(features or computed.features, {**kept, **computed.counts}, computed.profiles)


def _reuse_features(inputs: PlacedInputs, config: StatisticsConfig) -> Features | None:
    """Saved feature data, if they are of this autoencoder and this store."""
    n_valid = int(inputs.store.valid.sum())
    if not _is_current(inputs, VERB, FILES, lambda: read_record(inputs.folder, VERB).get("n_images") == n_valid):
        return None
    found = read_features(inputs.folder)
    _log_unused(config, VERB, {"top_k": found.top_values.shape[1]}, inputs.folder)
    return found


def _reuse_counts(inputs: PlacedInputs, config: StatisticsConfig, kind: GroupKind) -> Counts | None:
    """Saved counts, if they are of this autoencoder, this store and its readable images."""
    verb, *names = COUNT_FILES[kind]
    if not _is_current(inputs, verb, names, lambda: True):
        return None
    found = read_counts(inputs.folder, kind)
    column = np.array(getattr(inputs.store.images, kind), dtype=np.dtypes.StringDType())
    here, n_images = np.unique(column[inputs.store.valid & (column != "")], return_counts=True)
    counted = {name: n for name, n in zip(found.names, found.n_images.tolist(), strict=True) if n}
    if counted != dict(zip(map(str, here), n_images.tolist(), strict=True)):
        logger.info(f"the results of `{verb}` in '{inputs.folder}' belong to other images: recomputing them")
        return None
    made_with = {"threshold": tuple(found.thresholds.tolist()), "normalize": found.record.get("normalize")}
    _log_unused(config, verb, made_with, inputs.folder)
    return found


def _is_current(inputs: PlacedInputs, verb: str, names: Sequence[str], has_same_images: Callable[[], bool]) -> bool:
    """Whether a verb's files are complete and belong to this autoencoder and store; logs the reason if not."""
    if not all((inputs.folder / name).is_file() for name in (*names, f"{verb}.json")):
        logger.info(f"no results of `{verb}` in '{inputs.folder}' yet: computing them first")
        return False
    if not is_current(inputs, read_record(inputs.folder, verb)):
        logger.info(
            f"the results of `{verb}` in '{inputs.folder}' belong to another autoencoder or store: recomputing them"
        )
        return False
    if not has_same_images():
        logger.info(f"the results of `{verb}` in '{inputs.folder}' belong to other images: recomputing them")
        return False
    return True


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
