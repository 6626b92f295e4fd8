"""The command line: options in, one call, a summary out. Heavy imports happen inside the verbs."""

import dataclasses
import functools
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import click

from cytosae_pipeline.cli import atlas_verbs, rating_verbs, store_verbs  # noqa: F401 - register their verbs
from cytosae_pipeline.cli.group import cli, verb
from cytosae_pipeline.cli.options import GroupedCommand, config_options, given_options, make_config
from cytosae_pipeline.cli.output import one_message, print_result
from cytosae_pipeline.config import (
    BuildConfig,
    CompareConfig,
    DemoConfig,
    EvaluateConfig,
    ExploreConfig,
    ExportConfig,
    ReportConfig,
    StatisticsConfig,
    TrainConfig,
)
from cytosae_pipeline.errors import say_count
from cytosae_pipeline.runtime.file_limit import raise_file_limit
from cytosae_pipeline.runtime.progress import format_seconds
from cytosae_pipeline.runtime.ranks import is_first, is_several


def main() -> None:
    """Entry point of the `cytosae-cache` command."""
    # SIGTERM is handled like Ctrl-C: work is saved.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    raise_file_limit()
    with one_message():
        cli(prog_name="cytosae-cache", standalone_mode=not is_several())


@verb
@config_options(BuildConfig)
@click.option(
    "--dry-run", is_flag=True, help="Only print the plan: images, network, preprocessing, bytes and free disk."
)
def build(as_json: bool, dry_run: bool, **values: Any) -> None:
    """Run the vision transformer once: images to a store.

    Writes every image's activations to a chunked Zarr store that the other verbs stream. Run the same command
    again to resume an interrupted build; it returns at once if the store is complete.

    \b
    cytosae-cache build --dataset_name mll23 --images ./mll23 --model_path ./DinoBloom-B.pth
    cytosae-cache build --dataset_name try --images cells.csv --model_path embedded --limit 100 --dry-run
    cytosae-cache build --dataset_name mll23 --model_path ./DinoBloom-B.pth --store s3://bucket/mll23.zarr
    cytosae-cache build --dataset_name mll23 --model_path ./DinoBloom-B.pth --shards $SLURM_ARRAY_TASK_ID/16
    """
    config = make_config(BuildConfig, values)
    from cytosae_pipeline.building.build import build_stores
    from cytosae_pipeline.building.plan import plan_build

    if dry_run:
        plan = plan_build(config)
        facts = {
            "images": len(plan.images), "bytes": plan.n_bytes, "free_bytes": plan.stores[0].free_bytes,
            "store": plan.stores[0].store, "stores": [item.store for item in plan.stores],
        }  # fmt: skip
        print_result(facts | plan.images.to_json(), plan.describe() + "\nnothing was written (--dry-run)", as_json)
        return
    results = build_stores(config)
    result = results[0]
    lines = [f"store ({item.status}): {item.store}" for item in results]
    lines += [f"tail: {item.tail}" for item in results if item.tail is not None]
    lines.append(f"images: {result.n_images:,} in {format_seconds(result.seconds)}")
    if result.n_skipped:
        kinds = ", ".join(f"{count:,} {reason}" for reason, count in list(result.skipped_reasons.items())[:3])
        where = "" if result.skipped_csv is None else f", listed in {result.skipped_csv}"
        lines.append(f"set aside as unreadable: {result.n_skipped:,} ({kinds}){where}")
    if missing := max(item.n_missing_shards for item in results):
        them = "it" if missing == 1 else "them"
        how = f"the other parts write {them}, and the last one completes the store"
        if config.part is None:
            how = "files were damaged or removed meanwhile. Run the same command again"
        lines.append(f"{say_count(missing, 'shard is', 'shards are')} missing: {how}")
    else:
        lines.append(f"next: {result.next}")
    shown = result if len(results) == 1 else {"stores": [dataclasses.asdict(item) for item in results]}
    print_result(shown, "\n".join(lines), as_json)


class _TrainCommand(GroupedCommand):
    """Help of `train`: what is needed most comes first."""

    sections: ClassVar[dict[str, Sequence[str]]] = {
        "Options that are needed most": (
            "dataset_name", "root_dir", "preset", "arch", "expansion_factor", "k", "l1_coefficient",
            "total_training_tokens", "batch_size", "run_name",
        ),
        "Options of arch relu and gated": ("use_ghost_grads", "norm_weighted_l1", "mse_cls_coefficient"),
        "Options of arch topk, batchtopk and matryoshka": ("aux_coefficient",),
        "Options of arch jumprelu": ("l0_coefficient", "bandwidth", "pre_act_coefficient"),
    }  # fmt: skip


@functools.partial(verb, kind=_TrainCommand, in_ranks=True)
@click.option(
    "--sweep",
    type=click.Path(path_type=Path),
    help="TOML file with options as keys: lists give one run per combination, all trained on one stream.",
)
@click.option(
    "--measure",
    is_flag=True,
    help="After --sweep, measure for every run whether other seeds find the same latents, probes of labels, and "
    "monosemanticity: further columns of sweep.csv.",
)
@config_options(TrainConfig)
def train(sweep: Path | None, measure: bool, as_json: bool, **values: Any) -> None:
    """Train a sparse autoencoder on a store.

    Needs neither the vision transformer nor the images. Run the same command again, or use --resume RUN, to
    resume an interrupted run.

    \b
    cytosae-cache train --dataset_name mll23 --preset cytosae
    cytosae-cache train --dataset_name mll23 --preset modern --k 64
    cytosae-cache train --dataset_name mll23 --sweep grid.toml      (grid.toml: k = [16, 32, 64])
    cytosae-cache train --dataset_name mll23 --sweep grid.toml --measure      (with seed = [1, 2]: stability, too)
    torchrun --nproc-per-node 8 -m cytosae_pipeline train --dataset_name mll23      (a run, or a sweep, on 8 GPUs)
    """
    given = given_options()
    config = make_config(TrainConfig, {name: value for name, value in values.items() if name in given})
    if measure and sweep is None:
        raise click.UsageError("--measure is for --sweep; a single run is measured by `cytosae-cache evaluate`")
    if sweep is not None:
        if config.resume is not None:
            raise click.UsageError("--resume names one run; to resume a sweep, run its command again")
        from cytosae_pipeline.training.sweep import run_sweep

        table = run_sweep(config, sweep)
        if measure and is_first():
            from cytosae_pipeline.evaluation.sweeps import measure_sweep

            table = measure_sweep(config, table)
        print_result(table, table.describe(), as_json)
        if any(row.status == "failed" for row in table.rows):
            raise SystemExit(1)
        return
    from cytosae_pipeline.training.loop import train as run_training

    result = run_training(config)
    shown = {"losses/overall_loss": "loss", "metrics/explained_variance": "explained variance", "metrics/l0": "L0"}
    metrics = ", ".join(f"{text} {result.metrics[name]:.4g}" for name, text in shown.items() if name in result.metrics)
    text = (
        f"autoencoder ({result.status}, {result.n_steps:,} steps, {result.n_latents:,} latents): {result.sae}\n"
        f"last step: {metrics}\nmetrics and checkpoints: {result.folder}\n"
        f"next: {result.next}"
    )
    print_result(result, text, as_json)


@verb
@config_options(EvaluateConfig, leave_out=("vit_type",))
def evaluate(as_json: bool, **values: Any) -> None:
    """Measure how well an autoencoder reconstructs a store.

    Prints explained variance, L0, the share of dead latents and cosine similarity, overall and by label: what
    training prints at its end, for any autoencoder on any store of its encoder, also of another data set. On request
    also whether another seed finds the same latents, whether few latents tell labels apart, how similar the images of
    a latent are (docs/evaluation.md), and with --downstream how much of the encoder's embedding, and of a probe of the
    labels on it, the reconstruction keeps.

    \b
    cytosae-cache evaluate --dataset_name mll23 --sae_path latest
    cytosae-cache evaluate --dataset_name mll23 --sae_path seed1 --other_sae_path seed2 --probe --monosemanticity
    cytosae-cache evaluate --dataset_name bmc --sae_path SAE.pt --limit 2000 --json
    cytosae-cache evaluate --dataset_name mll23 --sae_path latest --downstream
    """
    config = make_config(EvaluateConfig, values)
    from cytosae_pipeline.evaluation.evaluate import run_evaluate

    result = run_evaluate(config)
    print_result(result, result.describe(), as_json)


@verb
@config_options(CompareConfig)
def compare(as_json: bool, **values: Any) -> None:
    """Compare two autoencoders latent by latent.

    Matches latents by what they do on the same images: two seeds, two architectures, or two encoders (two stores of the
    same images, such as DINOv2 and DinoBloom, or before and after fine-tuning). Writes tables of the latents with their
    partners, and of those that only one of the two has.

    \b
    cytosae-cache compare --dataset_name mll23 --sae_path seed1 --other_sae_path seed2
    cytosae-cache compare --store A.zarr --sae_path A.pt --other_store B.zarr --other_sae_path B.pt --json
    """
    config = make_config(CompareConfig, values)
    from cytosae_pipeline.evaluation.compare import run_compare

    result = run_compare(config)
    print_result(result, result.describe(), as_json)


@verb
@config_options(StatisticsConfig, leave_out=("threshold", "normalize"))
def features(as_json: bool, **values: Any) -> None:
    """Find each latent's top images, mean and sparsity.

    \b
    cytosae-cache features --dataset_name mll23 --sae_path latest --top_k 10
    """
    config = make_config(StatisticsConfig, values)
    from cytosae_pipeline.statistics.verbs import run_features

    result = run_features(config)
    text = (
        f"{result.n_active:,} of {result.n_latents:,} latents are active on any of "
        f"{say_count(result.n_images, 'image')}\n"
        f"{_list_files(result)}\nlook at it: {result.next}"
    )
    print_result(result, text, as_json)


def _list_files(result: Any) -> str:
    """The files of a statistic, and whether they were written now."""
    names = ", ".join(path.name for path in result.files)
    return f"{'there already' if result.reused else 'wrote'} in {result.folder}: {names}"


@verb
@config_options(StatisticsConfig, leave_out=("top_k",))
def classes(as_json: bool, **values: Any) -> None:
    """Count tokens above a threshold, by class.

    \b
    cytosae-cache classes --dataset_name mll23 --sae_path latest --threshold 0.2
    """
    _count(values, "label", as_json)


@verb
@config_options(StatisticsConfig, leave_out=("top_k",))
def patients(as_json: bool, **values: Any) -> None:
    """Count tokens above a threshold, by patient.

    With several --threshold all raw counts are kept; cls_sae_cnt.npy uses the first.

    \b
    cytosae-cache patients --dataset_name hehr --sae_path latest --threshold 0.2
    """
    _count(values, "patient", as_json)


def _count(values: dict[str, Any], kind: Any, as_json: bool) -> None:
    """`classes` and `patients`."""
    config = make_config(StatisticsConfig, values)
    from cytosae_pipeline.statistics.verbs import run_counts

    result = run_counts(config, kind)
    nouns = ("patient", "patients") if kind == "patient" else ("class", "classes")
    text = (
        f"{say_count(len(result.groups), *nouns)} x {result.n_latents:,} latents from "
        f"{say_count(result.n_images, 'image')}\n{_list_files(result)}\nlook at them: {result.next}"
    )
    print_result(result, text, as_json)


@verb
@config_options(ReportConfig)
def report(as_json: bool, **values: Any) -> None:
    """Write a page of cells, latents and patients.

    The page is a folder that opens from disk, offline, in any browser: a scatter of all latents, each latent's top
    images with heat maps over the cells, images analysed patch by patch, patients compared by group. Statistics that
    are missing are computed first. Needs the images for the pictures, but not the vision transformer; looks for them
    where the store was built from, unless --images says where they are now.

    \b
    cytosae-cache report --dataset_name mll23 --sae_path latest
    cytosae-cache report --dataset_name hehr --sae_path latest --groups patients.csv
    cytosae-cache report --dataset_name mll23 --sae_path latest --latents 12,500-520
    """
    config = make_config(ReportConfig, values)
    from cytosae_pipeline.report.static import write_report

    result = write_report(config)
    lines = [f"{say_count(result.n_latents, 'latent')} and {say_count(result.n_images, 'image')} have a page each"]
    if result.figures:
        lines.append(f"figures: {result.figures[0].parent}")
    if result.key is not None:
        lines.append(f"key of the pseudonyms (not part of the report; keep it secret): {result.key}")
    print_result(result, "\n".join([*lines, f"open in a browser: {result.index}"]), as_json)


@verb
@config_options(ExploreConfig)
def explore(as_json: bool, **values: Any) -> None:
    """Serve the page live: any latent, any image, your own images.

    Serves the page of `report` to this machine only, until Ctrl-C. Every latent and every image can be opened. Latents
    can be named and annotated; notes are kept beside the feature data and appear in later reports. It also analyses
    images of your own, which are not stored, if the vision transformer is where the store was built from or is named
    with --model_path. The printed address contains a secret that is new each time;
    requests without it are refused. Needs, in your clone: pip install ".[explore]"

    With --rate RATER it serves a blinded rating of latents instead: examples without numbers, labels, patients or
    values, an intruder to be found, and decoys. Answers are kept beside the feature data; see `ratings` and --passed.

    \b
    cytosae-cache explore --dataset_name mll23 --sae_path latest
    cytosae-cache explore --dataset_name mll23 --sae_path SAE.pt --model_path ./DinoBloom-B.pth --images ./mll23
    cytosae-cache explore --dataset_name mll23 --sae_path latest --rate anna --n_latents 40
    On a remote machine:  cytosae-cache explore --port 8080 ...  there,  ssh -L 8080:127.0.0.1:8080 SERVER  here
    """
    config = make_config(ExploreConfig, values)
    if config.rate is not None:
        from cytosae_pipeline.report.rating.server import rate

        rated = rate(config, lambda serving: print_result(serving, serving.describe(), as_json))
        if not as_json:
            click.echo(f"\nstopped; {rated.n_rated:,} of {rated.n_items:,} items are rated, kept in {rated.path}")
        return
    from cytosae_pipeline.report.explore.server import explore as run_explore

    ended = run_explore(config, lambda serving: print_result(serving, serving.describe(), as_json))
    if not as_json:
        click.echo(f"\nstopped; names and notes of {say_count(ended.n_notes, 'latent')} are kept in {ended.notes}")


@verb
@config_options(ExportConfig, leave_out=("model_path", "images", "layout", "top_k", "threshold", "normalize"))
def export(as_json: bool, **values: Any) -> None:
    """Write an autoencoder or its statistics for other programs.

    Every verb reads exported autoencoders (saelens, safetensors, reference) as --sae_path, and those of other programs
    (docs/autoencoders.md); --sae_arch states what their files do not contain. The pickled config that
    `reference` writes runs code when other programs unpickle it; it is read here without being executed.

    Statistics (anndata, csv, parquet) are the results of `features` and `patients` and the score of every image;
    missing results are computed first. An atlas is a folder to pass on, without images, paths or names of patients, in
    which `apply` places new images (docs/atlas.md).

    \b
    cytosae-cache export --sae_path latest --format saelens
    cytosae-cache export --sae_path latest --format safetensors --out sae.safetensors
    cytosae-cache export --sae_path latest --format anndata --dataset_name mll23
    cytosae-cache export --sae_path latest --format atlas --dataset_name mll23 --groups patients.csv --out mll23.atlas
    """
    config = make_config(ExportConfig, values)
    if config.format == "atlas":
        atlas_verbs.write_atlas(config, as_json)
        return
    from cytosae_pipeline.export.run import run_export
    from cytosae_pipeline.export.statistics import TablesResult

    result = run_export(config)
    if isinstance(result, TablesResult):
        text = (
            f"{say_count(result.n_images, 'image')} and {say_count(result.n_patients, 'patient')} x "
            f"{say_count(result.n_latents, 'latent')} as "
            f"{result.format}\nwrote in {result.folder}: {', '.join(path.name for path in result.files)}"
        )
        print_result(result, text, as_json)
        return
    size = f"{result.d_in} -> {result.n_latents:,}"
    text = f"wrote {result.architecture} autoencoder {size} as {result.format}: {result.path}"
    if result.format == "saelens":
        text += f"\nopen it with: from sae_lens import SAE; SAE.load_from_disk({str(result.path)!r})"
    print_result(result, text, as_json)


@verb
@config_options(DemoConfig)
def demo(as_json: bool, **values: Any) -> None:
    """Run the whole program on a synthetic cohort.

    Needs no data, download or GPU, and about a minute. Draws blood cells of patients in three groups that differ in
    cell composition, builds the store with the embedded vision transformer, trains an autoencoder, computes all
    statistics, checks that the groups are recovered, and writes a report to open in a browser.
    """
    config = make_config(DemoConfig, values)
    from cytosae_pipeline.demo.run import run_demo

    result = run_demo(config.root_dir, seed=config.seed, scanners=config.scanners)
    print_result(result, result.describe(), as_json)
    if not result.recovered:
        raise SystemExit(1)
