"""Where metrics go: always a JSON-lines file; Weights & Biases and TensorBoard when asked."""

import functools
import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt

from cytosae_pipeline.errors import UserError
from cytosae_pipeline.training.background import Background, one_line

Metrics = Mapping[str, float | int]


class Histogram(NamedTuple):
    """How often values fall into which bin."""

    counts: npt.NDArray[np.int64]
    """Values in each bin, shape `(bins,)`."""
    edges: npt.NDArray[np.float64]
    """Where bins begin and end, shape `(bins + 1,)`."""


Histograms = Mapping[str, Histogram]


def make_histogram(values: npt.NDArray[np.floating[Any]], *, n_bins: int = 64) -> Histogram:
    """The histogram of the finite values, in equal bins from the least to the greatest."""
    counts, edges = np.histogram(values[np.isfinite(values)], bins=n_bins)
    return Histogram(counts.astype(np.int64), edges.astype(np.float64))


class Tracker(Protocol):
    """Takes metrics of training steps."""

    def log(self, step: int, metrics: Metrics, histograms: Histograms | None = None) -> None:
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

    def log(self, step: int, metrics: Metrics, histograms: Histograms | None = None) -> None:
        """Write a line, without histograms; NaN and infinity become null, since JSON has neither."""
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class WandbTracker:
    """Sends metrics, and nothing that names a path, a label or a patient, to Weights & Biases.

    Without a login, or without an answer from the server, it writes an offline run that `wandb sync` can upload later,
    and says so; it never prompts. It runs in the background: training neither waits for it nor stops with it.

    Args:
        project: Project.
        entity: Entity; the account's own by default.
        run_id: Identifier under which a resumed run goes on.
        folder: Folder for the run's files.
        config: Numbers of the recipe.
        init_timeout_s: Seconds that the server has to answer in; fewer than `close_s`, so that a short run is not lost.
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
                sys.stderr.write(f"wandb: no login found, {offline}\n")
        # Everything wandb would collect of its own accord stays here: code, git, host, packages, command line, console.
        settings = {
            "console": "off", "disable_code": True, "disable_git": True, "save_code": False, "x_disable_meta": True,
            "x_disable_stats": True, "x_disable_machine_info": True, "x_save_requirements": False, "host": "",
            "silent": True, "disable_job_creation": True, "init_timeout": init_timeout_s,
        }  # fmt: skip
        make = functools.partial(
            _open_wandb, project=project, entity=entity, id=run_id, name=run_id, dir=str(folder), config=dict(config),
            mode=mode, settings=settings, offline=offline,
        )  # fmt: skip
        advice = f"Every metric is in metrics.jsonl; what wandb has on disk goes up with: {upload}"
        self._background = Background("wandb", make, advice=advice, close_s=close_s)

    def log(self, step: int, metrics: Metrics, histograms: Histograms | None = None) -> None:
        """Send the metrics of a step."""
        self._background.log(step, metrics, histograms)

    def close(self) -> None:
        """Finish the run."""
        self._background.close()


class TensorboardTracker:
    """Writes event files for TensorBoard, in the background: training neither waits for it nor stops with it.

    Args:
        folder: Folder for the files.
        after_step: Later steps of earlier files no longer count: the resumed run writes them anew.

    Raises:
        UserError: If tensorboard is not installed.
    """

    def __init__(self, folder: Path, *, after_step: int = 0) -> None:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise UserError(
                "--tensorboard needs tensorboard: pip install tensorboard, or leave the option out"
            ) from error
        make = functools.partial(_open_tensorboard, log_dir=str(folder.resolve()), purge_step=after_step + 1)
        self._background = Background("tensorboard", make, advice="Every metric is in metrics.jsonl")

    def log(self, step: int, metrics: Metrics, histograms: Histograms | None = None) -> None:
        """Write the metrics of a step."""
        self._background.log(step, metrics, histograms)

    def close(self) -> None:
        """Finish the files."""
        self._background.close()


class Trackers:
    """Several trackers as one; use as a context manager."""

    def __init__(self, *trackers: Tracker) -> None:
        self._trackers = trackers

    def log(self, step: int, metrics: Metrics, histograms: Histograms | None = None) -> None:
        """Record the metrics of a step everywhere."""
        for tracker in self._trackers:
            tracker.log(step, metrics, histograms)

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


class _TensorboardFiles:
    """Event files, written by torch's writer in this process."""

    def __init__(self, writer: Any) -> None:  # noqa: ANN401 - torch leaves it untyped
        self._writer = writer

    def log(self, step: int, metrics: Metrics, histograms: Histograms | None = None) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        for name, (counts, edges) in (histograms or {}).items():
            centres = (edges[:-1] + edges[1:]) / 2
            self._writer.add_histogram_raw(
                name, min=edges[0], max=edges[-1], num=counts.sum(), sum=counts @ centres,
                sum_squares=counts @ centres**2, bucket_limits=edges[1:].tolist(), bucket_counts=counts.tolist(),
                global_step=step,
            )  # fmt: skip

    def close(self) -> None:
        self._writer.close()


def _open_tensorboard(**options: Any) -> tuple[_TensorboardFiles, str]:  # noqa: ANN401
    """Start a new event file."""
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter
    return _TensorboardFiles(writer(**options, flush_secs=10)), ""


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
