"""The tables that `apply` writes."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cytosae.analysis.outside import known_share, unusual_share
from cytosae_pipeline.atlas.contents import HIGH_LEVEL, Atlas
from cytosae_pipeline.atlas.passes import JudgedImages
from cytosae_pipeline.export.table_files import escape_formula


def cell_columns(top: int) -> list[str]:
    """Columns of cells.csv."""
    columns = ["path", "patient", "outside", "known_share", "unexplained", "unusual"]
    for at in range(1, top + 1):
        columns += [f"latent_{at}", f"score_{at}", f"name_{at}"]
    return columns


def judge(atlas: Atlas, images: JudgedImages, outside: float) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """How much of the reference is as strange as each image, and whether it is outside.

    Args:
        atlas: The atlas.
        images: The images.
        outside: Share up to which an image is outside.

    Returns:
        `known_share` of reconstruction and unusual latents, and answers, shape `(n,)` each.
    """
    reference = atlas.reference
    unusual = unusual_share(images.scores, reference.quantiles[:, HIGH_LEVEL])
    share = known_share(
        np.stack([reference.unexplained, reference.unusual], axis=1), np.stack([images.unexplained, unusual], axis=1)
    )
    return share, share <= outside


def cell_rows(
    atlas: Atlas,
    images: JudgedImages,
    share: npt.NDArray[np.float64],
    is_outside: npt.NDArray[np.bool_],
    names: Sequence[tuple[str, str]],
    top: int,
) -> Iterator[list[Any]]:
    """Rows of cells.csv.

    Args:
        atlas: The atlas.
        images: The images.
        share: As `judge` returns it, shape `(n,)`.
        is_outside: The same.
        names: Path and patient of each.
        top: Latents of each image.
    """
    unusual = unusual_share(images.scores, atlas.reference.quantiles[:, HIGH_LEVEL])
    order = np.argsort(-images.scores, axis=1, kind="stable")[:, :top]
    for at, (path, patient) in enumerate(names):
        row = [
            escape_formula(path), escape_formula(patient), "yes" if is_outside[at] else "no", f"{share[at]:.6g}",
            f"{images.unexplained[at]:.6g}", f"{unusual[at]:.6g}",
        ]  # fmt: skip
        for latent in order[at].tolist():
            score = float(images.scores[at, latent])
            row += [latent, f"{score:.6g}", escape_formula(atlas.name_of(latent))] if score > 0 else ["", "", ""]
        yield row + [""] * (len(cell_columns(top)) - len(row))


def unread_row(path: str, patient: str, top: int) -> list[Any]:
    """The row of an image that could not be read."""
    row: list[Any] = [escape_formula(path), escape_formula(patient), "unreadable"]
    return row + [""] * (len(cell_columns(top)) - len(row))
