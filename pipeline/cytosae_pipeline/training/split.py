"""Which images are held out: of training by a hash, the same in every run everywhere; of a classifier by halves."""

import hashlib
from typing import Literal

import numpy as np
import numpy.typing as npt

from cytosae_cache.reading.permutation import IntArray, epoch_order
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.errors import UserError

HeldOutBy = Literal["image", "patient"]

_BUCKETS = 1 << 64


def held_out(store: ActivationStore, share: float, by: HeldOutBy) -> npt.NDArray[np.bool_]:
    """Whether each row is held out, shape `(n_images,)`.

    Equal pictures share a hash, and so a side; so do all images of a patient under `patient`.

    Args:
        store: The store.
        share: Share of images, or of patients, to hold out; 0 for none.
        by: `image` hashes the file's digest, `patient` the patient; an image without one counts for itself.

    Raises:
        UserError: If patients are asked for and the store names none.
    """
    if not share:
        return np.zeros(store.n_images, dtype=bool)
    digests = [bytes(row) for row in store.column("images/sha256")]
    if by == "patient":
        patients = store.images.patient
        if not any(patients):
            raise UserError(
                f"--held_out_by patient was given, but store '{store.path}' names no patients. Give --held_out_by image"
            )
        digests = [patient.encode() if patient else digest for patient, digest in zip(patients, digests, strict=True)]
    limit = int(share * _BUCKETS)
    return np.array([_bucket(digest) < limit for digest in digests], dtype=bool)


def split_in_halves(groups: IntArray, labels: IntArray, *, seed: int) -> npt.NDArray[np.bool_]:
    """Which images train a classifier and which test it: whole groups, and of every label about half of the images.

    Groups with the largest shares of their labels' images are placed first, equals in an order drawn by the seed. Each
    goes to the side that holds the smaller shares of its labels so far; to training if they are equal.

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


def _bucket(data: bytes) -> int:
    """A uniform number below `_BUCKETS`; a hash of its own, so that no other use of the digest is tied to it."""
    return int.from_bytes(hashlib.sha256(b"held out" + data).digest()[:8], "big")
