"""A map of cells: images by their scores on a plane, with the scores that colour and compare them."""

import functools
import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cytosae.analysis.cell_map import Components, principal_components
from cytosae.statistics.heatmaps import LatentEncoder
from cytosae_cache.reading.permutation import spread_rows
from cytosae_pipeline.config import PageConfig
from cytosae_pipeline.errors import UserError, install
from cytosae_pipeline.report.data.report_data import ReportData
from cytosae_pipeline.report.records.encoding import pack
from cytosae_pipeline.report.records.latents import images_at_once
from cytosae_pipeline.runtime.progress import Progress
from cytosae_pipeline.statistics.inputs import Inputs
from cytosae_pipeline.statistics.streaming import iter_parts, split_evenly

MAP_LATENTS = 1024
"""Most latents whose scores make the map."""

LATENTS_PER_FILE = 64
"""Latents whose scores are in one file."""

FEWEST_IMAGES = 3
"""Fewest images of a map."""
_UMAP_COMPONENTS = 50
_UMAP_NEIGHBOURS = 15


@dataclass(frozen=True)
class CellMap:
    """Images on a plane."""

    rows: npt.NDArray[np.int64]
    """The images, shape `(n,)`."""
    latents: npt.NDArray[np.int64]
    """The latents whose scores make the map, rising, shape `(M,)`."""
    scores: npt.NDArray[np.float32]
    """Scores of docs/definitions.md, section 6, shape `(n, M)`."""
    positions: npt.NDArray[np.float64]
    """Shape `(n, 2)`."""
    axes: tuple[str, str]
    """What the axes are."""
    method: str
    """How the positions were computed, in a sentence."""


def require_umap(config: PageConfig) -> None:
    """Check that umap-learn is installed if it is asked for.

    Raises:
        UserError: If it is not.
    """
    if config.map == "umap" and importlib.util.find_spec("umap") is None:
        raise UserError(f"--map umap needs umap-learn: {install('map')}, or give --map pca")


def measure_map(data: ReportData, featured: npt.NDArray[np.int64]) -> CellMap | None:
    """The map of up to `--map_images` images; None if it was not asked for or there are too few images.

    Args:
        data: Store, autoencoder and statistics.
        featured: Latents with a page, which the map contains in any case.
    """
    valid = data.store.valid_rows
    rows = valid[spread_rows(len(valid), data.config.map_images)]
    if len(rows) < FEWEST_IMAGES:
        return None
    latents = choose_map_latents(data.features.sparsity, data.features.mean_acts, featured)
    scores = _measure_scores(data, rows, latents)
    found = principal_components(scores, _UMAP_COMPONENTS)
    about = f"{len(rows):,} of {len(valid):,} readable images by the scores of {len(latents):,} of "
    about += f"{data.features.n_active:,} active latents."
    if data.config.map == "umap" and len(rows) > _UMAP_NEIGHBOURS:
        positions = _umap(found, data.config.seed)
        method = f"UMAP of the first {found.positions.shape[1]} principal components: {about} "
        method += "Distances between groups mean little."
        return CellMap(rows, latents, scores, positions, ("UMAP 1", "UMAP 2"), method)
    positions = np.zeros((len(rows), 2))
    positions[:, : found.positions.shape[1]] = found.positions[:, :2]
    shares = [*found.shares.tolist(), 0.0, 0.0]
    axes = (f"PC 1 ({shares[0]:.1%} of the variance)", f"PC 2 ({shares[1]:.1%} of the variance)")
    return CellMap(rows, latents, scores, positions, axes, f"Principal components, exact: {about}")


def choose_map_latents(
    sparsity: npt.NDArray[np.floating], mean_acts: npt.NDArray[np.floating], featured: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """All active latents or, beyond `MAP_LATENTS`, the featured ones and those whose scores vary most.

    Args:
        sparsity: Share of images where each latent is active, shape `(S,)`.
        mean_acts: Mean activation where active, shape `(S,)`.
        featured: Latents that are chosen first.

    Returns:
        Latents, rising, int64.
    """
    # A latent that is active on a share p of the images with the score m varies by at least m^2 p (1 - p).
    variance = np.asarray(mean_acts, np.float64) ** 2 * sparsity * (1 - sparsity)
    order = np.lexsort((np.arange(len(sparsity)), -variance))
    first = dict.fromkeys([*featured.tolist(), *order[sparsity[order] > 0].tolist()])
    return np.sort(np.array(list(first)[:MAP_LATENTS], dtype=np.int64))


def map_record(data: ReportData, found: CellMap) -> dict[str, Any]:
    """Record of the map itself."""
    return {
        "method": found.method,
        "axes": list(found.axes),
        "numbers": pack(data.numbers[found.rows].astype(np.int32)),
        "labels": pack(data.labels[found.rows].astype(np.int32)),
        "patients": pack(data.patients[found.rows].astype(np.int32)),
        "x": pack(found.positions[:, 0].astype(np.float32)),
        "y": pack(found.positions[:, 1].astype(np.float32)),
        "latents": pack(found.latents.astype(np.int32)),
        "latents_per_file": LATENTS_PER_FILE,
    }


def scores_record(found: CellMap, number: int) -> dict[str, Any]:
    """Record of the scores of some latents, as shares of the latent's largest in steps of 1/255, rounded up above 0."""
    part = found.scores[:, number * LATENTS_PER_FILE : (number + 1) * LATENTS_PER_FILE].T
    peaks = part.max(axis=1)
    levels = np.ceil(255 * part / np.where(peaks > 0, peaks, 1)[:, None]).clip(0, 255)
    return {"levels": pack(levels.astype(np.uint8)), "peaks": pack(peaks)}


def map_files(data: ReportData, found: CellMap) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and record of every file of the map."""
    yield "map", map_record(data, found)
    for number in range(n_score_files(found)):
        yield f"mapped/{number}", scores_record(found, number)


def n_score_files(found: CellMap) -> int:
    """Files of scores."""
    return -(-len(found.latents) // LATENTS_PER_FILE)


def _measure_scores(
    data: ReportData, rows: npt.NDArray[np.int64], latents: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Scores of latents on images."""
    scores = np.zeros((len(rows), len(latents)), np.float32)
    parts = split_evenly(len(rows), images_at_once(data, len(latents)))
    function = functools.partial(_measure_parts, rows, latents, not data.config.no_verify)
    with Progress("map", len(rows), "images") as bar:
        for part, found in zip(parts, iter_parts(data.inputs, data.config, function, parts), strict=True):
            scores[part.start : part.stop] = found
            bar.advance(len(part))
    return scores


def _measure_parts(
    rows: npt.NDArray[np.int64], latents: npt.NDArray[np.int64], verify: bool, inputs: Inputs, parts: Sequence[range]
) -> Iterator[npt.NDArray[np.float32]]:
    """Scores of latents on the images of each part."""
    encoder = LatentEncoder(inputs.sae, latents)
    with inputs.store.open_reader(verify=verify) as reader:
        for part in parts:
            acts = encoder(torch.from_numpy(reader.read(rows[part.start : part.stop])))
            yield acts.mean(dim=1).cpu().numpy()


def _umap(found: Components, seed: int) -> npt.NDArray[np.float64]:
    """Positions by UMAP, reproducible by their seed."""
    import umap

    n_threads = torch.get_num_threads()
    with warnings.catch_warnings():
        # It says that a seed costs it its threads.
        warnings.simplefilter("ignore")
        model = umap.UMAP(n_neighbors=_UMAP_NEIGHBOURS, random_state=seed, n_jobs=1)
        positions = model.fit_transform(found.positions)
    # It sets the threads of OpenMP, and a product of torch rounds differently with their number.
    torch.set_num_threads(n_threads)
    return np.asarray(positions, dtype=np.float64)
