"""Names and notes of latents, in a JSON file beside the feature data."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self, TypedDict

from cytosae_cache.errors import StoreBusyError
from cytosae_cache.storage.atomic import write_file
from cytosae_cache.storage.disk import reading
from cytosae_cache.storage.lock import locked
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.statistics.inputs import Inputs

FILE_NAME = "latent_notes.json"

MAX_NAME, MAX_NOTE = 200, 10_000
"""Characters of a latent's name and note."""

_MOST_WAIT_S = 10.0
_SECONDS_BETWEEN_TRIES = 0.02

_thread_lock = threading.Lock()


class LatentNote(TypedDict):
    """Name and note of one latent."""

    name: str
    """A few words."""
    note: str
    """Free text."""


class Subject(NamedTuple):
    """What notes were written about."""

    sae_sha256: str
    """Identity of the autoencoder."""
    store_contents: str
    """Identity of the contents of the store whose images were looked at."""

    @classmethod
    def of(cls, inputs: Inputs) -> Self:
        """What notes on these inputs are about."""
        return cls(inputs.sae_sha256, inputs.store.contents)


def read_notes(
    path: Path, n_latents: int, *, subject: Subject | None = None, keep: bool = False
) -> dict[int, LatentNote]:
    """The notes in a file, or none if there is no file.

    Args:
        path: The file.
        n_latents: Latents of the autoencoder.
        subject: What the notes must be about; None for results of another program, which say nothing about it.
        keep: Take them whatever they are about.

    Raises:
        UserError: If the file contains something else, or notes about another autoencoder or other images; it is never
            overwritten.
    """
    if not path.exists():
        return {}
    with reading(path):
        data = path.read_bytes()
    try:
        value = json.loads(data)
        notes = {int(latent): check_note(note) for latent, note in value["notes"].items()}
        if not all(0 <= latent < n_latents for latent in notes):
            raise ValueError(f"latents must lie in 0..{n_latents - 1}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"'{path}' is not a file of latent notes ({error}): fix or move it") from error
    if notes and subject is not None and not keep:
        _require_about(path, value.get("about"), subject)
    return notes


def _require_about(path: Path, about: object, subject: Subject) -> None:
    """Refuse notes about something else; those of older versions do not say what they are about.

    Raises:
        UserError: If they are.
    """
    found = about if isinstance(about, dict) else {}
    now = subject._asdict()
    names = {"sae_sha256": "another autoencoder", "store_contents": "other images: the store was made again since"}
    different = next((text for name, text in names.items() if found.get(name, now[name]) != now[name]), None)
    if different is not None:
        raise UserError(
            f"the names and notes of latents in '{path}' were written about {different}. Move the file away to "
            "start a new one, or give --keep_notes if they still apply"
        )


def write_notes(path: Path, notes: dict[int, LatentNote], *, subject: Subject | None = None) -> None:
    """Write all notes atomically, and what they are about."""
    about = {} if subject is None else {"about": subject._asdict()}
    record = {"format": 1, **about, "notes": {str(latent): notes[latent] for latent in sorted(notes)}}
    write_file(path, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())


def save_note(
    path: Path,
    n_latents: int,
    latent: int,
    note: LatentNote,
    *,
    before: LatentNote | None = None,
    subject: Subject | None = None,
    keep: bool = False,
) -> LatentNote | None:
    """Save one latent's note; the notes of other latents stay as they are in the file by now.

    Args:
        path: The file.
        n_latents: Latents of the autoencoder.
        latent: The latent.
        note: Its note; a note without any text is deleted.
        before: The note that the writer saw, the only one to replace; by default, any note is replaced.
        subject: What the notes are about, as for `read_notes`.
        keep: Keep the notes in the file whatever they are about.

    Returns:
        None if the note was saved; otherwise the note that another writer saved since, which is kept.

    Raises:
        UserError: If the file contains something else; it is not changed.
        StoreBusyError: If another process keeps writing it.
        WriteError: If the disk is full, read-only or fails; the file is unchanged.
    """
    with waiting_lock(path):
        notes = read_notes(path, n_latents, subject=subject, keep=keep)
        here = notes.get(latent, LatentNote(name="", note=""))
        if before is not None and here not in (before, note):
            return here
        if note["name"] or note["note"]:
            notes[latent] = note
        else:
            notes.pop(latent, None)
        write_notes(path, notes, subject=subject)
    return None


def check_note(value: Any) -> LatentNote:  # noqa: ANN401 - any JSON
    """Check the types and lengths of a note.

    Raises:
        ValueError: If it is not a note.
    """
    if not isinstance(value, dict):
        raise ValueError("a note must be an object with name and note")
    name, note = value.get("name", ""), value.get("note", "")
    if not isinstance(name, str) or not isinstance(note, str) or len(name) > MAX_NAME or len(note) > MAX_NOTE:
        raise ValueError(f"name and note must be text of at most {MAX_NAME} and {MAX_NOTE:,} characters")
    try:
        (name + note).encode()
    except UnicodeEncodeError as error:
        raise ValueError("name and note must be valid Unicode, found half of a surrogate pair") from error
    return LatentNote(name=name, note=note)


@contextlib.contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Keep other threads and processes from writing; their notes are small, so they are waited for.

    Raises:
        StoreBusyError: If another process keeps the lock for long.
    """
    deadline = time.monotonic() + _MOST_WAIT_S
    with _thread_lock, contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locked(path.with_suffix(".lock"), str(path)))
                break
            except StoreBusyError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_SECONDS_BETWEEN_TRIES)
        yield
