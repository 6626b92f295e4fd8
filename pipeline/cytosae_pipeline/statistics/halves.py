"""Which images train a classifier and which test it."""

import numpy as np
import numpy.typing as npt

from cytosae_cache.reading.permutation import IntArray, epoch_order


def split_in_halves(groups: IntArray, labels: IntArray, *, seed: int) -> npt.NDArray[np.bool_]:
    """Which images train a classifier and which test it: whole groups, and of every label about half of the images.

    Groups with the largest shares of their labels' images are placed first, equals in an order drawn by the seed. Each
    goes to the side with the smaller shares of its labels so far; to training if they are equal.

    Args:
        groups: Group of each image, 0-based, shape `(n,)`.
        labels: Label of each image, 0-based, shape `(n,)`.
        seed: Seed of the order; 0 or more.

    Returns:
        Whether each image is for training, shape `(n,)`.
    """
    if not len(labels):
        return np.zeros(0, dtype=bool)
    shares = np.zeros((groups.max() + 1, labels.max() + 1))
    np.add.at(shares, (groups, labels), 1)
    shares /= np.maximum(shares.sum(axis=0), 1)
    order = epoch_order(len(shares), seed=seed, epoch=0)
    order = order[np.argsort(-shares.sum(axis=1)[order], kind="stable")]
    in_training = np.zeros(len(shares), dtype=bool)
    surplus = np.zeros(shares.shape[1])
    for group in order:
        in_training[group] = surplus @ shares[group] <= 0
        surplus += shares[group] if in_training[group] else -shares[group]
    return in_training[groups]
