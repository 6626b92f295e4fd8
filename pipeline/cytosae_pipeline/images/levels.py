"""What the levels of a tree of folders mean: decided from their names where only one reading makes sense.

Pure functions over the folders above the images, the topmost first; nothing is read from disk.
"""

import shlex
from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import NamedTuple

from cytosae_pipeline.config.layout import CLASS, PATIENT, SKIP, Layout, parse_layout
from cytosae_pipeline.errors import join_few, quote
from cytosae_pipeline.images.folder_names import (
    have_no_gaps,
    holds_images,
    is_code,
    is_container,
    is_id,
    is_mask,
    is_number,
    is_patient,
    is_split,
    is_wrapper,
    looks_like_ranges,
)
from cytosae_pipeline.images.layout_choices import describe_choices, find_shared_patients, propose_layouts

Folders = tuple[str, ...]
"""The folders above an image, the topmost first."""

_NAMED = 4


class Reading(NamedTuple):
    """A layout, and what should be known about its choice."""

    layout: Layout | None
    """The layout; None if all images lie directly in the data set's folder."""
    notes: list[str]
    """Why levels were passed over, as messages."""


class AmbiguousFoldersError(ValueError):
    """The folders can be read in more than one way; the message says why and lists the layouts to choose from."""


def read_levels(folders: Collection[Folders]) -> Reading:
    """The one layout that makes sense for a tree.

    A level is passed over if its names can only be splits (train, test, fold_0), if it is one container (images, data),
    or if it cuts the folder above into consecutive ranges (0001-1000, 1001-2000). A level below another one names
    patients only if all its names look like it.

    Args:
        folders: The different folders of the images, at least one.

    Raises:
        AmbiguousFoldersError: If there is more than one.
    """
    if set(map(len, folders)) == {0}:
        return Reading(None, [])
    n_top, notes = _count_passed_over(folders)
    top = f"{SKIP}/" * n_top
    rest = {levels[n_top:] for levels in folders}
    short = _cut_below(rest, notes)
    end = "" if short == rest else f"/{SKIP}"
    depths = set(map(len, short))
    if depths == {1} and len(short) == 1 and holds_images(min(short)[0]):
        notes.append(f"folder {_name(min(short))} passed over")
        depths = {0}
    if depths == {0}:
        return Reading(parse_layout(SKIP), [*notes, "no folder is left that could name a class: images have no label"])
    if depths == {1}:
        notes += _remark_on_labels({levels[0] for levels in short}, top, end)
        return Reading(parse_layout(f"{top}{CLASS}{end}"), notes)
    reason, choices = _find_ambiguity(short, depths)
    if reason:
        layouts = [f"{top}{choice}{end}" for choice in choices]
        layouts += propose_layouts(short, n_above=n_top, is_open=bool(end))
        raise AmbiguousFoldersError(f"{reason}. {describe_choices(layouts, folders)}")
    codes = [levels[1] for levels in short if is_code(levels[1])]
    if codes:
        layout = shlex.quote(f"{top}{SKIP}/{CLASS}{end}")
        notes.append(f"folders such as {_name(codes)} are read as patients: if they are classes, use --layout {layout}")
    return Reading(parse_layout(f"{top}{CLASS}/{PATIENT}{end}"), notes)


def find_ranges(folders: Collection[Folders]) -> set[Folders]:
    """Folders that cut the one above into numbered ranges: all that look like it, if one set of them has no gaps."""
    siblings: dict[Folders, set[str]] = defaultdict(set)
    for levels in folders:
        if len(levels) > 1:
            siblings[levels[:-1]].add(levels[-1])
    ranges = {above: names for above, names in siblings.items() if looks_like_ranges(names)}
    if not any(map(have_no_gaps, ranges.values())):
        return set()
    return {(*above, name) for above, names in ranges.items() for name in names}


def find_masks(folders: Collection[Folders]) -> set[Folders]:
    """Folders of masks or annotations beside images: of `images/` and `masks/` the latter, with all below them."""
    children: dict[Folders, set[str]] = defaultdict(set)
    for levels in folders:
        for n, name in enumerate(levels):
            children[levels[:n]].add(name)
    masks = {
        (*above, name)
        for above, names in children.items()
        if above in folders or any(map(holds_images, names))
        for name in names
        if is_mask(name)
    }
    return {levels for levels in folders if any(levels[:n] in masks for n in range(1, len(levels) + 1))}


def _count_passed_over(folders: Collection[Folders]) -> tuple[int, list[str]]:
    """Levels from the top that mean nothing, and notes that name them."""
    notes: list[str] = []
    n, shallowest = 0, min(map(len, folders))
    while n < shallowest:
        names = {levels[n] for levels in folders}
        if all(map(is_split, names)):
            notes.append(f"splits {_name(names)} passed over")
        elif len(names) == 1 and is_wrapper(next(iter(names))) and n + 1 < shallowest:
            notes.append(f"folder {_name(names)} passed over")
        else:
            break
        n += 1
    return n, notes


def _cut_below(folders: Collection[Folders], notes: list[str]) -> set[Folders]:
    """Folders without the last levels that mean nothing; notes that name them are added."""
    ranges = find_ranges(folders)
    if ranges:
        notes.append(f"numbered ranges {_name(levels[-1] for levels in ranges)} passed over")
    short = {levels[:-1] if levels in ranges else levels for levels in folders}
    while all(len(levels) > 1 for levels in short):
        names = {levels[-1] for levels in short}
        is_one_container = len(names) == 1 and holds_images(min(names))
        if not is_one_container and not any(all(map(kind, names)) for kind in (is_split, is_container)):
            break
        notes.append(f"folders {_name(names)} passed over")
        short = {levels[:-1] for levels in short}
    return short


def _remark_on_labels(names: Collection[str], top: str, end: str) -> list[str]:
    """What should be known about labels that may be something else."""
    notes = []
    if all(map(is_patient, names)) and not looks_like_ranges(names):
        notes.append(
            f"labels such as {_name(names)} look like patients: if they are, use "
            f"--layout {shlex.quote(f'{top}{PATIENT}{end}')}"
        )
    elif len(names) == 1:
        notes.append(
            f"all images lie in the one folder {_name(names)}, which is their label: if it means nothing, use "
            f"--layout {shlex.quote(SKIP)}"
        )
    if masks := [name for name in names if is_mask(name)]:
        notes.append(f"labels such as {_name(masks)} look like masks: if they are, move them out of the data set")
    return notes


def _find_ambiguity(rest: Collection[Folders], depths: set[int]) -> tuple[str, list[str]]:
    """Why levels of two or more folders do not speak for themselves, '' if they do; and layouts to offer first."""
    if depths != {2}:
        depth = " or ".join(f"{n} folder{'s' * (n != 1)}" for n in sorted(depths))
        return f"the images lie {depth} deep", []
    tops, names = {levels[0] for levels in rest}, {levels[1] for levels in rest}
    if len(tops) == 1:
        return f"all images lie in the one folder {_name(tops)}", []
    if splits := [top for top in tops if is_split(top)]:
        return f"{_name(splits)} may be a split or a class", [f"{SKIP}/{CLASS}"]
    if looks_like_ranges(names):
        return f"{_name(names)} may be patients or ranges of images", [f"{CLASS}/{SKIP}", f"{CLASS}/{PATIENT}"]
    # Digits alone may also number the classes of people who are called patients.
    are_numbered = all(map(is_number, tops)) and all(is_patient(name) and not is_number(name) for name in names)
    if not are_numbered and (people := [top for top in tops if is_patient(top)]):
        return f"{_name(people)} above {_name(names)} look like patients", []
    layout = parse_layout(f"{CLASS}/{PATIENT}")
    assert layout is not None
    others = [name for name in names if not is_id(name)]
    if shared := find_shared_patients(layout, rest):
        patient = min(shared)
        where = " and ".join(quote(levels[0]) for levels in shared[patient][:2])
        n = len(shared)
        below, what = ("folder", "") if others else ("class", "patient ")
        return (
            f"{n} folder name{'s' * (n > 1)} occur{'s' * (n == 1)} below more than one {below}, for example "
            f"{what}{quote(patient)} in {where}",
            [] if others else ["class/patient", "class/patient-in-class", "patient/class"],
        )
    return (f"{_name(others)} below {_name(tops)} look like classes more than like patients" if others else ""), []


def describe_levels(layout: Layout, folders: Collection[Folders]) -> str:
    """The tree as the layout reads it: every level with its meaning and its first names.

    Args:
        layout: The layout.
        folders: The different folders of the images.
    """
    n = len(layout.words)
    parts = []
    for place, word in enumerate(layout.words):
        names = {levels[place if layout.from_top else len(levels) - n + place] for levels in folders}
        parts.append(f"{word} = {_name(names)}")
    if any(len(levels) > n for levels in folders):
        parts = [*parts, "levels below mean nothing"] if layout.from_top else ["levels above mean nothing", *parts]
    return "; ".join(parts)


def _name(names: Iterable[str]) -> str:
    """The first few of the different names, quoted."""
    return join_few(map(quote, sorted(set(names))), _NAMED)
