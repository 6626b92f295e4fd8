"""Which images are held out of training: decided by a hash, the same in every run on every machine."""

import hashlib
from typing import Literal

import numpy as np
import numpy.typing as npt

from cytosae_cache.store import ActivationStore
from cytosae_pipeline.errors import UserError

HeldOutBy = Literal["image", "patient"]

_BUCKETS = 1 << 64


def held_out(store: ActivationStore, share: float, by: HeldOutBy) -> npt.NDArray[np.bool_]:
    """Whether each row is held out, shape `(n_images,)`.

    Identical pictures have the same hash and stay together, as do all images of a patient with `patient`.

    Args:
        store: The store.
        share: Share of images, or of patients, to hold out; 0 for none.
        by: `image` hashes the file's digest, `patient` the patient; an image without a patient counts by itself.

    Raises:
        UserError: If `by` is `patient` and the store has no patients.
    """
    if not share:
        return np.zeros(store.n_images, dtype=bool)
    digests = [bytes(row) for row in store.column("images/sha256")]
    if by == "patient":
        patients = store.images.patient
        if not any(patients):
            raise UserError(
                f"--held_out_by patient was given, but store '{store.path}' has no patients. Give --held_out_by image"
            )
        digests = [patient.encode() if patient else digest for patient, digest in zip(patients, digests, strict=True)]
    limit = int(share * _BUCKETS)
    return np.array([_bucket(digest) < limit for digest in digests], dtype=bool)


def _bucket(data: bytes) -> int:
    """A uniform number below `_BUCKETS`; a separate hash, so that it is independent of other uses of the digest."""
    return int.from_bytes(hashlib.sha256(b"held out" + data).digest()[:8], "big")
