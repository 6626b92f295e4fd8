"""Reading the state of an interrupted run: the newest that is whole, and only of the same options and activations."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cytosae.formats.checkpoint import SaeCheckpointError, read_torch
from cytosae_pipeline.runtime.shortage import is_shortage
from cytosae_pipeline.training.runs import Run, TrainingError, differing_options, require_same_contents

logger = logging.getLogger(__name__)

_DAMAGED = (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError)
"""What a state raises whose file is whole and whose contents are something else."""


def load_state(run: Run, restore: Callable[[Mapping[str, Any]], None]) -> bool:
    """Restore the state of an interrupted run, if there is one; the one before if the newest is damaged.

    Args:
        run: The run.
        restore: Takes the state over.

    Raises:
        TrainingError: If all states are damaged, or belong to other options or to an older version.
    """
    damaged: list[Path] = []
    for path in run.state_paths:
        if not path.exists():
            continue
        try:
            # Of a part, the whole is read into the host's memory.
            state = read_torch(path, device="cpu" if run.latent_ranks.size > 1 else run.device)
            _check_state(run, path, state)
            restore(state)
            return True
        except TrainingError:
            raise
        except (SaeCheckpointError, *_DAMAGED) as error:
            if is_shortage(error):
                raise
            reason = str(error) if isinstance(error, SaeCheckpointError) else f"'{path}' is no state of a run"
            logger.warning(f"{reason}{'' if damaged else '; trying the state before it'}")
            damaged.append(path)
    if damaged:
        names = " and ".join(f"'{path}'" for path in damaged)
        raise TrainingError(
            f"run '{run.folder.name}' cannot be resumed: {names} cannot be read. Restore a copy, or move "
            f"{'it' if len(damaged) == 1 else 'both'} away and run the command again to train from the start"
        )
    return False


def _check_state(run: Run, path: Path, state: Mapping[str, Any]) -> None:
    """Refuse a state of other options, other activations or an older version.

    Raises:
        TrainingError: If it is one.
    """
    if differing_options(state["recipe"], run.recipe):
        raise TrainingError(f"'{path}' belongs to other options; choose another --run_name")
    if "samples_seen" not in state:
        raise TrainingError(
            f"'{path}' was written by an older version of cytosae-cache, whose unfinished runs cannot be "
            "resumed: finish the run with that version, or choose another --run_name"
        )
    require_same_contents(run, state.get("contents"))
    if "contents" not in state:
        logger.warning(f"'{path}' does not say which activations it is of: make sure that the store is the same")
