"""Names and notes that people give to latents, in a JSON file beside the feature data."""

import json
from pathlib import Path
from typing import Any, TypedDict

from cytosae_cache.durable import write_file
from cytosae_pipeline.config import UserError

FILE_NAME = "latent_notes.json"
MAX_NAME, MAX_NOTE = 200, 10_000


class LatentNote(TypedDict):
    """What is kept of one latent."""

    name: str
    """A few words."""
    note: str
    """Free text."""


def read_notes(path: Path, n_latents: int) -> dict[int, LatentNote]:
    """The notes in a file, or none if there is no file.

    Raises:
        UserError: If the file holds something else; nothing is ever thrown away.
    """
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_bytes())
        notes = {int(latent): check_note(note) for latent, note in value["notes"].items()}
        if not all(0 <= latent < n_latents for latent in notes):
            raise ValueError(f"latents must lie in 0..{n_latents - 1}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"'{path}' holds no notes on latents ({error}): mend it or move it away") from error
    return notes


def write_notes(path: Path, notes: dict[int, LatentNote]) -> None:
    """Write all notes, whole or not at all."""
    record = {"format": 1, "notes": {str(latent): notes[latent] for latent in sorted(notes)}}
    write_file(path, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())


def check_note(value: Any) -> LatentNote:  # noqa: ANN401 - whatever a file or a browser sends
    """A note of the right kind and length.

    Raises:
        ValueError: If it is none.
    """
    if not isinstance(value, dict):
        raise ValueError("a note must be an object with name and note")
    name, note = value.get("name", ""), value.get("note", "")
    if not isinstance(name, str) or not isinstance(note, str) or len(name) > MAX_NAME or len(note) > MAX_NOTE:
        raise ValueError(f"name and note must be text of at most {MAX_NAME} and {MAX_NOTE:,} characters")
    return LatentNote(name=name, note=note)
