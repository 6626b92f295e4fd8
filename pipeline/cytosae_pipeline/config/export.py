"""Options of `export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cytosae_pipeline.config.fields import option
from cytosae_pipeline.config.statistics import StatisticsConfig
from cytosae_pipeline.config.subjects import SubjectChoice
from cytosae_pipeline.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ExportConfig(SubjectChoice, StatisticsConfig):
    """Options of `export`: an autoencoder or, with the options of the statistics, what it found in a data set."""

    format: Literal["saelens", "safetensors", "reference", "anndata", "csv", "parquet", "atlas"] = option(
        "saelens",
        "The autoencoder: saelens = a folder for SAELens' SAE.load_from_disk, safetensors = one file of tensors, "
        "reference = a checkpoint that CytoSAE's own code reads (relu only). Its statistics on a data set: anndata = "
        "files for scanpy, csv and parquet = tables. atlas = a folder to pass on, in which `apply` places new images.",
    )
    anndata_as: Literal["h5ad", "zarr"] = option("h5ad", "Container of anndata: one file, or a Zarr folder.")
    out: Path | None = option(
        None,
        "What to write: a file or folder; for statistics the folder to write into. [default: beside the autoencoder, "
        "named after it; for statistics where `features` writes]",
    )
    groups: Path | None = option(
        None, "CSV with columns patient,group: the group of each patient, and of its images, goes into the tables."
    )
    keep_notes: bool = option(
        False, "Take names and notes of latents even if they were written about another autoencoder or other images."
    )
    overwrite: bool = option(False, "Replace existing files.")

    @property
    def of_data_set(self) -> bool:
        """Whether what is exported is about the images of a data set."""
        return self.of_statistics or self.format == "atlas"

    @property
    def of_statistics(self) -> bool:
        """Whether statistics are exported instead of the autoencoder."""
        return self.format in ("anndata", "csv", "parquet")

    def __post_init__(self) -> None:
        """Check options against the format."""
        super().__post_init__()
        if self.anndata_as != "h5ad" and self.format != "anndata":
            raise UserError(f"anndata_as {self.anndata_as} needs format anndata, found format {self.format}")
        for name in ("groups", "covariates", "subject_column"):
            if getattr(self, name) is not None and not self.of_data_set:
                raise UserError(f"{name} needs format anndata, csv, parquet or atlas, found format {self.format}")
        given = next((name for name in ("dataset_name", "store", "with_dataset") if getattr(self, name)), None)
        if not self.of_data_set and given is not None:
            raise UserError(
                f"format {self.format} writes the autoencoder alone, but {given} was given. For its statistics on a "
                "data set give format anndata, csv, parquet or atlas"
            )
