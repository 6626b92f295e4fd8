"""Options that say which patients of a store are one person, and what else is known about patients."""

from dataclasses import dataclass
from pathlib import Path

from cytosae_pipeline.config.fields import Config, option


@dataclass(frozen=True, kw_only=True)
class SubjectChoice(Config):
    """Options of every verb that compares patients, or writes what is known about them."""

    covariates: Path | None = option(
        None,
        "CSV with one row per patient: the column patient, and any others, such as subject, the person, where several "
        "patients of the store are samples of one.",
    )
    subject_column: str | None = option(
        None,
        "Column of --covariates, or of the manifest that the store was built from, that names the person: a person's "
        "patients are pooled wherever patients are compared. `patient` makes every patient a person. [default: "
        "subject, if there is one]",
    )
