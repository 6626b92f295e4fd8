"""How well patients' counts tell groups apart, and by which latents: nested cross-validation that leaks nothing.

Thousands of latents and tens of patients: some latents separate any groups by chance. So everything that looks at the
groups (choosing latents, choosing settings, fitting) sees the training patients of its fold alone. Choosing latents on
all patients first and cross-validating afterwards reports high accuracies on pure noise (Ambroise & McLachlan 2002).
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

N_INNER_FOLDS = 3
"""Folds of the training part in which the settings are chosen, where its groups are large enough."""


class Setting(NamedTuple):
    """What the inner cross-validation chooses."""

    n_latents: int
    """Latents kept: those whose counts differ most between the groups."""
    c: float
    """Inverse strength of the logistic regression's L2 penalty."""


SETTINGS = tuple(Setting(n_latents, c) for n_latents in (8, 32, 128) for c in (0.1, 1.0))
"""The candidates, the simpler first: of equally good ones the first is taken."""

DEFAULT_SETTING = Setting(32, 0.1)
"""Used where a training part is too small to be split again."""


class GroupClassification(NamedTuple):
    """Predictions for patients that the model never saw, and the latents it used."""

    accuracy: float
    """Share of rows predicted right."""
    balanced_accuracy: float
    """Mean over the groups of the share of their rows predicted right; guessing gives 1 / G."""
    chance: float
    """Share of the largest group: the accuracy of always naming it."""
    confusion: npt.NDArray[np.int64]
    """Rows by true group (first axis) and predicted group, shape `(G, G)`."""
    predicted: npt.NDArray[np.int64]
    """Predicted group of each row, shape `(P,)`."""
    fold: npt.NDArray[np.int64]
    """Fold in which the row was predicted, from 0, shape `(P,)`."""
    latents: npt.NDArray[np.int64]
    """Latents chosen in more than half of the folds, shape `(n,)`: by falling share of folds, then falling mean
    |coefficient|, then index."""
    latent_share: npt.NDArray[np.float64]
    """Share of the folds that chose each of `latents`, shape `(n,)`."""
    latent_weight: npt.NDArray[np.float64]
    """Coefficient of each of `latents` for each group, mean over the folds that chose it, shape `(n, G)`: what one
    standard deviation of `log1p(count)` adds to the group's logit, whose softmax is the prediction. Each row adds up
    to 0."""
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
    """Predict the group of every row by a model fitted on other patients.

    The model: `log1p`, the latents with the largest analysis-of-variance F, standardisation, logistic regression with
    an L2 penalty, in which all groups weigh the same, however many patients they have. Folds are stratified by group
    and keep a patient's rows together. How many latents and how strong a penalty is chosen by balanced accuracy in an
    inner cross-validation of each fold's training part (Varma & Simon 2006).

    Args:
        counts: Normalised counts, finite and not negative, shape `(P, S)`.
        groups: Group of each row as index into `names`, shape `(P,)`.
        names: Names of the G groups.
        patients: Patient of each row, shape `(P,)`; each row its own by default.
        n_folds: Outer folds; fewer where the smallest group has fewer patients.
        seed: Seed of the folds.

    Returns:
        The cross-validated predictions and what they were based on.

    Raises:
        ValueError: If the shapes do not fit, a count is negative or not finite, there are fewer than two groups or
            folds, a group has fewer than two patients, or the split found leaves a group without training patients,
            which only patients of several groups can cause.
    """
    groups = np.asarray(groups)
    ids = np.arange(len(groups)) if patients is None else np.unique(patients, return_inverse=True)[1]
    _check(counts, groups, names, ids, n_folds)
    splits = _splits(groups, ids, n_folds, seed)
    if splits is None:
        raise ValueError(
            "cannot split the patients so that every group is left to train on: too many patients have rows in "
            "several groups; leave such patients out, or give patients=None if rows are independent"
        )
    # Each row by itself, so nothing leaks between rows; done once instead of in every fit.
    features = np.log1p(np.asarray(counts, dtype=np.float64))
    predicted, fold = np.zeros(len(groups), dtype=np.int64), np.zeros(len(groups), dtype=np.int64)
    n_chosen = np.zeros(features.shape[1], dtype=np.int64)
    weights, strength = np.zeros((features.shape[1], len(names))), np.zeros(features.shape[1])
    settings = []
    for number, (train, test) in enumerate(splits):
        model, setting = _fit(features[train], groups[train], ids[train], seed)
        predicted[test], fold[test] = model.predict(features[test]), number
        settings.append(setting)
        latents, coefficients = _explain(model)
        n_chosen[latents] += 1
        weights[latents] += coefficients
        strength[latents] += np.abs(coefficients).mean(axis=1)
    latents = _order(n_chosen, strength, len(splits))
    confusion = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(confusion, (groups, predicted), 1)
    sizes = confusion.sum(axis=1)
    return GroupClassification(
        accuracy=float(np.trace(confusion) / len(groups)),
        balanced_accuracy=float((np.diag(confusion) / sizes).mean()),
        chance=float(sizes.max() / len(groups)),
        confusion=confusion,
        predicted=predicted,
        fold=fold,
        latents=latents,
        latent_share=n_chosen[latents] / len(splits),
        latent_weight=weights[latents] / n_chosen[latents, None],
        settings=tuple(settings),
    )


def variance_share(features: npt.NDArray[np.float64], groups: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """Share of each column's variance that lies between the groups (eta squared).

    It orders columns exactly as the F of an analysis of variance does, `F ~ share / (1 - share)`, but is defined for
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
    """Raise ValueError as `classify_groups` says."""
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
        raise ValueError(f"groups must be whole numbers from 0 to {len(names) - 1}; leave out rows of no group")
    sizes = _patients_by_group(groups, ids, len(names))
    if sizes.min() < 2:
        found = ", ".join(f"{name!r} has {size}" for name, size in zip(names, sizes.tolist(), strict=True))
        raise ValueError(f"classification needs at least 2 patients in each group: {found}")


def _patients_by_group(
    groups: npt.NDArray[np.integer], ids: npt.NDArray[np.integer], n_groups: int
) -> npt.NDArray[np.int64]:
    """Different patients of each group, shape `(G,)`."""
    pairs = np.unique(np.stack([groups, ids], axis=1), axis=0)
    return np.bincount(pairs[:, 0], minlength=n_groups)


def _splits(
    groups: npt.NDArray[np.integer], ids: npt.NDArray[np.integer], n_folds: int, seed: int
) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] | None:
    """Training and test rows of each fold; None where some training part would lack a group."""
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
    """A model fitted to the rows given, with the setting chosen among them."""
    model = Pipeline(
        [
            ("select", SelectKBest(variance_share)),
            ("scale", StandardScaler()),
            ("regress", LogisticRegression(max_iter=1000, class_weight="balanced")),
        ]
    )
    splits = _splits(groups, ids, N_INNER_FOLDS, seed)
    candidates = list(SETTINGS if splits else (DEFAULT_SETTING,))
    # More latents than there are would be a warning of scikit-learn's.
    settings = list(dict.fromkeys(Setting(min(n, features.shape[1]), c) for n, c in candidates))
    if splits is None:
        return model.set_params(**_parameters(settings[0])).fit(features, groups), settings[0]
    grid = [{name: [value] for name, value in _parameters(setting).items()} for setting in settings]
    search = GridSearchCV(model, grid, scoring="balanced_accuracy", cv=splits, error_score="raise")
    search.fit(features, groups)
    return search.best_estimator_, settings[search.best_index_]


def _parameters(setting: Setting) -> dict[str, float]:
    """A setting as the pipeline names it."""
    return {"select__k": setting.n_latents, "regress__C": setting.c}


def _explain(model: Pipeline) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The latents that a model chose and could learn from, shape `(k,)`, and their coefficients, shape `(k, G)`."""
    kept = model["select"].get_support(indices=True)
    coefficients = model["regress"].coef_
    if len(coefficients) == 1:
        # Two groups share one row of coefficients w; softmax over -w / 2 and w / 2 is the same model.
        coefficients = np.concatenate([-coefficients, coefficients]) / 2
    informative = model["select"].scores_[kept] > 0
    return kept[informative], coefficients.T[informative]


def _order(n_chosen: npt.NDArray[np.int64], strength: npt.NDArray[np.float64], n_folds: int) -> npt.NDArray[np.int64]:
    """Latents chosen in more than half of the folds: the most often chosen, then the strongest on average, first."""
    latents = np.flatnonzero(2 * n_chosen > n_folds)
    mean_strength = strength[latents] / n_chosen[latents]
    return latents[np.lexsort((-mean_strength, -n_chosen[latents]))].astype(np.int64)
