"""One run: an adapter trains in its own process, and what it saved is read and evaluated here."""

import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import cytosae
from benchmarks.campaign.data import Data
from benchmarks.campaign.environments import ROOT
from benchmarks.campaign.plan import OURS, Line, Run
from benchmarks.rivals.job import ANSWER_NAME, FORWARD_NAME, Job
from cytosae.backbones.errors import shown

N_SCALING = 100
"""Batches that a program gets to measure the scale of activations, if it is asked to."""

_TAIL_LINES = 10


class RunFailedError(RuntimeError):
    """An adapter ended without a result; the message ends with its last lines."""


class Sizes(NamedTuple):
    """What is the same for all runs of a campaign; the names are those of a line."""

    steps: int
    batch_images: int
    expansion: int
    held_out: float
    threads: int
    device: str


def train_and_evaluate(run: Run, sizes: Sizes, data: Data, command: Sequence[str | Path]) -> Line:
    """Carry out a run.

    Args:
        run: The run.
        sizes: Sizes of the campaign.
        data: The store.
        command: The command that starts the adapter.

    Raises:
        RunFailedError: If the adapter fails.
    """
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        job = make_job(run, sizes, data, folder)
        check = data.held_out_batch()
        answer = run_adapter(run, job, data, command, check, sizes.threads)
        line = {**run._asdict(), **describe(sizes, data), **{name: answer[name] for name in _MEASURED}}
        if not answer["is_finite"]:
            return {**line, **dict.fromkeys(_EVALUATED)}
        sae = cytosae.load(Path(folder) / answer["path"], **answer["stated"])
        with torch.no_grad():
            x = torch.from_numpy(check)
            ours, theirs = sae.decode(sae.encode(x)), torch.from_numpy(np.load(Path(folder) / FORWARD_NAME))
        found = data.evaluate(sae)
        return {
            **line,
            "explained_variance": found.explained_variance,
            "unexplained": 1 - found.explained_variance,
            "l0": found.l0,
            "dead_share": found.dead_share,
            "cosine": found.cosine,
            "forward_difference": float((ours - theirs).abs().max() / theirs.abs().max()),
        }


_MEASURED = ("version", "torch", "rate", "changed", "cpu_s", "wall_s", "waited_s", "peak_mb")
_EVALUATED = ("explained_variance", "unexplained", "l0", "dead_share", "cosine", "forward_difference")


def describe(sizes: Sizes, data: Data) -> dict[str, Any]:
    """The part of a line that says what was trained on: numbers and digests, no path."""
    n_tokens, d_model = data.trained.image_shape
    return {
        **sizes._asdict(), "latents": sizes.expansion * d_model, "store": data.store.contents[:12],
        "encoder": data.store.spec.model_name, "images_trained_on": len(data.trained),
        "images_held_out": len(data.evaluated), "tokens_per_image": n_tokens, "d_model": d_model,
        "machine": platform.machine(),
    }  # fmt: skip


def make_job(run: Run, sizes: Sizes, data: Data, folder: str) -> Job:
    """What the adapter is told."""
    n_tokens, d_model = data.trained.image_shape
    return Job(
        arch=run.arch, k=run.k, d_in=d_model, n_latents=sizes.expansion * d_model, tokens_per_image=n_tokens,
        batch_images=sizes.batch_images, n_steps=sizes.steps,
        n_scaling=min(N_SCALING, sizes.steps) if run.scaled else 0, seed=run.seed, order_seed=run.seed,
        rate=run.asked_rate, scaled=run.scaled, folder=folder, store=str(data.store.path),
        expansion=sizes.expansion, held_out=sizes.held_out, precision=run.precision, device=sizes.device,
    )  # fmt: skip


def adapter_command(program: str, python: Path) -> list[str | Path]:
    """The command that starts a program's adapter.

    Args:
        program: The program, as in a line.
        python: The Python of its environment.
    """
    adapter = "ours" if program == OURS else program
    return [python, "-W", "ignore", "-m", f"benchmarks.rivals.{adapter}"]


def adapter_environment(program: str, n_threads: int) -> dict[str, str]:
    """The environment variables of an adapter.

    Args:
        program: The program, as in a line.
        n_threads: Its threads.
    """
    # Of ours, other programs' environments get nothing but the adapters.
    paths = [ROOT, ROOT / "cache", ROOT / "pipeline"] if program == OURS else [ROOT]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(n_threads))
    return {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(map(str, paths))}


def run_adapter(
    run: Run, job: Job, data: Data, command: Sequence[str | Path], check: np.ndarray, n_threads: int
) -> dict[str, Any]:
    """Start the adapter, send it its batches, and return what it measured.

    Raises:
        RunFailedError: If it ends without a result.
    """
    log_path = Path(job.folder) / "log"
    variables = adapter_environment(run.program, n_threads)
    with (
        log_path.open("wb") as output,
        subprocess.Popen(
            command, cwd=ROOT, env=variables, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT
        ) as process,
    ):
        assert process.stdin is not None
        try:
            # An adapter that ends early breaks the pipe; its exit code says so below.
            with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
                pipe.write(json.dumps(job._asdict()).encode() + b"\n")
                # Ours reads the store itself, in the same order.
                for n_batches in () if run.program == OURS else (job.n_scaling, job.n_steps):
                    for batch in data.iter_batches(run.seed, n_batches):
                        pipe.write(batch.data)
                pipe.write(check.data)
            process.wait()
        except BaseException:
            process.kill()
            raise
    answer_path = Path(job.folder) / ANSWER_NAME
    if process.returncode or not answer_path.exists():
        log = log_path.read_text(errors="replace")
        raise failure(run.program, f"train {run.arch}", process.returncode, log)
    found: dict[str, Any] = json.loads(answer_path.read_text())
    return found


def failure(program: str, task: str, code: int, log: str) -> RunFailedError:
    """What to raise after an adapter has failed.

    Args:
        program: The program, as in a line.
        task: What it was to do.
        code: Its exit code.
        log: What it printed.
    """
    tail = [f"  {shown(line)}" for line in log.splitlines()[-_TAIL_LINES:]]
    return RunFailedError("\n".join([f"{program} failed to {task} (exit code {code}):", *tail]))


def own_python() -> Path:
    """The Python of our own environment."""
    return Path(sys.executable)
