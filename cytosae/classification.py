"""Telling patients' groups from their latent counts, with everything that is chosen chosen inside the training part."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.feature_selection import SelectKBest, VarianceThreshold, f_classif
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, confusion_matrix
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

_N_LATENTS = (8, 32, 128)
_PENALTIES = (0.1, 1.0)
_INNER_FOLDS = 3
MIN_PATIENTS = 3
"""Patients each group needs: a training part then holds two of them, as the F test needs."""

_MAX_ITERATIONS = 2000


class GroupClassification(NamedTuple):
    """Cross-validated classification of P patients into G groups."""

    accuracy: float
    """Share of patients told right."""
    balanced_accuracy: float
    """Mean over the groups of the share told right."""
    chance: float
    """Accuracy of always guessing the largest group."""
    confusion: npt.NDArray[np.int64]
    """Patients by true group (rows) and group told (columns), shape `(G, G)`."""
    predicted: npt.NDArray[np.int64]
    """Group told of each row, shape `(P,)`."""
    fold: npt.NDArray[np.int64]
    """Fold in which each row was tested, shape `(P,)`."""
    latents: npt.NDArray[np.int64]
    """Latents chosen in at least half of the folds: by share of folds, then mean size of coefficients."""
    latent_share: npt.NDArray[np.float64]
    """Share of folds that chose them."""
    latent_weight: npt.NDArray[np.float64]
    """Their mean coefficient for each group, of standardised `log(1 + count)`, 0 where not chosen, shape `(n, G)`."""
    settings: list[dict[str, float]]
    """Latents kept and penalty (C) chosen in each fold."""


def classify_groups(
    counts: npt.NDArray[np.floating],
    groups: npt.NDArray[np.integer],
    names: Sequence[str],
    *,
    patients: Sequence[str] | None = None,
    n_folds: int = 5,
    seed: int = 0,
) -> GroupClassification:
    """Classify patients' groups by logistic regression on the latents that differ most, by nested cross-validation.

    Outer folds are stratified by group and keep each patient's rows together. In each, latents are ranked by an F test
    and their number and the penalty chosen by inner folds of the training part alone; the part tested plays no role in
    either, so the accuracy of groups that do not differ is that of chance however many latents there are.

    Args:
        counts: Counts of each row, at least 0, shape `(P, S)`.
        groups: Group of each row, 0-based, shape `(P,)`.
        names: Groups.
        patients: Patient of each row; by default each row is a patient of its own.
        n_folds: Outer folds; fewer if the smallest group has fewer patients.
        seed: Of the folds.

    Raises:
        ValueError: If the lengths differ, there are fewer than two groups, or one has fewer than three patients.
    """
    owners = np.unique(np.arange(len(groups)) if patients is None else np.asarray(patients), return_inverse=True)[1]
    if not len(counts) == len(groups) == len(owners):
        raise ValueError(f"need one group and patient a row, found {len(counts)}, {len(groups)} and {len(owners)}")
    sizes = [len(np.unique(owners[groups == group])) for group in range(len(names))]
    if len(names) < 2 or min(sizes) < MIN_PATIENTS:
        found = ", ".join(f"{name}: {size}" for name, size in zip(names, sizes, strict=True))
        raise ValueError(f"classification needs two groups of {MIN_PATIENTS} patients each, found {found or 'none'}")
    wide = np.asarray(counts, dtype=np.float64)
    folds = StratifiedGroupKFold(min(n_folds, *sizes), shuffle=True, random_state=seed)
    predicted, fold = np.full(len(groups), -1), np.full(len(groups), -1)
    weights, settings = [], []
    for number, (train, test) in enumerate(folds.split(wide, groups, owners)):
        if not len(test):
            continue
        model, chosen = _fit(wide[train], groups[train], owners[train], seed)
        predicted[test], fold[test] = model.predict(wide[test]), number
        weights.append(_coefficients(model, wide.shape[1], len(names)))
        settings.append(chosen)
    return GroupClassification(
        float((predicted == groups).mean()),
        float(balanced_accuracy_score(groups, predicted)),
        float(np.bincount(groups).max() / len(groups)),
        confusion_matrix(groups, predicted, labels=np.arange(len(names))).astype(np.int64),
        predicted,
        fold,
        *_rank(np.stack(weights)),
        settings,
    )


def _fit(
    counts: npt.NDArray[np.float64], groups: npt.NDArray[np.integer], owners: npt.NDArray[np.int64], seed: int
) -> tuple[Pipeline, dict[str, float]]:
    """The model of one training part, and what was chosen for it."""
    varying = int((counts.min(axis=0) < counts.max(axis=0)).sum())
    model = Pipeline(
        [
            ("log", FunctionTransformer(np.log1p)),
            ("varying", VarianceThreshold()),
            ("best", SelectKBest(_f_test)),
            ("scale", StandardScaler()),
            ("regression", LogisticRegression(max_iter=_MAX_ITERATIONS)),
        ]
    )
    # An inner training part has fewer varying latents; SelectKBest must not be asked for more than there are.
    numbers: list[int | str] = [k for k in _N_LATENTS if k <= varying // 2]
    grid = {"best__k": numbers or ["all"], "regression__C": list(_PENALTIES)}
    smallest = min(len(np.unique(owners[groups == group])) for group in np.unique(groups))
    if smallest < _INNER_FOLDS + 1:
        k = min(_N_LATENTS[1], varying) or "all"
        model.set_params(best__k=k)
        return model.fit(counts, groups), {"latents": float(varying if k == "all" else k), "C": 1.0}
    inner = StratifiedGroupKFold(_INNER_FOLDS, shuffle=True, random_state=seed)
    search = GridSearchCV(model, grid, cv=inner, scoring="balanced_accuracy").fit(counts, groups, groups=owners)
    best = search.best_params_
    return search.best_estimator_, {
        "latents": float(varying if best["best__k"] == "all" else best["best__k"]),
        "C": float(best["regression__C"]),
    }


def _f_test(
    values: npt.NDArray[np.float64], groups: npt.NDArray[np.integer]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The F test, without a word about latents that tell the groups apart without any spread: theirs is infinite."""
    with np.errstate(divide="ignore", invalid="ignore"):
        statistic, p_value = f_classif(values, groups)
    return statistic, p_value


def _coefficients(model: Pipeline, n_latents: int, n_groups: int) -> npt.NDArray[np.float64]:
    """Coefficient of each latent for each group, shape `(S, G)`; 0 where the latent was not chosen."""
    varying = np.flatnonzero(model["varying"].get_support())
    chosen = varying[model["best"].get_support()]
    found = model["regression"].coef_
    if len(found) == 1:
        # Two groups share one row of coefficients: the second group's.
        found = np.concatenate([-found, found])
    weights = np.zeros((n_latents, n_groups))
    weights[np.ix_(chosen, model["regression"].classes_)] = found.T
    return weights


def _rank(
    weights: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Latents of at least half of the folds, best first, with their share of folds and mean coefficients."""
    share = (weights != 0).any(axis=2).mean(axis=0)
    mean = weights.mean(axis=0)
    latents = np.flatnonzero(share >= 0.5)
    order = np.lexsort((latents, -np.abs(mean[latents]).max(axis=1), -share[latents]))
    latents = latents[order]
    return latents, share[latents], mean[latents]
