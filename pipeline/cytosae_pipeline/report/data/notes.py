"""Names and notes that people give to latents, in a JSON file beside the feature data."""

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

from cytosae_cache.storage.atomic import write_file
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.report.data.limits import MAX_NAME, MAX_NOTE

FILE_NAME = "latent_notes.json"

_thread_lock = threading.Lock()


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


def save_note(
    path: Path, n_latents: int, latent: int, note: LatentNote, *, before: LatentNote | None = None
) -> LatentNote | None:
    """Keep one latent's note; those of other latents stay as they are in the file, whoever wrote them meanwhile.

    Args:
        path: The file.
        n_latents: Latents of the autoencoder.
        latent: The latent.
        note: Its note; one without any text is taken out.
        before: What the writer believes to replace; by default, whatever is there.

    Returns:
        None if it is kept; else what somebody wrote meanwhile, which stays.

    Raises:
        UserError: If the file holds something else; it is left alone.
    """
    with _locked(path):
        notes = read_notes(path, n_latents)
        here = notes.get(latent, LatentNote(name="", note=""))
        if before is not None and here not in (before, note):
            return here
        if note["name"] or note["note"]:
            notes[latent] = note
        else:
            notes.pop(latent, None)
        write_notes(path, notes)
    return None


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
    try:
        (name + note).encode()
    except UnicodeEncodeError as error:
        raise ValueError("name and note must be whole characters, found half of a surrogate pair") from error
    return LatentNote(name=name, note=note)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other threads, and other processes where the system has such locks, from writing meanwhile."""
    with _thread_lock, path.with_suffix(".lock").open("w") as file:
        # Windows has no such module and some network folders no such locks: there, one server at a time writes notes.
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield
