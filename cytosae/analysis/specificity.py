"""Which latents are specific to a label, and which depend on position (docs/definitions.md, section 10)."""

import itertools

import numpy as np
import numpy.typing as npt

from cytosae.analysis.latents import best_latents

POSITION_LIMIT = 0.4
"""A latent depends on position if its position share is at least this."""

_Z = 1.959964
"""Standard normal quantile of a two-sided 95 % interval."""


def label_lift(n_active: npt.NDArray[np.integer], n_images: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """How many times more often than by chance the images that activate a latent have a label, cautiously.

    Args:
        n_active: Images of each label on which each latent is active, shape `(S, L)`.
        n_images: Images of each label, shape `(L,)`.

    Returns:
        Lower end of Wilson's 95 % interval of the share of label c among the latent's active images, divided by the
        share of c among all images, float64, shape `(S, L)`; 0 for latents that are never active.
    """
    total = n_active.sum(axis=1, keepdims=True).astype(np.float64)
    n = np.maximum(total, 1)
    share = n_active / n
    centre = share + _Z**2 / (2 * n)
    half = _Z * np.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    lower = np.maximum((centre - half) / (1 + _Z**2 / n), 0)
    prior = n_images / max(int(n_images.sum()), 1)
    lift: npt.NDArray[np.float64] = np.where((total > 0) & (prior > 0), lower / np.where(prior > 0, prior, 1), 0.0)
    return lift


def depends_on_position(position_share: npt.NDArray[np.floating]) -> npt.NDArray[np.bool_]:
    """Whether each latent's maps are nearly the same on all images, shape `(S,)`."""
    return position_share >= POSITION_LIMIT


def specific_latents(lift: npt.NDArray[np.floating], allowed: npt.NDArray[np.bool_], n: int) -> npt.NDArray[np.int64]:
    """The latents that are most specific to each label, labels in turn.

    Args:
        lift: Result of `label_lift`, shape `(S, L)`.
        allowed: Whether a latent may be chosen, shape `(S,)`.
        n: Most latents to return.

    Returns:
        Latents with a lift above 1, each under the label of its largest lift, int64, shape `(at most n,)`. Ties go to
        the smaller latent.
    """
    if not lift.size:
        return np.zeros(0, dtype=np.int64)
    best = lift.argmax(axis=1)
    largest = lift[np.arange(len(lift)), best]
    order = np.argsort(-largest, kind="stable")
    order = order[(largest[order] > 1) & allowed[order]]
    turns = itertools.zip_longest(*(order[best[order] == label].tolist() for label in range(lift.shape[1])))
    chosen = [latent for turn in turns for latent in turn if latent is not None]
    return np.array(chosen[:n], dtype=np.int64)


def first_latents(
    sparsity: npt.NDArray[np.floating],
    mean_acts: npt.NDArray[np.floating],
    entropy: npt.NDArray[np.floating],
    *,
    lift: npt.NDArray[np.floating],
    position_share: npt.NDArray[np.floating],
    n: int,
) -> npt.NDArray[np.int64]:
    """The latents to look at first: those specific to each label in turn, then the others, last those of a position.

    Args:
        sparsity: Share of images where each latent is active, shape `(S,)`; latents with 0 are left out.
        mean_acts: Mean activation where active, shape `(S,)`.
        entropy: Label entropy, shape `(S,)`; -1 where not defined.
        lift: Result of `label_lift`, shape `(S, L)`.
        position_share: Shape `(S,)`; -1 where not defined.
        n: Most latents to return.

    Returns:
        Latents, best first, int64, shape `(at most n,)`.
    """
    fixed = depends_on_position(position_share)
    parts = [specific_latents(lift, (sparsity > 0) & ~fixed, n)]
    left = np.array(sparsity, copy=True)
    left[parts[0]] = 0
    for kept in (~fixed, fixed):
        parts.append(best_latents(np.where(kept, left, 0), mean_acts, entropy, n - sum(map(len, parts))))
    return np.concatenate(parts)


def mostly_label(mass: npt.NDArray[np.floating], means: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
    """The label that a latent's images mostly have, by its top images and by its means alike.

    Args:
        mass: Summed scores of each label among the top-k images, shape `(S, L)`.
        means: Mean score over the images of each label, shape `(S, L)`.

    Returns:
        The label with more than half of both, int64, shape `(S,)`; -1 if there is none.
    """
    if not mass.size:
        return np.full(len(mass), -1, dtype=np.int64)
    agree = np.ones(len(mass), dtype=bool)
    best = mass.argmax(axis=1)
    for values in (mass, means):
        agree &= values[np.arange(len(values)), best] > 0.5 * values.sum(axis=1)
    return np.where(agree, best, -1).astype(np.int64)
