"""Options of `import`."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cytosae_pipeline.config.fields import option
from cytosae_pipeline.config.store import WorkspaceChoice
from cytosae_pipeline.errors import UserError

ROWS = "rows"
"""What `grid` says where an array of shape (1, n, D) is n rows."""


@dataclass(frozen=True, kw_only=True)
class ImportConfig(WorkspaceChoice):
    """Options of `import`: embeddings of another program as a store."""

    dataset_name: str | None = option(None, "Name of the data set.", "dataset")
    source: Path | None = option(
        None, "A file of embeddings (.h5, .pt, .npy, .npz, .parquet, .h5ad), or a folder of such files of one kind."
    )
    labels: Path | None = option(
        None,
        "CSV with columns label and patient, either or both: one line per row of a single file, or with a column slide "
        "(file name without its ending) one line per file. A column path names the rows.",
    )
    key: str | None = option(
        None, "Name of the embeddings in the file: an HDF5 data set, an array, a column, or a matrix of obsm."
    )
    label_column: str = option("label", "Column of a .parquet or of obs in a .h5ad that contains the label.")
    patient_column: str = option("patient", "The same for the patient.")
    name_column: str = option("path", "The same for the name of each row.")
    model_name: str | None = option(
        None,
        "Name of the network that computed the embeddings: stores imported under the same name count as computed by "
        "the same network. [default: the source's name, and no other store counts so]",
    )
    grid: str | None = option(
        None,
        "Rows and columns of patches, such as 16x16, where each row is several tokens; or `rows` if an array of shape "
        "(1, n, D) without coordinates is n rows.",
    )
    n_cls: int = option(1, "Class tokens before the patches, where there are several tokens.", minimum=0, maximum=1)
    n_registers: int = option(0, "Register tokens after the class token.", minimum=0)
    store: str | None = option(None, "Path or URL of the store, instead of the place under root_dir.")
    store_dtype: Literal["float16", "float32", "int8"] = option("float16", "Type of the stored numbers.")
    shard_images: int | None = option(
        None, "Rows per shard file. [default: as many as take 128 MiB, at most 4096]", minimum=1
    )
    compression: Literal["none", "lz4", "zstd"] = option("none", "Lossless codec.")
    overwrite: bool = option(False, "Import from scratch; the new store replaces an existing one once it is complete.")
    delete_first: bool = option(
        False, "With --overwrite: delete the existing store before the new one is written, for want of space for both."
    )

    def __post_init__(self) -> None:
        """Check the grid."""
        super().__post_init__()
        if self.delete_first and not self.overwrite:
            raise UserError("delete_first says how an existing store is replaced: give overwrite as well")
        parse_grid(self.grid)


def parse_grid(text: str | None) -> tuple[int, int] | None:
    """A grid written as `16x16`; None if none was given, or `rows`.

    Raises:
        UserError: If the text is not a grid.
    """
    if text is None or text == ROWS:
        return None
    found = re.fullmatch(r"\s*(\d{1,4})\s*[xX]\s*(\d{1,4})\s*", text)
    if not found or not min(int(found[1]), int(found[2])):
        raise UserError(f"grid must be ROWSxCOLUMNS, such as 16x16, or {ROWS}, found {text!r}")
    return int(found[1]), int(found[2])
