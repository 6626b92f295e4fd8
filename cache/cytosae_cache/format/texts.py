"""Columns of texts of millions of images: sequences of str that are kept as arrays."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self, overload

import numpy as np
import numpy.typing as npt

_TOGETHER = 1 << 16


def to_texts(values: Iterable[str]) -> npt.NDArray[Any]:
    """Texts as an array of numpy's variable-width strings, shape `(n,)`."""
    return np.array(list(values), dtype=np.dtypes.StringDType())


class Texts(Sequence[str]):
    """A column of texts; behaves like the list of them, and is equal to it.

    Args:
        values: The texts, numpy's variable-width strings, shape `(n,)`.
    """

    __slots__ = ("_values",)

    def __init__(self, values: npt.NDArray[Any]) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return self._to_list(place)
        return str(self._values[place])

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _TOGETHER):
            yield from self._to_list(slice(start, start + _TOGETHER))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(one == another for one, another in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:  # noqa: ANN401 - numpy's
        return np.array(list(self), dtype=dtype)

    def __repr__(self) -> str:
        more = f", ... {len(self):,} in all" if len(self) > 3 else ""
        return f"<{type(self).__name__}: {', '.join(map(repr, self[:3]))}{more}>"

    def take(self, rows: npt.NDArray[np.integer]) -> Self:
        """The column of the given rows only, in their order."""
        return type(self)(self._values[rows])

    @classmethod
    def joined(cls, columns: Iterable["Texts"], prefixes: Iterable[str]) -> "Texts":
        """One column after the other, each text with the prefix of its column before it."""
        parts = [
            np.strings.add(to_texts([prefix]), column._values) for prefix, column in zip(prefixes, columns, strict=True)
        ]
        return Texts(np.concatenate([to_texts([]), *parts]))

    def _to_list(self, part: slice) -> list[str]:
        values: list[str] = self._values[part].tolist()
        return values


def as_texts(column: Sequence[str]) -> Texts:
    """A column of texts as stores keep it; one that is kept so already stays."""
    return column if isinstance(column, Texts) else Texts(to_texts(column))


class Names(Texts):
    """A column of few different texts, such as labels: four bytes for each, and every different one once.

    Args:
        values: Position of each text in `names`, int32, shape `(n,)`.
        names: The different texts.
    """

    __slots__ = ("_names",)

    def __init__(self, values: npt.NDArray[np.int32], names: Sequence[str]) -> None:
        super().__init__(values)
        self._names = names

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Names":
        """The same column; one that is kept so already stays."""
        if isinstance(texts, Names):
            return texts
        numbers: dict[str, int] = {}
        values = np.fromiter((numbers.setdefault(text, len(numbers)) for text in texts), np.int32, len(texts))
        return cls(values, list(numbers))

    @property
    def different(self) -> list[str]:
        """The different texts, in the order in which they occur."""
        return list(self._names)

    def renamed(self, rename: Callable[[str], str]) -> "Names":
        """The column with every text changed."""
        return Names(self._values, [rename(name) for name in self._names])

    @classmethod
    def concatenated(cls, columns: Iterable["Names"]) -> "Names":
        """One column after the other."""
        numbers: dict[str, int] = {}
        parts = []
        for column in columns:
            at = np.array([numbers.setdefault(name, len(numbers)) for name in column._names], dtype=np.int32)
            parts.append(at[column._values])
        return Names(np.concatenate([np.zeros(0, dtype=np.int32), *parts]), list(numbers))

    def __getitem__(self, place: Any) -> Any:  # noqa: ANN401 - as in `Texts`
        return self._to_list(place) if isinstance(place, slice) else self._names[self._values[place]]

    def take(self, rows: npt.NDArray[np.integer]) -> Self:
        """The column of the given rows only, in their order."""
        return type(self)(self._values[rows], self._names)

    def _to_list(self, part: slice) -> list[str]:
        return [self._names[value] for value in self._values[part].tolist()]
