"""A data set as text, for the plan of a build: how it was read, and what it consists of."""

from collections import Counter
from pathlib import PurePosixPath

from cytosae_pipeline.errors import join_few, quote, say_count
from cytosae_pipeline.images.columns import describe_type, type_columns
from cytosae_pipeline.images.image_list import ImageList, count_names

_NAMED = 8


def describe_images(images: ImageList) -> str:
    """The layout, an example, counts of labels, patients and kinds of files, and notes, in a few lines."""
    first = images.rows[0]
    labels, patients = count_names(images.labels), count_names(images.patients)
    lines = [
        f"{say_count(len(images), 'image')} ({say_count(len(labels), 'label')}, "
        f"{say_count(len(patients), 'patient')}; layout {images.layout}) from '{images.root}'",
        f"for example {quote(first.path)}: label {quote(first.label)}, patient {quote(first.patient)}",
    ]
    if images.levels:
        lines.append(f"folders: {images.levels}")
    if labels:
        lines.append(f"labels: {_most(labels)}{_missing(len(images) - labels.total())}")
    if patients:
        counts = patients.values()
        lines.append(
            f"patients: {min(counts):,} to {say_count(max(counts), 'image')} each"
            f"{_missing(len(images) - patients.total())}"
        )
    lines.append(f"files: {_most(Counter(PurePosixPath(path).suffix.lower() for path in images.paths))}")
    if images.columns:
        kinds = (f"{quote(name)} ({describe_type(column)})" for name, column in type_columns(images).items())
        lines.append(f"further columns: {join_few(kinds, _NAMED)}")
    return "\n".join([*lines, *(f"note: {note}" for note in images.notes)])


def _most(counts: Counter[str]) -> str:
    """The most frequent names with their counts."""
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return join_few((f"{n:,} {quote(name)}" for name, n in most), _NAMED)


def _missing(n: int) -> str:
    return f"; {say_count(n, 'image has none', 'images have none')}" if n else ""
