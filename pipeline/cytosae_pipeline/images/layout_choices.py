"""Which layouts a tree of folders suggests, the likeliest first; for a message that lets the user choose.

Pure functions over the folders above the images, the topmost first.
"""

import itertools
import shlex
from collections import defaultdict
from collections.abc import Collection, Iterable

from cytosae_pipeline.config.layout import CLASS, PATIENT, SKIP, Layout, parse_layout
from cytosae_pipeline.errors import quote
from cytosae_pipeline.images.folder_names import (
    holds_images,
    is_container,
    is_id,
    is_patient,
    is_split,
    looks_like_ranges,
)

_CHOICES = 3
_FEWEST = 2
_MARGIN = 3.0  # layouts this much less likely than the best are not offered
_LABELLED = 1.5  # a layout with labels is likelier than one without
_FROM_IMAGE = 1.0  # and so is the folder of the image where the levels above differ in number
_ALONE = -1.5  # one folder that contains everything is an unlikely class, unless patients lie below it
_PATIENT_ABOVE = -0.25  # classes stand above patients more often

# How well a level of names of some kind serves as class, as patient below the class, and as patient above it.
_SCORES = {
    "nothing": (-5.0, -5.0, -5.0),
    "one": (-1.0, -3.0, -5.0),
    "mixed": (-1.0, -3.0, -5.0),
    "range": (-3.0, -0.5, -5.0),
    "patient": (0.5, 3.0, 3.0),
    "id": (2.0, 2.0, -1.5),
    "word": (3.0, -1.0, -5.0),
}


def propose_layouts(folders: Collection[tuple[str, ...]], *, n_above: int = 0, is_open: bool = False) -> list[str]:
    """Layouts that may be meant, the likeliest first.

    Args:
        folders: The different folders of the images, the topmost first.
        n_above: Levels above them that mean nothing.
        is_open: Whether further levels below them mean nothing.
    """
    depths = set(map(len, folders))
    shallowest = min(depths)
    kinds = [_find_kind(folders, place) for place in range(shallowest)]
    scored: list[tuple[float, str]] = []
    if len(depths) > 1 and shallowest and not is_open and (last := _find_kind(folders, -1)) != "nothing":
        # Counted from the image upwards, where the levels above differ in number.
        scored.append((_SCORES[last][0] + _LABELLED + _FROM_IMAGE, CLASS))
    places = [*range(shallowest), None]
    for of_class, of_patient in itertools.product(reversed(places), reversed(places)):
        if of_class != of_patient:
            words = [SKIP] * n_above + _write(of_class, of_patient, shallowest)
            scored.append((_score(kinds, of_class, of_patient), _join(words, is_open=is_open or len(depths) > 1)))
    scored.sort(key=lambda item: -item[0])
    return [text for n, (score, text) in enumerate(scored) if n < _FEWEST or score > scored[0][0] - _MARGIN]


def describe_choices(layouts: Iterable[str], folders: Collection[tuple[str, ...]]) -> str:
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


def find_shared_patients(layout: Layout, folders: Iterable[tuple[str, ...]]) -> dict[str, list[tuple[str, ...]]]:
    """Patients that stand in several places of the tree, with the first folders of each."""
    places: dict[str, dict[tuple[str, ...], tuple[str, ...]]] = defaultdict(dict)
    if PATIENT not in layout.words:
        return {}
    from_end = len(layout.words) - layout.words.index(PATIENT)
    for levels in sorted(folders):
        patient = layout.read(levels)[1]
        stop = layout.words.index(PATIENT) + 1 if layout.from_top else len(levels) - from_end + 1
        places[patient].setdefault(levels[:stop], levels)
    return {patient: list(found.values()) for patient, found in places.items() if len(found) > 1}


def _find_kind(folders: Collection[tuple[str, ...]], place: int) -> str:
    """What the names of one level look like, as a key of `_SCORES`; -1 is the level above the images."""
    names = {levels[place] for levels in folders}
    passed_over = [name for name in names if is_split(name) or is_container(name)]
    if passed_over and all(name in passed_over or holds_images(name) for name in names):
        return "nothing"
    if place < 0 and names & {name for levels in folders for name in levels[:-1]}:
        return "nothing"
    if len(names) == 1:
        return "one"
    if passed_over or 0 < sum(map(holds_images, names)) < len(names):
        return "mixed"
    if looks_like_ranges(names):
        return "range"
    n_patients = sum(map(is_patient, names))
    if n_patients == len(names) or (place >= 0 and 2 * n_patients > len(names)):
        return "patient"
    if place < 0 and n_patients:
        return "mixed"
    return "id" if all(map(is_id, names)) and not _recurs(folders, place) else "word"


def _recurs(folders: Collection[tuple[str, ...]], place: int) -> bool:
    """Whether a name of a level stands below more than one folder; names of classes do."""
    if place <= 0:
        return False
    stems = {levels[: place + 1] for levels in folders}
    return len({stem[-1] for stem in stems}) < len(stems)


def _score(kinds: list[str], of_class: int | None, of_patient: int | None) -> float:
    """How likely a layout is: the higher, the likelier."""
    score = 0.0
    if of_class is not None:
        is_alone = kinds[of_class] == "one" and of_patient is None
        score += _SCORES[kinds[of_class]][0] + _LABELLED + (_ALONE if is_alone else 0.0)
    if of_patient is not None:
        is_above = of_class is not None and of_patient < of_class
        score += _SCORES[kinds[of_patient]][2] + _PATIENT_ABOVE if is_above else _SCORES[kinds[of_patient]][1]
    return score


def _write(of_class: int | None, of_patient: int | None, n_levels: int) -> list[str]:
    """A word for each level."""
    words = [SKIP] * n_levels
    if of_class is not None:
        words[of_class] = CLASS
    if of_patient is not None:
        words[of_patient] = PATIENT
    return words


def _join(words: list[str], *, is_open: bool) -> str:
    """A layout as text; a class below two levels or more that mean nothing is counted from the image upwards."""
    if len(words) > 2 and words[-1] == CLASS and set(words[:-1]) == {SKIP} and not is_open:
        return CLASS
    words = [*words, SKIP] if is_open else list(words)
    while words[-2:] == [SKIP, SKIP]:
        words.pop()
    return "/".join(words)


def _describe(example: tuple[str, str], pairs: Collection[tuple[str, str]]) -> str:
    """What a layout makes of an example, and how many labels and patients there would be."""
    n = [len({pair[place] for pair in pairs if pair[place]}) for place in (0, 1)]
    found = [f"{what} {quote(name)}" for what, name in zip(("label", "patient"), example, strict=True) if name]
    counts = [f"{count:,} {what}{'s' * (count != 1)}" for count, what in zip(n, ("label", "patient"), strict=True)]
    return f"{', '.join(found)} ({', '.join(counts)})"
