"""Data sets on disk for tests: empty files, CSVs beside them, and what was read from them."""

from pathlib import Path

from cytosae_pipeline.images.image_list import ImageList


def touch(root: Path, *paths: str) -> Path:
    """Make empty files below a folder; the folder."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def write_csv(root: Path, text: str | bytes, *images: str, name: str = "cells.csv") -> Path:
    """Write a CSV, and make empty files beside it; the CSV."""
    touch(root, *images)
    (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return root / name


def list_triples(images: ImageList) -> list[tuple[str, str, str]]:
    """Path, label and patient of every image."""
    return [(row.path, row.label, row.patient) for row in images.rows]
