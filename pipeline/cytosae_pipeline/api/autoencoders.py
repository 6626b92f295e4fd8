"""Autoencoders in Python: `train`, `evaluate`, `compare`, effects of latents and `export`."""

from cytosae_pipeline.api.options import takes_options, takes_pair, takes_two_pairs
from cytosae_pipeline.config import CompareOptions, EffectOptions, EvaluateOptions, ExportConfig, TrainConfig
from cytosae_pipeline.evaluation.comparison import Comparison, compare_pair
from cytosae_pipeline.evaluation.evaluate import SaeEvaluation, evaluate_pair
from cytosae_pipeline.evaluation.latent_effects import LatentEffects, measure_effects
from cytosae_pipeline.export.sae import ExportResult
from cytosae_pipeline.export.sae import export_sae as run_export
from cytosae_pipeline.statistics.inputs import Inputs
from cytosae_pipeline.training.loop import TrainResult, train


@takes_options(TrainConfig)
def train_sae(options: TrainConfig) -> TrainResult:
    """Train an autoencoder on a store: the verb `train`.

    Checkpoints and metrics are written into the run's folder, so that an interrupted run resumes. A run that is
    finished is not trained again.

    Returns:
        `result.load()` is the autoencoder, `result.metrics` the last metrics, `result.folder` the run's folder.

    Raises:
        ValueError: If the store is missing or does not fit the options; the message says what to do.
        RuntimeError: If the loss is no longer finite.
    """
    return train(options)


@takes_pair(EvaluateOptions)
def evaluate_sae(inputs: Inputs, options: EvaluateOptions) -> SaeEvaluation:
    """Measure how well an autoencoder reconstructs a store, overall and by label: the verb `evaluate`.

    Returns:
        `evaluation.overall.explained_variance`, `.l0`, `.dead_share`, `.cosine`, and the same in
        `evaluation.by_label[name]`. `evaluation.stability`, `.probe` and `.monosemanticity` are what was requested of
        it.

    Raises:
        ValueError: If autoencoder and store do not fit, no image is left to evaluate, or what was requested is not
            possible.
    """
    return evaluate_pair(inputs, options)


@takes_two_pairs(CompareOptions)
def compare(first: Inputs, second: Inputs, options: CompareOptions) -> Comparison:
    """Compare two autoencoders latent by latent, on one store or on two of the same images: the verb `compare`.

    No file is written.

    Returns:
        `comparison.latents` and `.other_latents` are the live latents of both with their partners, `.only_first` and
        `.only_second` those without; `comparison.describe()` is the summary.

    Raises:
        ValueError: If an autoencoder does not fit its store, or the images of the stores differ and `common_images` is
            not set.
    """
    return compare_pair(first, second, options)


@takes_pair(EffectOptions)
def latent_effects(inputs: Inputs, options: EffectOptions) -> LatentEffects:
    """Scale latents in cached images, and read the labels from the encoder's embedding before and after.

    Needs the store's tail (`build_store(..., keep_tail=True)`). The probe of the labels is trained on half of the
    images, whole patients. The page of `explore` shows the same.

    Returns:
        `.before`, shape `(n, C)`, and `.after`, shape `(L, n, C)`: probabilities of the labels in `.classes`;
        `.change`, their mean change, shape `(L, C)`; `.cosine` of the embeddings, shape `(L, n)`.

    Raises:
        ValueError: If there is no tail, no two labels, or no such latent or image.
    """
    return measure_effects(inputs, options)


@takes_options(ExportConfig, leave_out=("model_path", "images", "layout", "top_k", "threshold", "normalize"))
def export_sae(options: ExportConfig) -> ExportResult:
    """Write an autoencoder for another program: the verb `export` with the formats saelens, safetensors, reference.

    Returns:
        `result.path` is the file or folder.

    Raises:
        ValueError: If the target exists, or the format cannot represent the autoencoder.
    """
    return run_export(options)
