"""Statistics in Python: `features`, `classes`, `patients`, and `export` of their results."""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cytosae_pipeline.api.options import takes_options, takes_pair
from cytosae_pipeline.config import ExportConfig, StatisticsOptions
from cytosae_pipeline.errors import say_count
from cytosae_pipeline.export.anndata_files import latent_frame, make_groups, make_images
from cytosae_pipeline.export.statistics import TablesResult, export_tables
from cytosae_pipeline.export.tables import Table, collect_tables, make_patient_table, make_provenance
from cytosae_pipeline.statistics.counts import COUNT_FILES, Counts, GroupKind, save_counts
from cytosae_pipeline.statistics.features import VERB, Features, save_features
from cytosae_pipeline.statistics.inputs import Inputs
from cytosae_pipeline.statistics.records import lock_results
from cytosae_pipeline.statistics.results import RESULT_FILES, compute_statistics
from cytosae_pipeline.statistics.scores import pass_scores

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData


@dataclass(frozen=True, eq=False, repr=False)
class FeatureStats(Features):
    """What an autoencoder found in a store, latent by latent: the results of `features`, in memory."""

    inputs: Inputs
    """The autoencoder and the store."""
    options: StatisticsOptions
    """The options."""

    def best_latents(self, n: int = 20) -> list[int]:
        """The latents to look at first: those specific to each label in turn (docs/definitions.md, section 10).

        Args:
            n: How many at most.
        """
        return [int(latent) for latent in self.first_latents(n)]

    def to_pandas(self) -> "pd.DataFrame":
        """One row per latent: sparsity, mean_acts, label_entropy, dead, top_label and its share. Needs pandas."""
        return latent_frame(collect_tables(self.inputs, self, None))

    def to_anndata(self) -> "AnnData":
        """The scores of all readable images, sparse, images x latents, with what is known of both. Needs anndata.

        Takes one pass over the store, and memory for every score above 0. `export_stats` writes the same to disk in
        flat memory.
        """
        from scipy.sparse import csr_matrix, vstack

        blocks = [csr_matrix((0, len(self.sparsity)), dtype=np.float32)]
        pass_scores(self.inputs, self.options, lambda scores: blocks.append(csr_matrix(scores)), what="scores")
        return make_images(collect_tables(self.inputs, self, None), vstack(blocks, format="csr"))

    def save(self, folder: str | PathLike[str], *, replace_foreign: bool = False) -> list[Path]:
        """Write the files of `features` into a folder, which is made.

        Returns:
            The files.

        Raises:
            UserError: If another program wrote one of them, unless `replace_foreign` allows it.
        """
        with lock_results(Path(folder), {VERB: RESULT_FILES[VERB]}):
            return save_features(Path(folder), self, self.inputs.store, replace_foreign=replace_foreign)

    def __repr__(self) -> str:
        n = self.record["n_images"]
        return (
            f"<FeatureStats: {self.n_active:,} of {len(self.sparsity):,} latents are active on any of "
            f"{say_count(n, 'image')}; top {self.top_rows.shape[1]}>"
        )


@dataclass(frozen=True, eq=False, repr=False)
class GroupStats(Counts):
    """Tokens above thresholds, by patient or by label: the results of `patients` or `classes`, in memory."""

    kind: GroupKind
    """Whether groups are patients or labels."""
    inputs: Inputs
    """The autoencoder and the store."""
    options: StatisticsOptions
    """The options."""

    def to_pandas(self) -> "pd.DataFrame":
        """Normalised counts of the first threshold, groups x latents. Needs pandas."""
        import pandas as pd

        return pd.DataFrame(self.normalised, index=pd.Index(self.names, name=self.kind))

    def to_anndata(self) -> "AnnData":
        """Groups x latents, sparse: X the normalised counts of the first threshold, layer `counts` the raw ones.

        Needs anndata.
        """
        groups: Table = {"label": list(self.names), "n_images": self.n_images}
        if self.kind == "patient":
            groups = make_patient_table(self.inputs.store, self)
        return make_groups(self, groups, self.kind, None, make_provenance(self.inputs, None, self))

    def save(self, folder: str | PathLike[str], *, replace_foreign: bool = False) -> list[Path]:
        """Write the files of `patients` or `classes` into a folder, which is made.

        Returns:
            The files.

        Raises:
            UserError: If another program wrote one of them, unless `replace_foreign` allows it.
        """
        place, store, verb = Path(folder), self.inputs.store, COUNT_FILES[self.kind].verb
        with lock_results(place, {verb: RESULT_FILES[verb]}):
            return save_counts(place, self, self.kind, store.images, store.n_tokens, replace_foreign=replace_foreign)

    def __repr__(self) -> str:
        groups, images = say_count(len(self.names), self.kind), say_count(int(self.n_images.sum()), "image")
        return f"<GroupStats: {groups} x {self.counts.shape[2]:,} latents from {images}>"


@takes_pair(StatisticsOptions)
def feature_stats(inputs: Inputs, options: StatisticsOptions) -> FeatureStats:
    """Find each latent's top images, mean activation and sparsity: the verb `features`, without files.

    Returns:
        `.sparsity` and `.mean_acts`, shape `(S,)`; `.top_rows`, `.top_values` and `.top_labels`, shape `(S, k)`.

    Raises:
        ValueError: If autoencoder and store do not fit.
    """
    found = compute_statistics(inputs, options, features=True, what="features").features
    assert found is not None
    return FeatureStats(**vars(found), inputs=inputs, options=options)


@takes_pair(StatisticsOptions)
def class_counts(inputs: Inputs, options: StatisticsOptions) -> GroupStats:
    """Count tokens above thresholds by label: the verb `classes`, without files.

    Returns:
        `.counts`, int64, shape `(n_thresholds, G, S)`; `.normalised`, shape `(G, S)`; `.names`, the labels.

    Raises:
        ValueError: If autoencoder and store do not fit, or no image has a label.
    """
    return _count(inputs, options, "label")


@takes_pair(StatisticsOptions)
def patient_counts(inputs: Inputs, options: StatisticsOptions) -> GroupStats:
    """Count tokens above thresholds by patient: the verb `patients`, without files.

    Returns:
        `.counts`, int64, shape `(n_thresholds, G, S)`; `.normalised`, shape `(G, S)`; `.names`, the patients.

    Raises:
        ValueError: If autoencoder and store do not fit, or no image has a patient.
    """
    return _count(inputs, options, "patient")


@takes_options(ExportConfig)
def export_stats(options: ExportConfig) -> TablesResult:
    """Write what an autoencoder found in a store: the verb `export` with the formats anndata, csv, parquet.

    Memory does not grow with the number of images.

    Returns:
        `result.files` are the files.

    Raises:
        ValueError: If an option or package is missing, a target exists already, or the store does not fit.
    """
    return export_tables(options)


def _count(inputs: Inputs, options: StatisticsOptions, kind: GroupKind) -> GroupStats:
    """Counts of one kind."""
    found = compute_statistics(inputs, options, counts=[kind], what="counts").counts[kind]
    return GroupStats(**vars(found), kind=kind, inputs=inputs, options=options)
