"""Record of the classification of groups, with what it reaches by chance and how far it may be believed."""

from typing import Any

import numpy as np

from cytosae.analysis.classification import classify_groups
from cytosae.analysis.classification_chance import shuffle_groups
from cytosae.analysis.classification_quality import balanced_accuracy_interval, calibrate
from cytosae_pipeline.report.data.cohort import Cohort
from cytosae_pipeline.report.records.comparisons import comparable_groups
from cytosae_pipeline.runtime.progress import Progress

_LARGEST = 15


def classification_record(cohort: Cohort, *, seed: int, shuffles: int) -> dict[str, Any] | None:
    """Cross-validated classification of the groups that have enough patients; None if fewer than two have.

    Args:
        cohort: The patients.
        seed: Seed of the folds and shuffles.
        shuffles: Shuffles that say what it reaches by chance; 0 for none.
    """
    units, kept = cohort.units, comparable_groups(cohort)
    of = units.groups.of
    if len(kept) < 2:
        return None
    rows = np.flatnonzero(np.isin(of, kept))
    names, groups, counts = (
        [units.groups.names[group] for group in kept],
        np.searchsorted(kept, of[rows]),
        units.counts[rows],
    )
    found = classify_groups(counts, groups, names, seed=seed)
    calibration = calibrate(found.probability, groups)
    record = {
        "names": names,
        "accuracy": float(found.accuracy),
        "balanced_accuracy": float(found.balanced_accuracy),
        "interval": balanced_accuracy_interval(found.confusion),
        "chance": float(found.chance),
        "shuffled": None,
        "n_folds": len(set(found.fold.tolist())),
        "confusion": found.confusion.tolist(),
        "calibration": {
            "predicted": calibration.predicted.tolist(),
            "right": calibration.right.tolist(),
            "n_subjects": calibration.n_subjects.tolist(),
            "brier": calibration.brier,
        },
        "latents": [
            {"latent": int(latent), "share": float(share), "weights": [float(value) for value in weights]}
            for latent, share, weights in zip(
                found.latents[:_LARGEST], found.latent_share, found.latent_weight, strict=False
            )
        ],
    }
    if shuffles:
        with Progress("classify shuffled groups", shuffles, "shuffles") as bar:
            by_chance = shuffle_groups(counts, groups, seed=seed, n_shuffles=shuffles, advance=bar.advance)
        if len(by_chance.balanced_accuracy):
            record["shuffled"] = {
                "n": len(by_chance.balanced_accuracy),
                "p": by_chance.p_value(float(found.balanced_accuracy)),
                "spread": by_chance.spread(),
            }
    return record
