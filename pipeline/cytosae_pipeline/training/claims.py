"""The exclusive right of one process to the folders of its runs, and what it does before the first step."""

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cytosae.formats.checkpoint import SaeCheckpointError, read_torch
from cytosae.sae.world import World
from cytosae_cache.errors import StoreBusyError
from cytosae_cache.storage.atomic import TEMPORARY_SUFFIX, write_file
from cytosae_cache.storage.lock import locked
from cytosae_pipeline import __version__
from cytosae_pipeline.training.runs import Run, TrainingError, differing_options, require_same_contents
from cytosae_pipeline.workspace.runs import CONFIG_NAME, is_whole, read_config

logger = logging.getLogger(__name__)

LOCK_NAME = "training.lock"
"""Lock in the folder of a run that is being trained."""


@contextlib.contextmanager
def claimed(runs: Sequence[Run]) -> Iterator[list[Run]]:
    """Hold the folders of the unfinished runs, so that no other process trains them at the same time.

    Their configs are written, or compared with those that are there, and what killed processes left is removed.

    Args:
        runs: The runs.

    Yields:
        Those that are not finished, in their order.

    Raises:
        StoreBusyError: If another process trains one of them; the message names it.
        TrainingError: If a run's name belongs to other options, or its config or autoencoder is damaged.
    """
    for run in runs:
        if is_finished(run):
            _tidy(run, has_config=_check_config(run))
    with contextlib.ExitStack() as locks:
        # In one order, so that of two sweeps with the same runs one gets them all.
        for run in sorted(unfinished(runs), key=lambda run: run.folder):
            locks.enter_context(locked(run.folder / LOCK_NAME, str(run.folder)))
            if not _check_config(run):
                _write_config(run)
            _remove_partial_files(run)
        yield unfinished(runs)


@contextlib.contextmanager
def claimed_together(runs: Sequence[Run], world: World) -> Iterator[list[Run]]:
    """`claimed` by several processes: rank 0 holds the locks of all.

    Args:
        runs: The runs, the same on every rank.
        world: The processes.

    Yields:
        Those that are not finished.
    """
    with contextlib.ExitStack() as locks:
        todo = list(runs) if world.rank else locks.enter_context(claimed(runs))
        names = json.loads(world.gather_texts(json.dumps([run.folder.name for run in todo]))[0])
        yield [run for run in runs if run.folder.name in names]


def unfinished(runs: Sequence[Run]) -> list[Run]:
    """The runs that are not finished, in their order.

    Raises:
        TrainingError: If a finished autoencoder is damaged.
    """
    return [run for run in runs if not is_finished(run)]


def is_finished(run: Run) -> bool:
    """Whether a run's autoencoder is there.

    Raises:
        TrainingError: If it is damaged.
    """
    path = run.final_path
    if not path.exists():
        return False
    if not is_whole(path):
        raise TrainingError(
            f"'{path}' is no whole autoencoder: it was cut off or damaged after it was written. Restore a copy, or "
            "move it away and run the command again to train from scratch"
        )
    return True


def _tidy(run: Run, *, has_config: bool) -> None:
    """Remove what was left beside a finished autoencoder, unless another process is about to, or nothing can be.

    A config that was lost is written again.
    """
    lock = run.folder / LOCK_NAME
    if has_config and not _leftovers(run) and not lock.exists():
        return
    with contextlib.suppress(StoreBusyError, OSError), locked(lock, str(run.folder)):
        if not has_config:
            _write_config(run)
        for path in _leftovers(run):
            path.unlink(missing_ok=True)


def _leftovers(run: Run) -> list[Path]:
    """States of a finished run, and half-written files."""
    return [*(path for path in run.state_paths if path.exists()), *_partial_files(run)]


def _partial_files(run: Run) -> list[Path]:
    """Files that a killed process was writing; only right while the run is locked."""
    return [path for path in run.folder.glob(f"*{TEMPORARY_SUFFIX}") if path.is_file()]


def _remove_partial_files(run: Run) -> None:
    for path in _partial_files(run):
        path.unlink(missing_ok=True)


def _check_config(run: Run) -> bool:
    """Whether the run's folder says what it was trained with.

    Raises:
        TrainingError: If it was trained with other options, or its config is damaged.
    """
    recorded = _recorded(run)
    if recorded is None:
        return False
    found, contents = recorded
    differing = differing_options(found, run.recipe)
    if differing:
        shown = "; ".join(
            f"{name}: {found.get(name)!r:.80} there, {run.recipe.get(name)!r:.80} now" for name in differing[:6]
        )
        raise TrainingError(f"run '{run.folder.name}' exists with other options ({shown}). Choose another --run_name")
    if not _has_begun(run) and contents != run.contents:
        return False
    require_same_contents(run, contents)
    return (run.folder / CONFIG_NAME).exists()


def _has_begun(run: Run) -> bool:
    """Whether anything was saved that depends on the activations."""
    return any(path.exists() for path in run.state_paths) or any(run.folder.glob("*_sparse_*.pt"))


def _recorded(run: Run) -> tuple[dict[str, Any], object] | None:
    """Recipe and contents of the stores in a run's config or, if that is lost, in its other files; None if in none."""
    path = run.folder / CONFIG_NAME
    if path.is_symlink() or path.exists():
        try:
            record = read_config(run.folder)
        except ValueError as error:
            raise TrainingError(
                f"{error}. Restore a copy, or move it away and run the command again with all its options: they are "
                "compared with those in the run's other files"
            ) from error
        return record["recipe"], record.get("contents")
    for other in (*run.state_paths, run.final_path):
        if not other.exists():
            continue
        with contextlib.suppress(SaeCheckpointError):
            value = read_torch(other)
            found = value.get("recipe", value.get("cfg")) if isinstance(value, dict) else None
            if isinstance(found, dict) and "spec_hash" in found:
                contents = value["contents"] if "contents" in value else found.get("contents")
                return {name: found.get(name) for name in run.recipe}, contents
    return None


def _write_config(run: Run) -> None:
    """Write the run's config."""
    options = json.loads(json.dumps(asdict(run.config), default=str))
    record = {
        "package_version": __version__, "recipe": run.recipe, "contents": run.contents, "options": options,
        "products": run.products.to_json(),
    }  # fmt: skip
    write_file(run.folder / CONFIG_NAME, (json.dumps(record, indent=1) + "\n").encode())
