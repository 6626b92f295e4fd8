"""The destinations of a run's metrics."""

import hashlib

from cytosae_cache.format.spec import canonical_json
from cytosae_pipeline.training.loggers.base import MetricLogger, MetricLoggers
from cytosae_pipeline.training.loggers.jsonl import JsonlLogger
from cytosae_pipeline.training.loggers.tensorboard import TensorboardLogger
from cytosae_pipeline.training.loggers.weights_and_biases import WandbLogger
from cytosae_pipeline.training.runs import Run
from cytosae_pipeline.workspace.runs import METRICS_NAME


def open_loggers(run: Run, *, after_step: int) -> MetricLoggers:
    """Open all that the run's options name.

    Args:
        run: The run.
        after_step: Step from which it is resumed; what was logged of later ones is replaced.
    """
    config = run.config
    loggers: list[MetricLogger] = [JsonlLogger(run.folder / METRICS_NAME, after_step=after_step)]
    if config.log_to_wandb:
        loggers.append(_make_wandb(run))
    if config.tensorboard:
        loggers.append(TensorboardLogger(run.folder / "tensorboard", after_step=after_step))
    return MetricLoggers(*loggers)


def _make_wandb(run: Run) -> WandbLogger:
    """A Weights & Biases run that gets the recipe's numbers, but no data set, path or patient."""
    numbers = {name: value for name, value in run.recipe.items() if isinstance(value, int | float)}
    identity = hashlib.sha256(canonical_json([run.recipe, run.folder.name])).hexdigest()[:8]
    config = run.config
    return WandbLogger(
        project=config.wandb_project, entity=config.wandb_entity, run_id=identity, folder=run.folder, config=numbers
    )
