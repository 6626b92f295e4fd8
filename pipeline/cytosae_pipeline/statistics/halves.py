"""Which images train a classifier and which test it."""

import numpy as np
import numpy.typing as npt

from cytosae_cache.reading.permutation import IntArray, epoch_order
from cytosae_cache.store import ActivationStore


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


def find_companions(store: ActivationStore, rows: IntArray, subjects: IntArray | None = None) -> IntArray:
    """Group of each image: images of a person must stay together or, if the person is not known, identical pictures.

    Args:
        store: The store.
        rows: The images, shape `(n,)`.
        subjects: Person of each image of the store, shape `(n_images,)`; -1 where the patient is the person.

    Returns:
        0-based, shape `(n,)`.
    """
    patients, digests = store.images.patient, store.column("images/sha256")
    persons = np.full(len(rows), -1) if subjects is None else subjects[rows]
    numbers: dict[str | bytes | int, int] = {}
    keys = (
        person if person >= 0 else patients[row] or bytes(digests[row])
        for row, person in zip(rows.tolist(), persons.tolist(), strict=True)
    )
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
