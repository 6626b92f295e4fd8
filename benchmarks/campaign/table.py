"""A Markdown table of measured lines: medians over seeds, with their spread. No I/O."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.campaign.environments import RIVALS
from benchmarks.campaign.plan import ARCHS, OURS, Line, reaches_k

_HEAD = (
    "program", "settings", "rate", "seeds", "explained variance", "unexplained", "L0", "dead", "CPU s", "wall s",
    "peak MB",
)  # fmt: skip


def make_table(lines: Iterable[Line]) -> str:
    """The table, a part per store, size, architecture and k; candidates of tuning are left out."""
    groups: dict[tuple[Any, ...], dict[tuple[Any, ...], list[Line]]] = {}
    for line in lines:
        if line.get("settings") in ("default", "tuned"):
            part = tuple(line[name] for name in ("store", "latents", "steps", "batch_images", "device", "arch", "k"))
            row = tuple(line[name] for name in ("program", "version", "settings", "asked_rate", "scaled", "precision"))
            groups.setdefault(part, {}).setdefault(row, []).append(line)
    order = sorted(groups, key=lambda part: (*part[:5], ARCHS.index(part[5]), part[6]))
    return "\n\n".join(_part(groups[part]) for part in order)


def make_cache_table(lines: Iterable[Line]) -> str:
    """The table of lines of `--cache`."""
    head = ("program", "type", "MB of activations", "MB on disk", "write s", "CPU s", "read s", "CPU s")
    rows = []
    for line in lines:
        sizes = [f"{line[name] / 1e6:.1f}" for name in ("activation_bytes", "bytes")]
        times = [f"{line[name]:.2f}" for name in ("write_s", "write_cpu_s", "read_s", "read_cpu_s")]
        rows.append([f"{line['program']} {line['version']}", line["dtype"], *sizes, *times])
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _part(rows: dict[tuple[Any, ...], list[Line]]) -> str:
    first = next(iter(rows.values()))[0]
    title = (
        f"**{first['arch']}, k = {first['k']}**: {first['encoder']}, {first['images_trained_on']:,} images of "
        f"{first['tokens_per_image']} x {first['d_model']} to train on, {first['images_held_out']:,} held out; "
        f"{first['latents']:,} latents, {first['steps']:,} steps of {first['batch_images']} "
        f"images, on {first['device']}"
    )
    head = [f"| {' | '.join(_HEAD)} |", f"| {' | '.join('---' for _ in _HEAD)} |"]
    body = [f"| {' | '.join(_cells(lines))} |" for lines in sorted(rows.values(), key=_row_order)]
    missing = [f"{name}: {rival.missing}" for name, rival in RIVALS.items() if first["arch"] not in rival.archs]
    differences = [line["forward_difference"] for lines in rows.values() for line in lines]
    largest = max((value for value in differences if value is not None), default=0.0)
    notes = [
        f"Each program's own forward pass differs from what was read by at most {largest:.1e} of the largest value."
    ]
    if not all(reaches_k(line) for lines in rows.values() for line in lines if line["l0"] is not None):
        notes.append("(\\*) More latents are active than asked for: its explained variance is not comparable.")
    notes += [f"Not in the table: {'; '.join(missing)}."] if missing else []
    return "\n".join([title, "", *head, *body, "", " ".join(notes)])


def _row_order(lines: list[Line]) -> tuple[object, ...]:
    """Rivals by name, then ours."""
    line = lines[0]
    return (
        line["program"] == OURS,
        line["program"],
        line["version"],
        line["settings"],
        line["rate"],
        line["precision"] != "fp32",
    )


def _cells(lines: Sequence[Line]) -> list[str]:
    first = lines[0]
    precision = "" if first["program"] != OURS else f" --precision {first['precision']}"
    scaled = ", activations scaled" if first["scaled"] else ""
    dense = "" if all(reaches_k(line) for line in lines if line["l0"] is not None) else " (\\*)"
    return [
        f"{first['program']} {first['version']}", f"{first['settings']}{scaled}{precision}", f"{first['rate']:.2g}",
        str(len({line["seed"] for line in lines})), _spread(lines, "explained_variance", "{:.4f}".format),
        _spread(lines, "unexplained", "{:.4f}".format), _spread(lines, "l0", "{:.1f}".format) + dense,
        _spread(lines, "dead_share", "{:.1%}".format), _spread(lines, "cpu_s", "{:.0f}".format),
        _spread(lines, "wall_s", "{:.0f}".format), _spread(lines, "peak_mb", "{:.0f}".format),
    ]  # fmt: skip


def _spread(lines: Sequence[Line], name: str, show: Callable[[float], str]) -> str:
    """Median, with the lowest and highest value if they differ; how many runs diverged."""
    values = [line[name] for line in lines if line[name] is not None]
    failed = f"{len(lines) - len(values)} diverged" if len(values) < len(lines) else ""
    if not values:
        return failed
    low, middle, high = (show(value) for value in (min(values), statistics.median(values), max(values)))
    shown = middle if low == high else f"{middle} ({low} to {high})"
    return f"{shown}, {failed}" if failed else shown
