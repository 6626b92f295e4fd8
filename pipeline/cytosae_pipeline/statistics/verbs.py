"""The verbs `features`, `classes` and `patients`: open, compute, save, and say what was written."""

from dataclasses import dataclass
from pathlib import Path

from cytosae_pipeline.config import StatisticsConfig
from cytosae_pipeline.config.commands import command
from cytosae_pipeline.statistics.counts import GroupKind
from cytosae_pipeline.statistics.inputs import open_inputs
from cytosae_pipeline.statistics.results import update_statistics
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
    reused: bool
    """Whether the files were there already, made from the same with the same options."""
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
    reused: bool
    """Whether the files were there already, made from the same with the same options."""
    next: str
    """The command that shows them."""


def run_features(config: StatisticsConfig) -> FeaturesResult:
    """Compute and write feature data (docs/definitions.md, section 6), unless they are there already.

    Raises:
        ValueError: If the autoencoder or store is missing or they do not fit.
    """
    config = resolve_sae(config)
    inputs = open_inputs(config)
    found, files, reused = update_statistics(inputs, config, features=True)
    assert found.features is not None
    n_images, n_active = int(found.features.record["n_images"]), found.features.n_active
    following = command("report", config)
    return FeaturesResult(inputs.folder, files, n_images, inputs.n_latents, n_active, reused, following)


def run_counts(config: StatisticsConfig, kind: GroupKind) -> CountsResult:
    """Compute and write counts per patient or label (docs/definitions.md, section 7), unless they are there already.

    Raises:
        ValueError: If the autoencoder or store is missing, they do not fit, or no image has a group.
    """
    config = resolve_sae(config)
    inputs = open_inputs(config)
    found, files, reused = update_statistics(inputs, config, counts=[kind])
    counts = found.counts[kind]
    n_images = int(counts.n_images.sum())
    return CountsResult(
        folder=inputs.folder,
        files=files,
        groups=list(counts.names),
        n_images=n_images,
        n_without_group=int(inputs.store.valid.sum()) - n_images,
        n_latents=inputs.n_latents,
        reused=reused,
        next=command("report", config),
    )
