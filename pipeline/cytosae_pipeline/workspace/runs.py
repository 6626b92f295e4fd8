"""Training runs of a workspace: found by name, by folder, or as the newest one that is finished."""

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from cytosae_pipeline.config import SaeChoice
from cytosae_pipeline.config.commands import command
from cytosae_pipeline.config.fields import suggest
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.workspace.find import IMPORTED
from cytosae_pipeline.workspace.paths import Workspace, final_name

logger = logging.getLogger(__name__)

LATEST = "latest"
"""The word that stands for the newest finished run."""

CONFIG_NAME = "config.json"
"""File by which the folder of a run is recognised."""

_MAX_CONFIG_BYTES = 1 << 20
_TAIL_BYTES = 1 << 16
_Choice = TypeVar("_Choice", bound=SaeChoice)


@dataclass(frozen=True)
class RunFolder:
    """The folder of a training run."""

    folder: Path
    """The folder."""
    recipe: dict[str, Any]
    """What determines its numbers, as `train` wrote it."""

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.folder.name

    @property
    def sae(self) -> Path | None:
        """The finished autoencoder; None while the run is unfinished."""
        model, *others = (self.recipe.get(name) for name in ("model_name", "module_name", "n_latents"))
        for block in (self.recipe.get("block_layer"), IMPORTED):
            path = self.folder / final_name(str(model), str(block), *others)  # type: ignore[arg-type] # of a file
            if path.is_file():
                return path
        return None

    @property
    def resume_command(self) -> str | None:
        """The command that finishes an unfinished run; None if it does not lie where `train` looks for runs."""
        *_, out, checkpoints, _ = ("", "", *self.folder.parts)
        if (out, checkpoints) != ("out", "checkpoints"):
            return None
        root = self.folder.parents[2]
        return command("train", root_dir=None if root == Path() else root, resume=self.name)

    def last_metrics(self) -> dict[str, float]:
        """The last whole line of its metrics; empty if there is none."""
        try:
            with (self.folder / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
                lines = file.read().splitlines()
        except OSError:
            return {}
        for line in reversed(lines):
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(found, dict):
                numbers = {name: value for name, value in found.items() if isinstance(value, int | float)}
                return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}
        return {}


def open_run(folder: Path) -> RunFolder:
    """A run from its folder.

    Raises:
        UserError: If the folder is not that of a run.
    """
    path = folder / CONFIG_NAME
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise UserError(f"more than {_MAX_CONFIG_BYTES:,} bytes")
        recipe = json.loads(path.read_text("utf-8"))["recipe"]
        if not isinstance(recipe, dict):
            raise UserError("its recipe is no JSON object")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"'{path}' is not the config of a run: {error!s:.200}") from error
    return RunFolder(folder, recipe)


def run_folders(workspace: Workspace) -> list[Path]:
    """Folders of all runs, sorted by name, readable or not."""
    return sorted(path.parent for path in workspace.checkpoints_dir.glob(f"*/{CONFIG_NAME}"))


def iter_runs(workspace: Workspace) -> Iterator[RunFolder]:
    """All runs that can be read, sorted by name."""
    for folder in run_folders(workspace):
        with contextlib.suppress(UserError):
            yield open_run(folder)


def written_at(path: Path) -> datetime:
    """When a file was written, in local time."""
    return datetime.fromtimestamp(path.stat().st_mtime).astimezone()


def resolve_sae(config: _Choice) -> _Choice:
    """The same options with the path of the autoencoder where a run's name, its folder or `latest` was given.

    Args:
        config: Options of a verb.

    Raises:
        UserError: If such a run is unfinished, or a name means a path and a run at once.
    """
    if config.sae_path is None:
        return config
    workspace, path = Workspace(config.root_dir), config.sae_path
    named = _named(workspace, str(path))
    is_word = named is not None or path == Path(LATEST)
    if is_word and path.exists() and (named is None or path.resolve() != named.resolve()):
        raise UserError(
            f"sae_path {path} means a run, but '{path}' exists as well: give '{path.absolute()}' or "
            f"'{named or workspace.checkpoints_dir}'"
        )
    if is_word and named is None:
        return replace(config, sae_path=_latest(config, workspace))
    folder = named or path
    if not (folder / CONFIG_NAME).is_file():
        return config
    try:
        run = open_run(folder)
    except UserError:
        return config  # a folder of another program, which has a config.json of its own
    return replace(config, sae_path=_finished(run))


def suggest_sae(path: Path, root_dir: Path) -> str:
    """`. Did you mean 'x'?` for the run whose name is nearest to a path that does not exist, or nothing."""
    return suggest(path.name, [*(folder.name for folder in run_folders(Workspace(root_dir))), LATEST])


def _named(workspace: Workspace, name: str) -> Path | None:
    """The folder of the run of this name, if there is one."""
    if Path(name).name != name:
        return None
    folder = workspace.checkpoints_dir / name
    return folder if (folder / CONFIG_NAME).is_file() else None


def _finished(run: RunFolder) -> Path:
    """The autoencoder of a run.

    Raises:
        UserError: If there is none yet.
    """
    if run.sae is not None:
        return run.sae
    on_the_way = list(run.folder.glob("*_sparse_autoencoder_*.pt"))
    newest = max(on_the_way, key=lambda path: path.stat().st_mtime_ns, default=None)
    way = f"; its newest checkpoint is '{newest}'" if newest else ""
    finish = f"Finish it with: {run.resume_command}"
    if run.resume_command is None:
        finish = "To finish it, move its folder to out/checkpoints below the --root_dir of its store"
    raise UserError(f"run '{run.name}' is unfinished{way}. {finish}")


def _latest(config: SaeChoice, workspace: Workspace) -> Path:
    """The autoencoder of the newest finished run.

    Raises:
        UserError: If no run is finished.
    """
    finished = [run.sae for run in iter_runs(workspace) if run.sae is not None]
    if not finished:
        raise UserError(
            f"there is no finished run in '{workspace.checkpoints_dir}' that {LATEST} could mean. List what there is "
            f"with: {command('list', config, ('root_dir',))}"
        )
    newest = max(finished, key=lambda path: (path.stat().st_mtime_ns, path.parent.name))
    logger.info(
        f"{LATEST}: run '{newest.parent.name}', finished {written_at(newest):%Y-%m-%d %H:%M}, the newest of "
        f"{len(finished):,}: '{newest}'"
    )
    return newest
