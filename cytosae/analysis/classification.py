"""Classification of patients into groups by their counts, with nested cross-validation that leaks nothing.

With thousands of latents and tens of patients, some latents separate any groups by chance. Therefore every step that
uses the groups (selecting latents, choosing settings, fitting) sees only the training patients of its fold. Selecting
latents on all patients and cross-validating afterwards reports high accuracy on pure noise (Ambroise & McLachlan 2002).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.feature_selection import SelectKBest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from cytosae.backbones.errors import shown

N_INNER_FOLDS = 3
"""Inner folds, in which the settings are chosen if the groups of the training part are large enough."""


class Setting(NamedTuple):
    """Hyperparameters that the inner cross-validation chooses."""

    n_latents: int
    """Number of latents kept: those whose counts differ most between the groups."""
    c: float
    """Inverse strength of the logistic regression's L2 penalty."""


SETTINGS = tuple(Setting(n_latents, c) for n_latents in (8, 32, 128) for c in (0.1, 1.0))
"""The candidates, simplest first: the first of equally good ones is chosen."""

DEFAULT_SETTING = Setting(32, 0.1)
"""Used if a training part is too small to be split again."""


class GroupClassification(NamedTuple):
    """Predictions for patients that the model never saw, and the latents it used."""

    accuracy: float
    """Share of rows predicted correctly."""
    balanced_accuracy: float
    """Mean over the groups of the share of their rows predicted correctly; guessing gives 1 / G."""
    chance: float
    """Share of the largest group: the accuracy of always predicting it."""
    confusion: npt.NDArray[np.int64]
    """Rows by true group (first axis) and predicted group, shape `(G, G)`."""
    predicted: npt.NDArray[np.int64]
    """Predicted group of each row, shape `(P,)`."""
    probability: npt.NDArray[np.float64]
    """Probability of each group for each row, by the model that predicts it, shape `(P, G)`. Groups count as equally
    frequent."""
    fold: npt.NDArray[np.int64]
    """Fold in which the row was predicted, from 0, shape `(P,)`."""
    latents: npt.NDArray[np.int64]
    """Latents selected in more than half of the folds, shape `(n,)`, by descending share of folds, then descending mean
    |coefficient|, then index."""
    latent_share: npt.NDArray[np.float64]
    """Share of the folds that selected each of `latents`, shape `(n,)`."""
    latent_weight: npt.NDArray[np.float64]
    """Coefficient of each of `latents` for each group, mean over the folds that selected it, shape `(n, G)`: the change
    of the group's logit per standard deviation of `log1p(count)`. The softmax of the logits is the prediction. Each row
    sums to 0."""
    settings: tuple[Setting, ...]
    """The setting chosen in each fold."""


def classify_groups(
    counts: npt.NDArray[np.floating],
    groups: npt.NDArray[np.integer],
    names: Sequence[str],
    *,
    patients: npt.NDArray[np.generic] | None = None,
    n_folds: int = 5,
    seed: int = 0,
) -> GroupClassification:
    """Predict the group of every row with a model fitted on other patients.

    The model is `log1p`, selection of the latents with the largest analysis-of-variance F, standardisation, and
    logistic regression with an L2 penalty and equal weight for every group, regardless of its number of patients. Folds
    are stratified by group and keep a patient's rows together. An inner cross-validation of each fold's training part
    chooses the number of latents and the penalty by balanced accuracy (Varma & Simon 2006).

    Args:
        counts: Normalised counts, finite and not negative, shape `(P, S)`.
        groups: Group of each row as index into `names`, shape `(P,)`.
        names: Names of the G groups.
        patients: Patient of each row, shape `(P,)`; by default every row is a patient of its own.
        n_folds: Outer folds; fewer if the smallest group has fewer patients.
        seed: Seed of the folds.

    Returns:
        The cross-validated predictions and the latents and settings behind them.

    Raises:
        ValueError: If the shapes do not fit, a count is negative or not finite, there are fewer than two groups or
            folds, a group has fewer than two patients, or the split leaves a group without training patients, which
            happens only if patients belong to several groups.
    """
    groups = np.asarray(groups)
    ids = np.arange(len(groups)) if patients is None else np.unique(patients, return_inverse=True)[1]
    _check(counts, groups, names, ids, n_folds)
    splits = split_folds(groups, ids, n_folds, seed)
    if splits is None:
        raise ValueError(
            "cannot split the patients so that every training part has all groups: too many patients have rows in "
            "several groups; leave such patients out, or pass patients=None if rows are independent"
        )
    # Transforms each row by itself, so nothing leaks between rows; done once instead of in every fit.
    features = np.log1p(np.asarray(counts, dtype=np.float64))
    found = _cross_validate(features, groups, ids, splits, n_groups=len(names), seed=seed)
    latents = _order(found.n_chosen, found.strength, len(splits))
    confusion = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(confusion, (groups, found.predicted), 1)
    sizes = confusion.sum(axis=1)
    return GroupClassification(
        accuracy=float(np.trace(confusion) / len(groups)),
        balanced_accuracy=float((np.diag(confusion) / sizes).mean()),
        chance=float(sizes.max() / len(groups)),
        confusion=confusion,
        predicted=found.predicted,
        probability=found.probability,
        fold=found.fold,
        latents=latents,
        latent_share=found.n_chosen[latents] / len(splits),
        latent_weight=found.weights[latents] / found.n_chosen[latents, None],
        settings=found.settings,
    )


def predict_groups(
    counts: npt.NDArray[np.floating],
    groups: npt.NDArray[np.integer],
    names: Sequence[str],
    new_counts: npt.NDArray[np.floating],
    *,
    patients: npt.NDArray[np.generic] | None = None,
    seed: int = 0,
) -> npt.NDArray[np.float64]:
    """Probability of each group for new rows, by the model of `classify_groups` fitted on all rows.

    Args:
        counts: As for `classify_groups`, shape `(P, S)`.
        groups: As for `classify_groups`, shape `(P,)`.
        names: Names of the G groups.
        new_counts: Counts of the new rows, normalised in the same way, shape `(Q, S)`.
        patients: As for `classify_groups`, shape `(P,)`.
        seed: Seed of the inner folds.

    Returns:
        Float64, shape `(Q, G)`; each row sums to 1. Groups count as equally frequent.

    Raises:
        ValueError: As for `classify_groups`, and if the new counts do not fit.
    """
    groups = np.asarray(groups)
    ids = np.arange(len(groups)) if patients is None else np.unique(patients, return_inverse=True)[1]
    _check(counts, groups, names, ids, 2)
    if new_counts.ndim != 2 or new_counts.shape[1] != counts.shape[1]:
        raise ValueError(f"new_counts must be (Q, {counts.shape[1]}), found {new_counts.shape}")
    if not (new_counts.min(initial=0) >= 0 and new_counts.max(initial=0) < np.inf):
        raise ValueError("new_counts must be finite and not negative")
    if not len(new_counts):
        return np.zeros((0, len(names)))
    features = np.log1p(np.asarray(counts, dtype=np.float64))
    model, _ = _fit(features, groups, ids, seed)
    return np.asarray(model.predict_proba(np.log1p(np.asarray(new_counts, dtype=np.float64))))


class _Folds(NamedTuple):
    """What the models of all folds predict and use."""

    predicted: npt.NDArray[np.int64]
    """Predicted group of each row, shape `(P,)`."""
    probability: npt.NDArray[np.float64]
    """Probability of each group, shape `(P, G)`."""
    fold: npt.NDArray[np.int64]
    """Fold in which the row was predicted, shape `(P,)`."""
    n_chosen: npt.NDArray[np.int64]
    """Folds that selected each latent, shape `(S,)`."""
    weights: npt.NDArray[np.float64]
    """Sum over the folds of each latent's coefficients, shape `(S, G)`."""
    strength: npt.NDArray[np.float64]
    """Sum over the folds of each latent's mean |coefficient|, shape `(S,)`."""
    settings: tuple[Setting, ...]
    """The setting chosen in each fold."""


def _cross_validate(
    features: npt.NDArray[np.float64],
    groups: npt.NDArray[np.integer],
    ids: npt.NDArray[np.integer],
    splits: Sequence[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]],
    *,
    n_groups: int,
    seed: int,
) -> _Folds:
    """Fit a model on each training part and predict the rows that it did not see."""
    (n_rows, n_latents), settings = features.shape, list[Setting]()
    predicted, fold = np.zeros(n_rows, dtype=np.int64), np.zeros(n_rows, dtype=np.int64)
    n_chosen = np.zeros(n_latents, dtype=np.int64)
    weights, strength = np.zeros((n_latents, n_groups)), np.zeros(n_latents)
    probability = np.zeros((n_rows, n_groups))
    for number, (train, test) in enumerate(splits):
        model, setting = _fit(features[train], groups[train], ids[train], seed)
        predicted[test], fold[test] = model.predict(features[test]), number
        probability[test] = model.predict_proba(features[test])
        settings.append(setting)
        latents, coefficients = _explain(model)
        n_chosen[latents] += 1
        weights[latents] += coefficients
        strength[latents] += np.abs(coefficients).mean(axis=1)
    return _Folds(predicted, probability, fold, n_chosen, weights, strength, tuple(settings))


def variance_share(features: npt.NDArray[np.float64], groups: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """Share of each column's variance that is between the groups (eta squared).

    Columns have the same order as by the F of an analysis of variance, `F ~ share / (1 - share)`, but is defined for
    every column: scikit-learn's `f_classif` divides by zero where a column is constant, or constant in each group.

    Args:
        features: Shape `(n, S)`.
        groups: Group of each row, shape `(n,)`.

    Returns:
        Between 0 and 1, float64, shape `(S,)`; 0 for constant columns.
    """
    varies = features.max(axis=0) > features.min(axis=0)
    centred = features - features.mean(axis=0)
    total = np.einsum("ns,ns->s", centred, centred)
    between = np.zeros(features.shape[1])
    for group in np.unique(groups):
        rows = centred[groups == group]
        between += len(rows) * rows.mean(axis=0) ** 2
    return np.asarray(np.clip(np.divide(between, total, out=np.zeros_like(total), where=varies), 0, 1))


def _check(
    counts: npt.NDArray[np.floating],
    groups: npt.NDArray[np.integer],
    names: Sequence[str],
    ids: npt.NDArray[np.integer],
    n_folds: int,
) -> None:
    """Raise the ValueErrors of `classify_groups`."""
    if counts.ndim != 2 or not counts.shape[1] or groups.shape != counts.shape[:1] or ids.shape != groups.shape:
        raise ValueError(
            f"counts must be (P, S), groups and patients (P,), found {counts.shape}, {groups.shape} and {ids.shape}"
        )
    if not (counts.min(initial=0) >= 0 and counts.max(initial=0) < np.inf):
        raise ValueError("counts must be finite and not negative")
    if n_folds < 2:
        raise ValueError(f"n_folds must be at least 2, found {n_folds}")
    if len(names) < 2:
        raise ValueError(f"classification needs at least 2 groups, found {len(names)}")
    if not np.issubdtype(groups.dtype, np.integer) or not ((groups >= 0) & (groups < len(names))).all():
        raise ValueError(f"groups must be whole numbers from 0 to {len(names) - 1}; leave out rows without a group")
    sizes = _patients_by_group(groups, ids, len(names))
    if sizes.min() < 2:
        found = ", ".join(f"{shown(repr(name))} has {size}" for name, size in zip(names, sizes.tolist(), strict=True))
        raise ValueError(f"classification needs at least 2 patients in each group: {found}")


def _patients_by_group(
    groups: npt.NDArray[np.integer], ids: npt.NDArray[np.integer], n_groups: int
) -> npt.NDArray[np.int64]:
    """Number of distinct patients in each group, shape `(G,)`."""
    pairs = np.unique(np.stack([groups, ids], axis=1), axis=0)
    return np.bincount(pairs[:, 0], minlength=n_groups)


def split_folds(
    groups: npt.NDArray[np.integer], ids: npt.NDArray[np.integer], n_folds: int, seed: int
) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] | None:
    """Training and test rows of each fold, stratified by group; None if a training part would lack a group.

    Args:
        groups: Group of each row, shape `(P,)`.
        ids: Who the row is of, shape `(P,)`; all rows of one are in one fold.
        n_folds: Folds; fewer if the smallest group has fewer patients.
        seed: Seed of the folds.
    """
    present = np.unique(groups)
    sizes = _patients_by_group(groups, ids, 0)[present]
    n_folds = min(n_folds, int(sizes.min()))
    if n_folds < 2:
        return None
    folds = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    splits = list(folds.split(groups, groups, ids))
    whole = all(len(test) and np.array_equal(np.unique(groups[train]), present) for train, test in splits)
    return splits if whole else None


def _fit(
    features: npt.NDArray[np.float64], groups: npt.NDArray[np.integer], ids: npt.NDArray[np.integer], seed: int
) -> tuple[Pipeline, Setting]:
    """A model fitted to the given rows, and the setting chosen on them."""
    model = Pipeline(
        [
            ("select", SelectKBest(variance_share)),
            ("scale", StandardScaler()),
            ("regress", LogisticRegression(max_iter=1000, class_weight="balanced")),
        ]
    )
    splits = split_folds(groups, ids, N_INNER_FOLDS, seed)
    candidates = list(SETTINGS if splits else (DEFAULT_SETTING,))
    # scikit-learn warns if more latents are requested than exist.
    settings = list(dict.fromkeys(Setting(min(n, features.shape[1]), c) for n, c in candidates))
    if splits is None:
        return model.set_params(**_parameters(settings[0])).fit(features, groups), settings[0]
    grid = [{name: [value] for name, value in _parameters(setting).items()} for setting in settings]
    search = GridSearchCV(model, grid, scoring="balanced_accuracy", cv=splits, error_score="raise")
    search.fit(features, groups)
    return search.best_estimator_, settings[search.best_index_]


def _parameters(setting: Setting) -> dict[str, float]:
    """A setting under the parameter names of the pipeline."""
    return {"select__k": setting.n_latents, "regress__C": setting.c}


def _explain(model: Pipeline) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The informative latents that a model selected, shape `(k,)`, and their coefficients, shape `(k, G)`."""
    kept = model["select"].get_support(indices=True)
    coefficients = model["regress"].coef_
    if len(coefficients) == 1:
        # Two groups share one row of coefficients w; softmax over -w / 2 and w / 2 is the same model.
        coefficients = np.concatenate([-coefficients, coefficients]) / 2
    informative = model["select"].scores_[kept] > 0
    return kept[informative], coefficients.T[informative]


def _order(n_chosen: npt.NDArray[np.int64], strength: npt.NDArray[np.float64], n_folds: int) -> npt.NDArray[np.int64]:
    """Latents selected in more than half of the folds, by descending number of folds, then mean strength."""
    latents = np.flatnonzero(2 * n_chosen > n_folds)
    mean_strength = strength[latents] / n_chosen[latents]
    return latents[np.lexsort((-mean_strength, -n_chosen[latents]))].astype(np.int64)
