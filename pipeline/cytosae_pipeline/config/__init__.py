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
    preset: Literal["cytosae", "modern"] | None = option(
        None,
        "Values for options not given: cytosae = the published command's, modern = the best found on real blood cells "
        "(docs/training.md).",
    )
    arch: Literal["relu", "topk", "batchtopk", "jumprelu", "gated", "matryoshka"] = option(
        "relu", "Architecture of the autoencoder; relu is the reference's."
    )
    k: int = option(32, "Active latents a token that topk, batchtopk, matryoshka and jumprelu are to have.")
    expansion_factor: int = option(64, "Latents a channel: S = expansion_factor x D.")
    b_dec_init_method: Literal["geometric_median", "mean", "zeros"] = option(
        "geometric_median", "Where the decoder's bias starts, from a sample spread over the store."
    )
    encoder_init: Literal["kaiming", "decoder"] = option(
        "kaiming", "Where the encoder starts: random, or the decoder's transpose."
    )
    standardise: bool = option(
        False,
        "Train on activations centred and scaled to a mean variance of 1, by the store's exact moments; folded into "
        "the weights on saving.",
    )
    lr: float = option(0.0004, "Learning rate of Adam.")
    l1_coefficient: float = option(0.00008, "Weight of the sparsity term (relu, gated).")
    l1_warm_up_steps: int = option(0, "Steps over which the sparsity term's weight rises.")
    norm_weighted_l1: bool = option(
        False, "Weigh L1 by the norms of the decoder's rows and leave those free, instead of keeping them at 1 (relu)."
    )
    aux_coefficient: float = option(
        0.03125, "Weight of the term that revives dead latents (topk, batchtopk, matryoshka)."
    )
    l0_coefficient: float = option(1.0, "Weight of the distance from k active latents a token (jumprelu).")
    bandwidth: float = option(
        1.0, "Width of the kernel through which thresholds learn, in units of the activations (jumprelu)."
    )
    lr_scheduler_name: Literal[
        "constantwithwarmup", "constant", "linearwarmupdecay", "cosineannealing", "cosineannealingwarmup",
        "cosineannealingwarmrestarts",
    ] = option("constantwithwarmup", "Learning-rate schedule.")  # fmt: skip
    lr_warm_up_steps: int = option(500, "Steps over which the learning rate rises.")
    lr_decay_share: float = option(0.0, "Share of the steps, at the end, over which the rate falls to 0; often 0.2.")
    lr_cycles: int = option(1, "Cycles of cosineannealingwarmrestarts.")
    max_gradient_norm: float | None = option(None, "Norm to which gradients are clipped. [default: never]")
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
    tokens: Literal["all", "patches", "cls"] = option("all", "Which tokens of an image to train on.")
    class_token: bool = option(False, "The same as --tokens cls (the reference's name).")
    held_out: float = option(0.0, "Share of images or patients kept apart for evaluation, chosen by a hash.")
    held_out_by: Literal["image", "patient"] = option("image", "What is kept apart as a whole.")
    resident: Resident = option(
        "auto", "Keep all activations in memory (ram) or on the GPU (gpu); batches are the same. auto: where it pays."
    )
    mse_cls_coefficient: float = option(1.0, "Weight of the CLS token's reconstruction error (relu).")
    use_ghost_grads: bool = option(False, "Revive dead latents with ghost gradients (relu).")
    feature_sampling_window: int = option(64, "Steps over which latents' firing rates are measured.")
    dead_feature_window: int = option(64, "Steps without firing after which a latent is to be revived.")
    dead_feature_threshold: float = option(1e-6, "Firing rate under which a latent is reported as dead.")
    seed: int = option(42, "Seed of the weights, the order and the samples.")
    order_seed: int | None = option(None, "Seed of the order alone. [default: --seed]")
    n_checkpoints: int = option(20, "Checkpoints on the way, evenly spaced.")
    log_to_wandb: bool = option(False, "Log metrics to Weights & Biases as well (offline without a login).")
    tensorboard: bool = option(False, "Write TensorBoard's event files into the run's folder as well.")
    wandb_project: str = option("cytosae-cache", "Weights & Biases project.")
    wandb_entity: str | None = option(None, "Weights & Biases entity.")
    wandb_log_frequency: int = option(20, "Steps between log lines, with or without Weights & Biases.")
    clip_dim: int | None = option(None, "Width D that the store must have. [default: not checked]")
    precision: Literal["auto", "fp32", "bf16"] = option(
        "auto",
        "Type of the matrix products' factors; weights and sums stay fp32. auto: bf16 on GPUs and processors that "
        "have it, fp32 elsewhere.",
    )
    max_memory: float | None = option(
        None, "GiB of the largest tensor of tokens x latents; a batch is split to fit. [default: 0.5, on a GPU 4]"
    )
    no_verify: bool = option(False, "Do not check checksums while reading.")

    @property
    def order(self) -> int:
        """Seed of the order."""
        return self.seed if self.order_seed is None else self.order_seed

    @property
    def trained_on(self) -> Literal["all", "patches", "cls"]:
        """Which tokens of an image are trained on."""
        return "cls" if self.class_token else self.tokens

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
            "k",
            "lr_cycles",
        )
        _check_at_least(
            self, 0, "lr_warm_up_steps", "n_checkpoints", "seed", "order_seed", "l1_coefficient", "l1_warm_up_steps",
            "dead_feature_window", "lr", "mse_cls_coefficient", "dead_feature_threshold", "aux_coefficient",
            "l0_coefficient", "lr_decay_share", "held_out", "max_gradient_norm",
        )  # fmt: skip
        for name, least in (("held_out", 0.9), ("lr_decay_share", 1.0)):
            if getattr(self, name) > least:
                raise ValueError(f"{name} must be at most {least}, found {getattr(self, name)}")
        for name in ("max_memory", "max_gradient_norm", "bandwidth"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0, found {value}")
        self._check_tokens()
        self._check_architecture()

    def _check_tokens(self) -> None:
        """Raise for options that no batch could follow."""
        if self.class_token and self.tokens == "patches":
            raise ValueError("class_token is tokens cls, but tokens patches was given: leave one out")
        if self.batch_of == "tokens" and (self.trained_on != "all" or self.mse_cls_coefficient != 1):
            name = "mse_cls_coefficient"
            if self.trained_on != "all":
                name = "class_token" if self.class_token else f"tokens {self.tokens}"
            raise ValueError(
                f"{name} needs batch_of images: under batch_of tokens the tokens are mixed, and none stands in the CLS "
                "token's place"
            )
        if self.trained_on == "patches" and self.mse_cls_coefficient != 1:
            raise ValueError("mse_cls_coefficient was given, but tokens patches trains on no CLS token")

    def _check_architecture(self) -> None:
        """Raise for options that the architecture does not have."""
        relu_only = {
            "use_ghost_grads": self.use_ghost_grads,
            "norm_weighted_l1": self.norm_weighted_l1,
            "mse_cls_coefficient": self.mse_cls_coefficient != 1,
        }
        for name, given in relu_only.items():
            if given and self.arch != "relu":
                raise ValueError(f"{name} is an option of arch relu, found arch {self.arch}")


PRESETS: dict[str, dict[str, Any]] = {
    "cytosae": {
        "arch": "relu", "expansion_factor": 64, "b_dec_init_method": "geometric_median", "batch_size": 64,
        "n_checkpoints": 20, "l1_coefficient": 0.00008, "lr": 0.0004, "seed": 42, "use_ghost_grads": True,
        "total_training_tokens": 1_000_000,
    },
    "modern": {
        "arch": "batchtopk", "k": 32, "lr": 0.003, "standardise": True, "encoder_init": "decoder",
        "b_dec_init_method": "mean", "batch_of": "tokens", "lr_decay_share": 0.2, "held_out": 0.05,
        "max_gradient_norm": 1.0,
    },
}  # fmt: skip
"""What `train --preset` gives to options that the command line does not."""


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


@dataclass(frozen=True, kw_only=True)
class ExportConfig(StatisticsConfig):
    """Options of `export`: an autoencoder, or with the options of the statistics what it found in a data set."""

    format: Literal["saelens", "safetensors", "reference", "anndata", "csv", "parquet"] = option(
        "saelens",
        "The autoencoder: saelens = a folder for SAELens' SAE.load_from_disk, safetensors = one file of tensors, "
        "reference = a checkpoint as CytoSAE's own code reads it (relu only). Its statistics on a data set: anndata = "
        "files for scanpy, csv and parquet = tables.",
    )
    anndata_as: Literal["h5ad", "zarr"] = option("h5ad", "Container of anndata: one file, or a Zarr folder.")
    out: Path | None = option(
        None,
        "What to write: a file or folder; for statistics the folder to write into. [default: beside the autoencoder, "
        "named after it; for statistics where `features` writes]",
    )
    overwrite: bool = option(False, "Replace what is there.")

    @property
    def of_statistics(self) -> bool:
        """Whether statistics are exported, not the autoencoder."""
        return self.format in ("anndata", "csv", "parquet")

    def __post_init__(self) -> None:
        """Check ranges and options that do not go together."""
        super().__post_init__()
        if self.anndata_as != "h5ad" and self.format != "anndata":
            raise ValueError(f"anndata_as {self.anndata_as} needs format anndata, found format {self.format}")
        name = "dataset_name" if self.dataset_name is not None else "store"
        if not self.of_statistics and getattr(self, name) is not None:
            raise ValueError(
                f"format {self.format} writes the autoencoder alone, but {name} was given. For its statistics on a "
                "data set give format anndata, csv or parquet"
            )


def _check_at_least(config: object, least: int, *names: str) -> None:
    """Raise for the first of the fields that is set and too small, or not a finite number."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value >= least):
            raise ValueError(f"{name} must be at least {least}, found {value}")
