"""`verify --deep`: hash all images again, recompute some activations as the spec says, and compare."""

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from cytosae.backbones.backbone import BackboneInfo, describe_backbone, load_backbone
from cytosae.backbones.preprocessing import StatedTransform
from cytosae_cache.format.spec import StoreSpec
from cytosae_cache.reading.permutation import spread_rows
from cytosae_cache.reading.reader import StoreReader
from cytosae_cache.store import ActivationStore
from cytosae_cache.verify import VerifyReport
from cytosae_pipeline.building.activations import compute_activations
from cytosae_pipeline.building.plan import make_spec
from cytosae_pipeline.building.source_check import compare_source
from cytosae_pipeline.building.verify_shards import verify_files
from cytosae_pipeline.config import StoreSource, VerifyConfig
from cytosae_pipeline.errors import UserError, escape
from cytosae_pipeline.images.decoding import ImageDecoder, open_decoder
from cytosae_pipeline.images.image_list import ImageList
from cytosae_pipeline.images.listing import list_stored_images
from cytosae_pipeline.runtime.devices import choose_device
from cytosae_pipeline.runtime.progress import Progress
from cytosae_pipeline.workspace.build_record import find_images, find_model
from cytosae_pipeline.workspace.find import find_store, require_finished
from cytosae_pipeline.workspace.paths import resolve_model_path

N_IMAGES = 16
"""Images that are recomputed, spread over the store."""

_BATCH_IMAGES = 8
_INT8_TOLERANCE = 0.05
"""Largest allowed root mean square of the difference for int8 codes, as a share of the image's; docs/half-size.md."""

_TOLERANCE = {"fp32": 2e-3, "fp16": 1e-2, "bf16": 5e-2}
"""Largest allowed difference, as a share of the image's root mean square: the rounding of the number types."""


def check_store(config: VerifyConfig) -> tuple[ActivationStore, VerifyReport]:
    """Check every file and checksum of the store that the options mean, and some of its activations if `deep` is set.

    Returns:
        The store, and what was found.

    Raises:
        StoreError: If there is no such store, or it is unfinished.
        ClusterError: If the cluster cannot be used.
        UserError: As for `verify_against_source`.
    """
    store = find_store(config)
    require_finished(store, config)
    report = verify_files(store, config.dask)
    if config.deep and not report.problems:
        report.problems += verify_against_source(store, config)
    return store, report


def verify_against_source(store: ActivationStore, config: StoreSource) -> list[str]:
    """Compare the images with their recorded digests, and stored activations with recomputed ones.

    Args:
        store: A complete store.
        config: Names the checkpoint and the images, if they are not where the store was built from.

    Returns:
        One line per problem: an image that changed or vanished, or whose activations differ.

    Raises:
        UserError: If the checkpoint or the images are missing, or the checkpoint is not the store's.
    """
    _require_network(store)
    model_path = resolve_model_path(find_model(store, config.root_dir, config.model_path))
    if model_path is None:
        raise UserError("--deep recomputes activations: pass the network with --model_path CHECKPOINT")
    info = describe_own_backbone(store, model_path, config.model_name)
    place = find_images(store, config.root_dir, config.images)
    images = list_stored_images(store, dataclasses.replace(config, images=place))
    if images is None:
        raise UserError(f"no images at '{place}': pass their location with --images PATH")
    problems = _compare_files(store, images)
    sound = np.array([row for row in store.valid_rows.tolist() if row not in problems], dtype=np.int64)
    rows = sound[spread_rows(len(sound), N_IMAGES)]
    device = choose_device(config.device)
    backbone = load_backbone(model_path, info, device=device)
    with (
        StoreReader(store) as reader,
        open_decoder(store, images) as decoder,
        Progress("recompute", len(rows), "images") as bar,
        torch.inference_mode(),
    ):
        for start in range(0, len(rows), _BATCH_IMAGES):
            batch = list(decoder.iter_rows(rows[start : start + _BATCH_IMAGES].tolist()))
            computed = compute_activations(backbone, batch, store.spec, device)[0].astype(np.float64)
            stored = reader.read(np.array([image.row for image in batch])).astype(np.float64)
            for image, mine, theirs in zip(batch, computed, stored, strict=True):
                if image.reason:
                    problems[image.row] = f"the image can no longer be read: {image.reason}"
                elif _differ(mine, theirs, store.spec):
                    problems[image.row] = "its activations differ from recomputed ones"
            bar.advance(len(batch))
    return [f"row {row} ('{escape(images.rows[row].path)}'): {problem}" for row, problem in sorted(problems.items())]


def describe_own_backbone(store: ActivationStore, model_path: Path, name: str | None) -> BackboneInfo:
    """Description of a checkpoint, if it is the one that the store was built with.

    Args:
        store: The store.
        model_path: The checkpoint.
        name: Name of its encoder; that of the store if None.

    Raises:
        BackboneError: If the checkpoint does not exist or cannot be read.
        UserError: If it is another one.
    """
    _require_network(store)
    stated = store.spec.preprocessing
    info = describe_backbone(
        model_path,
        name=name or store.spec.model_name,
        block=store.spec.block - store.spec.n_blocks,
        preprocessing=StatedTransform(
            stated.image_size, stated.mean, stated.std, stated.scale, stated.resample.removeprefix("pillow-")
        ),
    )
    spec = make_spec(
        info, store_dtype=store.spec.store_dtype, precision=store.spec.precision, white_level=stated.white_level
    )
    spec = dataclasses.replace(spec, model_name=store.spec.model_name)
    if spec != store.spec:
        raise UserError(
            f"'{model_path}' is not what store '{store.path}' was built with (store, checkpoint): "
            + "; ".join(store.spec.differences(spec))
        )
    return info


def _require_network(store: ActivationStore) -> None:
    """Raise for imported embeddings, which no network here can compute again."""
    if store.spec.imported:
        raise UserError(
            f"store '{store.path}' was imported ('{store.spec.model_name}'): there is no network to ask for its "
            "activations. Without --deep, `verify` checks its files"
        )


def _compare_files(store: ActivationStore, images: ImageList) -> dict[int, str]:
    """Problem of every row whose file is not the one that was read."""
    digests = store.column("images/sha256")
    rows = np.flatnonzero(digests.any(axis=1)).tolist()
    problems = {}
    with (
        ImageDecoder(images, n_workers=0) as decoder,
        Progress("compare images", len(rows), "images") as bar,
    ):
        for image in decoder.iter_hashes(rows):
            problem = compare_source(bytes(digests[image.row]), image)
            if problem:
                problems[image.row] = problem
            bar.advance()
    return problems


def _differ(mine: npt.NDArray[np.float64], theirs: npt.NDArray[np.float64], spec: StoreSpec) -> bool:
    """Whether an image's activations differ by more than the rounding of the number types."""
    size, difference = np.sqrt((theirs**2).mean()), np.abs(mine - theirs)
    if spec.store_dtype == "int8":
        return bool(np.sqrt((difference**2).mean()) > _INT8_TOLERANCE * size)
    # A value that lies between two of the stored type may have been rounded to the other one.
    step = np.spacing(np.abs(theirs).astype(spec.store_dtype)).astype(np.float64)
    return bool((difference > _TOLERANCE[spec.precision] * size + step).any())
