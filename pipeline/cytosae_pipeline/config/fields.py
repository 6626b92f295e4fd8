"""Fields of the config records: default, help text and range in one place, checked when a record is made."""

import dataclasses
import difflib
import functools
import math
import numbers
import os
import types
import typing
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Union

from cytosae_pipeline.errors import UserError

_MOST = 10**100 - 1
"""Largest whole number that is looked at."""

MAX_SEED = 2**63 - 1
"""Largest seed that torch and numpy both take."""


def option(
    default: Any,  # noqa: ANN401 - of the field's type
    text: str,
    *names: str,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    choices: Collection[str] | None = None,
    variable: str | None = None,
) -> Any:  # noqa: ANN401 - a field
    """A field with its help text, its range and further names on the command line.

    Args:
        default: Default value.
        text: Help, in one or two sentences.
        *names: Further option names.
        minimum: Smallest value allowed.
        maximum: Largest value allowed.
        above: Every value must be larger than this.
        choices: Values allowed, where they are not a `Literal` because more can be registered.
        variable: Environment variable that sets it on the command line, for every verb that has it.
    """
    limits = {"minimum": minimum, "maximum": maximum, "above": above, "choices": choices}
    return dataclasses.field(default=default, metadata={"help": text, "names": names, "variable": variable, **limits})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Base of all config records: checks every field against its type, choices and range.

    Text is accepted for paths, a list or a single value for tuples, and whole numbers for floats; fields then have
    their own type.

    Raises:
        UserError: If a value is not allowed; the message names the field, the value and what is allowed.
    """

    def __post_init__(self) -> None:
        """Check every field on its own; subclasses check what fields must agree on."""
        for field in dataclasses.fields(self):
            value = check_field(type(self), field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)


def check_field(record: type[Config], name: str, value: object) -> Any:  # noqa: ANN401 - of the field's type
    """The value in the field's own type, if the field allows it.

    Args:
        record: A config record.
        name: One of its fields.
        value: What it is to be set to.

    Raises:
        UserError: If the field does not allow it.
    """
    field = record.__dataclass_fields__[name]
    hint, is_optional, length = parse_hint(_hints(record)[name])  # type: ignore[arg-type] # a class is hashable
    if value is None and is_optional:
        return None
    if length == 1:
        return _check(name, value, hint, field.metadata)
    values = value if isinstance(value, list | tuple) else (value,)
    if length is not None and len(values) != length:
        raise UserError(f"{name} must be {length} values, found {value!r}")
    return tuple(_check(name, item, hint, field.metadata) for item in values)


def parse_hint(hint: Any) -> tuple[Any, bool, int | None]:  # noqa: ANN401 - an annotation
    """An annotation without `None` and `tuple`, whether `None` is allowed, and how many values it has.

    The last is 1 for a single value and None for a tuple of any length.
    """
    is_optional = typing.get_origin(hint) in (Union, types.UnionType)
    if is_optional:
        (hint,) = (item for item in typing.get_args(hint) if item is not types.NoneType)
    if typing.get_origin(hint) is not tuple:
        return hint, is_optional, 1
    items = typing.get_args(hint)
    return items[0], is_optional, None if items[-1] is Ellipsis else len(items)


def is_fixed_length(record: type[Config], name: str) -> bool:
    """Whether a field has several values of a fixed number, which follow one option on the command line."""
    length = parse_hint(_hints(record)[name])[2]  # type: ignore[arg-type] # a class is hashable
    return length is not None and length > 1


def parse_choices(hint: Any, metadata: typing.Mapping[str, Any]) -> tuple[str, ...]:  # noqa: ANN401 - an annotation
    """The values that a field is limited to; empty if it is not limited to any."""
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    return tuple(metadata["choices"] or ())


def suggest(value: object, known: Iterable[str]) -> str:
    """`. Did you mean 'x'?` for the nearest of the known names, or nothing if none is near."""
    near = difflib.get_close_matches(str(value), list(known), n=1)
    return f". Did you mean '{near[0]}'?" if near else ""


@functools.cache
def _hints(record: type) -> dict[str, Any]:
    return typing.get_type_hints(record)


def _check(name: str, value: Any, hint: Any, limits: typing.Mapping[str, Any]) -> Any:  # noqa: ANN401
    """One value."""
    choices = parse_choices(hint, limits)
    if choices:
        return _check_choice(name, value, choices)
    if hint is Path and isinstance(value, str | os.PathLike):
        return Path(value)
    if hint is str and isinstance(value, str | os.PathLike):
        return os.fspath(value)
    if hint is bool and isinstance(value, bool):
        return value
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if is_number and isinstance(value, numbers.Integral) and abs(int(value)) > _MOST:
        raise UserError(f"{name} must be a number of at most {len(str(_MOST))} digits, found one of more")
    if hint is int and is_number and isinstance(value, numbers.Integral):
        return _check_range(name, int(value), limits)
    if hint is float and is_number:
        return _check_range(name, float(value), limits)
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
    raise UserError(f"{name} must be {kinds[hint]}, found {value!r}")


def _check_choice(name: str, value: object, known: Sequence[str]) -> object:
    """One of a closed set of values."""
    if value not in known:
        choices = ", ".join(known[:-1]) + (" or " if known[1:] else "") + known[-1]
        raise UserError(f"{name} must be {choices}, found {value!r}{suggest(value, known)}")
    return value


def _check_range(name: str, value: float, limits: typing.Mapping[str, Any]) -> float:
    """A finite number inside the field's range."""
    minimum, maximum, above = limits["minimum"], limits["maximum"], limits["above"]
    if above is not None and not above < value < math.inf:
        raise UserError(f"{name} must be above {above}, found {value}")
    if minimum is not None and not (math.isfinite(value) and value >= minimum):
        raise UserError(f"{name} must be at least {minimum}, found {value}")
    if maximum is not None and not value <= maximum:
        raise UserError(f"{name} must be at most {maximum}, found {value}")
    if not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, found {value}")
    return value
