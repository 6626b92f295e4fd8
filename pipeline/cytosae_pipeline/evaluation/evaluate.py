"""`evaluate`: how well an autoencoder reconstructs the images of a store, overall and by label."""

import logging
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from cytosae_cache.reading.concat import ConcatReader
from cytosae_cache.reading.permutation import IntArray, spread_rows
from cytosae_pipeline.building.tail_file import find_tail, open_tail
from cytosae_pipeline.config import EvaluateConfig, EvaluateOptions
from cytosae_pipeline.config.store import StorePlace
from cytosae_pipeline.errors import UserError, say_count
from cytosae_pipeline.evaluation.downstream import Downstream, measure_downstream
from cytosae_pipeline.evaluation.image_scores import ImageScores, Tokens
from cytosae_pipeline.evaluation.monosemanticity import SaeMonosemanticity, measure_monosemanticity
from cytosae_pipeline.evaluation.patch_monosemanticity import PatchMonosemanticity, measure_patch_monosemanticity
from cytosae_pipeline.evaluation.probing import SaeProbe, measure_probe
from cytosae_pipeline.evaluation.stability import Stability, measure_stability
from cytosae_pipeline.images.masks import find_masks
from cytosae_pipeline.runtime.memory import exceeds_page_cache
from cytosae_pipeline.runtime.progress import Progress
from cytosae_pipeline.statistics.inputs import Inputs, open_pair, require_sae_path
from cytosae_pipeline.statistics.label_index import LabelIndex
from cytosae_pipeline.statistics.subjects import find_persons
from cytosae_pipeline.training.evaluation import Evaluation, measure
from cytosae_pipeline.training.expectations import explain_dense
from cytosae_pipeline.training.holdout import HeldOutBy, held_out, is_trained_on, trained_unit
from cytosae_pipeline.training.matmul import fp32_matmul
from cytosae_pipeline.workspace.runs import resolve_sae

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaeEvaluation:
    """How well an autoencoder reconstructs the images of a store (docs/definitions.md, section 9)."""

    overall: Evaluation
    """Of all evaluated images."""
    by_label: dict[str, Evaluation]
    """Of the images of each label, with their own mean, by name; only labels with evaluated images."""
    tokens: Tokens
    """Tokens that were evaluated."""
    held_out: float
    """Share of images or patients that training leaves out, to which the evaluation is limited; 0 if it is not."""
    held_out_by: HeldOutBy
    """Unit that was held out as a whole."""
    architecture: str
    """Architecture of the autoencoder."""
    n_latents: int
    """Latents S."""
    stability: list[Stability] = field(default_factory=list)
    """Against each of the other autoencoders."""
    probe: SaeProbe | None = None
    """Probes of labels; None if they were not requested."""
    monosemanticity: SaeMonosemanticity | None = None
    """Similarity of the images of each latent; None if it was not requested."""
    patches: PatchMonosemanticity | None = None
    """The same of patches; None without masks."""
    downstream: Downstream | None = None
    """What is left of the encoder's embedding; None if it was not asked for."""

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON values."""
        return asdict(self)

    def describe(self) -> str:
        """The result as a table for humans."""
        which = f"held out ({self.held_out:.3g} by {self.held_out_by})" if self.held_out else "of the store"
        head = (
            f"{self.architecture}, {self.n_latents:,} latents, on {say_count(self.overall.n_images, 'image')} {which}, "
            f"{self.tokens} tokens"
        )
        names = ["all", *(name or "(no name)" for name in self.by_label)]
        width = min(40, max(map(len, names)))
        lines = [head, f"{'':<{width}}  {'images':>9}  {'expl. var.':>10}  {'L0':>9}  {'dead':>6}  {'cosine':>6}"]
        for name, found in zip(names, [self.overall, *self.by_label.values()], strict=True):
            shown = "".join(c if c.isprintable() else "?" for c in name)
            shown = shown if len(shown) <= width else shown[: width - 1] + "…"
            lines.append(
                f"{shown:<{width}}  {found.n_images:>9,}  {found.explained_variance:>10.4f}  {found.l0:>9.1f}  "
                f"{found.dead_share:>6.1%}  {found.cosine:>6.3f}"
            )
        parts = [*self.stability, self.monosemanticity, self.patches, self.probe, self.downstream]
        return "\n".join([*lines, *(part.describe() for part in parts if part is not None)])


def run_evaluate(config: EvaluateConfig) -> SaeEvaluation:
    """Evaluate an autoencoder on a store; any autoencoder, on any store of its encoder.

    Raises:
        ValueError: If the autoencoder or store is missing, they do not fit, or no image is left to evaluate.
    """
    others = tuple(require_sae_path(resolve_sae(replace(config, sae_path=path))) for path in config.other_sae_path)
    config = replace(resolve_sae(config), other_sae_path=others)
    return evaluate_pair(open_pair(config, encoder_only=False), config)


def evaluate_pair(inputs: Inputs, options: EvaluateOptions) -> SaeEvaluation:
    """Evaluate an autoencoder on a store, in float32.

    Args:
        inputs: Autoencoder, with its decoder, and store.
        options: What to measure.

    Raises:
        UserError: If no image is left, the images do not have such tokens, or what is requested beside the
            reconstruction is not possible: see `measure_stability` and `measure_probe`.
    """
    found, rows = _evaluate_reconstruction(inputs, options)
    if not (options.other_sae_path or options.probe or options.monosemanticity):
        return found
    scores = ImageScores(inputs, rows, found.tokens, no_verify=options.no_verify)
    stability = [
        measure_stability(
            scores, path, above=options.match_above, allow_mismatch=options.allow_mismatch, no_verify=options.no_verify
        )
        for path in options.other_sae_path
    ]
    monosemanticity = measure_monosemanticity(scores) if options.monosemanticity else None
    masks = find_masks(inputs.store, options, rows)
    patches = None if masks is None else measure_patch_monosemanticity(inputs, masks, no_verify=options.no_verify)
    probe = None
    if options.probe:
        subjects = find_persons(inputs, options.covariates, options.subject_column)
        probe = measure_probe(
            inputs, found.tokens, n_images=options.probe_images, subjects=subjects, no_verify=options.no_verify
        )
    return replace(found, stability=stability, monosemanticity=monosemanticity, patches=patches, probe=probe)


def _evaluate_reconstruction(inputs: Inputs, options: EvaluateOptions) -> tuple[SaeEvaluation, IntArray]:
    """What training printed at its end, and the rows of the evaluated images."""
    store, sae = inputs.store, inputs.sae
    share, by = _held_out(inputs, options)
    tokens = _tokens(inputs, options)
    if options.downstream:  # before anything is computed
        open_tail(find_tail(store), options if isinstance(options, StorePlace) else None)
    rows = store.valid & held_out(store, share, by) if share else store.valid
    if not rows.any():
        raise UserError(
            f"no readable image of store '{store.path}' is held out with held_out {share:g} by {by}: give held_out 0 "
            "to evaluate all images"
        )
    if not share and is_trained_on(inputs.sae_cfg, store):
        logger.info("the autoencoder was trained on these images: it may reconstruct new ones less well")
    labels = LabelIndex.of(store.images.label)
    direct = exceeds_page_cache(store.n_images * store.spec.record_bytes)
    with store.open_reader(verify=not options.no_verify, direct=direct) as reader:
        images = ConcatReader([reader], [rows])
        chosen = spread_rows(len(images), options.limit or len(images))
        groups = labels.numbers[images.rows[chosen]]
        with Progress("evaluate", len(chosen), "images") as bar:
            found = measure(
                sae, images, chosen, store.spec.tokens, matmul=fp32_matmul(sae.b_enc.device),
                choice=tokens, groups=groups, n_groups=len(labels.names), advance=bar.advance,
            )  # fmt: skip
    n_images = np.bincount(groups[groups >= 0], minlength=len(labels.names)).tolist()
    by_label = {
        name: Evaluation.of(found.of_group(at), n_images[at]) for at, name in enumerate(labels.names) if n_images[at]
    }
    overall = Evaluation.of(found.overall(), len(chosen))
    if dense := explain_dense(sae.architecture, overall.l0, inputs.n_latents):
        logger.warning(dense)
    evaluation = SaeEvaluation(overall, by_label, tokens, share, by, sae.architecture, inputs.n_latents)
    if options.downstream:
        evaluation = replace(evaluation, downstream=measure_downstream(inputs, options, images.rows[chosen], tokens))
    return evaluation, images.rows[chosen]


def _held_out(inputs: Inputs, options: EvaluateOptions) -> tuple[float, HeldOutBy]:
    """The share of images to which the evaluation is limited, and by which unit they were held out."""
    cfg = inputs.sae_cfg
    by = options.held_out_by or trained_unit(cfg)
    if options.held_out is not None:
        return options.held_out, by
    trained_here = cfg.get("spec_hash") == inputs.store.spec.hash and is_trained_on(cfg, inputs.store)
    share = cfg.get("held_out")
    return (float(share) if trained_here and isinstance(share, int | float) else 0.0), by


def _tokens(inputs: Inputs, options: EvaluateOptions) -> Tokens:
    """The tokens to evaluate.

    Raises:
        UserError: If the images have none of them.
    """
    cfg, layout = inputs.sae_cfg, inputs.store.spec.tokens
    trained = "cls" if cfg.get("class_token") is True else cfg.get("tokens")
    known: dict[object, Tokens] = {"all": "all", "patches": "patches", "cls": "cls"}
    tokens = options.tokens or known.get(trained, "all")
    if (tokens == "cls" and not layout.n_cls) or (tokens == "patches" and not layout.grid[0] * layout.grid[1]):
        raise UserError(f"images of store '{inputs.store.path}' have no {tokens} tokens: give another value of tokens")
    return tokens
