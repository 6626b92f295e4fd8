"""Which images are held out of training: decided by a hash, the same in every run on every machine."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from cytosae_cache.store import ActivationStore
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.images.columns import column_texts

HeldOutBy = Literal["image", "patient", "subject"]

_SUBJECT = "subject"
"""The column of the images that names the person, where several patients are samples of one."""

_BUCKETS = 1 << 64


def is_trained_on(cfg: Mapping[str, Any], store: ActivationStore) -> bool:
    """Whether an autoencoder was trained on the images of a store, or on those of one of the stores it is joined of.

    Args:
        cfg: What its file says about the training.
        store: The store.
    """
    further = cfg.get("with_list_digest")
    trained = [cfg.get("list_digest"), *(further if isinstance(further, list) else [])]
    return any(part.provenance.list_digest in trained for part in store.parts)


def trained_unit(cfg: Mapping[str, Any]) -> HeldOutBy:
    """What training held out, by what an autoencoder's file says; single images if it says nothing."""
    return next((unit for unit in get_args(HeldOutBy) if unit == cfg.get("held_out_by")), "image")


def held_out(store: ActivationStore, share: float, by: HeldOutBy) -> npt.NDArray[np.bool_]:
    """Whether each row is held out, shape `(n_images,)`.

    Identical pictures have the same hash and stay together, as do all images of a patient with `patient`, and of a
    person with `subject`.

    Args:
        store: The store.
        share: Share of images, of patients, or of subjects to hold out; 0 for none.
        by: `image` hashes the file's digest, `patient` the patient, `subject` the person; an image without a subject
            counts by its patient, one without either by itself.

    Raises:
        UserError: If `by` is `patient` or `subject` and the store has none; of joined ones, if all have none.
    """
    if not share:
        return np.zeros(store.n_images, dtype=bool)
    # As in the training, which knows no names of joined stores.
    keys = [_keys(part, by) for part in store.parts]
    if by != "image" and not any(any(of_part) for of_part in keys):
        raise UserError(
            f"--held_out_by {by} was given, but store '{store.path}' has no {by}s. Give --held_out_by "
            + ("patient" if by == "subject" and any(store.images.patient) else "image")
        )
    return np.concatenate(
        [_held_out(part, share, by, of_part) for part, of_part in zip(store.parts, keys, strict=True)]
    )


def _keys(store: ActivationStore, by: HeldOutBy) -> Sequence[str]:
    """The unit by whose name each image of a store is held out, '' where unknown; empty if it is the image."""
    return [] if by == "image" else _subjects(store) if by == "subject" else store.images.patient


def _held_out(store: ActivationStore, share: float, by: HeldOutBy, names: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Whether each row of a store is held out, by the names of `_keys`."""
    digests = [bytes(row) for row in store.column("images/sha256")]
    if by != "image":
        # With another prefix a subject and a patient of the same name are not the same.
        keys = [
            f"subject {name}" if name and by == "subject" else patient
            for name, patient in zip(names or [""] * len(digests), store.images.patient, strict=True)
        ]
        digests = [key.encode() if key else digest for key, digest in zip(keys, digests, strict=True)]
    limit = int(share * _BUCKETS)
    return np.array([_bucket(digest) < limit for digest in digests], dtype=bool)


def _subjects(store: ActivationStore) -> list[str]:
    """Person of each image, '' where unknown."""
    for name, column in store.image_columns.items():
        if name.casefold() == _SUBJECT:
            return column_texts(column)
    return []


def _bucket(data: bytes) -> int:
    """A uniform number below `_BUCKETS`; a separate hash, so that it is independent of other uses of the digest."""
    return int.from_bytes(hashlib.sha256(b"held out" + data).digest()[:8], "big")
