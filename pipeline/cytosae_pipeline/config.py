"""What each verb can be told: frozen records whose fields are the command line's options and hold the only defaults.

Nothing heavy is imported here, so that `cytosae-cache --help` answers at once.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Device = Literal["auto", "cpu", "cuda", "mps"]
PrecisionChoice = Literal["auto", "fp32", "bf16", "fp16"]
Layout = Literal["auto", "class", "patient", "class/patient"]
Resident = Literal["auto", "none", "ram", "gpu"]


class UserError(ValueError):
    """Something the user can put right; the message says what was found, what was expected and what to type."""


def option(default: Any, text: str, *names: str) -> Any:  # noqa: ANN401 - a field's default
    """A field with its help text and further names on the command line.

    Args:
        default: Default value.
        text: Help, in one or two sentences.
        *names: Further option names.
    """
    return dataclasses.field(default=default, metadata={"help": text, "names": names})


@dataclass(frozen=True, kw_only=True)
class StoreChoice:
    """Options of every verb that reads a store: which one."""

    root_dir: Path = option(Path(), "Folder that holds dataset/ and out/.")
    dataset_name: str | None = option(None, "Name of the data set.", "dataset")
    store: str | None = option(
        None, "The store's own path or URL (s3://...), instead of the place below root_dir named after the data set."
    )
    model_name: str | None = option(
        None, "Backbone, such as dinov2_vits14, dinov2_vitb14, dinov2_vitl14 or dinov2_vitg14. Found out if not given."
    )
    block_layer: int = option(-2, "Block whose output is used, as a Python index; -2 is the last but one.")
    module_name: Literal["resid"] = option("resid", "What is used of the block: the residual stream after it.")


@dataclass(frozen=True, kw_only=True)
class StoreSource(StoreChoice):
    """Options of every verb that builds a missing store first: from what."""

    model_path: Path | None = option(
        None, "Checkpoint of the vision transformer, a local transformers folder, or the word `embedded`."
    )
    images: Path | None = option(
        None, "Folder of images, or a CSV with columns path[,label][,patient]. [default: <root>/dataset/<name>]"
    )
    layout: Layout = option(
        "auto",
        "What a folder's levels mean: class = parent folder is the label, patient = parent is the patient, "
        "class/patient = grandparent is the label. auto goes by manifest.csv or the depth.",
    )
    vit_type: str = option("custom", "Kind of backbone; a folder of the outputs is named after it.")
    device: Device = option("auto", "Where the work runs. auto: cuda, then mps, then cpu.")


@dataclass(frozen=True, kw_only=True)
class BuildConfig(StoreSource):
    """Options of `build`, and of verbs that build a missing store first."""

    precision: PrecisionChoice = option("auto", "Type the network computes in. auto: fp16 on cuda, fp32 elsewhere.")
    batch_size: int = option(32, "Images a forward pass.")
    workers: int | None = option(None, "Processes that decode images; 0 decodes in the main one. [default: by cores]")
    shard_images: int = option(256, "Images a shard file.")
    compression: Literal["none", "lz4", "zstd"] = option(
        "none", "Lossless codec; saves 0-7 % of fp16 activations, so raw is the default."
    )
    store_dtype: Literal["float16", "float32", "int8"] = option(
        "float16",
        "Type of the stored numbers. int8 halves the store: codes with a scale a token, read as float16.",
    )
    limit: int | None = option(None, "Build on this many images only, spread evenly over the list.")
    overwrite: bool = option(False, "Delete the store if it exists and build it anew.")
    strict_images: bool = option(False, "Stop at the first unreadable image instead of setting it aside.")
    dry_run: bool = option(False, "Say what would be done: images, bytes and free disk.")

    def __post_init__(self) -> None:
        """Check ranges."""
        _check_at_least(self, 1, "batch_size", "shard_images", "limit")
        _check_at_least(self, 0, "workers")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(StoreSource):
    """Options of `train`: the reference's recipe and its names."""

    run_name: str | None = option(
        None, "Name of the run's folder under out/checkpoints. [default: made from the options]"
    )
    resume: str | None = option(None, "Go on with the interrupted run of this name.")
    with_dataset: tuple[str, ...] = option(
        (), "A further data set, streamed with the first as one; its store must have the same spec. Repeatable."
    )
    arch: Literal["relu"] = option("relu", "Architecture of the autoencoder.")
    expansion_factor: int = option(64, "Latents a channel: S = expansion_factor x D.")
    b_dec_init_method: Literal["geometric_median", "mean", "zeros"] = option(
        "geometric_median", "Where the decoder's bias starts, from a sample spread over the store."
    )
    lr: float = option(0.0004, "Learning rate of Adam.")
    l1_coefficient: float = option(0.00008, "Weight of the sparsity term.")
    lr_scheduler_name: Literal["constantwithwarmup", "constant"] = option(
        "constantwithwarmup", "Learning-rate schedule."
    )
    lr_warm_up_steps: int = option(500, "Steps over which the learning rate rises.")
    batch_size: int = option(16, "Images a step (the reference's own run used 64).")
    total_training_tokens: int = option(1_000_000, "Images to train on, over all epochs (the reference's name).")
    shuffle: Literal["global", "windowed"] = option(
        "global",
        "global: every epoch a uniform permutation of all images. windowed: whole shards in random order, 8 at a time "
        "mixed in memory, for disks and stores where random reads are dear.",
    )
    batch_of: Literal["images", "tokens"] = option(
        "images", "What a batch is filled with: whole images, or as many tokens drawn from 8 batches' worth of images."
    )
    resident: Resident = option(
        "auto", "Keep all activations in memory (ram) or on the GPU (gpu); batches are the same. auto: where it pays."
    )
    mse_cls_coefficient: float = option(1.0, "Weight of the CLS token's reconstruction error.")
    use_ghost_grads: bool = option(False, "Revive dead latents with ghost gradients.")
    feature_sampling_window: int = option(64, "Steps over which latents' firing rates are measured.")
    dead_feature_window: int = option(64, "Steps without firing after which a latent gets ghost gradients.")
    dead_feature_threshold: float = option(1e-6, "Firing rate under which a latent is reported as dead.")
    seed: int = option(42, "Seed of the weights, the order and the samples.")
    n_checkpoints: int = option(20, "Checkpoints on the way, evenly spaced.")
    log_to_wandb: bool = option(False, "Log metrics to Weights & Biases as well (offline without a login).")
    wandb_project: str = option("cytosae-cache", "Weights & Biases project.")
    wandb_entity: str | None = option(None, "Weights & Biases entity.")
    wandb_log_frequency: int = option(20, "Steps between log lines, with or without Weights & Biases.")
    clip_dim: int | None = option(None, "Width D that the store must have. [default: not checked]")
    class_token: bool = option(False, "Train on the CLS token alone.")
    precision: Literal["fp32"] = option("fp32", "Type the autoencoder trains in.")
    no_verify: bool = option(False, "Do not check checksums while reading.")

    def __post_init__(self) -> None:
        """Check ranges."""
        _check_at_least(
            self,
            1,
            "expansion_factor",
            "batch_size",
            "total_training_tokens",
            "feature_sampling_window",
            "wandb_log_frequency",
        )
        _check_at_least(
            self, 0, "lr_warm_up_steps", "n_checkpoints", "seed", "l1_coefficient", "dead_feature_window", "lr",
            "mse_cls_coefficient", "dead_feature_threshold",
        )  # fmt: skip
        if self.batch_of == "tokens" and (self.class_token or self.mse_cls_coefficient != 1):
            name = "class_token" if self.class_token else "mse_cls_coefficient"
            raise ValueError(
                f"{name} needs batch_of images: under batch_of tokens the tokens are mixed, and none stands in the CLS "
                "token's place"
            )


@dataclass(frozen=True, kw_only=True)
class StatisticsConfig(StoreSource):
    """Options of `features`, `classes` and `patients`."""

    sae_path: Path | None = option(None, "The autoencoder: a .pt that `train` or the reference wrote.")
    top_k: int = option(10, "Maximally activating images kept a latent (features).")
    threshold: tuple[float, ...] = option((0.2,), "Activation above which a token counts; may be given several times.")
    normalize: Literal["image", "token", "none", "latents"] = option(
        "image",
        "What counts are divided by: the group's images, its tokens, nothing, or the number of latents as in the "
        "published files.",
    )
    batch_size: int = option(64, "Images read at once; results do not depend on it.")
    precision: PrecisionChoice = option("auto", "Type of the encoder's product. auto: fp32.")
    allow_mismatch: bool = option(False, "Use a store whose spec differs from the one the autoencoder was trained on.")
    no_verify: bool = option(False, "Do not check checksums while reading.")

    def __post_init__(self) -> None:
        """Check ranges."""
        _check_at_least(self, 1, "top_k", "batch_size")
        if not self.threshold or not all(math.isfinite(value) and value >= 0 for value in self.threshold):
            raise ValueError(f"threshold must be given as numbers of 0 or more, found {self.threshold}")
        if len(set(self.threshold)) != len(self.threshold):
            raise ValueError(f"threshold holds a value twice: {self.threshold}")


def _check_at_least(config: object, least: int, *names: str) -> None:
    """Raise for the first of the fields that is set and too small, or not a finite number."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value >= least):
            raise ValueError(f"{name} must be at least {least}, found {value}")
