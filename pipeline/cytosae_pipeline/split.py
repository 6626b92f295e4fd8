"""Which images are held out of training: decided by a hash of what they are, the same in every run everywhere."""

import hashlib
from typing import Literal

import numpy as np
import numpy.typing as npt

from cytosae_cache.store import ActivationStore
from cytosae_pipeline.config import UserError

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


def _bucket(data: bytes) -> int:
    """A uniform number below `_BUCKETS`; a hash of its own, so that no other use of the digest is tied to it."""
    return int.from_bytes(hashlib.sha256(b"held out" + data).digest()[:8], "big")
