"""Where metrics go: always a JSON-lines file, and Weights & Biases when asked."""

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from cytosae_pipeline.config import UserError

Metrics = Mapping[str, float | int]


class Tracker(Protocol):
    """Takes metrics of training steps."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Record the metrics of a step."""
        ...

    def close(self) -> None:
        """Write what is pending."""
        ...


class JsonLines:
    """Appends one JSON object a line; a resumed run goes on in the same file.

    Args:
        path: The file.
        after_step: Lines of later steps are dropped: the resumed run writes them anew.
    """

    def __init__(self, path: Path, *, after_step: int = 0) -> None:
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except ValueError:  # the line that a killed run was writing
                    continue
                if record["step"] <= after_step:
                    kept.append(line + "\n")
        path.write_text("".join(kept))
        self._file = path.open("a", buffering=1)

    def log(self, step: int, metrics: Metrics) -> None:
        """Write a line; NaN and infinity become null, since JSON has neither."""
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class WandbTracker:
    """Sends metrics, and nothing that names a path, a label or a patient, to Weights & Biases.

    Without a login it writes an offline run that `wandb sync` can upload later, and says so; it never prompts.

    Args:
        project: Project.
        entity: Entity; the account's own by default.
        run_id: Identifier under which a resumed run goes on.
        folder: Folder for the run's files.
        config: Numbers of the recipe.
    """

    def __init__(
        self, *, project: str, entity: str | None, run_id: str, folder: Path, config: Mapping[str, Any]
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError("--log_to_wandb needs wandb: pip install wandb, or leave the option out") from error
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_login() else "offline")
        if mode == "offline":
            sys.stderr.write(
                f"wandb: no login found, so the run is written offline under '{folder}/wandb'. "
                f"Upload it later with: wandb sync '{folder}/wandb/latest-run'\n"
            )
        # Everything wandb would collect of its own accord stays here: code, git, host, command line, console, files.
        settings = wandb.Settings(
            console="off", disable_code=True, disable_git=True, save_code=False, x_disable_meta=True,
            x_disable_stats=True, x_disable_machine_info=True, silent=True, disable_job_creation=True,
        )  # fmt: skip
        self._run = wandb.init(
            project=project, entity=entity, id=run_id, name=run_id, dir=str(folder), config=dict(config), mode=mode,  # type: ignore[arg-type]
            resume="allow" if mode == "online" else None, settings=settings,
        )  # fmt: skip

    def log(self, step: int, metrics: Metrics) -> None:
        """Send the metrics of a step."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class Trackers:
    """Several trackers as one; use as a context manager."""

    def __init__(self, *trackers: Tracker) -> None:
        self._trackers = trackers

    def log(self, step: int, metrics: Metrics) -> None:
        """Record the metrics of a step everywhere."""
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def close(self) -> None:
        """Write what is pending everywhere."""
        for tracker in self._trackers:
            tracker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _has_login() -> bool:
    """Whether wandb has an API key, from the environment or its own files; asks nobody and nothing on the network."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc

    import wandb

    host = os.environ.get("WANDB_BASE_URL", wandb.Settings().base_url).split("//")[-1].split("/")[0]
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
