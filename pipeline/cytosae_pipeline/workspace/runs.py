"""Training runs of a workspace: found by name, by folder, or as the newest one that is finished."""

import json
import logging
import math
import os
import stat
import zipfile
from collections.abc import Iterator, Mapping
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

STATE_NAMES = ("training_state.pt", "training_state.before.pt")
"""States from which an interrupted run is resumed: the newest and the one before it."""

METRICS_NAME = "metrics.jsonl"
"""Metrics of a run, one JSON object per line."""

_MAX_CONFIG_BYTES = 1 << 20
_TAIL_BYTES = 1 << 16
_MOST_LETTERS = 200
_KINDS = {"model_name": str, "module_name": str, "arch": str, "dataset_name": str, "block_layer": int, "n_latents": int}
"""Types of what is read of a recipe here."""

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
        model, module, n_latents = (self.recipe[name] for name in ("model_name", "module_name", "n_latents"))
        for block in (self.recipe.get("block_layer"), IMPORTED):
            path = self.folder / final_name(model, str(block), module, n_latents)
            if path.parent == self.folder and path.is_file():
                return path
        return None

    @property
    def damage(self) -> str | None:
        """What is wrong with the finished autoencoder, and what to do; None if nothing is, or the run is unfinished."""
        sae = self.sae
        if sae is None or is_whole(sae):
            return None
        again = f"run: {self.resume_command}" if self.resume_command else "train it again"
        return (
            f"'{sae}' is no whole autoencoder: it was cut off or damaged after it was written. Restore a copy, or move "
            f"it away and {again}"
        )

    @property
    def resume_command(self) -> str | None:
        """The command that finishes an unfinished run; None if it does not lie where `train` looks for runs."""
        *_, out, checkpoints, _ = ("", "", *self.folder.parts)
        if (out, checkpoints) != ("out", "checkpoints"):
            return None
        root = self.folder.parents[2]
        return command("train", root_dir=None if root == Path() else root, resume=self.name)

    def last_metrics(self) -> dict[str, float]:
        """The numbers in the last whole line of its metrics; empty if there is none."""
        try:
            with open(self.folder / METRICS_NAME, "rb", opener=_open_at_once) as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
                lines = file.read(_TAIL_BYTES).splitlines()
        except OSError:
            return {}
        for line in reversed(lines):
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(found, dict):
                return {name: value for name, value in found.items() if _is_number(value)}
        return {}


def open_run(folder: Path) -> RunFolder:
    """A run from its folder.

    Raises:
        UserError: If the folder is not that of a run.
    """
    return RunFolder(folder, read_config(folder)["recipe"])


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a run: `recipe`, and `options` as `train` was given them.

    Raises:
        UserError: If it is missing or damaged, or not that of a run.
    """
    path = folder / CONFIG_NAME
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UserError("it is not a file")
            data = file.read(_MAX_CONFIG_BYTES + 1)
        if len(data) > _MAX_CONFIG_BYTES:
            raise UserError(f"more than {_MAX_CONFIG_BYTES:,} bytes")
        config = json.loads(data.decode("utf-8"))
        if not isinstance(config, dict) or not isinstance(config.get("recipe"), dict):
            raise UserError("it contains no recipe")
        _check_recipe(config["recipe"])
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{error!s:.200}"
        raise UserError(f"'{path}' is not the config of a run: {reason or type(error).__name__}") from error
    return config


def is_whole(path: Path) -> bool:
    """Whether a file that `torch.save` wrote has its end; nothing else of it is read."""
    try:
        return path.stat().st_size > 0 and zipfile.is_zipfile(path)
    except OSError:
        return False


def run_folders(workspace: Workspace) -> list[Path]:
    """Folders of all runs, sorted by name, readable or not."""
    try:
        return sorted(filter(_is_run, workspace.checkpoints_dir.iterdir()))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_run(folder: Path) -> bool:
    """Whether a folder has the config or a state of a run, in whatever condition, or does not let that be seen."""
    try:
        names = {path.name for path in folder.iterdir()}
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return not names.isdisjoint((CONFIG_NAME, *STATE_NAMES))


def _open_at_once(path: str, flags: int) -> int:
    """Open a file without waiting, as a pipe without a writer would let us do."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check_recipe(recipe: Mapping[str, Any]) -> None:
    """Raise UserError unless what is read of a recipe has its type and a length that names of files can have."""
    for name, kind in _KINDS.items():
        value = recipe.get(name)
        if name in ("arch", "dataset_name", "block_layer") and value is None:
            continue
        is_kind = isinstance(value, kind) and not isinstance(value, bool)
        if not is_kind or len(str(value)) > _MOST_LETTERS or "\0" in str(value):
            raise UserError(f"{name} must be of type {kind.__name__}, found {value!r:.80}")


def _is_number(value: object) -> bool:
    """Whether a JSON value is a number that a float can hold."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def iter_runs(workspace: Workspace) -> Iterator[RunFolder]:
    """All runs that can be read, sorted by name; the others are said."""
    for folder in run_folders(workspace):
        try:
            yield open_run(folder)
        except UserError as error:
            logger.warning(f"left out: {error}")


def written_at(path: Path) -> datetime:
    """When a file was written, in local time."""
    return datetime.fromtimestamp(path.stat().st_mtime).astimezone()


def resolve_sae(config: _Choice) -> _Choice:
    """The same options with the path of the autoencoder where a run's name, its folder or `latest` was given.

    Args:
        config: Options of a verb.

    Raises:
        UserError: If such a run is unfinished or damaged, or a name means a path and a run at once.
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
    if not _is_run(folder):
        return config
    try:
        run = open_run(folder)
    except UserError as error:
        saes = sorted(folder.glob("*_sparse_autoencoder_*.pt"), key=_age)
        if named is None and not saes:
            return config  # a folder of another program, which has a config.json of its own
        by_path = f". Its newest autoencoder is '{saes[0]}': give that path" if saes else ""
        raise UserError(f"{error}{by_path}") from error
    return replace(config, sae_path=_finished(run))


def suggest_sae(path: Path, root_dir: Path) -> str:
    """`. Did you mean 'x'?` for the run whose name is nearest to a path that does not exist, or nothing."""
    return suggest(path.name, [*(folder.name for folder in run_folders(Workspace(root_dir))), LATEST])


def _named(workspace: Workspace, name: str) -> Path | None:
    """The folder of the run of this name, if there is one."""
    if Path(name).name != name:
        return None
    folder = workspace.checkpoints_dir / name
    return folder if _is_run(folder) else None


def _age(path: Path) -> int:
    """A number that is smaller for files written later."""
    return -path.stat().st_mtime_ns


def _finished(run: RunFolder) -> Path:
    """The autoencoder of a run.

    Raises:
        UserError: If there is none yet, or it is damaged.
    """
    if run.damage is not None:
        raise UserError(run.damage)
    if run.sae is not None:
        return run.sae
    newest = min(run.folder.glob("*_sparse_autoencoder_*.pt"), key=_age, default=None)
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
    finished = []
    for run in iter_runs(workspace):
        if run.damage is not None:
            logger.warning(f"left out: {run.damage}")
        elif run.sae is not None:
            finished.append(run.sae)
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
