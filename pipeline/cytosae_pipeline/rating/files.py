"""Ratings on disk: one JSON file per rater beside the feature data, so that no rater overwrites another's."""

import json
import os
import stat
from pathlib import Path
from typing import Any

from cytosae_cache.storage.atomic import make_folder, write_file
from cytosae_cache.storage.disk import reading
from cytosae_pipeline.config.rating import check_rater
from cytosae_pipeline.errors import UserError, quote
from cytosae_pipeline.rating.answers import Answer, Ratings, check_answer
from cytosae_pipeline.statistics.notes import Subject, waiting_lock

FOLDER_NAME = "latent_ratings"

MOST_RATERS = 200
"""Files of a folder that are read."""

MOST_BYTES = 16 << 20
"""Bytes of a file that are read; 10,000 answers with the longest names need about 9 MB."""


def rater_path(folder: Path, rater: str) -> Path:
    """The file of a rater.

    Args:
        folder: Folder of the feature data.
        rater: The rater's checked name.
    """
    return folder / FOLDER_NAME / f"{rater}.json"


def read_ratings(
    folder: Path, rater: str, n_latents: int, *, subject: Subject | None = None, keep: bool = False
) -> Ratings:
    """The ratings of one rater; none if there is no file.

    Args:
        folder: Folder of the feature data.
        rater: The rater.
        n_latents: Latents of the autoencoder.
        subject: What the ratings must be about.
        keep: Take them whatever they are about.

    Raises:
        UserError: If the file is a link, too large, contains something else, or ratings of another rater, of another
            autoencoder or other images; it is never overwritten.
    """
    path = rater_path(folder, rater)
    data = _read_bytes(path)
    if data is None:
        return Ratings(rater)
    try:
        value = json.loads(data)
        if not isinstance(value, dict) or value.get("format") != 1:
            raise ValueError("its format is not 1")
        latents = {int(name): check_answer(answer) for name, answer in value["latents"].items()}
        decoys = {str(name): check_answer(answer) for name, answer in value["decoys"].items()}
        if not all(0 <= latent < n_latents for latent in latents):
            raise ValueError(f"latents must lie in 0..{n_latents - 1}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"'{path}' is not a file of ratings ({error}): fix or move it") from error
    if value.get("rater") != rater:
        raise UserError(
            f"'{path}' contains the ratings of another rater, {quote(str(value.get('rater')))}: rename the file, or "
            "rate under another name"
        )
    if not keep and subject is not None:
        _require_about(path, value.get("about"), subject)
    return Ratings(rater, latents, decoys)


def read_all_ratings(
    folder: Path, n_latents: int, *, subject: Subject | None = None, keep: bool = False
) -> list[Ratings]:
    """The ratings of all raters with an answer, in the order of their names; arguments as for `read_ratings`.

    Files that are not named like a rater's are not read.

    Raises:
        UserError: If there are more than 200 raters, or a file is not one of ratings, as for `read_ratings`.
    """
    place = folder / FOLDER_NAME
    if not place.is_dir():
        return []
    with reading(place):
        names = sorted(path.stem for path in place.iterdir() if path.suffix == ".json" and _is_rater(path.stem))
    if len(names) > MOST_RATERS:
        raise UserError(f"'{place}' has files of {len(names):,} raters, at most {MOST_RATERS} are read: move some away")
    found = (read_ratings(folder, name, n_latents, subject=subject, keep=keep) for name in names)
    return [ratings for ratings in found if len(ratings)]


def save_answer(
    folder: Path,
    rater: str,
    n_latents: int,
    latent: int,
    answer: Answer,
    *,
    subject: Subject,
    keep: bool = False,
) -> None:
    """Save one answer; it is on disk when this returns, and other answers stay as they are in the file by now.

    Args:
        folder: Folder of the feature data.
        rater: The rater.
        n_latents: Latents of the autoencoder.
        latent: The latent; -1 for a decoy.
        answer: The answer, which replaces an earlier one.
        subject: What it is about.
        keep: Keep the answers in the file whatever they are about.

    Raises:
        UserError: If the file contains something else; it is not changed.
        StoreBusyError: If another process keeps writing it.
        WriteError: If the disk is full, read-only or fails; the file is unchanged.
    """
    path = rater_path(folder, rater)
    make_folder(path.parent)
    with waiting_lock(path):
        ratings = read_ratings(folder, rater, n_latents, subject=subject, keep=keep)
        if latent < 0:
            ratings.decoys[answer["item"]] = answer
        else:
            ratings.latents[latent] = answer
        record: dict[str, Any] = {
            "format": 1,
            "about": subject._asdict(),
            "rater": rater,
            "latents": {str(name): ratings.latents[name] for name in sorted(ratings.latents)},
            "decoys": {name: ratings.decoys[name] for name in sorted(ratings.decoys)},
        }
        write_file(path, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())


def _is_rater(name: str) -> bool:
    """Whether a file is named like a rater's."""
    try:
        check_rater(name)
    except UserError:
        return False
    return True


def _read_bytes(path: Path) -> bytes | None:
    """A file's bytes; None if there is none. Links are not followed, and nothing else than a small file is opened.

    Raises:
        UserError: If it is something else.
    """
    with reading(path):
        try:
            # Looked at before it is opened: opening a pipe would block forever.
            if not stat.S_ISREG(path.lstat().st_mode):
                raise UserError(f"'{path}' is not a file of ratings but a link, a folder or a device: move it away")
            number = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
        except FileNotFoundError:
            return None
        with os.fdopen(number, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise UserError(f"'{path}' is not a file of ratings: it is larger than {MOST_BYTES >> 20} MB. Move it away")
    return data


def _require_about(path: Path, about: object, subject: Subject) -> None:
    """Refuse ratings of something else.

    Raises:
        UserError: If they are.
    """
    found = about if isinstance(about, dict) else {}
    now = subject._asdict()
    names = {"sae_sha256": "another autoencoder", "store_contents": "other images: the store was made again since"}
    different = next((text for name, text in names.items() if found.get(name) != now[name]), None)
    if different is not None:
        raise UserError(
            f"the ratings of latents in '{path}' are about {different}. Move the file away to start a new one, or "
            "give --keep_notes if they still apply"
        )
