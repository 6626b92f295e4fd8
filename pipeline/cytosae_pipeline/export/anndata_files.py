"""Results as AnnData on disk, in HDF5 or Zarr; scores of images are appended as they are computed.

The format is the one that anndata documents; anndata itself writes frames, texts and the empty matrix. Zarr folders
use Zarr format 2, which older releases of anndata read too.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from cytosae_pipeline.export.hdf5_files import open_hdf5
from cytosae_pipeline.export.tables import Column, Table, Tables, latent_name
from cytosae_pipeline.statistics.counts import Counts

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

Container = Literal["h5ad", "zarr"]

_UNS = "cytosae_cache"
"""Our own key in `uns`, for the provenance."""

CHUNK_ENTRIES = 1 << 17
"""Scores above 0 per chunk on disk."""


class CsrScores:
    """Appends scores of images to a sparse matrix on disk; memory does not grow with the number of images.

    Args:
        group: An open HDF5 or Zarr group of an AnnData without X.
        n_images: Rows that will be appended.
        n_latents: Columns S.
        check: Raises if writing has failed since.
    """

    def __init__(
        self,
        group: Any,  # noqa: ANN401 - h5py or zarr
        n_images: int,
        n_latents: int,
        *,
        check: Callable[[], object] = bool,
    ) -> None:
        from anndata.io import sparse_dataset, write_elem
        from scipy.sparse import csr_matrix

        empty = csr_matrix((0, n_latents), dtype=np.float32)
        # Wide enough for a dense matrix, and both the same: scikit-learn's PCA refuses two different types.
        index = np.int32 if n_images * n_latents < np.iinfo(np.int32).max else np.int64
        empty.indices, empty.indptr = empty.indices.astype(index), empty.indptr.astype(index)
        write_elem(group, "X", empty, dataset_kwargs={"chunks": (CHUNK_ENTRIES,)})
        self._matrix: Any = sparse_dataset(group["X"], should_cache_indptr=False)
        self._check = check

    def append(self, scores: npt.NDArray[np.float32]) -> None:
        """Write the scores of the next images, shape `(n, S)`."""
        from scipy.sparse import csr_matrix

        if len(scores):
            self._matrix.append(csr_matrix(scores))
            self._check()


@contextmanager
def open_group(path: Path, container: Container) -> Iterator[tuple[Any, Callable[[], object]]]:
    """A new, empty HDF5 file or Zarr folder: a group, and a function that raises if writing has failed since."""
    if container == "h5ad":
        with open_hdf5(path) as opened:
            yield opened
    else:
        from cytosae_pipeline.export.zarr_folders import open_folder

        with open_folder(path) as opened:
            yield opened


def make_patients(tables: Tables) -> "AnnData":
    """Patients x latents, as `make_groups`, with the table of latents.

    Raises:
        ValueError: If there are no patients.
    """
    if tables.patients is None or tables.counts is None:
        raise ValueError("there are no patients")
    return make_groups(tables.counts, tables.patients, "patient", latent_frame(tables), tables.provenance)


def make_groups(
    counts: Counts, groups: Table, index: str, latents: "pd.DataFrame | None", provenance: dict[str, Any]
) -> "AnnData":
    """Groups x latents, sparse: X the normalised counts of the first threshold, layer `counts` the raw ones.

    Args:
        counts: The counts.
        groups: What is known about the groups, one entry each.
        index: Column of `groups` with their names.
        latents: What is known about the latents; None for their names alone.
        provenance: Where the numbers come from.
    """
    from anndata import AnnData
    from scipy.sparse import csr_matrix

    obs = _frame({name: column for name, column in groups.items() if name != index}, groups[index], index)
    names = [latent_name(latent) for latent in range(counts.counts.shape[2])]
    var = _frame({}, names, "latent") if latents is None else latents
    layers = {"counts": csr_matrix(counts.counts[0])}
    return AnnData(csr_matrix(counts.normalised), obs=obs, var=var, layers=layers, uns={_UNS: provenance})


def write_patients(path: Path, container: Container, tables: Tables) -> None:
    """Write `make_patients`.

    Raises:
        ValueError: If there are no patients.
    """
    from anndata.io import write_elem

    with open_group(path, container) as (group, _):
        write_elem(group, "/", make_patients(tables))


def make_images(tables: Tables, scores: Any = None) -> "AnnData":  # noqa: ANN401 - a sparse matrix
    """Images x latents, one row per image of the tables: X the scores, shape `(n, S)`; None leaves them out."""
    from anndata import AnnData

    images = tables.images
    names = {"path": images.path, "label": images.label, "patient": images.patient}
    obs = _frame({**names, **images.further}, list(map(str, images.row.tolist())), "row")
    return AnnData(scores, obs=obs, var=latent_frame(tables), uns={_UNS: tables.provenance})


@contextmanager
def open_images(path: Path, container: Container, tables: Tables) -> Iterator[CsrScores]:
    """A new file of `make_images` to which scores are appended."""
    from anndata.io import write_elem

    with open_group(path, container) as (group, check):
        write_elem(group, "/", make_images(tables))
        yield CsrScores(group, len(tables.images.row), len(tables.latents["sparsity"]), check=check)


def latent_frame(tables: Tables) -> "pd.DataFrame":
    """The table of latents as a frame."""
    names = [latent_name(latent) for latent in range(len(tables.latents["sparsity"]))]
    return _frame(tables.latents, names, "latent")


def _frame(table: Table, names: Column | Sequence[str], index: str) -> "pd.DataFrame":
    """A table as a frame; texts except paths become categories, unknown values are missing."""
    import pandas as pd

    columns: dict[str, Any] = {}
    for name, column in table.items():
        if isinstance(column, list) and name != "path":
            columns[name] = pd.Categorical(column, categories=sorted({text for text in column if text is not None}))
        else:
            columns[name] = np.array(column, dtype=object) if isinstance(column, list) else column
    return pd.DataFrame(columns, index=pd.Index(np.array(names, dtype=object), name=index))
