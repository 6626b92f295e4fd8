"""Several autoencoders from one stream: a grid of options, its runs, and their results."""

import itertools
import json
import logging
import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from cytosae.sae.world import World
from cytosae_cache.storage.atomic import make_folder, write_file
from cytosae_pipeline.config import TrainConfig
from cytosae_pipeline.config.fields import check_field
from cytosae_pipeline.config.train import OF_SOME, without_foreign
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.runtime.ranks import joined
from cytosae_pipeline.runtime.tables import format_number, format_table
from cytosae_pipeline.training.claims import unfinished
from cytosae_pipeline.training.loop import TrainResult, train_together
from cytosae_pipeline.training.pareto import Point, draw_pareto
from cytosae_pipeline.training.requirements import require_disk
from cytosae_pipeline.training.runs import NOT_THE_RECIPE, Run, prepare_together
from cytosae_pipeline.workspace.csv_files import to_csv
from cytosae_pipeline.workspace.paths import Workspace, file_part

_STREAM = {
    "with_dataset", "dataset_name", "model_name", "block_layer", "module_name", "batch_size", "total_training_tokens",
    "shuffle", "batch_of", "tokens", "class_token", "held_out", "held_out_by", "order_seed",
}  # fmt: skip
"""Options that determine the batches, which all runs of a sweep share."""

_MOST_RUNS = 256


@dataclass(frozen=True)
class SweepRow:
    """One run of a sweep."""

    run: str
    """Its name."""
    options: dict[str, Any]
    """What distinguishes it."""
    status: str
    """trained, resumed, already trained or failed."""
    explained_variance: float | None
    """On the held-out images or, without any, of the last logged step; None if the run failed."""
    l0: float | None
    """Mean number of active latents per token, on the same."""
    dead_share: float | None
    """Share of latents that are never active, on the same."""
    loss: float | None
    """Of the last logged step."""
    step_s: float | None
    """Mean time of a step; None if there was nothing to do."""
    sae: Path
    """The finished autoencoder."""
    arch: str
    """Its architecture."""
    seed: int
    """Seed of its weights."""
    measures: dict[str, float | None] = field(default_factory=dict)
    """What was measured afterwards beside the reconstruction, by name; None where it does not apply."""

    @property
    def text(self) -> str:
        """What distinguishes the run."""
        return ", ".join(f"{name} {value}" for name, value in self.options.items())


@dataclass(frozen=True)
class SweepResult:
    """Result of a sweep."""

    rows: list[SweepRow]
    """Its runs, in the grid's order."""
    table: Path
    """The same as CSV."""
    picture: Path
    """Explained variance and what was measured against L0, as SVG."""

    def describe(self) -> str:
        """The table as text."""
        measures = _measures(self.rows)
        header = ["run", "explained variance", "L0", "dead", "loss", "ms/step", "status", *measures]
        lines = [
            [
                row.run, format_number(row.explained_variance, ".4f"), format_number(row.l0, ".1f"),
                format_number(row.dead_share, ".1%"), format_number(row.loss, ".4g"),
                format_number(None if row.step_s is None else 1000 * row.step_s, ".0f"), row.status,
                *(format_number(row.measures.get(name), ".3f") for name in measures),
            ]
            for row in self.rows
        ]  # fmt: skip
        return f"{format_table(header, lines)}\ntable: {self.table}\npicture: {self.picture}"


def read_grid(path: Path | str) -> list[dict[str, Any]]:
    """The options of every run of a grid file.

    Keys are options of `train`. A list means one run with each of its values, several lists mean all combinations.
    Each `[[run]]` table, if there are any, is a grid of its own on top of the keys before them.

    Raises:
        UserError: If the file cannot be read, or an option is unknown, belongs to the stream or has a wrong value.
    """
    path = Path(path)
    try:
        grid = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--sweep '{path}' cannot be read: {error}") from error
    except RecursionError as error:
        raise UserError(f"--sweep '{path}' cannot be read: its values are nested too deeply") from error
    tables = grid.pop("run", [{}])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"'run' in '{path}' must be written as [[run]] tables")
    runs: list[dict[str, Any]] = []
    for table in tables:
        values = {name: value if isinstance(value, list) else [value] for name, value in {**grid, **table}.items()}
        for name, choices in values.items():
            _check_name(path, name)
            converted = [_convert(path, name, value) for value in choices]
            values[name] = list(dict.fromkeys(converted))
        # Counted before they are made: lists of moderate length can give more combinations than fit into memory.
        n_runs = math.prod(map(len, values.values()))
        if n_runs > _MOST_RUNS:
            raise UserError(f"'{path}' describes {n_runs:,} runs; there must be 1 to {_MOST_RUNS}")
        runs += [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]
    runs = [run for number, run in enumerate(runs) if run not in runs[:number]]
    if not 1 <= len(runs) <= _MOST_RUNS:
        raise UserError(f"'{path}' describes {len(runs):,} runs; there must be 1 to {_MOST_RUNS}")
    return runs


def run_sweep(base: TrainConfig, path: Path | str) -> SweepResult:
    """Train every run of a grid on one stream; called again, it resumes unfinished runs.

    Processes that torchrun started deal the runs out: each trains its own on a stream of its own, and they exchange
    nothing until all are done.

    Args:
        base: Options that the grid does not set; its run name is the prefix of the runs' names.
        path: The grid file.
    """
    with joined(on_gpus=False, level=logging.WARNING) as world:
        if world.size > 1 and base.split != "data":
            raise UserError(
                f"a sweep is dealt out to the processes, each of which trains whole autoencoders: leave out --split "
                f"{base.split}, or train one run"
            )
        return _run_sweep(base, Path(path), world)


def _run_sweep(base: TrainConfig, path: Path, world: World) -> SweepResult:
    """`run_sweep` by the processes of a world."""
    grid = read_grid(path)
    prefix = base.run_name or file_part(path.stem)
    varying = [name for name in TrainConfig.__dataclass_fields__ if len({str(run.get(name)) for run in grid}) > 1]
    grid = _without_foreign(grid, base.arch)
    runs: list[Run] = []
    for values in grid:
        own = {name: values[name] for name in varying if name in values}
        name = "-".join([prefix, *(file_part(f"{key}_{value}") for key, value in own.items())])
        try:
            arch = values.get("arch", base.arch)
            # Options of the command line apply to those runs whose architecture has them.
            foreign = {name: None for name in OF_SOME if arch != base.arch and name not in values}
            foreign = {name: None for name in foreign if name not in without_foreign(arch, foreign)}
            config = replace(base, **{**foreign, **values}, order_seed=base.shuffle_seed, run_name=name)
        except ValueError as error:
            raise UserError(f"a run of '{path}' ({name}) is not possible: {error}") from error
        runs.append(prepare_together(config, world, runs[0].stores if runs else None))
    options = [{name: values.get(name) for name in varying} for values in grid]
    rows = _train_dealt(runs, options, world)
    folder = Workspace(base.root_dir).run_dir(prefix)
    result = SweepResult(rows, folder / "sweep.csv", folder / "sweep.svg")
    if not world.rank:
        make_folder(folder)
        write_sweep(result)
    return result


def write_sweep(result: SweepResult, units: Mapping[str, str] | None = None) -> None:
    """Write the table and the picture of a sweep, in place of those that are there.

    Args:
        result: The sweep.
        units: Unit of each measure, for the picture.
    """
    write_file(result.table, _to_csv(result.rows))
    points = [
        Point(
            row.l0,
            math.nan if row.explained_variance is None else row.explained_variance,
            row.arch,
            row.text,
            row.measures,
        )
        for row in result.rows
        if row.l0 is not None
    ]
    write_file(result.picture, draw_pareto(points, units or {}).encode())


def _train_dealt(runs: list[Run], options: list[dict[str, Any]], world: World) -> list[SweepRow]:
    """Train every n-th run on each of n processes.

    Args:
        runs: All runs.
        options: What distinguishes each.
        world: The processes.

    Returns:
        The rows of all runs, on every process.
    """
    if todo := unfinished(runs):
        require_disk(todo)  # of all of them: each process counts its own alone
    own = slice(world.rank, None, world.size)
    results = train_together(runs[own]) if runs[own] else []
    rows = [_make_row(*one) for one in zip(runs[own], results, options[own], strict=True)]
    dealt = [json.loads(text) for text in world.gather_texts(json.dumps([asdict(row) for row in rows], default=str))]
    found = [dealt[number % world.size][number // world.size] for number in range(len(runs))]
    return [SweepRow(**{**row, "sae": Path(row["sae"])}) for row in found]


def _without_foreign(grid: list[dict[str, Any]], arch: str) -> list[dict[str, Any]]:
    """The runs, each without options that only other architectures of the grid have, and each once."""
    architectures = {run.get("arch", arch) for run in grid}
    kept: list[dict[str, Any]] = []
    for run in grid:
        usable = {name for one in architectures for name in without_foreign(one, run)}
        own = without_foreign(run.get("arch", arch), run)
        kept.append({name: value for name, value in run.items() if name in own or name not in usable})
    return [run for number, run in enumerate(kept) if run not in kept[:number]]


def _check_name(path: Path, name: str) -> None:
    """Raise for a key that is not an option, or that all runs share."""
    known = {field.name for field in fields(TrainConfig)} - NOT_THE_RECIPE
    if name in _STREAM:
        raise UserError(
            f"'{name}' in '{path}' determines the batches, which all runs of a sweep share: give it on the command line"
        )
    if name not in known:
        raise UserError(
            f"'{path}' has '{name}', which cannot vary between runs. Allowed are: {', '.join(sorted(known - _STREAM))}"
        )


def _convert(path: Path, name: str, value: object) -> Any:  # noqa: ANN401 - an option's value
    """A value in the option's own type."""
    try:
        return check_field(TrainConfig, name, value)
    except UserError as error:
        raise UserError(f"'{path}': {error}") from error


def _make_row(run: Run, result: TrainResult, options: dict[str, Any]) -> SweepRow:
    """The result of a run."""
    metrics = result.metrics if result.status != "failed" else {}

    def find(*names: str) -> float | None:
        return next((metrics[name] for name in names if name in metrics), None)

    return SweepRow(
        run.folder.name,
        options,
        result.status,
        find("eval/explained_variance", "metrics/explained_variance"),
        find("eval/l0", "metrics/l0"),
        find("eval/dead_share", "sparsity/dead_features"),
        find("losses/overall_loss"),
        result.step_s,
        run.final_path,
        str(run.config.arch),
        run.config.seed,
    )


def _measures(rows: list[SweepRow]) -> list[str]:
    """Names of what was measured of any run, in their order."""
    return list(dict.fromkeys(name for row in rows for name in row.measures))


def _to_csv(rows: list[SweepRow]) -> bytes:
    """The table."""
    varying, measures = list(dict.fromkeys(name for row in rows for name in row.options)), _measures(rows)
    header = ["run", *varying, "explained_variance", "l0", "dead_share", "loss", "step_s", "status", "sae", *measures]
    return to_csv(
        header,
        (
            [
                row.run, *(row.options[name] for name in varying),
                row.explained_variance, row.l0, row.dead_share, row.loss, row.step_s, row.status, row.sae,
                *(row.measures.get(name) for name in measures),
            ]
            for row in rows
        ),
    )  # fmt: skip
