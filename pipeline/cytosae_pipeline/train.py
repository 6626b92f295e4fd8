"""Stage two's training: the reference recipe, streamed from a store, seeded, and resumable at any step."""

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from cytosae.architectures import make_sae
from cytosae.checkpoint import read_torch, save_sae, write_torch_atomically
from cytosae.geometric_median import geometric_median
from cytosae.objective import explained_variance, l0, learning_rate_factor
from cytosae.sae import SparseAutoencoder
from cytosae.train_step import StepResult, TrainStep
from cytosae_cache.errors import StoreError
from cytosae_cache.joined import JoinedReader
from cytosae_cache.order import spread_rows
from cytosae_cache.reader import StoreReader
from cytosae_cache.spec import canonical_json
from cytosae_pipeline.batches import Batches, open_batches
from cytosae_pipeline.config import TrainConfig
from cytosae_pipeline.interrupts import HeldInterrupts
from cytosae_pipeline.memory import available_ram
from cytosae_pipeline.progress import Progress, Reporter
from cytosae_pipeline.residence import choose_residence, exceeds_page_cache, find_needs, find_room
from cytosae_pipeline.runs import Run, TrainingError, plan_run, sae_cfg
from cytosae_pipeline.tracking import JsonLines, Tracker, Trackers, WandbTracker

_MEDIAN_IMAGES = 256
_MEDIAN_TOKENS = 16_384
_SECONDS_BETWEEN_SAVES = 300.0


@dataclass(frozen=True)
class TrainResult:
    """What `train` did."""

    sae: Path
    """The finished autoencoder."""
    folder: Path
    """The run's folder."""
    status: Literal["trained", "resumed", "already trained"]
    """What had to be done."""
    n_steps: int
    """Steps of the whole run."""
    n_latents: int
    """Latents S."""
    metrics: dict[str, float]
    """Metrics of the last log line."""


def train(config: TrainConfig, report: Reporter) -> TrainResult:
    """Train an autoencoder, go on with an interrupted run, or do nothing if the run is finished.

    Raises:
        ValueError: If the store is missing or does not fit the options; the message says what to do.
        TrainingError: If the loss stops being a finite number; checkpoints are kept, no final file is written.
    """
    run = plan_run(config, report)
    if run.final_path.exists():
        report.say(f"run '{run.folder.name}' is already trained: nothing to do")
        return TrainResult(
            run.final_path, run.folder, "already trained", run.n_steps, run.n_latents, _last_metrics(run)
        )
    with contextlib.ExitStack() as stack:
        direct = exceeds_page_cache(run.stores, available_ram())
        readers = [
            stack.enter_context(StoreReader(store, verify=not config.no_verify, direct=direct)) for store in run.stores
        ]
        loop = TrainingLoop(run, readers, report)
        resumed = loop.position > 0
        loop.run()
    loop.step.sae.normalise_decoder_()
    save_sae(run.final_path, loop.step.sae, sae_cfg(run))
    run.state_path.unlink(missing_ok=True)
    report.say(f"wrote '{run.final_path}'")
    status: Literal["trained", "resumed"] = "resumed" if resumed else "trained"
    return TrainResult(run.final_path, run.folder, status, run.n_steps, run.n_latents, _last_metrics(run))


class TrainingLoop:
    """The loop over steps: stream, step, metrics, checkpoints. Picks up the state of an interrupted run.

    Args:
        run: The run.
        readers: Read its stores, in order.
        report: Shows progress.
    """

    def __init__(self, run: Run, readers: Sequence[StoreReader], report: Reporter) -> None:
        config = run.config
        self._run, self._readers, self._report = run, readers, report
        self.position = 0
        """Images trained on."""
        self._n_done = 0
        sae = make_sae(config.arch, run.store.d_model, run.n_latents, seed=config.seed, device=run.device)
        self.step = TrainStep(
            sae,
            l1_coefficient=config.l1_coefficient,
            use_ghost_grads=config.use_ghost_grads,
            dead_feature_window=config.dead_feature_window,
            mse_cls_coefficient=config.mse_cls_coefficient if run.store.spec.tokens.n_cls else 1.0,
        )
        self._n_fired = torch.zeros(run.n_latents, dtype=torch.int64, device=run.device)
        self._n_tokens = 0
        self._last_save = time.monotonic()
        if run.state_path.exists():
            self._load_state()
        else:
            _initialise_b_dec(sae, readers, config)

    def run(self) -> None:
        """All remaining steps. On Ctrl-C or an error of the disk or store the state is saved first.

        Raises:
            TrainingError: If the loss stops being a finite number.
            UserError: If `--resident` asks for a place without room.
        """
        run, config = self._run, self._run.config
        if self.position:
            self._report.say(f"going on with run '{run.folder.name}' after {self.position:,} images")
        needs = find_needs(config, run.stores, n_latents=run.n_latents, position=self.position)
        residence = choose_residence(config.resident, needs, find_room(run.device))
        self._report.say(residence.text)
        batches = open_batches(self._readers, config, position=self.position, device=run.device, place=residence.place)
        metrics_path = run.folder / "metrics.jsonl"
        trackers: list[Tracker] = [JsonLines(metrics_path, after_step=self._n_done)]
        if config.log_to_wandb:
            trackers.append(_make_wandb(run))
        progress = self._report.progress("train", config.total_training_tokens, "images", done=self.position)
        with HeldInterrupts() as interrupts:
            try:
                with Trackers(*trackers) as tracker, progress:
                    self._steps(batches, tracker, progress, interrupts)
            except (KeyboardInterrupt, OSError, StoreError):
                # After a second Ctrl-C the parameters may be half-way through a step: the last state saved stands.
                if not interrupts.torn:
                    self._save_state()
                raise

    def _steps(self, batches: Batches, tracker: Tracker, progress: Progress, interrupts: HeldInterrupts) -> None:
        config = self._run.config
        checkpoints = _checkpoint_positions(config, after=self.position)
        upcoming = next(checkpoints, None)
        note = ""
        whole, interval = WaitingTime(batches), WaitingTime(batches)
        for batch in batches:
            n_images = len(batch.activations)
            x = self._to_device(batch.activations)
            factor = learning_rate_factor(
                self._n_done, scheduler=config.lr_scheduler_name, warm_up_steps=config.lr_warm_up_steps
            )
            result = self.step.step(x, config.lr * factor)
            self._count_firing(result)
            self.position, self._n_done = batch.position, self._n_done + 1
            last = self.position >= config.total_training_tokens
            if self._n_done % config.wandb_log_frequency == 0 or last or self._n_done == 1:
                metrics = self._measure(result, x, config.lr * factor, progress.rate, interval.share())
                interval = WaitingTime(batches)
                tracker.log(self._n_done, metrics)
                note = f"loss {metrics['losses/overall_loss']:.4g}, EV {metrics['metrics/explained_variance']:.3f}"
            if self._n_done % config.feature_sampling_window == 0:
                self._n_fired.zero_()
                self._n_tokens = 0
            if upcoming is not None and self.position >= upcoming:
                save_sae(self._run.checkpoint_path(self.position), self.step.sae, sae_cfg(self._run))
                self._save_state()
                while upcoming is not None and self.position >= upcoming:
                    upcoming = next(checkpoints, None)
            elif time.monotonic() - self._last_save > _SECONDS_BETWEEN_SAVES:
                self._save_state()
            progress.advance(n_images, note)
            interrupts.check()
        self._report.say(f"waited for data {whole.share():.1%} of the time")

    def _to_device(self, activations: torch.Tensor) -> torch.Tensor:
        """A batch as float32 on the device, shape `(B, T, D)`."""
        if self._run.config.class_token:
            activations = activations[:, :1]
        # Two steps: at once, torch would convert on the host and then copy twice the bytes.
        return activations.to(self._run.device).to(torch.float32)

    def _count_firing(self, result: StepResult) -> None:
        """Add to the firing counts of the sampling window; stays on the device."""
        fired = result.acts.detach() > 0
        self._n_fired += fired.sum(dim=(0, 1))
        self._n_tokens += fired.shape[0] * fired.shape[1]

    @torch.no_grad()
    def _measure(
        self, result: StepResult, x: torch.Tensor, rate: float, images_per_s: float, wait_share: float
    ) -> dict[str, float]:
        """Metrics of a step under the reference's names. CPU-GPU sync point, hence only every few steps.

        Raises:
            TrainingError: If the loss is not a finite number.
        """
        variance = explained_variance(x, result.reconstruction)
        frequency = self._n_fired.cpu().double() / max(self._n_tokens, 1)
        config = self._run.config
        loss = float(result.terms.loss)
        if not torch.isfinite(result.terms.loss):
            raise TrainingError(
                f"the loss became {loss} at step {self._n_done}. Earlier checkpoints in '{self._run.folder}' "
                "are sound. Try a smaller --lr, more --lr_warm_up_steps, or no --use_ghost_grads"
            )
        since = self.step.tracker.n_steps_since_fired.cpu()
        return {
            "losses/overall_loss": loss,
            "losses/mse_loss": float(result.terms.mse),
            "losses/l1_loss": float(result.terms.l1),
            "losses/ghost_grad_loss": float(result.terms.ghost),
            "metrics/explained_variance": float(variance.total),
            "metrics/explained_variance_std": float(variance.per_token_std),
            "metrics/l0": float(l0(result.acts)),
            "metrics/mean_log10_feature_sparsity": float(torch.log10(frequency + 1e-10).mean()),
            "sparsity/mean_passes_since_fired": float(since.double().mean()),
            "sparsity/n_passes_since_fired_over_threshold": int((since > config.dead_feature_window).sum()),
            "sparsity/below_1e-5": float((frequency < 1e-5).double().mean()),
            "sparsity/below_1e-6": float((frequency < 1e-6).double().mean()),
            "sparsity/dead_features": float((frequency < config.dead_feature_threshold).double().mean()),
            "details/n_training_tokens": self.position,
            "details/current_learning_rate": rate,
            "details/images_per_s": images_per_s,
            "details/data_wait_share": wait_share,
        }

    def _save_state(self) -> None:
        """Everything needed to go on exactly here."""
        state = {
            "recipe": self._run.recipe,
            "position": self.position,
            "n_done": self._n_done,
            "n_fired": self._n_fired,
            "n_tokens": self._n_tokens,
            "step": self.step.state_dict(),
        }
        write_torch_atomically(self._run.state_path, state)
        self._last_save = time.monotonic()

    def _load_state(self) -> None:
        """Go on where an interrupted run stopped."""
        state = read_torch(self._run.state_path, device=self._run.device)
        if state["recipe"] != self._run.recipe:
            raise TrainingError(f"'{self._run.state_path}' belongs to other options; choose another --run_name")
        self.position, self._n_done = state["position"], state["n_done"]
        self._n_fired, self._n_tokens = state["n_fired"], state["n_tokens"]
        self.step.load_state_dict(state["step"])


class WaitingTime:
    """The share of the time since it was made that was spent waiting for data.

    Args:
        batches: What is waited for.
    """

    def __init__(self, batches: Batches) -> None:
        self._batches, self._waited_s, self._start = batches, batches.waited_s, time.perf_counter()

    def share(self) -> float:
        """Between 0 and 1."""
        passed = time.perf_counter() - self._start
        return min(1.0, (self._batches.waited_s - self._waited_s) / passed) if passed > 0 else 0.0


def sample_tokens(
    readers: Sequence[StoreReader], *, n_images: int = _MEDIAN_IMAGES, n_tokens: int = _MEDIAN_TOKENS
) -> torch.Tensor:
    """Token vectors from a sample of images spread over all stores.

    Args:
        readers: Read the stores.
        n_images: Images to read at the most.
        n_tokens: Tokens to return at the most.

    Returns:
        Float32, shape `(n, D)`.
    """
    images = JoinedReader(readers)
    chosen = spread_rows(len(images), n_images)
    values = np.empty((len(chosen), *images.image_shape), dtype=images.dtype)
    images.read(chosen, values)
    tokens = values.reshape(-1, images.image_shape[1])
    return torch.from_numpy(tokens[spread_rows(len(tokens), n_tokens)]).float()


def _initialise_b_dec(sae: SparseAutoencoder, readers: Sequence[StoreReader], config: TrainConfig) -> None:
    """Start the decoder's bias where the activations are."""
    if config.b_dec_init_method == "zeros":
        return
    tokens = sample_tokens(readers)
    start = geometric_median(tokens) if config.b_dec_init_method == "geometric_median" else tokens.double().mean(dim=0)
    with torch.no_grad():
        sae.b_dec.copy_(start.float())


def _checkpoint_positions(config: TrainConfig, *, after: int) -> Iterator[int]:
    """Images after which checkpoints are due: evenly spaced between start and end."""
    parts = config.n_checkpoints + 1
    due = (config.total_training_tokens * number // parts for number in range(1, parts))
    return (position for position in due if position > after)


def _make_wandb(run: Run) -> WandbTracker:
    """A Weights & Biases run that knows the recipe's numbers and no name of a data set, path or person."""
    numbers = {name: value for name, value in run.recipe.items() if isinstance(value, int | float)}
    identity = hashlib.sha256(canonical_json([run.recipe, run.folder.name])).hexdigest()[:8]
    config = run.config
    return WandbTracker(
        project=config.wandb_project, entity=config.wandb_entity, run_id=identity, folder=run.folder, config=numbers
    )


def _last_metrics(run: Run) -> dict[str, float]:
    """The last line of the run's metrics."""
    path = run.folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {name: value for name, value in json.loads(lines[-1]).items() if value is not None} if lines else {}
