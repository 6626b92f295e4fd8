"""`compare`: two autoencoders latent by latent, and the tables that say which latents both have."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cytosae_cache.store import ActivationStore
from cytosae_pipeline.config import CompareConfig, PassOptions
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.evaluation.comparison import Comparison, LatentMatch, compare_pair
from cytosae_pipeline.statistics.inputs import Inputs, open_pair, open_sae, require_match, require_sae_path
from cytosae_pipeline.statistics.notes import FILE_NAME as NOTES_NAME
from cytosae_pipeline.statistics.notes import Subject, read_notes
from cytosae_pipeline.statistics.records import lock_results, make_record, replacing_results, require_ours
from cytosae_pipeline.workspace.csv_files import write_csv
from cytosae_pipeline.workspace.paths import Workspace, run_of_sae
from cytosae_pipeline.workspace.runs import resolve_sae

logger = logging.getLogger(__name__)

VERB = "compare"

FILES = ("latents.csv", "only_first.csv", "only_second.csv")
"""Tables: live latents of the first autoencoder with their partners; those without; those of the second without."""

HEADER = (
    "latent", "name", "sparsity", "partner", "partner_name", "correlation", "best", "best_name", "best_correlation",
    "decoder_cosine",
)  # fmt: skip


@dataclass(frozen=True)
class CompareResult:
    """What `compare` found and wrote."""

    comparison: Comparison
    """What it found."""
    folder: Path
    """Folder of the tables."""
    files: list[Path]
    """The tables."""

    def describe(self) -> str:
        """The result as text for humans."""
        names = ", ".join(path.name for path in self.files)
        return f"{self.comparison.describe()}\nwrote in {self.folder}: {names}"


def run_compare(config: CompareConfig) -> CompareResult:
    """Compare two autoencoders, and write the tables.

    Args:
        config: Options.

    Raises:
        ValueError: If an autoencoder or store is missing, they do not fit, or the images differ.
        UserError: If another program's files are in the way.
        StoreBusyError: If another process writes the same tables.
    """
    other_config = resolve_sae(replace(config, sae_path=config.other_sae_path, sae_arch=None, sae_k=None,
                                       sae_threshold=None))  # fmt: skip
    config = resolve_sae(config)
    first = open_pair(config, encoder_only=False)
    second = _open_other(first, other_config)
    folder = _results_folder(config, first)
    names = _read_names(config, first, folder)
    other_names = _read_names(other_config, second, _results_folder(other_config, second))
    comparison = compare_pair(first, second, config, names=names, other_names=other_names)
    target = config.out or folder / f"compare_{run_of_sae(require_sae_path(other_config))}"
    return save_comparison(comparison, first, second, target, replace_foreign=config.replace_foreign)


def save_comparison(
    comparison: Comparison, first: Inputs, second: Inputs, folder: Path, *, replace_foreign: bool = False
) -> CompareResult:
    """Write the tables and the record of what they were made from; together, or not at all.

    Args:
        comparison: What was found.
        first: The autoencoder and its store.
        second: The other one.
        folder: Folder of the tables, which is made.
        replace_foreign: Replace tables that another program wrote.

    Raises:
        UserError: If a file exists that another program wrote.
        StoreBusyError: If another process writes there.
    """
    record = make_record(
        first, PassOptions(), VERB, other_sae_sha256=second.sae_sha256, other_store_contents=second.store.contents,
        n_images=comparison.n_images, match_above=comparison.above, n_matched=comparison.n_matched,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    with lock_results(folder, {VERB: FILES}):
        require_ours(folder, FILES, record, replace_foreign=replace_foreign)
        with replacing_results(folder, FILES, record) as places:
            tables = (comparison.latents, comparison.only_first, comparison.only_second)
            for name, latents in zip(FILES, tables, strict=True):
                write_csv(places[name], HEADER, map(_row, latents))
    return CompareResult(comparison, folder, [folder / name for name in FILES])


def _open_other(first: Inputs, config: CompareConfig) -> Inputs:
    """The other autoencoder and its store, which is the first one's unless one is named.

    Raises:
        ValueError: If it cannot be read, or does not fit its store.
    """
    sae = open_sae(config, device=first.sae.W_enc.device)
    store = first.store if config.other_store is None else ActivationStore.open(config.other_store)
    if config.other_store is None and sae.W_enc.shape[0] != store.d_model:
        raise UserError(
            f"'{config.sae_path}' takes activations of width {sae.W_enc.shape[0]}, store '{store.path}' has width "
            f"{store.d_model}: name the store of its own encoder with --other_store"
        )
    require_match(store, sae, allow_mismatch=config.allow_mismatch)
    return Inputs(store, sae)


def _results_folder(config: CompareConfig, inputs: Inputs) -> Path:
    """Where `features` writes about an autoencoder on its store."""
    return Workspace(config.root_dir).feature_dir(
        require_sae_path(config), config.vit_type, inputs.store.provenance.dataset
    )


def _read_names(config: CompareConfig, inputs: Inputs, folder: Path) -> dict[int, str]:
    """Names of latents that somebody has written; none where there are no notes."""
    notes = read_notes(folder / NOTES_NAME, inputs.n_latents, subject=Subject.of(inputs), keep=config.keep_notes)
    return {latent: note["name"] for latent, note in notes.items() if note["name"]}


def _row(one: LatentMatch) -> Sequence[Any]:
    """Cells of a latent; empty where there is nothing."""
    values = (getattr(one, name) for name in HEADER)
    return ["" if value is None else f"{value:.6g}" if isinstance(value, float) else value for value in values]
