"""Click options made from the config records, so that names, types, defaults and help stand in one place."""

import dataclasses
import os
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from cytosae_pipeline.config.fields import Config, parse_choices, parse_hint, suggest
from cytosae_pipeline.errors import UserError

Command = TypeVar("Command", bound=Callable[..., Any])

CONTEXT_SETTINGS: dict[str, Any] = {
    # `--root_dir` and `--root-dir` are the same option, as are spellings of their values.
    "token_normalize_func": lambda name: name.replace("_", "-"),
    "help_option_names": ["-h", "--help"],
    "max_content_width": 110,
}


def config_options(record: type[Config], *, leave_out: Sequence[str] = ()) -> Callable[[Command], Command]:
    """A decorator that gives a command one option per field of a config record.

    Args:
        record: The record; its fields were made with `option`.
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
    """Parameters of the running command that the user gave: on the command line or by an environment variable."""
    context = click.get_current_context()
    sources = (click.core.ParameterSource.COMMANDLINE, click.core.ParameterSource.ENVIRONMENT)
    return {name for name in context.params if context.get_parameter_source(name) in sources}


def make_config(record: type[Config], values: dict[str, Any]) -> Any:  # noqa: ANN401 - an instance of `record`
    """The record from a command's parameters.

    Raises:
        click.UsageError: If the record refuses a value (exit code 2).
    """
    try:
        return record(**{name: value for name, value in values.items() if name in record.__dataclass_fields__})
    except UserError as error:
        raise click.UsageError(str(error)) from error


class VerbCommand(click.Command):
    """A command whose options are completed in the spelling that was begun, with `_` or `-`."""

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """What the Tab key offers."""
        items = super().shell_complete(ctx, incomplete.replace("_", "-"))
        if "_" in incomplete:
            for item in items:
                item.value = "--" + item.value.removeprefix("--").replace("-", "_")
        return items


class GroupedCommand(VerbCommand):
    """A command whose help lists its options under headings; `sections` has the names of the parameters of each."""

    sections: typing.ClassVar[dict[str, Sequence[str]]] = {}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections in their order, and options of none under the last heading."""
        records = {parameter.name: parameter.get_help_record(ctx) for parameter in self.get_params(ctx)}
        for title, names in self.sections.items():
            with formatter.section(title):
                formatter.write_dl([record for name in names if (record := records.pop(name, None)) is not None])
        with formatter.section("Other options"):
            formatter.write_dl([record for record in records.values() if record is not None])


class _Option(click.Option):
    """An option for which a verb's own environment variable comes before the one of all verbs."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        """The value of the first variable that is set."""
        own = os.environ.get(f"{ctx.auto_envvar_prefix}_{str(self.name).upper()}")
        return own or super().resolve_envvar_value(ctx)


class _Choice(click.Choice[str]):
    """A closed choice whose error suggests the nearest right value."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:  # noqa: ANN401 - click's
        """What was found, what was expected, and the nearest of it."""
        return super().get_invalid_choice_message(value, ctx).rstrip(".") + (suggest(value, self.choices) or ".")


def _make_option(field: "dataclasses.Field[Any]", annotation: Any) -> Callable[[Command], Command]:  # noqa: ANN401
    """One option."""
    names = [f"--{name.replace('_', '-')}" for name in (field.name, *field.metadata["names"])]
    text, variable = field.metadata["help"], field.metadata["variable"]
    if variable is not None:
        text += f" [env: {variable}]"
    hint, _, length = parse_hint(annotation)
    if hint is bool:
        return click.option(*names, field.name, is_flag=True, default=field.default, help=text)
    choices = parse_choices(hint, field.metadata)
    kind = _Choice(choices) if choices else hint
    return click.option(
        *names,
        field.name,
        type=click.Path(path_type=Path) if hint is Path else kind,
        default=field.default,
        multiple=length is None,
        nargs=length or 1,
        envvar=variable,
        cls=_Option,
        help=text,
        show_default=field.default is not None and "[default" not in text,
    )
