"""Weights & Biases, in a process of its own, without anything that names a path, a label or a patient."""

import functools
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cytosae_pipeline.errors import UserError
from cytosae_pipeline.training.loggers.background import Background
from cytosae_pipeline.training.loggers.base import Histograms, Metrics, one_line

logger = logging.getLogger(__name__)


class WandbLogger:
    """Sends metrics, and nothing that names a path, a label or a patient, to Weights & Biases.

    Without a login, or if the server does not answer, it writes an offline run that `wandb sync` can upload later, and
    says so; it never prompts. It runs in the background: training neither waits for it nor stops with it.

    Args:
        project: Project.
        entity: Entity; the account's own by default.
        run_id: Identifier under which a resumed run continues.
        folder: Folder for the run's files.
        config: Numbers of the recipe.
        init_timeout_s: Seconds within which the server must answer; fewer than `close_s`, so that a short run is kept.
        close_s: Seconds that `close` waits for uploads.

    Raises:
        UserError: If wandb is not installed.
    """

    def __init__(
        self, *, project: str, entity: str | None, run_id: str, folder: Path, config: Mapping[str, Any],
        init_timeout_s: float = 20.0, close_s: float = 30.0,
    ) -> None:  # fmt: skip
        try:
            import wandb  # noqa: F401
        except ImportError as error:
            raise UserError("--log_to_wandb needs wandb: pip install wandb, or leave the option out") from error
        folder = folder.resolve()
        upload = f"wandb sync '{folder}/wandb/latest-run'"
        offline = f"so the run is written offline under '{folder}/wandb'. Upload it later with: {upload}"
        mode = os.environ.get("WANDB_MODE")
        if not mode:
            mode = "online" if _has_login() else "offline"
            if mode == "offline":
                logger.warning(f"wandb: no login found, {offline}")
        # What wandb collects by default is switched off: code, git, host, packages, command line, console.
        settings = {
            "console": "off", "disable_code": True, "disable_git": True, "save_code": False, "x_disable_meta": True,
            "x_disable_stats": True, "x_disable_machine_info": True, "x_save_requirements": False, "host": "",
            "silent": True, "disable_job_creation": True, "init_timeout": init_timeout_s,
        }  # fmt: skip
        make = functools.partial(
            _open_wandb, project=project, entity=entity, id=run_id, name=run_id, dir=str(folder), config=dict(config),
            mode=mode, settings=settings, offline=offline,
        )  # fmt: skip
        advice = f"Every metric is in metrics.jsonl; upload what wandb has on disk with: {upload}"
        self._background = Background("wandb", make, advice=advice, close_s=close_s)

    def log(self, step: int, metrics: Metrics, histograms: Histograms | None = None) -> None:
        """Send the metrics of a step."""
        self._background.log(step, metrics, histograms)

    def close(self) -> None:
        """Finish the run."""
        self._background.close()


class _WandbRun:
    """A run of wandb, in this process."""

    def __init__(self, run: Any) -> None:  # noqa: ANN401 - wandb has no types here
        self._run = run

    def log(self, step: int, metrics: Metrics, histograms: Histograms | None = None) -> None:
        import wandb

        plots = {name: wandb.Histogram(np_histogram=tuple(value)) for name, value in (histograms or {}).items()}
        self._run.log({**metrics, **plots}, step=step)

    def close(self) -> None:
        import wandb

        self._run.finish()
        wandb.teardown()


def _open_wandb(*, mode: str, settings: dict[str, Any], offline: str, **options: Any) -> tuple[_WandbRun, str]:  # noqa: ANN401
    """Start a run of wandb, offline if it cannot be started online; with the reason for that."""
    os.environ["WANDB_ERROR_REPORTING"] = "false"  # its crash reports name files and hosts
    import wandb

    def init(mode: Any) -> _WandbRun:  # noqa: ANN401 - whatever WANDB_MODE says
        resume: Any = "allow" if mode == "online" else None
        return _WandbRun(wandb.init(**options, mode=mode, resume=resume, settings=wandb.Settings(**settings)))

    try:
        return init(mode), ""
    except Exception as error:
        if mode != "online":
            raise
        reason = one_line(error)
    wandb.teardown()  # its service holds on to the name of the run
    return init("offline"), f"wandb: the server cannot be used ({reason}), {offline}"


def _has_login() -> bool:
    """Whether wandb has an API key, from the environment or its own files; without a prompt and without the network."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc

    import wandb

    host = os.environ.get("WANDB_BASE_URL", wandb.Settings().base_url).split("//")[-1].split("/")[0]
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
