"""Verbs about stores: importing, listing, showing and checking them."""

import dataclasses
from pathlib import Path
from typing import Any

import click

from cytosae_pipeline.cli.group import verb
from cytosae_pipeline.cli.options import config_options, make_config
from cytosae_pipeline.cli.output import print_result
from cytosae_pipeline.config import ImportConfig, StoreChoice, VerifyConfig, WorkspaceChoice
from cytosae_pipeline.errors import say_count
from cytosae_pipeline.runtime.progress import format_bytes, format_seconds


@verb
@click.argument("source", type=click.Path(path_type=Path))
@config_options(ImportConfig, leave_out=("source",))
def import_(source: Path, as_json: bool, **values: Any) -> None:
    """Turn embeddings that you already have into a store.

    SOURCE is a file, or a folder of files of one kind: .h5 (TRIDENT, CLAM), .pt, .npy, .npz, .parquet or .h5ad. Each
    row becomes an image of one token; with --grid, each row is an image of several tokens. All verbs work on the store,
    without heat maps where there is a single token. Run the same command again to resume an interrupted import.

    \b
    cytosae-cache import ./trident/features_uni --dataset_name slides --model_name uni --labels slides.csv
    cytosae-cache import cells.npy --labels cells.csv --dataset_name cells
    cytosae-cache import tokens.npy --grid 16x16 --dataset_name cells
    """
    config = make_config(ImportConfig, {**values, "source": source})
    from cytosae_pipeline.importing.store import import_embeddings

    result = import_embeddings(config)
    size = f"{say_count(result.n_images, 'row')} of {result.n_tokens} x {result.d_model}"
    lines = [f"store ({result.status}): {result.store}", f"{size} in {format_seconds(result.seconds)}"]
    if result.n_skipped:
        lines.append(f"set aside, as they contain NaN or infinity: {result.n_skipped:,}")
    lines.append(f"next: {result.next}")
    print_result(result, "\n".join(lines), as_json)


@verb
@config_options(WorkspaceChoice)
def list_(as_json: bool, **values: Any) -> None:
    """List stores and training runs.

    Each run is shown with its L0 and explained variance, on held-out images if there were any, and with the path that
    --sae_path takes; its name does as well, and `latest` is the newest finished one.
    """
    config = make_config(WorkspaceChoice, values)
    from cytosae_pipeline.workspace.inventory import take_inventory

    inventory = take_inventory(config.root_dir)
    print_result(inventory, inventory.describe(), as_json)


@verb
@click.argument("path", required=False)
@config_options(StoreChoice)
def info(path: str | None, as_json: bool, **values: Any) -> None:
    """Show where a store comes from.

    Takes the PATH or URL of the store (or --store PATH), or --dataset_name.
    """
    config = make_config(StoreChoice, {**values, "store": _one_store(path, values["store"])})
    from cytosae_cache.format.spec import UNUSED_IF_IMPORTED
    from cytosae_pipeline.building.tail_file import tail_bytes, tail_location
    from cytosae_pipeline.workspace.find import find_store

    store = find_store(config)
    facts = store.describe()
    if (n_bytes := tail_bytes(store.path)) is not None:
        facts |= {"tail": str(tail_location(store.path)), "tail_bytes": n_bytes}
    spec = facts.pop("spec")
    shown = {name: value for name, value in facts.items() if value != ""}
    lines = [f"{name}: {format_bytes(value) if name.endswith('_bytes') else value}" for name, value in shown.items()]
    unused = UNUSED_IF_IMPORTED if store.spec.imported else ()
    lines += ["spec:", *(f"  {name}: {value}" for name, value in spec.items() if name not in unused)]
    print_result({**facts, "spec": spec}, "\n".join(lines), as_json)


@verb
@click.argument("path", required=False)
@config_options(VerifyConfig, leave_out=("layout", "vit_type"))
def verify(path: str | None, as_json: bool, **values: Any) -> None:
    """Check every file and checksum of a store.

    Takes the PATH or URL of the store (or --store PATH), or --dataset_name. The exit code is 1 if anything is wrong,
    files included that do not belong to the store. --deep looks for images and checkpoint where the store was built
    from, unless --images and --model_path say where they are now.

    \b
    cytosae-cache verify --dataset_name mll23
    cytosae-cache verify --dataset_name mll23 --deep --images ./mll23 --model_path ./DinoBloom-B.pth
    """
    config = make_config(VerifyConfig, {**values, "store": _one_store(path, values["store"])})
    from cytosae_pipeline.building.deep_verify import check_store
    from cytosae_pipeline.workspace.find import build_again_command

    store, report = check_store(config)
    lines = [*report.problems, *report.foreign]
    if report.problems:
        again = "Import it again with --overwrite"
        if not store.spec.imported:
            again = f"Build it again with: {build_again_command(store, config, overwrite=True)}"
        lines.append(f"{say_count(len(report.problems), 'problem')} in '{store.path}'. {again}")
    else:
        state = "the store itself is sound" if report.foreign or report.tail_problem else "sound"
        n_shards, n_images = say_count(report.n_shards, "shard"), say_count(store.n_images, "image")
        lines.append(f"{state}: {n_shards}, {format_bytes(report.n_bytes)}, {n_images}: {store.path}")
    if report.foreign:
        lines.append("Move what does not belong to the store to another place")
    if report.litter:
        lines.append(f"harmless, left by an operating system: {', '.join(map(repr, report.litter))}")
    if report.tail:
        lines.append(report.tail_problem or f"its tail is sound: {report.tail}")
    print_result({"path": store.path, "sound": report.sound, **dataclasses.asdict(report)}, "\n".join(lines), as_json)
    if not report.sound:
        raise SystemExit(1)


def _one_store(path: str | None, option: str | None) -> str | None:
    """The store that was named, as PATH or by --store."""
    if path is not None and option not in (None, path):
        raise click.UsageError(f"PATH names the store '{path}', and --store '{option}': leave one out")
    return option if path is None else path
