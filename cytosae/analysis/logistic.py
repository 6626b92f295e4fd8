"""Logistic regression on few rows by Newton's method: shuffled cross-validations fit it thousands of times."""

import numpy as np
import numpy.typing as npt

_MAX_STEPS = 50
_GRADIENT = 1e-8
"""Largest entry of the gradient at which a fit ends."""

Floats = npt.NDArray[np.float64]


def fit_logistic(features: Floats, groups: npt.NDArray[np.integer], n_groups: int, c: float) -> tuple[Floats, Floats]:
    """Fit the model of scikit-learn's `LogisticRegression(C=c, class_weight="balanced")`.

    It minimises `c sum_i w_i log loss_i + 1/2 ||W||^2` with weights of rows `w_i = n / (G n_g)` and free intercepts; of
    two groups, the penalty is that of their one difference. The solution lies in the span of the rows, so that Newton's
    method works in at most as many dimensions as there are rows.

    Args:
        features: Standardised columns, shape `(n, k)`.
        groups: Group of each row, each of 0 to `n_groups - 1` at least once, shape `(n,)`.
        n_groups: Groups G.
        c: Inverse strength of the penalty.

    Returns:
        Coefficients, shape `(k, G)`, and intercepts, shape `(G,)`, each with sum 0 over the groups: the group with the
        largest `features @ coefficients + intercepts` is predicted, and their softmax is its probability.
    """
    n = len(groups)
    left, scale, right = np.linalg.svd(features, full_matrices=False)
    kept = scale > 1e-10 * scale.max(initial=0)
    inputs = np.column_stack([left[:, kept] * scale[kept], np.ones(n)])
    wanted = (groups[:, None] == np.arange(n_groups)).astype(np.float64)
    weights = c * n / (n_groups * wanted.sum(axis=0))[groups]
    penalty = np.full((inputs.shape[1], n_groups), 2.0 if n_groups == 2 else 1.0)
    penalty[-1] = 0
    fitted = np.zeros(penalty.shape)
    loss, probability = _loss(fitted, inputs, groups, weights, penalty)
    for _ in range(_MAX_STEPS):
        gradient = inputs.T @ (weights[:, None] * (probability - wanted)) + penalty * fitted
        if np.abs(gradient).max() < _GRADIENT:
            break
        step = _solve(inputs, probability, weights, penalty, gradient)
        size = 1.0
        while size > 1e-10:
            tried, probability = _loss(fitted - size * step, inputs, groups, weights, penalty)
            if tried <= loss:
                break
            size /= 2
        fitted, loss = fitted - size * step, tried
    fitted = fitted - fitted.mean(axis=1, keepdims=True)
    return right[kept].T @ fitted[:-1], fitted[-1]


def _loss(
    fitted: Floats, inputs: Floats, groups: npt.NDArray[np.integer], weights: Floats, penalty: Floats
) -> tuple[float, Floats]:
    """The objective, and each row's probabilities, shape `(n, G)`."""
    logits = inputs @ fitted
    logits -= logits.max(axis=1, keepdims=True)
    odds = np.exp(logits)
    total = odds.sum(axis=1)
    losses = np.log(total) - logits[np.arange(len(groups)), groups]
    return float(weights @ losses + (penalty * fitted**2).sum() / 2), odds / total[:, None]


def _solve(inputs: Floats, probability: Floats, weights: Floats, penalty: Floats, gradient: Floats) -> Floats:
    """Newton's step, of the shape of the gradient."""
    n_inputs, n_groups = gradient.shape
    blocks = np.empty((n_groups, n_inputs, n_groups, n_inputs))
    for one in range(n_groups):
        for two in range(one, n_groups):
            here = weights * probability[:, one] * ((one == two) - probability[:, two])
            blocks[one, :, two] = blocks[two, :, one] = inputs.T @ (here[:, None] * inputs)
    hessian = blocks.reshape(n_groups * n_inputs, n_groups * n_inputs)
    # All intercepts together change nothing: a little keeps the system regular.
    hessian[np.diag_indices(len(hessian))] += (penalty + 1e-9 * weights.sum()).T.ravel()
    return np.asarray(np.linalg.solve(hessian, gradient.T.ravel()).reshape(n_groups, n_inputs).T)
