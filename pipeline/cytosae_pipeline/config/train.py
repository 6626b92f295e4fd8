"""Options of `train`, and its presets."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from cytosae.sae.registry import ARCHITECTURES
from cytosae_pipeline.config.fields import MAX_SEED, option
from cytosae_pipeline.config.store import StoreSource
from cytosae_pipeline.errors import UserError

Resident = Literal["auto", "none", "ram", "gpu"]


_Record = TypeVar("_Record")


def _fills_from_preset(record: type[_Record]) -> type[_Record]:
    """Make `preset` set every option that is not passed to the record and that the architecture has."""
    original: Any = record.__init__

    @functools.wraps(original)
    def init(self: Any, **given: Any) -> None:  # noqa: ANN401 - a record and its options
        preset = given.get("preset")
        values = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
        arch = given.get("arch", values.get("arch"))
        if isinstance(arch, str) and arch in ARCHITECTURES:
            # None is not foreign: it stands for what suits any architecture.
            foreign = {n: value for n, value in values.items() if value is not None and not _belongs(n, arch)}
            values = {name: value for name, value in values.items() if name not in foreign}
            # `dataclasses.replace` passes what the preset had set for another architecture.
            given = {name: value for name, value in given.items() if name not in foreign or value != foreign[name]}
        original(self, **{**values, **given})

    record.__init__ = init  # type: ignore[method-assign]
    return record


OF_ARCHITECTURES: dict[str, Any] = {
    "k": 32,
    "l1_coefficient": 0.00008,
    "aux_coefficient": 0.03125,
    "l0_coefficient": 1.0,
    "bandwidth": 1.0,
}
"""Defaults of options that only some architectures have; None in a record stands for them."""

_DEAD_FEATURE_WINDOW = 64
"""Steps of `dead_feature_window` by default, and the most that are derived from how often a latent should fire."""
_FIRINGS = 20
"""Times that a latent of average frequency fires within a derived window."""

_COMPETING = ("topk", "batchtopk", "matryoshka")
_SUITED: dict[str, dict[str, float]] = {
    "weight_decay": dict.fromkeys((*_COMPETING, "jumprelu"), 0.4),
    "input_noise": {**dict.fromkeys(_COMPETING, 0.2), "jumprelu": 0.1},
    "pre_act_coefficient": {"jumprelu": 0.03125},
}
"""What None stands for, by architecture; 0 for others. Noise makes more latents active, so that learned thresholds let
fewer through on what is read without noise."""

OF_SOME = (*OF_ARCHITECTURES, "pre_act_coefficient")
"""Options that a run of another architecture does without, in a grid or a preset of several."""

_SWITCHES_OF_ARCHITECTURES = ("use_ghost_grads", "norm_weighted_l1", "mse_cls_coefficient")


def _owners(name: str) -> list[str]:
    """Architectures that have an option."""
    return [arch for arch, kind in ARCHITECTURES.items() if name in {*kind.setting_names, *kind.training_options}]


def _belongs(name: str, arch: str) -> bool:
    """Whether an option is one of all architectures, or of this one."""
    return name not in {*OF_SOME, *_SWITCHES_OF_ARCHITECTURES} or arch in _owners(name)


def without_foreign(arch: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options without those that an architecture does not have; its own stay, and so do switches."""
    return {name: value for name, value in options.items() if name not in OF_SOME or _belongs(name, arch)}


@_fills_from_preset
@dataclass(frozen=True, kw_only=True)
class TrainConfig(StoreSource):
    """Options of `train`, under the reference's names where it has them.

    Options that are not passed have the preset's values, or else their defaults.
    """

    run_name: str | None = option(
        None, "Name of the run's folder under out/checkpoints. [default: made from the options]"
    )
    resume: str | None = option(None, "Resume the interrupted run of this name.")
    with_dataset: tuple[str, ...] = option(
        (), "A further data set, streamed together with the first; its store must have the same spec. Repeatable."
    )
    preset: Literal["cytosae", "modern"] | None = option(
        None,
        "Values for options that are not given: cytosae = those of the published command, modern = the best found on "
        "real blood cells (docs/training.md).",
    )
    arch: str = option("relu", "Architecture of the autoencoder; relu is the reference's.", choices=ARCHITECTURES)
    k: int | None = option(
        None, "Target L0: active latents per token (topk, batchtopk, matryoshka, jumprelu). [default: 32]", minimum=1
    )
    expansion_factor: int = option(64, "Latents per channel: S = expansion_factor x D.", minimum=1)
    b_dec_init_method: Literal["geometric_median", "mean", "zeros"] = option(
        "geometric_median", "Initial decoder bias, from a sample spread over the store."
    )
    encoder_init: Literal["kaiming", "decoder"] = option(
        "kaiming", "Initial encoder: random, or the transpose of the decoder."
    )
    standardise: bool = option(
        False,
        "Train on activations centred and scaled to a mean variance of 1, by the store's exact moments; folded into "
        "the weights on saving.",
        "standardize",
    )
    lr: float = option(0.0004, "Learning rate of Adam.", minimum=0)
    l1_coefficient: float | None = option(None, "Weight of the L1 term (relu, gated). [default: 8e-05]", minimum=0)
    l1_warm_up_steps: int = option(0, "Steps over which the weight of the sparsity term rises.", minimum=0)
    norm_weighted_l1: bool = option(
        False, "Weight L1 by the norms of the decoder's rows and leave these free, instead of keeping them at 1 (relu)."
    )
    aux_coefficient: float | None = option(
        None,
        "Weight of the AuxK term, which revives dead latents (topk, batchtopk, matryoshka). [default: 0.03125]",
        minimum=0,
    )
    l0_coefficient: float | None = option(
        None, "Weight of the distance between L0 and k (jumprelu). [default: 1.0]", minimum=0
    )
    pre_act_coefficient: float | None = option(
        0.0,
        "Weight of the pre-activation loss, which revives dead latents by pulling them towards their thresholds "
        "(jumprelu). --preset modern takes 0.03125.",
        minimum=0,
    )
    bandwidth: float | None = option(
        None,
        "Width of the kernel through which thresholds are learned, in units of the activations (jumprelu). "
        "[default: 1.0]",
        above=0,
    )
    lr_scheduler_name: Literal[
        "constantwithwarmup", "constant", "linearwarmupdecay", "cosineannealing", "cosineannealingwarmup",
        "cosineannealingwarmrestarts",
    ] = option("constantwithwarmup", "Learning-rate schedule.")  # fmt: skip
    lr_warm_up_steps: int = option(500, "Steps over which the learning rate rises.", minimum=0)
    lr_warm_up_share: float | None = option(
        None, "Share of the steps over which the learning rate rises, instead of --lr_warm_up_steps.", minimum=0,
        maximum=1,
    )  # fmt: skip
    encoder_lr_factor: float | None = option(
        None,
        "Learning rate of the encoder's weights, in terms of --lr; below 1, fewer latents die at a high rate. "
        "[default: 1]",
        above=0,
    )
    weight_decay: float | None = option(
        0.0,
        "Decay of the encoder's weights (AdamW): a step multiplies those of active latents by 1 - their rate x this, "
        "so that few images are not learned by heart. --preset modern takes 0.4 for architectures with --k.",
        minimum=0,
    )
    input_noise: float | None = option(
        0.0,
        "Standard deviation of Gaussian noise on the activations that are trained on, in terms of their channel's. "
        "--preset modern takes 0.2 for topk, batchtopk and matryoshka, and 0.1 for jumprelu.",
        minimum=0,
    )
    adam_beta1: float | None = option(
        None, "Adam's decay of the mean gradient. [default: 0.9]", minimum=0, maximum=0.999999
    )
    adam_beta2: float | None = option(
        None,
        "Adam's decay of the mean squared gradient; lower follows gradients of rare latents faster. [default: 0.999]",
        minimum=0, maximum=0.999999,
    )  # fmt: skip
    lr_decay_share: float = option(
        0.0, "Share of the steps, at the end, over which the rate falls to 0; often 0.2.", minimum=0, maximum=1
    )
    lr_cycles: int = option(1, "Cycles of cosineannealingwarmrestarts.", minimum=1)
    max_gradient_norm: float | None = option(None, "Norm to which gradients are clipped. [default: never]", above=0)
    batch_size: int = option(16, "Images per step (the reference's own run used 64).", minimum=1)
    total_training_tokens: int = option(
        1_000_000, "Images to train on, over all epochs (the reference's name).", minimum=1
    )
    shuffle: Literal["global", "windowed"] = option(
        "global",
        "global: every epoch is a uniform permutation of all images. windowed: whole shards in random order, 8 at a "
        "time mixed in memory, for disks and stores where random reads are slow.",
    )
    batch_of: Literal["images", "tokens"] = option(
        "images", "Contents of a batch: whole images, or as many tokens drawn from 8 batches' worth of images."
    )
    tokens: Literal["all", "patches", "cls"] = option("all", "Which tokens of an image to train on.")
    class_token: bool = option(False, "The same as --tokens cls (the reference's name).")
    held_out: float = option(
        0.0, "Share of images or patients held out for evaluation, chosen by a hash.", minimum=0, maximum=0.9
    )
    held_out_by: Literal["image", "patient", "subject"] = option(
        "image",
        "Unit that is held out as a whole; subject is the person that the manifest's column subject names.",
    )
    resident: Resident = option(
        "auto", "Keep all activations in memory (ram) or on the GPU (gpu); batches are the same. auto: where it pays."
    )
    split: Literal["data", "latents"] = option(
        "data",
        "What processes that torchrun starts share: data = the images of every batch, latents = the latents of the "
        "autoencoder (docs/training.md).",
    )
    mse_cls_coefficient: float = option(1.0, "Weight of the CLS token's reconstruction error (relu).", minimum=0)
    use_ghost_grads: bool = option(False, "Revive dead latents with ghost gradients (relu).")
    feature_sampling_window: int = option(64, "Steps over which firing rates are measured.", minimum=1)
    dead_feature_window: int | None = option(
        _DEAD_FEATURE_WINDOW,
        "Steps without firing after which a latent is revived. --preset modern derives them from --k: as many as a "
        "latent of average frequency needs to fire 20 times, at most 64.",
        minimum=0,
    )
    dead_feature_threshold: float = option(1e-6, "Firing rate below which a latent is reported as dead.", minimum=0)
    seed: int = option(42, "Seed of the weights, the order and the samples.", minimum=0, maximum=MAX_SEED)
    order_seed: int | None = option(None, "Seed of the order alone. [default: --seed]", minimum=0, maximum=MAX_SEED)
    n_checkpoints: int = option(20, "Intermediate checkpoints, evenly spaced.", minimum=0)
    log_to_wandb: bool = option(False, "Log metrics to Weights & Biases as well (offline without a login).")
    tensorboard: bool = option(False, "Write TensorBoard's event files into the run's folder as well.")
    wandb_project: str = option("cytosae-cache", "Weights & Biases project.")
    wandb_entity: str | None = option(None, "Weights & Biases entity.")
    wandb_log_frequency: int = option(20, "Steps between log lines, with or without Weights & Biases.", minimum=1)
    clip_dim: int | None = option(None, "Width D that the store must have. [default: not checked]", minimum=1)
    precision: Literal["auto", "fp32", "bf16"] = option(
        "auto",
        "Type of the factors of matrix products; weights and sums stay fp32. auto: bf16 on GPUs and processors that "
        "have it, fp32 elsewhere.",
    )
    max_memory: float | None = option(
        None,
        "GiB of the largest tensor of tokens x latents; a batch is split to fit. [default: 0.5, on a GPU 4]",
        above=0,
    )
    no_verify: bool = option(False, "Skip checksums while reading.")

    @property
    def shuffle_seed(self) -> int:
        """Seed of the order."""
        return self.seed if self.order_seed is None else self.order_seed

    def warm_up_steps(self, n_steps: int) -> int:
        """Steps over which the learning rate rises, of `n_steps` in all."""
        return self.lr_warm_up_steps if self.lr_warm_up_share is None else round(self.lr_warm_up_share * n_steps)

    def revive_after_steps(self, n_latents: int, n_tokens: int) -> int:
        """`dead_feature_window`; where it is None, from how often a latent should fire, or 64 if there is no `k`.

        Args:
            n_latents: Latents S.
            n_tokens: Tokens of an image that are trained on.
        """
        if self.dead_feature_window is not None:
            return self.dead_feature_window
        if self.k is None:
            return _DEAD_FEATURE_WINDOW
        firings_per_step = self.k * self.batch_size * n_tokens / n_latents
        return min(math.ceil(_FIRINGS / firings_per_step), _DEAD_FEATURE_WINDOW)

    def _suited(self) -> dict[str, Any]:
        """Options of which None stands for what suits the architecture."""
        values = {name: getattr(self, name) for name in _SUITED}
        return {name: _SUITED[name].get(self.arch, 0.0) if value is None else value for name, value in values.items()}

    @property
    def trained_on(self) -> Literal["all", "patches", "cls"]:
        """Which tokens of an image are trained on."""
        return "cls" if self.class_token else self.tokens

    def __post_init__(self) -> None:
        """Check what options must agree on."""
        super().__post_init__()
        if self.resume is not None and self.run_name is not None:
            raise UserError(f"resume names the run '{self.resume}', and run_name another: leave out run_name")
        self._check_tokens()
        self._check_architecture()
        decay = self._suited()["weight_decay"]
        shrinks = self.lr * (self.encoder_lr_factor or 1) * decay
        if shrinks >= 1:
            raise UserError(
                f"weight_decay {decay:g} takes {shrinks:g} of the encoder's weights in a step (lr x "
                "encoder_lr_factor x weight_decay), which must be less than 1"
            )

    def _check_tokens(self) -> None:
        """Raise for options that no batch could satisfy."""
        if self.class_token and self.tokens == "patches":
            raise UserError("class_token means tokens cls, but tokens patches was given: leave one out")
        if self.batch_of == "tokens" and (self.trained_on != "all" or self.mse_cls_coefficient != 1):
            name = "mse_cls_coefficient"
            if self.trained_on != "all":
                name = "class_token" if self.class_token else f"tokens {self.tokens}"
            raise UserError(
                f"{name} needs batch_of images: with batch_of tokens the tokens are mixed, and no position is the CLS "
                "token's"
            )
        if self.trained_on == "patches" and self.mse_cls_coefficient != 1:
            raise UserError("mse_cls_coefficient was given, but tokens patches trains on no CLS token")

    def _check_architecture(self) -> None:
        """Raise for options that the architecture does not have."""
        if self.split == "latents" and not ARCHITECTURES[self.arch].splits_latents:
            able = ", ".join(arch for arch, kind in ARCHITECTURES.items() if kind.splits_latents)
            raise UserError(f"split latents is for arch {able}, found arch {self.arch}: give split data")
        of_some = {name: getattr(self, name) is not None for name in OF_ARCHITECTURES} | {
            "use_ghost_grads": self.use_ghost_grads,
            "norm_weighted_l1": self.norm_weighted_l1,
            "mse_cls_coefficient": self.mse_cls_coefficient != 1,
            "pre_act_coefficient": bool(self.pre_act_coefficient),
        }
        for name, given in of_some.items():
            if given and not _belongs(name, self.arch):
                raise UserError(
                    f"{name} is an option of arch {', '.join(_owners(name))}, found arch {self.arch}: leave it out, or "
                    "choose another --arch"
                )

    def filled(self) -> "TrainConfig":
        """The same options, with the defaults of those of the architecture that were not given, and what suits it."""
        unset = {name: value for name, value in OF_ARCHITECTURES.items() if getattr(self, name) is None}
        return replace(self, **without_foreign(self.arch, unset), **self._suited())


PRESETS: dict[str, dict[str, Any]] = {
    "cytosae": {
        "arch": "relu", "expansion_factor": 64, "b_dec_init_method": "geometric_median", "batch_size": 64,
        "n_checkpoints": 20, "l1_coefficient": 0.00008, "lr": 0.0004, "seed": 42, "use_ghost_grads": True,
        "total_training_tokens": 1_000_000,
    },
    "modern": {
        "arch": "batchtopk", "k": 32, "lr": 0.006, "encoder_lr_factor": 0.5, "adam_beta1": 0.8, "adam_beta2": 0.98,
        "lr_warm_up_share": 0.02, "lr_decay_share": 0.6, "dead_feature_window": None, "standardise": True,
        "encoder_init": "decoder", "b_dec_init_method": "mean", "batch_of": "tokens", "held_out": 0.05,
        "weight_decay": None, "input_noise": None, "pre_act_coefficient": None,
    },
}  # fmt: skip
"""Values of options that are not given, by preset."""
