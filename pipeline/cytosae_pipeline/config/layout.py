"""The language of `--layout`: what each level of folders means."""

from dataclasses import dataclass

from cytosae_pipeline.config.fields import suggest
from cytosae_pipeline.errors import UserError

CLASS, PATIENT, PATIENT_IN_CLASS, SKIP = "class", "patient", "patient-in-class", "*"
_WORDS = (CLASS, PATIENT, PATIENT_IN_CLASS, SKIP)
_MAX_LEVELS = 8


@dataclass(frozen=True)
class Layout:
    """Meaning of the folders above an image.

    Without `*` the levels are counted from the image upwards, and folders further up mean nothing. With `*` they are
    counted from the top: `*` is one folder that means nothing, and a final `*` any number of folders, also none.
    """

    text: str
    """As it is written for `--layout`."""
    words: tuple[str, ...]
    """One word per level, without a final `*`."""
    from_top: bool
    """Whether levels are counted from the top."""
    open_end: bool
    """Whether further folders may follow."""

    def fits(self, folders: tuple[str, ...]) -> bool:
        """Whether an image in these folders, the topmost first, has a folder for every level."""
        n, needed = len(folders), len(self.words)
        return n >= needed if self.open_end or not self.from_top else n == needed

    def read(self, folders: tuple[str, ...]) -> tuple[str, str]:
        """Label and patient of an image in folders that fit; '' where the layout has none.

        Where the numbering of patients restarts in every class, a patient is `class/patient`.
        """
        levels = folders[: len(self.words)] if self.from_top else folders[len(folders) - len(self.words) :]
        names = dict(zip(self.words, levels, strict=True))
        label = names.get(CLASS, "")
        if PATIENT_IN_CLASS in names:
            return label, f"{label}/{names[PATIENT_IN_CLASS]}"
        return label, names.get(PATIENT, "")


def parse_layout(text: str) -> Layout | None:
    """A layout from its text; None for `auto`.

    Raises:
        UserError: If it is not one.
    """
    if text == "auto":
        return None
    words = tuple(text.split("/"))
    expected = (
        "auto, or levels separated by / : class, patient, patient-in-class, and * for a folder that means nothing, "
        "such as class, class/patient, '*/class' or 'class/*'"
    )
    wrong = [word for word in words if word not in _WORDS]
    if wrong:
        raise UserError(f"layout must be {expected}, found {text!r}{suggest(wrong[0], _WORDS)}")
    n_patients = words.count(PATIENT) + words.count(PATIENT_IN_CLASS)
    if words.count(CLASS) > 1 or n_patients > 1 or len(words) > _MAX_LEVELS:
        raise UserError(
            f"layout may name class once, patient once and at most {_MAX_LEVELS} levels, found {text!r}. "
            f"Expected {expected}"
        )
    if PATIENT_IN_CLASS in words and CLASS not in words:
        raise UserError(f"layout {text!r} has patients in a class but no level class. Expected {expected}")
    from_top = SKIP in words
    open_end = from_top and words[-1] == SKIP
    return Layout(text, words[:-1] if open_end else words, from_top, open_end)
