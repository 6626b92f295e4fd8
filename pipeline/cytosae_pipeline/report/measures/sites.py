"""Where each image was made, by a column of the images or of the table of patients."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cytosae_cache.joined_store import JoinedStore
from cytosae_pipeline.config import PageConfig
from cytosae_pipeline.errors import UserError, quote
from cytosae_pipeline.images.columns import column_texts
from cytosae_pipeline.statistics.covariates import describe_columns, read_covariates
from cytosae_pipeline.statistics.inputs import Inputs
from cytosae_pipeline.statistics.label_index import LabelIndex
from cytosae_pipeline.statistics.patient_table import clean_cell
from cytosae_pipeline.statistics.subjects import same_name

DEFAULT_COLUMN = "site"
"""Column that is taken if there is one."""


class Sites(NamedTuple):
    """The sites of a store's images."""

    names: tuple[str, ...]
    """Their names, sorted."""
    of_image: npt.NDArray[np.int64]
    """Site of each image, shape `(n_images,)`; -1 where it is not known."""
    column: str
    """Name of the column that says so."""


def find_sites(inputs: Inputs, config: PageConfig) -> Sites | None:
    """The site of every image: of joined stores without such a column, the data set; None if nothing says it.

    The column is looked for in the table of covariates first, then among the further columns of the store's images.

    Args:
        inputs: The store.
        config: Options: the table, and the name of the column.

    Raises:
        UserError: If the column that is named does not exist, or the table of patients is not one.
    """
    wanted, images = config.site_column or DEFAULT_COLUMN, inputs.store.image_columns
    patients, named = inputs.patients, []
    if config.covariates is not None and patients.names:
        table = read_covariates(config.covariates, patients.names)
        if (found := same_name(wanted, table.cells)) is not None:
            cells = [*map(clean_cell, table.cells[found]), ""]
            return _index([cells[at] for at in patients.numbers.tolist()], found)
        named.append(f"'{table.path}' has {describe_columns(list(table.cells))}")
    if (found := same_name(wanted, images)) is not None:
        return _index(column_texts(images[found]), found)
    if config.site_column is None:
        store = inputs.store
        return (
            _index(column_texts(images[store.dataset_column]), "data set") if isinstance(store, JoinedStore) else None
        )
    named.append(f"the images of store '{inputs.store.path}' have {describe_columns(list(images))}")
    raise UserError(
        f"--site_column {quote(wanted)} names no column: beside path, label and patient, {', '.join(named)}. Give one "
        "of these, or a table with it: --covariates patients.csv (columns patient,site)"
    )


def _index(texts: list[str], column: str) -> Sites | None:
    """Sites from the text of every image; None if all are empty."""
    names, numbers = LabelIndex.of(texts)
    return Sites(names, numbers, column) if names else None
