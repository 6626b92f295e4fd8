"""Atlases in Python: `export --format atlas` and `apply`."""

from os import PathLike
from typing import Any

from cytosae_pipeline.api.options import takes_options
from cytosae_pipeline.atlas.apply import ApplyResult, run_apply
from cytosae_pipeline.atlas.export import AtlasResult
from cytosae_pipeline.atlas.export import export_atlas as run_export
from cytosae_pipeline.config import ApplyConfig, ExportConfig


@takes_options(ExportConfig, leave_out=("format", "anndata_as"))
def _export(options: ExportConfig) -> AtlasResult:
    return run_export(options)


def export_atlas(**options: Any) -> AtlasResult:  # noqa: ANN401 - of `ExportConfig`
    """Write an atlas to pass on: the verb `export --format atlas`, with its options.

    Args:
        **options: `sae_path`, `dataset_name` or `store`, `out`, `groups` and all other options of `export`.

    Returns:
        `result.folder` is the atlas, `result.key` the key of the pseudonyms, which is not part of it.

    Raises:
        ValueError: If an option is missing, the target exists already, or store and autoencoder do not fit.
    """
    return _export(**{"format": "atlas", **options})


@takes_options(ApplyConfig)
def _apply(options: ApplyConfig) -> ApplyResult:
    return run_apply(options)


def apply(atlas: str | PathLike[str], /, **options: Any) -> ApplyResult:  # noqa: ANN401 - of `ApplyConfig`
    """Place new images and patients in an atlas: the verb `apply`, with its options.

    Args:
        atlas: Folder of the atlas.
        **options: `images` and `model_path`, or `store`; `out`, `outside` and all other options of `apply`.

    Returns:
        `result.n_outside` of `result.n_images` are outside of what the atlas knows; `result.patients` has the nearest
        reference patients, and the probability of each group, of each new patient.

    Raises:
        ValueError: If the atlas is damaged, or images, checkpoint or store do not fit it.
    """
    return _apply(**{"atlas": atlas, **options})
