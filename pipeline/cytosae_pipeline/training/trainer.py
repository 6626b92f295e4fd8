"""Training of one autoencoder: step, schedule, metrics, checkpoints and state; `loop` feeds it."""

import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cytosae.formats.checkpoint import save_sae
from cytosae.sae.base import Sae
from cytosae.sae.loss import LossWeights, SaeLoss
from cytosae.sae.registry import make_sae
from cytosae.training.latent_parts import LatentParts
from cytosae.training.lr_schedule import LearningRateSchedule
from cytosae.training.metrics import explained_variance
from cytosae.training.step import TrainStep
from cytosae_cache.reading.concat import ConcatReader
from cytosae_cache.storage.atomic import replacing_path
from cytosae_pipeline.config import TrainConfig
from cytosae_pipeline.errors import say_count
from cytosae_pipeline.training.evaluation import Evaluation, evaluate, images_on_the_way
from cytosae_pipeline.training.expectations import Expectations
from cytosae_pipeline.training.init import DataInit
from cytosae_pipeline.training.loggers.base import MetricLoggers, make_histogram
from cytosae_pipeline.training.loggers.of_run import open_loggers
from cytosae_pipeline.training.matmul import fp32_matmul
from cytosae_pipeline.training.noise import find_noise
from cytosae_pipeline.training.runs import Run, TrainingError, sae_cfg
from cytosae_pipeline.training.states import load_state
from cytosae_pipeline.workspace.files import write_torch

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_SAVES = 300.0
_LEAST_FREQUENCY = 1e-10
"""Added before the logarithm, as in the reference; a latent that never fired is at -10."""


class Trainer:
    """Trains one autoencoder; resumes from the state of an interrupted run.

    Args:
        run: The run.
        start: Initial values that depend on the data.
        held_out: Images for evaluation; None for no evaluation.
    """

    def __init__(self, run: Run, start: DataInit, held_out: ConcatReader | None) -> None:
        self.run, self._start, self._held_out = run, start, held_out
        self.samples_seen = 0
        """Images trained on."""
        self.n_done = 0
        """Steps done."""
        self.seconds = 0.0
        """Duration of its steps in this process, in seconds."""
        self.n_timed = 0
        """Number of these steps."""
        self.note = ""
        """Summary of the last log line."""
        self.has_unrecorded_step = False
        """Whether log line or checkpoint of the last step could not be written: a run resumed after it never would."""
        config, layout = run.config, run.store.spec.tokens
        self._scaling = start.scaling.to(run.device) if config.standardise else None
        self._noise = find_noise(run, start)
        self._parts = LatentParts(run.latent_ranks, run.n_latents)
        whole = make_sae(
            config.arch, run.store.d_model, run.n_latents, seed=config.seed,
            device="cpu" if self._parts.is_cut else run.device, k=config.k, bandwidth=config.bandwidth,
        )  # fmt: skip
        sae = self._parts.cut_sae(whole, run.device)
        self.step = TrainStep(
            sae,
            lr=config.lr,
            weights=LossWeights(**{name: run.recipe[name] for name in LossWeights._fields if name in run.recipe}),
            use_ghost_grads=config.use_ghost_grads,
            dead_feature_window=run.revive_after_steps,
            mse_cls_coefficient=config.mse_cls_coefficient if layout.n_cls else 1.0,
            norm_weighted_l1=config.norm_weighted_l1,
            max_gradient=config.max_gradient_norm,
            matmul=run.matmul,
            beta1=config.adam_beta1,
            beta2=config.adam_beta2,
            encoder_lr_factor=config.encoder_lr_factor,
            weight_decay=config.weight_decay,
            token_ranks=run.token_ranks,
            latent_ranks=run.latent_ranks,
            parts=self._parts,
        )
        self._schedule = LearningRateSchedule(
            self.step.optimizer,
            config.lr_scheduler_name,
            n_steps=run.n_steps,
            warm_up_steps=config.warm_up_steps(run.n_steps),
            n_cycles=config.lr_cycles,
            decay_share=config.lr_decay_share,
        )
        self._expectations = Expectations(config, run.n_latents, run.n_steps, run.revive_after_steps)
        self._n_fired = torch.zeros_like(sae.b_enc, dtype=torch.int64)
        self._n_tokens = 0
        self._evaluation: Evaluation | None = None
        self._calibrated: dict[str, torch.Tensor] | None = None
        self._last_save = time.monotonic()
        self._loggers = MetricLoggers()
        if not load_state(run, self._restore):
            start.initialise_(whole, config)
            self._parts.copy_sae_(sae, whole)
        self._start_together(sae)
        self._due = _checkpoint_positions(config, after=self.samples_seen)
        self._upcoming = next(self._due, None)

    def _start_together(self, sae: Sae) -> None:
        """Make sure that all ranks train the same autoencoder from the same step on.

        Raises:
            TrainingError: If one has resumed from another state.
        """
        world, at = self.run.world, [self.samples_seen, self.n_done]
        first = world.gather_numbers(at)[0]
        if first != at:
            raise TrainingError(
                f"rank {world.rank} resumes run '{self.run.folder.name}' after {say_count(at[0], 'image')}, and rank 0 "
                f"after {first[0]:,}: all processes must see the same folder '{self.run.folder}'"
            )
        for values in sae.state_dict().values():
            self.run.token_ranks.broadcast_(values)

    def open_loggers(self) -> MetricLoggers:
        """Open the destinations of the metrics, of rank 0 alone; the caller closes them."""
        if self.run.world.rank:
            return self._loggers
        self._loggers = open_loggers(self.run, after_step=self.n_done)
        return self._loggers

    @property
    def is_save_due(self) -> bool:
        """Whether the last state was saved long ago."""
        return time.monotonic() - self._last_save > _SECONDS_BETWEEN_SAVES

    def train_on(self, x: torch.Tensor, samples_seen: int, pace: Mapping[str, float], saves: bool = False) -> bool:
        """One step.

        Args:
            x: Activations of the chosen tokens, float32, shape `(B, T, D)`, on the run's device.
            samples_seen: Images trained on after this step, by all ranks.
            pace: Metrics of the stream, added to a log line.
            saves: Whether to save the state after it.

        Returns:
            Whether it wrote a log line.

        Raises:
            TrainingError: If the loss is no longer finite.
        """
        config = self.run.config
        started = time.perf_counter()
        n_images = samples_seen - self.samples_seen
        x = self._noise.add(x, n_images=n_images, n_done=self.n_done) if self._noise else x
        x = self._scaling.apply(x) if self._scaling else x
        rate = self.step.optimizer.param_groups[0]["lr"]
        warm = config.l1_warm_up_steps
        result = self.step.step(x, sparsity=min(1.0, (self.n_done + 1) / warm) if warm else 1.0)
        self._n_fired += result.n_fired
        n_tokens = n_images * x.shape[1]
        self._n_tokens += n_tokens
        self._schedule.step()
        self.seconds, self.n_timed = self.seconds + time.perf_counter() - started, self.n_timed + 1
        self.samples_seen, self.n_done = samples_seen, self.n_done + 1
        last = samples_seen >= config.total_training_tokens
        due = self._upcoming is not None and samples_seen >= self._upcoming
        logs = self.n_done % config.wandb_log_frequency == 0 or last or self.n_done == 1
        logs = logs or (due and self._held_out is not None)
        self.has_unrecorded_step = logs or due
        if logs:
            # CPU-GPU sync point.
            frequency = self._parts.join_counts(self._n_fired).cpu().double() / max(self._n_tokens, 1)
            since = self._parts.join_counts(self.step.tracker.n_steps_since_fired).cpu()
            metrics = {**self._measure(result, x, n_tokens, rate, frequency, since), **pace}
            if (due or last) and self._held_out is not None:
                limit = None if last else images_on_the_way(config.total_training_tokens, config.n_checkpoints)
                self._evaluation = self._evaluate(self.finished_sae(), self._held_out, limit=limit)
                metrics |= self._evaluation.metrics() if self._evaluation else {}
            histogram = make_histogram(torch.log10(frequency + _LEAST_FREQUENCY).numpy())
            self._loggers.log(self.n_done, metrics, {"plots/feature_density_line_chart": histogram})
            dead_share = float((since > self._expectations.dead_after_steps).double().mean())
            for text in self._expectations.check(self.n_done, metrics["metrics/l0"], dead_share):
                logger.warning(f"run '{self.run.folder.name}', step {self.n_done:,} of {self.run.n_steps:,}: {text}")
            self.note = f"loss {metrics['losses/overall_loss']:.4g}, EV {metrics['metrics/explained_variance']:.3f}"
        if self.n_done % config.feature_sampling_window == 0:
            self._n_fired.zero_()
            self._n_tokens = 0
        if due or saves:
            self._save(result, with_checkpoint=due)
        self.has_unrecorded_step = False
        return logs

    def _save(self, result: SaeLoss, *, with_checkpoint: bool) -> None:
        """Save the state after a step, after a checkpoint if one is due.

        Raises:
            TrainingError: If the loss or a parameter is not finite.
        """
        self._check_sound(result)
        if with_checkpoint:
            self._save_sae(self.run.checkpoint_path(self.samples_seen))
            self.has_unrecorded_step = False
            while self._upcoming is not None and self.samples_seen >= self._upcoming:
                self._upcoming = next(self._due, None)
        self.save_state()

    def finish(self) -> None:
        """Write the finished autoencoder and remove the state."""
        self._save_sae(self.run.final_path)
        if self.run.world.rank:
            return
        for path in self.run.state_paths:
            path.unlink(missing_ok=True)
        logger.info(f"wrote '{self.run.final_path}'")

    def _save_sae(self, path: Path) -> None:
        """Write the autoencoder as it is now, atomically and durably; rank 0 does."""
        sae = self.finished_sae() if self._parts.is_cut or not self.run.world.rank else None
        if sae is None or self.run.world.rank:
            return
        with replacing_path(path) as temporary:
            save_sae(temporary, sae, self._cfg())

    def finished_sae(self) -> Sae | None:
        """A copy as it is saved: decoder rows of unit norm, for raw activations; calibrated after the last step.

        Of an autoencoder that is cut, rank 0 has it, and the others None.
        """
        sae = self._parts.join_sae(self.step.sae)
        if sae is None:
            return None
        if self.run.config.norm_weighted_l1:
            norms = sae.W_dec.detach().norm(dim=1)
            sae.rescale_latents_(norms.clamp_min(torch.finfo(norms.dtype).tiny))
        else:
            sae.normalise_decoder_()
        if self.samples_seen >= self.run.config.total_training_tokens:
            self._calibrate_(sae)
        sae.W_enc.data = sae.W_enc.data.contiguous()
        if self._scaling is not None:
            sae.fold_scaling_(self._scaling.mean.to(sae.b_dec.device), self._scaling.scale)
        return sae

    def _calibrate_(self, sae: Sae) -> None:
        """Set what inference alone uses. Found once: evaluation and file need the same."""
        if self._calibrated is None:
            self._start.calibrate_(sae, standardise=self.run.config.standardise)
            self._calibrated = {name: values.clone() for name, values in sae.named_buffers()}
            return
        for name, values in sae.named_buffers():
            values.copy_(self._calibrated[name])

    def save_state(self) -> None:
        """Save the state, from which training resumes exactly here; the state before it is kept. Rank 0 does."""
        if self.run.world.rank and not self._parts.is_cut:
            return
        state = {
            "recipe": self.run.recipe,
            "contents": self.run.contents,
            "samples_seen": self.samples_seen,
            "n_done": self.n_done,
            "n_fired": self._parts.join("n_fired", self._n_fired),
            "n_tokens": self._n_tokens,
            "schedule": self._schedule.state_dict(),
            "step": self.step.state_dict(),
            "evaluation": asdict(self._evaluation) if self._evaluation else None,
        }
        self._last_save = time.monotonic()
        if self.run.world.rank:
            return
        newest, before = self.run.state_paths
        if newest.exists():
            newest.replace(before)
        write_torch(newest, state)

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self.samples_seen, self.n_done = state["samples_seen"], state["n_done"]
        self._n_fired.copy_(self._parts.cut("n_fired", state["n_fired"]))
        self._n_tokens = state["n_tokens"]
        self._evaluation = Evaluation(**state["evaluation"]) if state["evaluation"] else None
        self._schedule.load_state_dict(state["schedule"])
        self.step.load_state_dict(state["step"])

    def _cfg(self) -> dict[str, object]:
        """The config in the autoencoder's file."""
        evaluation = asdict(self._evaluation) if self._evaluation else None
        return {**sae_cfg(self.run), "evaluation": evaluation}

    def _evaluate(self, sae: Sae | None, held_out: ConcatReader, *, limit: int | None) -> Evaluation | None:
        """Evaluate the autoencoder, where it is; several processes that have it share the images."""
        if sae is None:
            return None
        config, layout = self.run.config, self.run.store.spec.tokens
        matmul = fp32_matmul(self.run.device, config.max_memory)
        return evaluate(
            sae, held_out, layout, matmul=matmul, choice=config.trained_on, limit=limit, ranks=self.run.token_ranks
        )

    def _check_sound(self, result: SaeLoss) -> None:
        """Refuse to save a state of NaN, which would replace the last good one.

        Raises:
            TrainingError: If the loss or a parameter is not finite.
        """
        parameters = self.step.sae.parameters()
        is_sound = math.isfinite(result.terms.loss) and all(bool(torch.isfinite(part).all()) for part in parameters)
        if not self.run.world.add(int(not is_sound)):
            self._check_equal()
            return
        raise self._failure(float(result.terms.loss))

    def _check_equal(self) -> None:
        """Refuse to go on with processes whose weights have become different, as those of unlike processors might.

        Raises:
            TrainingError: If they have.
        """
        if other := self.step.find_unequal_ranks():
            raise TrainingError(
                f"the processes of run '{self.run.folder.name}' no longer have the same weights: rank {other[0]} "
                "differs from rank 0. Resume from the last saved state on machines of one kind"
            )

    def _failure(self, loss: float) -> TrainingError:
        states = [path for path in self.run.state_paths if path.exists()]
        files = sorted(self.run.folder.glob("*_sparse_*.pt"), key=lambda path: path.stat().st_mtime)
        kept = f"The last good autoencoder is '{files[-1]}'" if files else "No checkpoint had been written yet"
        if states:
            kept += f", the last good state '{states[0]}'"
        what = "the parameters are no longer finite" if math.isfinite(loss) else f"the loss became {loss}"
        return TrainingError(
            f"{what} at step {self.n_done} of run '{self.run.folder.name}'. {kept}. Train under another --run_name "
            "with a smaller --lr, more --lr_warm_up_steps, --max_gradient_norm 1, or without --use_ghost_grads"
        )

    @torch.no_grad()
    def _measure(
        self,
        result: SaeLoss,
        x: torch.Tensor,
        n_tokens: int,
        rate: float,
        frequency: torch.Tensor,
        since: torch.Tensor,
    ) -> dict[str, float]:
        """Metrics of a step under the reference's names. A CPU-GPU sync point, hence only every few steps.

        Args:
            result: Result of the step.
            x: Its activations, this rank's, shape `(B, T, D)`.
            n_tokens: Tokens of the whole batch.
            rate: Its learning rate.
            frequency: Firing rates in the sampling window, float64 on the host, shape `(S,)`.
            since: Steps since each latent last fired, int64 on the host, shape `(S,)`.
        """
        variance = explained_variance(x, result.reconstruction, self.run.token_ranks)
        config = self.run.config
        loss = float(result.terms.loss)
        if not math.isfinite(loss):
            raise self._failure(loss)
        return {
            "losses/overall_loss": loss,
            "losses/mse_loss": float(result.terms.mse),
            "losses/l1_loss": float(result.terms.l1),
            "losses/ghost_grad_loss": float(result.terms.ghost),
            "metrics/explained_variance": float(variance.total),
            "metrics/explained_variance_std": float(variance.per_token_std),
            "metrics/l0": float(self.run.latent_ranks.sum(result.n_fired.sum())) / n_tokens,
            "metrics/mean_log10_feature_sparsity": float(torch.log10(frequency + _LEAST_FREQUENCY).mean()),
            "sparsity/mean_passes_since_fired": float(since.double().mean()),
            "sparsity/n_passes_since_fired_over_threshold": int((since > self.run.revive_after_steps).sum()),
            "sparsity/below_1e-5": float((frequency < 1e-5).double().mean()),
            "sparsity/below_1e-6": float((frequency < 1e-6).double().mean()),
            "sparsity/dead_features": float((frequency < config.dead_feature_threshold).double().mean()),
            "details/n_training_tokens": self.samples_seen,
            "details/current_learning_rate": rate,
        }


def _checkpoint_positions(config: TrainConfig, *, after: int) -> Iterator[int]:
    """Numbers of images after which checkpoints are due, evenly spaced between start and end."""
    parts = config.n_checkpoints + 1
    due = (config.total_training_tokens * number // parts for number in range(1, parts))
    return (n_images for n_images in due if n_images > after)
