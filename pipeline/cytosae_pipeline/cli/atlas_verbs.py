"""Verbs about atlases: writing one, and placing new images in it."""

from pathlib import Path
from typing import Any

import click

from cytosae_pipeline.cli.group import verb
from cytosae_pipeline.cli.options import config_options, make_config
from cytosae_pipeline.cli.output import print_result
from cytosae_pipeline.config import ApplyConfig, ExportConfig


def write_atlas(config: ExportConfig, as_json: bool) -> None:
    """`export --format atlas`."""
    from cytosae_pipeline.atlas.export import describe, export_atlas

    result = export_atlas(config)
    print_result(result, describe(result), as_json)


@verb
@click.argument("atlas", type=click.Path(path_type=Path))
@config_options(ApplyConfig, leave_out=("atlas",))
def apply(atlas: Path, as_json: bool, **values: Any) -> None:
    """Place new images in an atlas.

    ATLAS is a folder that `export --format atlas` wrote, here or elsewhere. Computes the activations of the new images
    with the same vision transformer, encodes them, and writes cells.csv (each image: whether it is outside of what the
    atlas knows, and its latents), patients.csv (each patient: the nearest patients of the atlas, and how probable each
    of its groups is, which is no diagnosis) and barcodes.csv. Without patients, all images are one.

    \b
    cytosae-cache apply mll23.atlas --images ./new --model_path ./DinoBloom-B.pth
    cytosae-cache apply mll23.atlas --store NEW.zarr --json
    """
    config = make_config(ApplyConfig, {**values, "atlas": atlas})
    from cytosae_pipeline.atlas.apply import run_apply

    result = run_apply(config)
    print_result(result, result.describe(), as_json)
