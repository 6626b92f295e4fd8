"""Functions that take the options of a config record under their own names, with the record's types and checks."""

import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from cytosae.sae.base import Sae
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.runtime.cluster_client import keep_connected
from cytosae_pipeline.runtime.shortage import explained_shortage
from cytosae_pipeline.statistics.inputs import Inputs, read_sae, require_match

P = ParamSpec("P")
Record = TypeVar("Record")
Result = TypeVar("Result")

SaeLike = Sae | str | PathLike[str]
"""An autoencoder, or the path of one."""

StoreLike = ActivationStore | str | PathLike[str]
"""A store, or its path or URL."""

_WIDTH = 110

_PLACES = {
    "sae": "The autoencoder, or its path.",
    "store": "The store, or its path or URL; complete.",
    "other_sae": "The other autoencoder, or its path.",
    "other_store": "Its store, or the path or URL; the same store by default.",
}
"""What a function takes beside its options."""


def takes_options(
    record: Callable[P, Record], *, leave_out: tuple[str, ...] = ()
) -> Callable[[Callable[[Record], Result]], Callable[P, Result]]:
    """Turn a function of a config record into a function of the record's options.

    Args:
        record: The record's class.
        leave_out: Options that are not documented, because they make no sense here.
    """

    def decorate(function: Callable[[Record], Result]) -> Callable[P, Result]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> Result:
            options = record(*args, **kwargs)
            with explained_shortage(vars(options)), keep_connected():
                return function(options)

        _document(call, function, record, leave_out)
        return call

    return decorate


def takes_pair(
    record: Callable[P, Record],
) -> Callable[[Callable[[Inputs, Record], Result]], Callable[Concatenate[SaeLike, StoreLike, P], Result]]:
    """Turn a function of an autoencoder with its store and a record into a function of `sae`, `store` and options."""

    def decorate(
        function: Callable[[Inputs, Record], Result],
    ) -> Callable[Concatenate[SaeLike, StoreLike, P], Result]:
        @functools.wraps(function)
        def call(sae: SaeLike, store: StoreLike, /, *args: P.args, **kwargs: P.kwargs) -> Result:
            options = record(*args, **kwargs)
            with explained_shortage(vars(options)), keep_connected():
                pair = Inputs(open_store(store), open_sae(sae))
                require_match(pair.store, pair.sae, allow_mismatch=getattr(options, "allow_mismatch", False))
                return function(pair, options)

        _document(call, function, record, (), {"sae": SaeLike, "store": StoreLike})
        return call

    return decorate


def takes_two_pairs(
    record: Callable[P, Record],
) -> Callable[
    [Callable[[Inputs, Inputs, Record], Result]],
    Callable[Concatenate[SaeLike, StoreLike, SaeLike, StoreLike | None, P], Result],
]:
    """The same for two autoencoders: `sae`, `store`, `other_sae`, `other_store` (by default the same one), options."""

    def decorate(
        function: Callable[[Inputs, Inputs, Record], Result],
    ) -> Callable[Concatenate[SaeLike, StoreLike, SaeLike, StoreLike | None, P], Result]:
        @functools.wraps(function)
        def call(
            sae: SaeLike,
            store: StoreLike,
            other_sae: SaeLike,
            other_store: StoreLike | None = None,
            /,
            *args: P.args,
            **kwargs: P.kwargs,
        ) -> Result:
            options = record(*args, **kwargs)
            with explained_shortage(vars(options)), keep_connected():
                first = Inputs(open_store(store), open_sae(sae))
                second = Inputs(first.store if other_store is None else open_store(other_store), open_sae(other_sae))
                for pair in (first, second):
                    require_match(pair.store, pair.sae, allow_mismatch=getattr(options, "allow_mismatch", False))
                return function(first, second, options)

        places = {"sae": SaeLike, "store": StoreLike, "other_sae": SaeLike, "other_store": StoreLike | None}
        _document(call, function, record, (), places)
        return call

    return decorate


def open_sae(sae: SaeLike) -> Sae:
    """The autoencoder, read if a path was given.

    Raises:
        SaeCheckpointError: If it cannot be read.
    """
    return sae if isinstance(sae, Sae) else read_sae(Path(sae))


def open_store(store: StoreLike) -> ActivationStore:
    """The complete store, opened if a place was given.

    Raises:
        StoreError: If it is missing, unfinished or damaged.
    """
    if not isinstance(store, ActivationStore):
        return ActivationStore.open(str(store))
    store.require_complete()
    return store


def _document(
    call: Callable[..., Any],
    function: Callable[..., Any],
    record: Callable[..., Any],
    leave_out: tuple[str, ...],
    first: Mapping[str, Any] | None = None,
) -> None:
    """Give a function the signature and the docstring of what it takes."""
    fields = record.__dataclass_fields__  # type: ignore[attr-defined]
    kinds = inspect.Parameter
    parameters = [
        kinds(name, kinds.POSITIONAL_ONLY, annotation=hint, default=None if name == "other_store" else kinds.empty)
        for name, hint in (first or {}).items()
    ]
    parameters += [
        kinds(name, kinds.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for name, field in fields.items()
        if name not in leave_out
    ]
    returned = inspect.signature(function).return_annotation
    call.__signature__ = inspect.Signature(parameters, return_annotation=returned)  # type: ignore[attr-defined]
    texts = {name: fields[name].metadata["help"] for name in fields if name not in leave_out}
    if first:
        texts = {name: _PLACES[name] for name in first} | texts
    lines = [
        textwrap.fill(f"{name}: {text}", _WIDTH, initial_indent="    ", subsequent_indent="        ")
        for name, text in texts.items()
    ]
    before, marker, after = inspect.cleandoc(function.__doc__ or "").partition("\nReturns:")
    call.__doc__ = "\n".join([before.rstrip(), "", "Args:", *lines, *([marker + after] if marker else [])])
