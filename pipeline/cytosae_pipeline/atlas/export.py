"""`export --format atlas`: writes an atlas."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from cytosae_cache.storage.atomic import make_folder, replacing_path
from cytosae_cache.storage.lock import locked
from cytosae_pipeline.atlas.cohort import (
    collect_barcodes,
    measure_quality,
    no_barcodes,
    require_patients,
    warn_of_names,
)
from cytosae_pipeline.atlas.contents import FILES, FORMAT, MANIFEST, Atlas
from cytosae_pipeline.atlas.reading import read_atlas
from cytosae_pipeline.atlas.reference import measure_reference
from cytosae_pipeline.atlas.writing import write_atlas
from cytosae_pipeline.config import ExportConfig
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.evaluation.image_scores import Tokens
from cytosae_pipeline.report.data.pseudonyms import ensure_key
from cytosae_pipeline.statistics.inputs import PlacedInputs, open_inputs
from cytosae_pipeline.statistics.notes import FILE_NAME, LatentNote, Subject, read_notes
from cytosae_pipeline.statistics.results import ensure_statistics
from cytosae_pipeline.workspace.runs import resolve_sae
from cytosae_pipeline.workspace.targets import resolve_target

_MOST_MARK = 1 << 26


@dataclass(frozen=True)
class AtlasResult:
    """What `export` wrote as an atlas."""

    folder: Path
    """The atlas."""
    files: list[Path]
    """Its files."""
    key: Path | None
    """Key of the pseudonyms, which is not part of it; None without patients."""
    n_images: int
    """Reference images."""
    n_patients: int
    """Reference patients, or subjects."""
    unit: str
    """Which of the two."""
    groups: list[str]
    """Names of the groups."""
    balanced_accuracy: float | None
    """Of the groups of the reference patients, cross-validated; None where there are too few."""
    n_latents: int
    """Latents S."""
    n_named: int
    """Latents with a name or note."""
    n_compared: int
    """Images with whose reconstruction that of new images is compared."""
    seen: str
    """Whether the autoencoder was trained on these."""


def export_atlas(config: ExportConfig) -> AtlasResult:
    """Write an atlas: everything that is needed to place new images, and no image, path or name of a patient.

    The folder appears once it is complete and has been read back.

    Raises:
        ValueError: If an option is missing, the target exists already, or store, autoencoder and tables do not fit.
        StoreBusyError: If another process is writing it.
        WriteError: If the disk is full, read-only or fails; what was there before is unchanged.
    """
    if config.format != "atlas":
        raise UserError(f"export_atlas writes format atlas, found format {config.format}")
    if config.dataset_name is None and config.store is None:
        raise UserError("--format atlas needs the data set: name it with --dataset_name NAME or --store PATH")
    inputs = open_inputs(resolve_sae(config), encoder_only=False)
    folder = config.out or inputs.folder / "atlas"
    target = resolve_target(folder)
    make_folder(target.parent)
    with locked(target.with_name(f"{target.name}.lock"), str(folder)):
        _require_free(folder, config)
        key = target.with_name(f"{target.name}.key") if any(inputs.store.images.patient) else None
        atlas = collect_atlas(inputs, config, key)
        with replacing_path(target) as temporary:
            write_atlas(temporary, atlas)
            read_atlas(temporary)
    barcodes, quality, reference = atlas.barcodes, atlas.quality, atlas.reference
    return AtlasResult(
        folder, [folder / name for name in (MANIFEST, *FILES)], key, reference.n_images, len(barcodes.names),
        barcodes.unit, list(barcodes.group_names), None if quality is None else quality.balanced_accuracy,
        atlas.n_latents, len(atlas.notes), len(reference.unexplained), reference.seen,
    )  # fmt: skip


def collect_atlas(inputs: PlacedInputs, config: ExportConfig, key: Path | None) -> Atlas:
    """The atlas of an autoencoder on a store; missing statistics are computed and saved first.

    Args:
        inputs: Autoencoder, with its decoder, and store.
        config: Options.
        key: File of the key of the pseudonyms, which is made if it is missing; None if no image has a patient.

    Raises:
        UserError: If no image can be read, or tables of patients do not fit the store.
    """
    store = inputs.store
    if not len(store.valid_rows):
        raise UserError(f"no image of store '{store.path}' could be read, so there is nothing to make an atlas of")
    found = ensure_statistics(inputs, config, counts=[] if key is None else ["patient"])
    assert found.features is not None
    notes = read_notes(inputs.folder / FILE_NAME, inputs.n_latents, subject=Subject.of(inputs), keep=config.keep_notes)
    clean = {latent: clean_note(note) for latent, note in notes.items()}
    tokens, threshold = _tokens_of(inputs), float(config.threshold[0])
    if key is None:
        require_patients(config, store)
        barcodes, real = no_barcodes(inputs.n_latents), list[str]()
    else:
        counts = found.counts["patient"]
        threshold = float(counts.thresholds[0])
        barcodes, real = collect_barcodes(counts, store, config, ensure_key(key))
    reference = measure_reference(inputs, found.features, tokens=tokens, threshold=threshold, options=config)
    warn_of_names(real, store.images.path, clean, reference.labels, barcodes.group_names)
    quality = measure_quality(barcodes)
    return Atlas(store.spec, inputs.sae, tokens, threshold, reference, barcodes, quality, clean)


def clean_note(note: LatentNote) -> LatentNote:
    """A note without characters that control a terminal; line ends and tabs stay."""
    name, text = (
        "".join(c for c in part if c.isprintable() or c in keep)
        for part, keep in ((note["name"], ""), (note["note"], "\n\t"))
    )
    return LatentNote(name=name, note=text)


def _tokens_of(inputs: PlacedInputs) -> Tokens:
    """The tokens that the autoencoder was trained on, if the images have them; else all."""
    cfg, layout = inputs.sae_cfg, inputs.store.spec.tokens
    if layout.n_cls and (cfg.get("class_token") is True or cfg.get("tokens") == "cls"):
        return "cls"
    return "patches" if cfg.get("tokens") == "patches" and layout.grid[0] * layout.grid[1] else "all"


def _require_free(folder: Path, config: ExportConfig) -> None:
    """Refuse a target that must not be replaced.

    Raises:
        UserError: If it exists, unless `overwrite` allows it and it is an atlas and nothing else.
    """
    if not os.path.lexists(folder):
        return
    if not config.overwrite:
        raise UserError(f"'{folder}' exists already. Give another --out, or --overwrite")
    if not folder.is_dir() or not _is_atlas(folder):
        raise UserError(f"'{folder}' is not an atlas, and is not replaced. Give another --out")


def _is_atlas(folder: Path) -> bool:
    """Whether a folder contains an atlas and nothing else, so that replacing it loses nothing."""
    if not {path.name for path in folder.iterdir()} <= {MANIFEST, *FILES}:
        return False
    try:
        with (folder / MANIFEST).open("rb") as file:
            value = json.loads(file.read(_MOST_MARK))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(value, dict) and value.get("format") == FORMAT


def describe(result: AtlasResult) -> str:
    """The result as text."""
    lines = [
        f"atlas of {result.n_images:,} images, {result.n_patients:,} {result.unit}s and {result.n_latents:,} latents "
        f"({result.n_named:,} with a name or note): {result.folder}",
        f"new images are compared with {result.n_compared:,} of them ({result.seen})",
    ]
    if result.balanced_accuracy is not None:
        lines.append(
            f"groups of its own {result.unit}s, cross-validated: balanced accuracy {result.balanced_accuracy:.1%}"
        )
    if result.key is not None:
        lines.append(f"key of the pseudonyms (not part of the atlas; keep it secret): {result.key}")
    return "\n".join(
        [*lines, f"place new images in it: cytosae-cache apply {result.folder} --images IMAGES --model_path VIT"]
    )
