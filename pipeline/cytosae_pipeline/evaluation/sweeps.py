"""What the runs of a finished sweep are worth beside the reconstruction: the last columns of its table."""

import logging
from dataclasses import fields, replace

from cytosae_pipeline.config import EvaluateConfig, TrainConfig
from cytosae_pipeline.config.store import StoreSource
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.evaluation.evaluate import SaeEvaluation, evaluate_pair
from cytosae_pipeline.evaluation.probing import SaeProbe, measure_probe
from cytosae_pipeline.statistics.inputs import Inputs, open_pair
from cytosae_pipeline.statistics.subjects import find_persons
from cytosae_pipeline.training.sweep import SweepResult, SweepRow, write_sweep

logger = logging.getLogger(__name__)

PROBE_K = 5
"""Latents of the probe that the table shows."""

MOST_IMAGES = 4000
"""Images of the store on which the runs are measured, at most."""

COLUMNS = {
    "stability_decoder": "share of live latents",
    "stability_activation": "share of live latents",
    f"probe_{PROBE_K}": "balanced accuracy",
    "probe_mean_token": "balanced accuracy",
    "monosemanticity": "median over latents",
}
"""Columns that are added, and their units; definitions in docs/definitions.md, section 12."""


def measure_sweep(base: TrainConfig, result: SweepResult) -> SweepResult:
    """Measure every finished run, and write the table and the picture again with what was found.

    Stability is the mean over the other runs that differ in the seed alone, whatever their number; probes are left out
    where the store has no labels that can be tested. Runs that failed have no measures.

    Args:
        base: Options of the sweep, which say what store it was trained on.
        result: The finished sweep.

    Raises:
        ValueError: If the store or an autoencoder cannot be read.
    """
    finished = [row for row in result.rows if row.status != "failed"]
    measured: dict[str, dict[str, float | None]] = {}
    can_probe = True
    for row in finished:
        others = [other for other in finished if _differs_by_seed(row, other)]
        options = _evaluate_config(base, row, others)
        inputs = open_pair(options, encoder_only=False)
        found = evaluate_pair(inputs, options)
        probe = _probe(inputs, found, no_verify=base.no_verify) if can_probe else None
        can_probe = probe is not None
        measured[row.run] = _columns(found, probe)
    nothing: dict[str, float | None] = dict.fromkeys(COLUMNS)
    rows = [replace(row, measures=measured.get(row.run, nothing)) for row in result.rows]
    made = replace(result, rows=rows)
    write_sweep(made, COLUMNS)
    return made


def _differs_by_seed(row: SweepRow, other: SweepRow) -> bool:
    """Whether two runs differ in the seed, and in nothing else."""
    one, two = ({name: value for name, value in each.options.items() if name != "seed"} for each in (row, other))
    return row.seed != other.seed and row.arch == other.arch and one == two


def _evaluate_config(base: TrainConfig, row: SweepRow, others: list[SweepRow]) -> EvaluateConfig:
    """What is measured of a run, on the store of the sweep."""
    shared = {field.name for field in fields(EvaluateConfig)} & {field.name for field in fields(StoreSource)}
    return EvaluateConfig(
        **{name: getattr(base, name) for name in shared}, no_verify=base.no_verify, sae_path=row.sae,
        other_sae_path=tuple(other.sae for other in others), monosemanticity=True, limit=MOST_IMAGES,
    )  # fmt: skip


def _probe(inputs: Inputs, found: SaeEvaluation, *, no_verify: bool) -> SaeProbe | None:
    """The probes; None, with the reason in a message, where labels cannot be tested."""
    try:
        subjects = find_persons(inputs, None, None)
        return measure_probe(inputs, found.tokens, n_images=MOST_IMAGES, subjects=subjects, no_verify=no_verify)
    except UserError as error:
        logger.info(f"no probes of the sweep's runs: {error}")
        return None


def _columns(found: SaeEvaluation, probe: SaeProbe | None) -> dict[str, float | None]:
    """The cells of a run."""
    best = None if probe is None else probe.by_k.get(PROBE_K)
    return {
        "stability_decoder": _mean([one.decoder_share for one in found.stability]),
        "stability_activation": _mean([one.activation_share for one in found.stability]),
        f"probe_{PROBE_K}": None if best is None else best.balanced_accuracy,
        "probe_mean_token": None if probe is None else probe.mean_token.balanced_accuracy,
        "monosemanticity": None if found.monosemanticity is None else found.monosemanticity.median,
    }


def _mean(shares: list[float | None]) -> float | None:
    """Mean of those that are defined; None if none is."""
    defined = [share for share in shares if share is not None]
    return sum(defined) / len(defined) if defined else None
