"""What the levels of a tree of folders mean: decided from their names where only one reading makes sense.

Pure functions over the folders above the images, the topmost first; nothing is read from disk.
"""

import itertools
import re
import shlex
from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import NamedTuple

from cytosae_pipeline.config.layout import CLASS, PATIENT, SKIP, Layout, parse_layout
from cytosae_pipeline.errors import join_few, quote

Folders = tuple[str, ...]
"""The folders above an image, the topmost first."""

_SPLIT = re.compile(
    r"(train(ing)?|val(id(ation)?)?|test(ing)?|dev|eval(uation)?|hold[ _-]?out)([ _-]?(set|data|images?))?"
    r"[ _-]?([a-z]|\d{0,3})|(fold|split|cv)[ _-]?\d{1,3}",
    re.IGNORECASE,
)
_CONTAINER = re.compile(r"(data(set)?|images?|imgs?|pictures?|raw|cropped|crops|cells)", re.IGNORECASE)
_RANGE = re.compile(r"(\d+) ?(?:-|_|\.\.|\u2013| to ) ?(\d+)")
_PATIENT_LIKE = re.compile(r"(patient|pat|subject|donor|case|p)[ _-]?\d+", re.IGNORECASE)
_CHOICES = 3
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
    or if it cuts the folder above into consecutive ranges (0001-1000, 1001-2000).

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
    if depths == {0}:
        return Reading(parse_layout(SKIP), [*notes, "no folder is left that could name a class: images have no label"])
    if depths == {1}:
        if all(_PATIENT_LIKE.fullmatch(levels[0]) for levels in short):
            notes.append(
                f"labels such as {_name(levels[0] for levels in short)} look like patients: if they are, use "
                f"--layout {shlex.quote(f'{top}{PATIENT}{end}')}"
            )
        return Reading(parse_layout(f"{top}{CLASS}{end}"), notes)
    reason, choices = _find_ambiguity(short, depths)
    if reason:
        layouts = [f"{top}{choice.removesuffix(end)}{end}" for choice in choices]
        raise AmbiguousFoldersError(f"{reason}. {_list_choices(layouts, folders)}")
    return Reading(parse_layout(f"{top}{CLASS}/{PATIENT}{end}"), notes)


def find_shared_patients(layout: Layout, folders: Iterable[Folders]) -> dict[str, list[Folders]]:
    """Patients that stand in several places of the tree, with the first folders of each."""
    places: dict[str, dict[Folders, Folders]] = defaultdict(dict)
    if PATIENT not in layout.words:
        return {}
    from_end = len(layout.words) - layout.words.index(PATIENT)
    for levels in sorted(folders):
        patient = layout.read(levels)[1]
        stop = layout.words.index(PATIENT) + 1 if layout.from_top else len(levels) - from_end + 1
        places[patient].setdefault(levels[:stop], levels)
    return {patient: list(found.values()) for patient, found in places.items() if len(found) > 1}


def looks_like_ranges(names: Iterable[str]) -> bool:
    """Whether names, at least one, can only be ranges of numbered images, such as `0001-1000`."""
    found = [_RANGE.fullmatch(name) for name in names]
    return bool(found) and all(
        match and (width := int(match[2]) - int(match[1])) > 0 and width % 10 in (0, 9) for match in found
    )


def _count_passed_over(folders: Collection[Folders]) -> tuple[int, list[str]]:
    """Levels from the top that mean nothing, and notes that name them."""
    notes: list[str] = []
    n, shallowest = 0, min(map(len, folders))
    while n < shallowest:
        names = {levels[n] for levels in folders}
        if all(map(_SPLIT.fullmatch, names)):
            notes.append(f"splits {_name(names)} passed over")
        elif len(names) == 1 and _CONTAINER.fullmatch(next(iter(names))) and n + 1 < shallowest:
            notes.append(f"folder {_name(names)} passed over")
        else:
            break
        n += 1
    return n, notes


def find_ranges(folders: Collection[Folders]) -> set[Folders]:
    """Folders that cut the one above into numbered ranges: all that look like it, if one set of them has no gaps."""
    siblings: dict[Folders, set[str]] = defaultdict(set)
    for levels in folders:
        if len(levels) > 1:
            siblings[levels[:-1]].add(levels[-1])
    ranges = {above: names for above, names in siblings.items() if looks_like_ranges(names)}
    if not any(map(_has_no_gaps, ranges.values())):
        return set()
    return {(*above, name) for above, names in ranges.items() for name in names}


def _has_no_gaps(names: Iterable[str]) -> bool:
    """Whether ranges begin at 0 or 1 and follow each other."""
    bounds = sorted((int(match[1]), int(match[2])) for match in map(_RANGE.fullmatch, names) if match)
    follow = all(after[0] - before[1] in (0, 1) for before, after in itertools.pairwise(bounds))
    return bounds[0][0] in (0, 1) and follow


def _cut_below(folders: Collection[Folders], notes: list[str]) -> set[Folders]:
    """Folders without the last levels that mean nothing; notes that name them are added."""
    ranges = find_ranges(folders)
    if ranges:
        notes.append(f"numbered ranges {_name(levels[-1] for levels in ranges)} passed over")
    short = {levels[:-1] if levels in ranges else levels for levels in folders}
    while all(len(levels) > 1 for levels in short):
        names = {levels[-1] for levels in short}
        if not any(all(map(kind.fullmatch, names)) for kind in (_SPLIT, _CONTAINER)):
            break
        notes.append(f"folders {_name(names)} passed over")
        short = {levels[:-1] for levels in short}
    return short


def _find_ambiguity(rest: Collection[Folders], depths: set[int]) -> tuple[str, list[str]]:
    """Why levels of two or more folders do not speak for themselves, with the layouts that may fit; '' if they do."""
    if depths != {2}:
        # Folders that contain everything may be those of an archive.
        shallowest = min(depths)
        same = (len({levels[: n + 1] for levels in rest}) == 1 for n in range(shallowest - 1))
        lead = f"{SKIP}/" * sum(itertools.takewhile(bool, same))
        archive = [f"{lead}class", f"{lead}class/patient", f"{lead}class/*"] if lead else []
        return (
            "the images lie " + " or ".join(f"{n} folder{'s' * (n != 1)}" for n in sorted(depths)) + " deep",
            [*archive, "class/*", "class/patient", "class/patient/*", "*/class/patient", "*/class/*", "patient/*"],
        )
    tops, names = {levels[0] for levels in rest}, {levels[1] for levels in rest}
    if len(tops) == 1:
        return f"all images lie in the one folder {_name(tops)}", ["*/class", "class/patient", "*/patient"]
    if splits := [top for top in tops if _SPLIT.fullmatch(top)]:
        return f"{_name(splits)} may be a split or a class", ["*/class", "class/patient"]
    if looks_like_ranges(names):
        return f"{_name(names)} may be patients or ranges of images", ["class/*", "class/patient"]
    layout = parse_layout("class/patient")
    assert layout is not None
    shared = find_shared_patients(layout, rest)
    if shared:
        patient = min(shared)
        where = " and ".join(quote(levels[0]) for levels in shared[patient][:2])
        n = len(shared)
        return (
            f"{n} folder name{'s' * (n > 1)} occur{'s' * (n == 1)} below more than one class, for example patient "
            f"{quote(patient)} in {where}",
            ["class/patient", "class/patient-in-class", "patient/class"],
        )
    return "", []


def _list_choices(layouts: Iterable[str], folders: Collection[Folders]) -> str:
    """The first layouts that fit the tree and differ in what they read, one per line with an example."""
    example = max(sorted(folders), key=len)
    lines: dict[tuple[tuple[str, str], ...], str] = {}
    for text in layouts:
        layout = parse_layout(text)
        if layout is None or not all(map(layout.fits, folders)) or len(lines) == _CHOICES:
            continue
        pairs = [layout.read(levels) for levels in sorted(folders)]
        lines.setdefault(tuple(pairs), f"  --layout {shlex.quote(text)}: " + _describe(layout.read(example), pairs))
    if not lines:
        return "No layout fits: move images that lie in no folder of their own into one"
    return f"In {quote('/'.join(example) + '/')}, choose one:\n" + "\n".join(lines.values())


def _describe(example: tuple[str, str], pairs: Collection[tuple[str, str]]) -> str:
    """What a layout makes of an example, and how many labels and patients there would be."""
    n = [len({pair[place] for pair in pairs if pair[place]}) for place in (0, 1)]
    found = [f"{what} {quote(name)}" for what, name in zip(("label", "patient"), example, strict=True) if name]
    counts = [f"{count:,} {what}{'s' * (count != 1)}" for count, what in zip(n, ("label", "patient"), strict=True)]
    return f"{', '.join(found)} ({', '.join(counts)})"


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
