"""Training: one or several autoencoders on one stream of a store's activations."""

import contextlib
import functools
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cytosae.formats.checkpoint import load
from cytosae.sae.base import Sae
from cytosae_cache.errors import StoreError
from cytosae_cache.reading.concat import ConcatReader
from cytosae_cache.reading.reader import StoreReader
from cytosae_pipeline.config import TrainConfig
from cytosae_pipeline.config.commands import command
from cytosae_pipeline.errors import say_count
from cytosae_pipeline.runtime.interrupts import HeldInterrupts
from cytosae_pipeline.runtime.memory import exceeds_page_cache, limit_primitive_cache
from cytosae_pipeline.runtime.progress import Progress
from cytosae_pipeline.runtime.ranks import RankStoppedError, joined, launched
from cytosae_pipeline.training.batches import Batches, TensorBatch, open_batches
from cytosae_pipeline.training.claims import claimed, claimed_together, unfinished
from cytosae_pipeline.training.expectations import explain_dense
from cytosae_pipeline.training.holdout import held_out
from cytosae_pipeline.training.init import DataInit, choose_tokens
from cytosae_pipeline.training.placement import choose_placement, find_free_memory, find_needs
from cytosae_pipeline.training.requirements import require_disk, require_training_memory
from cytosae_pipeline.training.runs import Run, TrainingError, prepare_together
from cytosae_pipeline.training.trainer import Trainer
from cytosae_pipeline.workspace.runs import RunFolder

logger = logging.getLogger(__name__)

Status = Literal["trained", "resumed", "already trained", "failed"]


@dataclass(frozen=True)
class TrainResult:
    """What `train` did."""

    sae: Path
    """The finished autoencoder."""
    folder: Path
    """The run's folder."""
    status: Status
    """What had to be done."""
    n_steps: int
    """Steps of the whole run."""
    n_latents: int
    """Latents S."""
    metrics: dict[str, float]
    """Metrics of the last log line."""
    step_s: float | None
    """Mean time of a step without waiting for data; None if there was nothing to do. On a GPU, time to launch it."""
    next: str
    """The command that reads the autoencoder."""

    def load(self, *, device: str = "cpu") -> Sae:
        """The finished autoencoder, ready to use."""
        return load(self.sae, device=device)


def train(config: TrainConfig) -> TrainResult:
    """Train an autoencoder, resume an interrupted run, or do nothing if the run is finished.

    Processes that torchrun started train it together: rank 0 writes all files.

    Raises:
        ValueError: If the store is missing or does not fit the options; the message says what to do.
        StoreBusyError: If another process trains the same run.
        UserError: If it does not fit into memory or on the disk.
        TrainingError: If the loss is no longer finite; checkpoints are kept, and no final file is written.
    """
    with joined(on_gpus=config.device in ("auto", "cuda")) as world:
        run = replace(prepare_together(config, world), world=world)
        require_room([run])
        with claimed_together([run], world) as todo:
            if not todo:
                logger.info(f"run '{run.folder.name}' is already trained: nothing to do")
                return _result(run, "already trained", None)
            loop = TrainingLoop(todo)
            (failure,) = loop.run()
        if failure is not None:
            raise failure
        world.add(0)  # rank 0 has written everything
        return _result(run, "resumed" if loop.resumed else "trained", loop.step_s[run.folder])


def train_together(runs: Sequence[Run]) -> list[TrainResult]:
    """Train several autoencoders on the same batches, each read once. One that fails does not affect the others.

    Args:
        runs: Runs on the same stores in the same order.

    Raises:
        StoreBusyError: If another process trains one of the runs.
        UserError: If they do not fit into memory or on the disk.
    """
    require_room(runs)
    with claimed(runs) as todo:
        results = {run.folder: _result(run, "already trained", None) for run in runs if run not in todo}
        if todo:
            loop = TrainingLoop(todo)
            for run, failure in zip(todo, loop.run(), strict=True):
                status: Status = "failed" if failure else "resumed" if loop.resumed else "trained"
                results[run.folder] = _result(run, status, loop.step_s[run.folder])
                if failure:
                    logger.info(str(failure))
    return [results[run.folder] for run in runs]


def require_room(runs: Sequence[Run]) -> None:
    """Refuse unfinished runs that do not fit into memory or on the disk, before anything of them is written.

    Raises:
        UserError: If they do not; the message says what makes them smaller.
    """
    todo = unfinished(runs)
    if todo:
        logger.info(todo[0].products.explain())
        require_training_memory(todo, find_free_memory(todo[0].device))
        logger.info(require_disk(todo))


class TrainingLoop:
    """Feeds one stream of batches to all trainers.

    Args:
        runs: Runs on the same stores in the same order.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = runs
        self.resumed = False
        """Whether any run had been started before."""
        self.step_s: dict[Path, float | None] = {}
        """Mean time per step of every run, by its folder."""
        self._stopped_together = False
        """Whether all ranks have left the loop at the same step."""

    def run(self) -> list[TrainingError | None]:
        """Run all remaining steps. On Ctrl-C or an error of disk or store the states are saved first.

        Returns:
            The error of every run, or None.

        Raises:
            UserError: If `--resident` names a place with too little memory.
        """
        limit_primitive_cache()
        run = self._runs[0]
        config = run.config
        with contextlib.ExitStack() as stack:
            direct = exceeds_page_cache(sum(store.n_images * store.spec.record_bytes for store in run.stores))
            readers = [
                stack.enter_context(StoreReader(store, verify=not config.no_verify, direct=direct))
                for store in run.stores
            ]
            apart = [held_out(store, config.held_out, config.held_out_by) for store in run.stores]
            images = ConcatReader(readers, [~mask for mask in apart])
            evaluated = ConcatReader(readers, apart) if config.held_out else None
            start = DataInit(images, run.stores, choice=config.trained_on, unseen=evaluated)
            trainers = [Trainer(one, start, evaluated) for one in self._runs]
            return self._train(trainers, images)

    def _train(self, trainers: list[Trainer], images: ConcatReader) -> list[TrainingError | None]:
        """Feed all batches to the trainers."""
        run = trainers[0].run
        config = run.config
        samples_seen = min(trainer.samples_seen for trainer in trainers)
        self.resumed = any(trainer.samples_seen for trainer in trainers)
        for trainer in trainers:
            if trainer.samples_seen:
                logger.info(
                    f"resuming run '{trainer.run.folder.name}' after {say_count(trainer.samples_seen, 'image')}"
                )
        needs = find_needs([trainer.run for trainer in trainers], samples_seen=samples_seen)
        placement = choose_placement(config.resident, needs, find_free_memory(run.device))
        logger.info(placement.text)
        choose = functools.partial(choose_tokens, choice=config.trained_on, layout=run.store.spec.tokens)
        batches = open_batches(
            images,
            config,
            choose,
            samples_seen=samples_seen,
            device=run.device,
            place=placement.place,
            world=run.token_ranks,
        )
        progress = Progress("train", config.total_training_tokens, "images", done=samples_seen)
        with HeldInterrupts(repeated=launched() is not None) as interrupts:
            try:
                with contextlib.ExitStack() as loggers, progress:
                    for trainer in trainers:
                        loggers.enter_context(trainer.open_loggers())
                    failures = self._steps(trainers, batches, progress, interrupts)
            except (KeyboardInterrupt, OSError, StoreError, RankStoppedError):
                # After a second Ctrl-C the parameters may be half-way through a step: the last saved state stays.
                # Parts of the latents are saved by all ranks together, or not at all.
                can_save = not interrupts.torn and (self._stopped_together or run.latent_ranks.size == 1)
                for trainer in trainers if can_save else ():
                    if not trainer.has_unrecorded_step:
                        trainer.save_state()
                raise
        for trainer in trainers:
            self.step_s[trainer.run.folder] = trainer.seconds / trainer.n_timed if trainer.n_timed else None
            if failures[trainer] is None:
                trainer.finish()
        return list(failures.values())

    def _steps(
        self, trainers: list[Trainer], batches: Batches, progress: Progress, interrupts: HeldInterrupts
    ) -> dict[Trainer, TrainingError | None]:
        """Take every trainer's step on every batch; returns the errors of those that failed."""
        run = trainers[0].run
        failures: dict[Trainer, TrainingError | None] = dict.fromkeys(trainers)
        whole, interval = WaitingTime(batches), WaitingTime(batches)
        for batch, is_save_due in self._agreed(trainers, batches, interrupts):
            # Two calls: in a single one torch would convert on the host and then copy twice the bytes.
            x = batch.activations.to(run.device).float()
            pace = {"details/images_per_s": progress.rate, "details/data_wait_share": interval.share()}
            logged = False
            for trainer in trainers:
                if failures[trainer] is not None or trainer.samples_seen >= batch.samples_seen:
                    continue
                try:
                    logged |= trainer.train_on(x, batch.samples_seen, pace, is_save_due)
                except TrainingError as error:
                    failures[trainer] = error
            if logged:
                interval = WaitingTime(batches)
            progress.advance(batch.samples_seen - progress.done, trainers[0].note)
            if all(failures.values()):
                break
            if run.world.size == 1:  # else all ranks stop at one step, before the next one
                interrupts.check()
        logger.info(f"waited for data during {whole.share():.1%} of the time")
        return failures

    def _agreed(
        self, trainers: list[Trainer], batches: Batches, interrupts: HeldInterrupts
    ) -> Iterator[tuple[TensorBatch, bool]]:
        """The batches, and whether to save after the step on it: all ranks take a step, or none.

        Raises:
            KeyboardInterrupt: If any rank was interrupted.
            RankStoppedError: If another rank could not read its part of a batch.
        """
        world, remaining = trainers[0].run.world, iter(batches)
        while True:
            batch, failure = None, None
            try:
                batch = next(remaining, None)
            except (OSError, StoreError) as error:
                failure = error
            own = [failure is not None, interrupts.pending, any(trainer.is_save_due for trainer in trainers)]
            signs = world.gather_numbers(list(map(int, own)))
            failed, interrupted, is_save_due = (any(column) for column in zip(*signs, strict=True))
            self._stopped_together = failed or interrupted
            if failure is not None:
                raise failure
            if failed:
                raise RankStoppedError("another process could not read its part of a batch")
            if interrupted:
                raise KeyboardInterrupt
            if batch is None:
                return
            yield batch, is_save_due


class WaitingTime:
    """The share of time since its construction that was spent waiting for data.

    Args:
        batches: The batches.
    """

    def __init__(self, batches: Batches) -> None:
        self._batches, self._waited_s, self._start = batches, batches.waited_s, time.perf_counter()

    def share(self) -> float:
        """Between 0 and 1."""
        passed = time.perf_counter() - self._start
        return min(1.0, (self._batches.waited_s - self._waited_s) / passed) if passed > 0 else 0.0


def _result(run: Run, status: Status, step_s: float | None) -> TrainResult:
    """The result of a run."""
    following = command("features", run.config, sae_path=run.final_path)
    metrics = RunFolder(run.folder, run.recipe).last_metrics()
    l0 = metrics.get("eval/l0", metrics.get("metrics/l0"))
    if dense := explain_dense(run.config.arch, None if status == "failed" else l0, run.n_latents):
        logger.warning(f"run '{run.folder.name}': {dense}")
    return TrainResult(run.final_path, run.folder, status, run.n_steps, run.n_latents, metrics, step_s, following)
