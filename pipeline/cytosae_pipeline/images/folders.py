"""A folder of images: which files count, and labels and patients from the names of the folders."""

import os
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from cytosae_pipeline.config.layout import CLASS, PATIENT, PATIENT_IN_CLASS, SKIP, Layout, parse_layout
from cytosae_pipeline.errors import join_few, quote, say_count
from cytosae_pipeline.images.files import FileStamp, stamp_file
from cytosae_pipeline.images.folder_names import find_masked, is_mask
from cytosae_pipeline.images.image_list import DatasetError, ImageList, ImageRow, join_lines, unify_names
from cytosae_pipeline.images.layout_choices import find_shared_patients
from cytosae_pipeline.images.levels import (
    AmbiguousFoldersError,
    Folders,
    describe_levels,
    find_masks,
    find_ranges,
    read_levels,
)

WEBP_ENDINGS = (".webp",)
"""Endings of WebP files."""

JPEG_2000_ENDINGS = (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx")
"""Endings of JPEG 2000 files."""

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff", *WEBP_ENDINGS, *JPEG_2000_ENDINGS}
)
"""Endings of image files, in any case."""

OTHER_PICTURES = frozenset(
    {
        ".gif", ".heic", ".heif", ".avif", ".jxl", ".dcm", ".dicom", ".svs", ".ndpi", ".mrxs", ".scn", ".vsi", ".bif",
        ".czi", ".nd2", ".lif", ".lsm", ".oib", ".oif", ".stk", ".ims", ".zvi", ".qptiff", ".btf", ".npy", ".npz",
        ".mat", ".nii", ".mha", ".psd", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".exr", ".hdr", ".ico", ".emf", ".wmf",
        ".svg", ".dib", ".raw", ".dng", ".cr2", ".nef", ".arw",
    }
)  # fmt: skip
"""Endings of files that contain images but are not read."""

_IGNORED = frozenset({"__MACOSX", "@eaDir"})  # copies and thumbnails left behind by macOS and Synology servers
_SYSTEM_FILES = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini"})
_NOTES = 10  # links that are named one by one
_ENDINGS = 6  # endings that are named one by one
_SHARED = 3  # patients that are named one by one
_MAX_ENDING = 12  # letters
_MASKS = ("mask or annotation", "masks or annotations")
_MAX_DEPTH = 100  # folders


@dataclass
class _Found:
    """What a walk through a folder found."""

    stamps: dict[str, FileStamp] = field(default_factory=dict)
    """Relative path and stamp of every image."""
    links: list[str] = field(default_factory=list)
    """Why a link was not followed."""
    others: Counter[str] = field(default_factory=Counter)
    """Other files by ending."""


def scan_folder(root: Path, layout: str = "auto") -> ImageList:
    """The images below a folder, with labels and patients from the folders' names.

    Hidden entries and other files are passed over; links that lead out of the folder are not followed.

    Args:
        root: The folder.
        layout: What the levels of folders mean, as for `--layout`; `auto` where their names say it.

    Raises:
        DatasetError: If there are no images, they do not lie as deep as the layout says, or the folders' names do not
            say what the levels mean.
    """
    found = _Found()
    _walk(root, resolve(root), found)
    notes = [*_describe_links(found.links), *_describe_others(found.others)]
    if not found.stamps:
        raise DatasetError(
            f"no images below '{root}': looked for files ending in {', '.join(sorted(SUFFIXES))}"
            + (f". {say_count(len(found.links), 'link was', 'links were')} not followed ({found.links[0]}): copy the "
               "images instead" if found.links else "")
            + "".join(f". {note}" for note in _describe_others(found.others))
        )  # fmt: skip
    folders_of = {path: PurePosixPath(path).parts[:-1] for path in found.stamps}
    notes += _leave_out_masks(folders_of)
    folders = set(folders_of.values())
    chosen = parse_layout(layout)
    if chosen is None:
        try:
            chosen, passed_over = read_levels(folders)
        except AmbiguousFoldersError as error:
            raise DatasetError(
                f"the folders of '{root}' can be read in more than one way: {error}\nor list the images in a CSV with "
                "the columns path, label and patient, and give it as --images"
            ) from error
        notes += passed_over
    else:
        _check_fit(chosen, root, folders_of)
    rows = tuple(_row_of(path, chosen, levels, found.stamps[path]) for path, levels in folders_of.items())
    if chosen is None:
        return ImageList(root, rows, "flat", tuple(notes))
    notes += _describe_shared(chosen, folders)
    rows, respelt = unify_names(rows)
    return ImageList(root, rows, chosen.text, (*notes, *respelt), levels=describe_levels(chosen, folders))


def resolve(path: Path) -> Path:
    """A path with its links resolved; unlike `Path.resolve` without a RuntimeError for circular links."""
    return Path(os.path.realpath(path))


def _walk(folder: Path, root: Path, found: _Found, prefix: str = "") -> None:
    """Find the images below a folder.

    Raises:
        DatasetError: If folders lie deeper in each other than any data set's.
    """
    if prefix.count("/") > _MAX_DEPTH:
        raise DatasetError(f"{quote(prefix)} lies more than {_MAX_DEPTH} folders deep: give a folder further down")
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith(".") or entry.name in _IGNORED:
                continue
            relative = prefix + entry.name
            if entry.is_symlink() and not resolve(Path(entry.path)).is_relative_to(root):
                found.links.append(f"link {relative!r} leads out of the folder: not followed")
            elif entry.is_symlink() and Path(entry.path).is_dir():
                found.links.append(f"link {relative!r} leads to a folder that is listed anyway: not followed")
            elif entry.is_dir(follow_symlinks=False):
                _walk(Path(entry.path), root, found, relative + "/")
            elif (seen := stamp_file(Path(entry.path))) is not None:
                ending = Path(entry.name).suffix.lower()
                if ending in SUFFIXES:
                    _check_utf8(relative)
                    found.stamps[relative] = seen
                elif entry.name.lower() not in _SYSTEM_FILES:
                    found.others[ending[:_MAX_ENDING]] += 1


def _leave_out_masks(folders_of: dict[str, Folders]) -> Iterator[str]:
    """Remove masks that lie beside images; notes that say so."""
    masks = find_masks(set(folders_of.values()))
    stem_of = {path: str(PurePosixPath(path).with_suffix("")) for path in folders_of}
    stems = set(stem_of.values())
    left_out = [path for path, levels in folders_of.items() if levels in masks]
    beside = [path for path in folders_of.keys() - left_out if find_masked(stem_of[path]) in stems]
    for path in [*left_out, *beside]:
        del folders_of[path]
    if beside:
        yield (
            f"{say_count(len(beside), *_MASKS)} such as {quote(min(beside))} beside the images of the same name "
            "left out. To use them as images, list them in a CSV"
        )
    if left_out:
        names = sorted({name for levels in masks for name in levels if is_mask(name)})
        yield (
            f"{say_count(len(left_out), *_MASKS)} in {join_few(map(quote, names), _NOTES)} beside the images left "
            "out. To use them as images, list them in a CSV"
        )


def _check_utf8(relative: str) -> None:
    """Refuse a name that no table of the store could contain."""
    try:
        relative.encode()
    except UnicodeEncodeError as error:
        raise DatasetError(f"the file name {relative!r} is not UTF-8; rename it") from error


def _check_fit(layout: Layout, root: Path, folders_of: dict[str, Folders]) -> None:
    """Refuse images that do not lie as deep as a layout says, and ranges of images that it would take for names."""
    n = len(layout.words)
    needed = f"{'exactly' if layout.from_top and not layout.open_end else 'at least'} {n} folder{'s' * (n > 1)} deep"
    misfits = sorted(path for path, levels in folders_of.items() if not layout.fits(levels))
    option = shlex.quote(layout.text)
    if misfits and set(folders_of.values()) == {()}:
        raise DatasetError(
            f"--layout {option} was given, but images lie directly in '{root}', for example {quote(misfits[0])}, "
            "so there is no folder to take names from"
        )
    if misfits:
        hint = shlex.quote(f"{layout.text}/{SKIP}") if layout.from_top and not layout.open_end else ""
        raise DatasetError(
            f"--layout {option} needs every image {needed} in '{root}', "
            f"but {len(misfits):,} of {len(folders_of):,} are not, for example {quote(misfits[0])}"
            + (f". Where the levels below mean nothing, use --layout {hint}" if hint else "")
        )
    ranges = set() if layout.from_top else find_ranges(set(folders_of.values()))
    if ranges:
        levels = min(ranges)
        above = len(levels) - n
        skipping = f"{SKIP}/" * (above - 1) + layout.text if above else CLASS
        meant = f"{SKIP}/" * above + layout.text if above else f"{layout.text}/{SKIP}"
        raise DatasetError(
            f"--layout {option} would make the numbered range {quote(levels[-1])} in {quote('/'.join(levels[:-1]))} a "
            f"{layout.words[-1]}. Use --layout {shlex.quote(f'{skipping}/{SKIP}')} to pass over ranges, or, if they "
            f"are meant, --layout {shlex.quote(meant)}"
        )


def _row_of(path: str, layout: Layout | None, folders: Folders, seen: FileStamp) -> ImageRow:
    """Label and patient from the names of the folders above an image."""
    label, patient = layout.read(folders) if layout is not None else ("", "")
    return ImageRow(path, join_lines(label), join_lines(patient), seen)


def _describe_shared(layout: Layout, folders: set[Folders]) -> Iterator[str]:
    """Notes about patients that stand in several places of the tree and are read as one."""
    shared = find_shared_patients(layout, folders)
    for patient in sorted(shared)[:_SHARED]:
        advice = "list the images in a CSV"
        if len({layout.read(levels)[0] for levels in shared[patient]}) > 1:
            advice = f"use --layout {shlex.quote(layout.text.replace(PATIENT, PATIENT_IN_CLASS))}"
        places = " and ".join(quote("/".join(levels)) for levels in shared[patient][:2])
        yield (
            f"patient {quote(patient)} stands in {len(shared[patient]):,} folders, such as {places}: read as one "
            f"person. If these are different people, {advice}"
        )
    if len(shared) > _SHARED:
        yield f"and {len(shared) - _SHARED:,} more patients that stand in several folders"


def _describe_links(links: list[str]) -> list[str]:
    """Notes about links that were not followed."""
    return [*links[:_NOTES], *([f"and {len(links) - _NOTES:,} more links not followed"] if links[_NOTES:] else [])]


def _describe_others(others: Counter[str]) -> Iterator[str]:
    """Notes about files that were passed over."""
    pictures = Counter({ending: n for ending, n in others.items() if ending in OTHER_PICTURES})
    if pictures:
        yield f"images of kinds that are not read passed over: {_count(pictures)}. Convert them to PNG or TIFF"
    if rest := others - pictures:
        yield f"other files passed over: {_count(rest)}"


def _count(endings: Counter[str]) -> str:
    """How many files have which ending."""
    most = sorted(endings.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{n:,} {quote(ending)[1:-1] if ending else 'without an ending'}" for ending, n in most[:_ENDINGS]]
    return ", ".join(shown) + (f" and {len(most) - _ENDINGS:,} more endings" if most[_ENDINGS:] else "")
