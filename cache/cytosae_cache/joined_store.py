"""Several stores of the same encoder, opened as one: cohorts that span sites, or that grow."""

import hashlib
import os
import typing
from collections import Counter
from collections.abc import Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt

from cytosae_cache.errors import StoreError, StoreMismatchError
from cytosae_cache.format.layout import ImageTable
from cytosae_cache.format.metadata import Provenance
from cytosae_cache.format.moments import Moments
from cytosae_cache.format.spec import canonical_json
from cytosae_cache.format.texts import Names, Texts, as_texts, to_texts
from cytosae_cache.reading.concat import check_same_spec
from cytosae_cache.reading.joined_reader import JoinedReader, first_rows
from cytosae_cache.reading.reader import RowReader
from cytosae_cache.storage.base import Location
from cytosae_cache.store import ActivationStore
from cytosae_cache.views import dask_view

if TYPE_CHECKING:
    import dask.array
    import zarr

SameNames = Literal["same", "separate"]
"""What it means that a patient's name stands in several data sets: one person, or another one in each."""

DATASET_COLUMN = "dataset"
"""Further column of the images of a joined store: the name of their data set; `joined_dataset` if they have one."""

_NAMED = 3  # patients in a message


class JoinedStore(ActivationStore):
    """Several complete stores, opened for reading as one: the rows of the first, then those of the next.

    Images, activations and sums are those of the parts. Paths begin with the name of the data set; it is also a further
    column, `dataset`. Columns that only some parts have are NaN or '' in the others. Nothing is copied or written.

    Args:
        stores: The stores, or where they are, of different data sets.
        joined_patients: What it means that a patient's name stands in several data sets. `same`: one person.
            `separate`: another one in each; patients are then called `data set/patient`. Needed only if there are
            such names.

    Raises:
        StoreError: If a store cannot be opened or is unfinished, or there are fewer than two.
        StoreMismatchError: If encoders differ, two stores are of data sets of the same name, or a patient's name
            stands in several and `joined_patients` does not say what that means, or contradicts what was stated when
            some of the stores were joined.
        TypeError: If one place is given instead of several.
        ValueError: If `joined_patients` is another word.
    """

    def __init__(
        self, stores: Sequence[ActivationStore | Location], *, joined_patients: SameNames | None = None
    ) -> None:
        _require_sequence(stores)
        if joined_patients not in (None, *typing.get_args(SameNames)):
            raise ValueError(f"joined_patients must be 'same', 'separate' or None, found {joined_patients!r}")
        opened = [one if isinstance(one, ActivationStore) else ActivationStore.open(one) for one in stores]
        _require_stated_alike(opened, joined_patients)
        self._parts = tuple(part for store in opened for part in store.parts)
        self.joined_patients = joined_patients
        """What was stated about patients."""
        self._readers: dict[int, RowReader] = {}
        _require_several(self._parts)
        self.names = tuple(part.provenance.dataset for part in self._parts)
        """Names of the data sets, in the order of the rows."""
        self.path = " + ".join(str(part.path) for part in self._parts)
        self.spec, self.compression = self._parts[0].spec, self._parts[0].compression
        self.complete, self.files = True, {}
        self.n_images = sum(part.n_images for part in self._parts)
        self.shard_images = max(part.shard_images for part in self._parts)
        self._first_shards = np.cumsum([0, *(part.n_shards for part in self._parts)])
        self._first_rows = first_rows(self._parts)
        self.provenance = self._make_provenance()
        _require_known_patients(self)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return partial(JoinedStore, joined_patients=self.joined_patients), (
            [part.absolute_location for part in self._parts],
        )

    def __fspath__(self) -> str:
        """Joined stores have no place of their own.

        Raises:
            StoreError: Always.
        """
        raise self._without_place()

    def read_file(self, name: str, *, max_bytes: int | None = None) -> bytes:
        """Files belong to one of the parts: ask that one.

        Raises:
            StoreError: Always.
        """
        raise self._without_place()

    def _without_place(self) -> StoreError:
        return StoreError(
            f"'{self.path}' are several stores that are read as one, found where the place of one is expected. Name "
            "their data sets instead, with dataset_name and with_dataset"
        )

    @property
    def parts(self) -> tuple[ActivationStore, ...]:
        """The stores that it is joined of, in the order of the rows."""
        return self._parts

    @property
    def n_shards(self) -> int:
        """Shards of all parts."""
        return int(self._first_shards[-1])

    @property
    def shard_starts(self) -> npt.NDArray[np.int64]:
        """First row of each shard, shape `(n_shards,)`."""
        starts = zip(self._parts, self._first_rows, strict=False)
        return np.concatenate([part.shard_starts + first for part, first in starts])

    def shard_rows(self, shard: int) -> range:
        """Rows in a shard."""
        number = int(np.searchsorted(self._first_shards, shard, side="right")) - 1
        rows = self._parts[number].shard_rows(shard - int(self._first_shards[number]))
        first = int(self._first_rows[number])
        return range(first + rows.start, first + rows.stop)

    @cached_property
    def images(self) -> ImageTable:
        """Path, label and patient of every row: see `JoinedStore`."""
        tables = [part.images for part in self._parts]
        path = Texts.joined([as_texts(table.path) for table in tables], [f"{name}/" for name in self.names])
        label = Names.concatenated([Names.of(table.label) for table in tables])
        return ImageTable(path, label, Names.concatenated(self._patients()))

    @cached_property
    def image_columns(self) -> dict[str, npt.NDArray[Any]]:
        """Further columns of all parts, and which data set each image is of."""
        tables = [part.image_columns for part in self._parts]
        sizes = [part.n_images for part in self._parts]
        found = {self.dataset_column: np.repeat(to_texts(self.names), sizes)}
        for name in dict.fromkeys(name for table in tables for name in table):
            found[name] = _join_column([table.get(name) for table in tables], sizes)
        return found

    @cached_property
    def dataset_column(self) -> str:
        """Name of the column that says which data set an image is of."""
        name, taken = DATASET_COLUMN, {name for part in self._parts for name in part.image_columns}
        while name in taken:
            name = f"joined_{name}"
        return name

    @cached_property
    def valid(self) -> npt.NDArray[np.bool_]:
        """Whether each image could be read, shape `(n_images,)`."""
        return np.concatenate([part.valid for part in self._parts])

    @cached_property
    def contents(self) -> str:
        """Identity of what its parts contain, their names, and what was stated about patients, 64 hex digits."""
        return self._digest([part.contents for part in self._parts])

    @cached_property
    def moments(self) -> Moments:
        """Exact sums per shard."""
        parts = [part.moments for part in self._parts]
        return Moments(*(np.concatenate([getattr(one, name) for one in parts]) for name in Moments.__annotations__))

    def column(self, place: str, *, lengths: Sequence[int] | None = None) -> npt.NDArray[Any]:
        """One of the small arrays with an entry for each image or shard.

        Raises:
            StoreError: If it is another one.
        """
        if not place.startswith(("images/", "moments/", "shards/")):
            self._refuse(f"no array '{place}'")
        return np.concatenate([part.column(place) for part in self._parts])

    def open_reader(self, *, n_threads: int | None = None, verify: bool = True, direct: bool = False) -> RowReader:
        """A reader of rows of all parts; use as a context manager, or close it."""
        opening = [partial(part.open_reader, n_threads=n_threads, verify=verify, direct=direct) for part in self._parts]
        return JoinedReader(self, opening)

    def zarr_array(self) -> "zarr.Array[Any]":
        """Joined stores have no array of their own.

        Raises:
            StoreError: Always.
        """
        self._refuse("no Zarr array")

    def dask(self) -> "dask.array.Array":
        """The activations as a lazy dask array, float32, one chunk per shard, shape `(n_images, n_tokens, d_model)`."""
        import dask.array as da

        return da.concatenate([dask_view(part) for part in self._parts])

    def _refuse(self, what: str) -> NoReturn:
        """Raise StoreError for what only its parts have."""
        raise StoreError(f"'{self.path}' are several stores that are read as one: they have {what}. Ask one of .parts")

    def _patients(self) -> list[Names]:
        """The patients of each part as they are called here."""
        found = [Names.of(part.images.patient) for part in self._parts]
        if self.joined_patients != "separate":
            return found
        return [column.renamed(partial(_rename, dataset)) for dataset, column in zip(self.names, found, strict=True)]

    def _make_provenance(self) -> Provenance:
        """Where the parts came from, as far as it is the same."""
        found = [part.provenance for part in self._parts]
        devices, sizes = {one.device for one in found}, {one.batch_size for one in found}
        return Provenance(
            dataset="+".join(self.names),
            list_digest=self._digest([one.list_digest for one in found]),
            package_version=found[0].package_version,
            created=max(one.created for one in found),
            device=devices.pop() if len(devices) == 1 else "",
            batch_size=sizes.pop() if len(sizes) == 1 else 0,
        )

    def _digest(self, of_parts: list[str]) -> str:
        """SHA-256 of what is known of each part, hex."""
        return hashlib.sha256(canonical_json(["joined", self.names, of_parts, self.joined_patients])).hexdigest()


def join_stores(
    stores: Sequence[ActivationStore | Location], *, joined_patients: SameNames | None = None
) -> ActivationStore:
    """Open several stores as one, see `JoinedStore`; one alone is opened as it is."""
    _require_sequence(stores)
    if len(stores) == 1:
        return stores[0] if isinstance(stores[0], ActivationStore) else ActivationStore.open(stores[0])
    return JoinedStore(stores, joined_patients=joined_patients)


def require_different(stores: Sequence[ActivationStore]) -> None:
    """Refuse a store that was given twice.

    Raises:
        StoreMismatchError: If there is one.
    """
    places = [store.path if isinstance(store.path, str) else store.path.resolve() for store in stores]
    twice = next((store for store, place in zip(stores, places, strict=True) if places.count(place) > 1), None)
    if twice is not None:
        raise StoreMismatchError(f"store '{twice.path}' was given twice: omit one --with_dataset")


def _require_sequence(stores: Sequence[ActivationStore | Location]) -> None:
    """Refuse one place, whose letters would be taken for places."""
    if isinstance(stores, str | os.PathLike):
        raise TypeError(f"stores must be a list of stores or places, found '{os.fspath(stores)}' alone")


def _require_stated_alike(stores: Sequence[ActivationStore], joined_patients: SameNames | None) -> None:
    """Refuse stores that were joined with another statement about patients, which would be lost."""
    for store in stores:
        if isinstance(store, JoinedStore) and store.joined_patients not in (None, joined_patients):
            raise StoreMismatchError(
                f"'{store.path}' were joined with joined_patients {store.joined_patients!r}, found "
                f"{joined_patients!r}: state the same, or join their .parts"
            )


def _require_several(parts: Sequence[ActivationStore]) -> None:
    """Refuse stores that cannot be joined."""
    if len(parts) < 2:
        raise StoreError(f"joining takes at least 2 stores, found {len(parts)}")
    for part in parts:
        part.require_complete()
    require_different(parts)
    check_same_spec(parts)
    names = Counter(part.provenance.dataset for part in parts)
    twice = next((name for name, n in names.items() if n > 1), None)
    if twice is not None:
        found = ", ".join(f"'{part.path}'" for part in parts if part.provenance.dataset == twice)
        raise StoreMismatchError(
            f"{found} are stores of data sets of the same name, {twice!r}, by which images of joined stores are told "
            "apart. Build one of them again with another --dataset_name"
        )


def _require_known_patients(store: JoinedStore) -> None:
    """Refuse names of patients that stand in several data sets, unless it was said what that means."""
    if store.joined_patients is not None:
        return
    counts = Counter(name for part in store.parts for name in Names.of(part.images.patient).different if name)
    shared = sorted(name for name, n in counts.items() if n > 1)
    if shared:
        named = ", ".join(repr(name) for name in shared[:_NAMED])
        named += f" and {len(shared) - _NAMED:,} more" * (len(shared) > _NAMED)
        names = "1 name of patients stands" if len(shared) == 1 else f"{len(shared):,} names of patients stand"
        raise StoreMismatchError(
            f"{names} in several of the data sets {', '.join(map(repr, store.names))}: {named}. Say what that means: "
            "--joined_patients same if such a patient is the same person, --joined_patients separate if it is another "
            "one in each data set"
        )


def _join_column(parts: Sequence[npt.NDArray[Any] | None], sizes: Sequence[int]) -> npt.NDArray[Any]:
    """A further column of several parts, None where a part has none.

    Whole numbers become float64 if there are parts without the column, or with fractions; numbers become texts if
    there are parts with texts.
    """
    kinds = {"" if part is None else part.dtype.kind for part in parts}
    if "T" in kinds:
        filled = [
            to_texts([""] * n) if part is None else part if part.dtype.kind == "T" else to_texts(_write(part))
            for part, n in zip(parts, sizes, strict=True)
        ]
    elif kinds == {"i"}:
        filled = [part for part in parts if part is not None]
    else:
        filled = [
            np.full(n, np.nan) if part is None else part.astype(np.float64)
            for part, n in zip(parts, sizes, strict=True)
        ]
    return np.concatenate(filled)


def _write(numbers: npt.NDArray[Any]) -> list[str]:
    """Numbers as texts, whole ones without a point, '' for NaN."""
    return ["" if value != value else str(value).removesuffix(".0") for value in numbers.tolist()]


def _rename(dataset: str, patient: str) -> str:
    """What a patient is called where every data set has patients of its own."""
    return f"{dataset}/{patient}" if patient else ""
