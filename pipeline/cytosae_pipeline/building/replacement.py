"""Where a store is written: in its place, or beside the complete store that it replaces once it is complete itself."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

from cytosae_cache.creation import clear_leftovers
from cytosae_cache.errors import StoreCorruptError, StoreError, StoreNotFoundError
from cytosae_cache.storage.base import Location
from cytosae_cache.storage.open import open_storage
from cytosae_cache.storage.swap import finish_swap, place_beside, swap
from cytosae_cache.store import ActivationStore

logger = logging.getLogger(__name__)

Status = TypeVar("Status")
"""What a verb calls what it had to do."""


def choose_place(place: Location, *, overwrite: bool, delete_first: bool, chosen: bool) -> Location:
    """Where to write the store of a place; needs its lock.

    A complete store is replaced only by a complete one, unless the user asks to delete it first. An unfinished one is
    left for the caller, who resumes it or deletes it.

    Args:
        place: The store's place.
        overwrite: Whether a store that is there is to be replaced.
        delete_first: Whether to delete it before, for want of space.
        chosen: Whether the user chose the place: then nothing is deleted that does not open as a store.

    Raises:
        StoreError: If other files are there, or a complete store on object storage, where nothing can be renamed.
        StoreCorruptError: If the user chose the place, and what is there does not open as a store.
    """
    if isinstance(place, Path):
        finish_swap(_real(place))
    if not overwrite:
        _mention_unfinished(place)
        return place
    try:
        is_whole = ActivationStore(place).complete
    except StoreNotFoundError:
        clear_leftovers(open_storage(place))
        return place
    except StoreCorruptError:
        if chosen:
            raise
        open_storage(place).delete()
        return place
    if not is_whole:
        return place
    if delete_first:
        logger.info(f"deleting store '{place}' before the new one is written, as --delete-first says")
        open_storage(place).delete()
        return place
    if not isinstance(place, Path):
        raise StoreError(
            f"'{place}' is a complete store. Nothing can be renamed on object storage, so a new one cannot take its "
            "place once it is complete. Give another --store, or add --delete-first to delete the old one before"
        )
    return place_beside(_real(place))


def reopen(
    where: Location, place: Location, check: Callable[[ActivationStore], Status], *, overwrite: bool
) -> tuple[ActivationStore, Status | Literal["resumed"]] | None:
    """The store that was begun, or finished, where `choose_place` said; None if there is none, or it was deleted.

    Args:
        where: What `choose_place` returned.
        place: The store's place.
        check: Says what has to be done for a store; raises `StoreError` if it is not the one that is to be made.
        overwrite: Whether a store that does not fit is deleted.

    Raises:
        StoreError: If the store does not fit, unless it may be deleted.
    """
    storage = open_storage(where)
    if storage.size("zarr.json") is None:
        return None
    try:
        store = ActivationStore(where)
        status = check(store)
    except StoreError as error:
        # What is replaced is complete: this was begun by another command, or from other images.
        if not overwrite:
            raise
        logger.info(f"starting again from scratch, as --overwrite asks: {error}")
        storage.delete()
        return None
    return store, status if where == place else "resumed"


def put_in_place(store: ActivationStore, place: Location) -> ActivationStore:
    """A complete store in its place; where it was written beside an older one, that one is removed.

    Args:
        store: The store, where `choose_place` said.
        place: Its place.
    """
    if store.path == place or not isinstance(place, Path):
        return store
    store.close()
    swap(_real(place))
    return ActivationStore.open(place)


def _mention_unfinished(place: Location) -> None:
    """Mention a replacement that an interrupted `--overwrite` left behind."""
    if isinstance(place, Path) and place_beside(_real(place)).exists():
        logger.info(
            f"'{place_beside(_real(place))}' is the unfinished replacement of this store: run the command with "
            "--overwrite to finish it, or delete that folder"
        )


def _real(place: Path) -> Path:
    """The place that a link leads to: the new store goes there, and the link stays."""
    return Path(os.path.realpath(place))
