"""The verbs `features`, `classes` and `patients`: open, compute, save, and say what was written."""

from dataclasses import dataclass
from pathlib import Path

from cytosae_pipeline.config import StatisticsConfig
from cytosae_pipeline.config.commands import command
from cytosae_pipeline.statistics.counts import COUNT_FILES, GroupKind
from cytosae_pipeline.statistics.features import VERB
from cytosae_pipeline.statistics.inputs import open_inputs
from cytosae_pipeline.statistics.results import compute_statistics, require_own_results
from cytosae_pipeline.workspace.runs import resolve_sae


@dataclass(frozen=True)
class FeaturesResult:
    """What `features` did."""

    folder: Path
    """Folder of the files."""
    files: list[Path]
    """The files."""
    n_images: int
    """Images counted."""
    n_latents: int
    """Latents S."""
    n_active: int
    """Latents that are active on at least one image."""
    next: str
    """The command that shows them."""


@dataclass(frozen=True)
class CountsResult:
    """What `patients` or `classes` did."""

    folder: Path
    """Folder of the files."""
    files: list[Path]
    """The files."""
    groups: list[str]
    """Patients or classes, in the order of the rows."""
    n_images: int
    """Images counted."""
    n_without_group: int
    """Readable images without a patient or class, which are not counted."""
    n_latents: int
    """Latents S."""
    next: str
    """The command that shows them."""


def run_features(config: StatisticsConfig) -> FeaturesResult:
    """Compute and write feature data (docs/definitions.md, section 6).

    Raises:
        ValueError: If the autoencoder or store is missing or they do not fit.
    """
    config = resolve_sae(config)
    inputs = open_inputs(config)
    require_own_results(inputs, config, features=True)
    found = compute_statistics(inputs, config, features=True, what=VERB)
    assert found.features is not None
    files, n_images = found.save(inputs, replace_foreign=config.replace_foreign), int(found.features.record["n_images"])
    following = command("report", config)
    return FeaturesResult(inputs.folder, files, n_images, inputs.n_latents, found.features.n_active, following)


def run_counts(config: StatisticsConfig, kind: GroupKind) -> CountsResult:
    """Compute and write counts per patient or per label (docs/definitions.md, section 7).

    Raises:
        ValueError: If the autoencoder or store is missing, they do not fit, or no image has a group.
    """
    config = resolve_sae(config)
    inputs = open_inputs(config)
    require_own_results(inputs, config, counts=[kind])
    found = compute_statistics(inputs, config, counts=[kind], what=COUNT_FILES[kind].verb)
    counts = found.counts[kind]
    n_images = int(counts.n_images.sum())
    n_without = int(inputs.store.valid.sum()) - n_images
    return CountsResult(
        inputs.folder,
        found.save(inputs, replace_foreign=config.replace_foreign),
        list(counts.names),
        n_images,
        n_without,
        inputs.n_latents,
        command("report", config),
    )
