"""Results as AnnData on disk, in HDF5 or Zarr; scores of images are appended as they are computed.

The format is the one that anndata documents; anndata itself writes frames, texts and the empty matrix. Zarr folders
use Zarr format 2, which older releases of anndata read too.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from cytosae_pipeline.export.tables import Column, Table, Tables, latent_name

if TYPE_CHECKING:
    import pandas as pd

Container = Literal["h5ad", "zarr"]

CHUNK_ENTRIES = 1 << 17
"""Scores above 0 per chunk on disk."""


class CsrScores:
    """Appends scores of images to a sparse matrix on disk; memory does not grow with the number of images.

    Args:
        group: An open HDF5 or Zarr group of an AnnData without X.
        n_images: Rows that will be appended.
        n_latents: Columns S.
    """

    def __init__(self, group: Any, n_images: int, n_latents: int) -> None:  # noqa: ANN401 - h5py or zarr
        from anndata.io import sparse_dataset, write_elem
        from scipy.sparse import csr_matrix

        empty = csr_matrix((0, n_latents), dtype=np.float32)
        # Wide enough for a dense matrix, and both the same: scikit-learn's PCA refuses two different types.
        index = np.int32 if n_images * n_latents < np.iinfo(np.int32).max else np.int64
        empty.indices, empty.indptr = empty.indices.astype(index), empty.indptr.astype(index)
        write_elem(group, "X", empty, dataset_kwargs={"chunks": (CHUNK_ENTRIES,)})
        self._matrix: Any = sparse_dataset(group["X"], should_cache_indptr=False)

    def append(self, scores: npt.NDArray[np.float32]) -> None:
        """Write the scores of the next images, shape `(n, S)`."""
        from scipy.sparse import csr_matrix

        if len(scores):
            self._matrix.append(csr_matrix(scores))


@contextmanager
def open_group(path: Path, container: Container) -> Iterator[Any]:
    """A new, empty HDF5 file or Zarr folder, as a group."""
    if container == "h5ad":
        import h5py

        with h5py.File(path, "w") as file:
            yield file
    else:
        import zarr

        yield zarr.open_group(path, mode="w", zarr_format=2)


def write_patients(path: Path, container: Container, tables: Tables) -> None:
    """Write patients x latents, sparse: X the normalised counts of the first threshold, layer `counts` the raw ones.

    Raises:
        ValueError: If there are no patients.
    """
    from anndata import AnnData
    from anndata.io import write_elem
    from scipy.sparse import csr_matrix

    if tables.patients is None or tables.counts is None:
        raise ValueError("there are no patients")
    names = tables.patients["patient"]
    obs = _frame({name: column for name, column in tables.patients.items() if name != "patient"}, names, "patient")
    with open_group(path, container) as group:
        data = AnnData(
            csr_matrix(tables.counts.normalised), obs=obs, var=_latent_frame(tables),
            layers={"counts": csr_matrix(tables.counts.counts[0])}, uns=_uns(tables),
        )  # fmt: skip
        write_elem(group, "/", data)


@contextmanager
def open_images(path: Path, container: Container, tables: Tables) -> Iterator[CsrScores]:
    """A new file of images x latents to which scores are appended, one row per image of the tables."""
    from anndata import AnnData
    from anndata.io import write_elem

    images = tables.images
    names = {"path": images.path, "label": images.label, "patient": images.patient}
    obs = _frame({**names, **images.further}, list(map(str, images.row.tolist())), "row")
    with open_group(path, container) as group:
        write_elem(group, "/", AnnData(None, obs=obs, var=_latent_frame(tables), uns=_uns(tables)))
        yield CsrScores(group, len(images.row), len(tables.latents["sparsity"]))


def _latent_frame(tables: Tables) -> "pd.DataFrame":
    """The frame `var`."""
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


def _uns(tables: Tables) -> dict[str, Any]:
    """The provenance under our own key."""
    return {"cytosae_cache": tables.provenance}
