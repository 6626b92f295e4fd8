"""Click options made from the config records, so that names, types, defaults and help stand in one place."""

import dataclasses
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import click

Command = TypeVar("Command", bound=Callable[..., Any])

CONTEXT_SETTINGS: dict[str, Any] = {
    # `--root_dir` and `--root-dir` are the same option, as are their values' spellings.
    "token_normalize_func": lambda name: name.replace("_", "-"),
    "help_option_names": ["-h", "--help"],
    "max_content_width": 110,
}


def config_options(record: type, *, leave_out: Sequence[str] = ()) -> Callable[[Command], Command]:
    """A decorator that gives a command one option a field of a config record.

    Args:
        record: A frozen dataclass whose fields were made with `config.option`.
        leave_out: Fields that the command takes in another way.
    """
    hints = typing.get_type_hints(record)
    fields = [field for field in dataclasses.fields(record) if field.name not in leave_out]

    def decorate(command: Command) -> Command:
        for field in reversed(fields):
            command = _make_option(field, hints[field.name])(command)
        return command

    return decorate


def given_options() -> set[str]:
    """Parameters of the running command that stand on the command line."""
    context = click.get_current_context()
    source = click.core.ParameterSource.COMMANDLINE
    return {name for name in context.params if context.get_parameter_source(name) is source}


def make_config(record: type, values: dict[str, Any]) -> Any:  # noqa: ANN401 - an instance of `record`
    """The record from a command's parameters; a field out of range becomes a usage error (exit code 2).

    Raises:
        click.UsageError: If the record refuses a value.
    """
    try:
        return record(**{name: value for name, value in values.items() if name in record.__dataclass_fields__})  # type: ignore[attr-defined]
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _make_option(field: "dataclasses.Field[Any]", hint: Any) -> Callable[[Command], Command]:  # noqa: ANN401
    """One option."""
    names = [f"--{name.replace('_', '-')}" for name in (field.name, *field.metadata["names"])]
    text = field.metadata["help"]
    if hint is bool:
        return click.option(*names, field.name, is_flag=True, default=field.default, help=text)
    multiple = typing.get_origin(hint) is tuple
    shown = field.default is not None and "[default" not in text
    return click.option(
        *names,
        field.name,
        type=click_type(hint),
        default=field.default,
        multiple=multiple,
        help=text,
        show_default=shown,
    )


def click_type(hint: Any) -> Any:  # noqa: ANN401 - whatever click takes
    """Click's type for an annotation."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        (hint,) = (item for item in typing.get_args(hint) if item is not type(None))
    if typing.get_origin(hint) is tuple:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) is Literal:
        return click.Choice(typing.get_args(hint))
    return click.Path(path_type=Path) if hint is Path else hint
