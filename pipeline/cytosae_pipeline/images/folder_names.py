"""What single names of folders look like: splits, containers, masks, numbered ranges, patients, classes."""

import itertools
import re
from collections.abc import Iterable

_SPLIT = re.compile(
    r"(train(ing)?|val(id(ation)?)?|test(ing)?|dev|eval(uation)?|hold[ _-]?out)([ _-]?(set|data|images?))?"
    r"[ _-]?([a-z]|\d{0,3})|(fold|split|cv)[ _-]?\d{1,3}",
    re.IGNORECASE,
)
_CONTAINER = re.compile(
    r"(data(sets?)?|images?|imgs?|im|pictures?|photos?|raw|cropped|crops|cells|tiles|patches)", re.IGNORECASE
)
_RANGE = re.compile(r"(\d+) ?(?:-|_|\.\.|\u2013| to ) ?(\d+)")
_PATIENT = re.compile(
    r"(patients?|pat|pt|subjects?|subj|sub|donors?|cases?|participants?|samples?|specimens?|slides?|smears?|persons?|individuals?|pid|mrn|uid|id)"
    r"[ _.-]?\w?\d+[a-z]?|TCGA-\w{2}-\w{4}.*|[a-z]{1,4}[_-]\d{2,}|[a-z][ _-]?\d+|\d+([._-]\d+)*",
    re.IGNORECASE,
)
_MASK_FILE = re.compile(
    r"(.+?)[ _.-]+(masks?|gt|ground[ _-]?truth|seg(mentation)?|annotations?|labels?|overlay)([ _-]?\d+)?", re.IGNORECASE
)
_FEW_DIGITS = re.compile(r"[^\W\d_]{2,}[^\W\d_pP][ _-]?\d")  # NPM1, HER2, blast1
_GRADE = re.compile(r"[LM][0-7](eo|[abv])?|(grade|stage|type|class|score)[ _-]?(\d|[IV]+)[a-c]?", re.IGNORECASE)
_CODE = re.compile(r"[A-Z]\w{0,3}|\w")  # AEC, BXY; too short to say what it is
# Abbreviations of cells and tissues in published data sets.
_CELLS = frozenset(
    {
        "ABE", "ART", "BA", "BAS", "BASO", "BL", "BLA", "BLAST", "BNE", "EBO", "EO", "EOS", "ERB", "FGC", "HAC",
        "IG", "KSC", "LY", "LYI", "LYM", "LYMPH", "LYT", "MET", "MMY", "MMZ", "MO", "MOB", "MON", "MONO", "MY",
        "MYB", "MYE", "MYO", "NE", "NEU", "NEUT", "NGB", "NGS", "NIF", "NRBC", "OTH", "PC", "PEB", "PLM", "PLT",
        "PMB", "PMO", "PMY", "PRO", "RBC", "SEG", "SNE", "WBC", "ADI", "BACK", "DEB", "MUC", "MUS", "NORM", "STR",
        "TUM",
    }
)  # fmt: skip
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_IMAGE_WORDS = frozenset(
    {
        "image", "images", "img", "imgs", "im", "picture", "pictures", "photo", "photos", "data", "dataset",
        "datasets", "database", "original", "originals", "raw",
    }
)  # fmt: skip
_WRAPPER_WORDS = frozenset({"data", "dataset", "datasets", "database"})
_SET_WORDS = frozenset({"set", "sets"})
_MASK_WORDS = frozenset(
    {
        "mask", "masks", "annotation", "annotations", "annotated", "gt", "groundtruth", "seg", "segs",
        "segmentation", "segmentations", "contour", "contours", "overlay", "overlays", "labelmap", "labelmaps",
    }
)  # fmt: skip


def is_split(name: str) -> bool:
    """Whether a name can only be a part of a data set, such as `train` or `fold_0`."""
    return bool(_SPLIT.fullmatch(name))


def is_container(name: str) -> bool:
    """Whether a name only says that there are images, such as `images` or `data`."""
    return bool(_CONTAINER.fullmatch(name))


def holds_images(name: str) -> bool:
    """Whether a name says, among other things, that there are images, such as `JPEGImages` or `tissue images`."""
    return is_container(name) or (bool(_words(name) & _IMAGE_WORDS) and not is_mask(name))


def is_wrapper(name: str) -> bool:
    """Whether a name is that of a whole data set, such as `bone_marrow_cell_dataset` or `lung_colon_image_set`."""
    words = _words(name)
    return is_container(name) or bool(words & _WRAPPER_WORDS) or bool(words & _SET_WORDS and words & _IMAGE_WORDS)


def is_mask(name: str) -> bool:
    """Whether a name looks like that of masks or annotations that belong to images, such as `masks` or `gt`."""
    words = _words(name)
    return bool(words & _MASK_WORDS) or {"ground", "truth"} <= words or name.lower() in ("label", "labels")


def find_masked(stem: str) -> str:
    """The name of the image that a file is the mask of by its own name, both without ending; '' for none."""
    match = _MASK_FILE.fullmatch(stem)
    return match[1] if match else ""


def is_patient(name: str) -> bool:
    """Whether a name looks like a patient's: `P0`, `patient_12`, `S-1234`, `TCGA-AB-1234`, `19-6574`, `7`."""
    return bool(_PATIENT.fullmatch(name)) and not _GRADE.fullmatch(name)


def is_number(name: str) -> bool:
    """Whether a name is digits alone."""
    return name.isascii() and name.isdigit()


def is_code(name: str) -> bool:
    """Whether a name is a few letters that may be anything, such as `AEC`, and no known cell or tissue."""
    return bool(_CODE.fullmatch(name)) and name.isalpha() and name.upper() not in _CELLS


def is_id(name: str) -> bool:
    """Whether a name can be a patient's: it has digits that no class has, or is a code."""
    if is_split(name) or is_container(name) or _GRADE.fullmatch(name):
        return False
    has_digits = any(map(str.isdigit, name)) and not _FEW_DIGITS.fullmatch(name)
    return is_patient(name) or has_digits or is_code(name)


def looks_like_ranges(names: Iterable[str]) -> bool:
    """Whether names, at least one, can only be ranges of numbered images, such as `0001-1000`."""
    found = [_RANGE.fullmatch(name) for name in names]
    return bool(found) and all(
        match and (width := int(match[2]) - int(match[1])) > 0 and width % 10 in (0, 9) for match in found
    )


def have_no_gaps(names: Iterable[str]) -> bool:
    """Whether ranges begin at 0 or 1 and follow each other."""
    bounds = sorted((int(match[1]), int(match[2])) for match in map(_RANGE.fullmatch, names) if match)
    follow = all(after[0] - before[1] in (0, 1) for before, after in itertools.pairwise(bounds))
    return bounds[0][0] in (0, 1) and follow


def _words(name: str) -> set[str]:
    """The words of a name in lower case; `JPEGImages` has two."""
    return {word.lower() for word in _WORDS.findall(name)}
