"""Tables of text for people."""

from collections.abc import Sequence


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, indent: str = "") -> str:
    """Rows with aligned columns, two blanks apart, without blanks at the ends of lines.

    Args:
        header: Names of the columns.
        rows: Cells; numbers are aligned to the left like words.
        indent: What every line begins with.
    """
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(indent + line.rstrip() for line in shown)


def format_number(value: float | None, form: str) -> str:
    """A number in the given format, or a dash for None."""
    return "-" if value is None else format(value, form)
