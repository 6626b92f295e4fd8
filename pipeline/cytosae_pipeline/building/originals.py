"""The images and the network that a store was built from, compared with what the store contains."""

import dataclasses
import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from cytosae.backbones.backbone import Backbone, BackboneInfo, describe_backbone, load_backbone
from cytosae.backbones.errors import BackboneNotFoundError
from cytosae.backbones.preprocessing import StatedTransform
from cytosae_cache.format.spec import StoreSpec
from cytosae_cache.reading.reader import StoreReader
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.building.activations import compute_activations
from cytosae_pipeline.building.plan import make_spec
from cytosae_pipeline.building.source_check import compare_source
from cytosae_pipeline.config.store import Device
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.images.decoding import ImageDecoder, open_decoder
from cytosae_pipeline.images.image_list import ImageList
from cytosae_pipeline.images.listing import list_images_of
from cytosae_pipeline.runtime.devices import choose_device
from cytosae_pipeline.workspace.paths import EMBEDDED_MODEL
from cytosae_pipeline.workspace.shared_store import SharedStore, unreachable

BATCH_IMAGES = 8
"""Images that are recomputed at once."""

_INT8_TOLERANCE = 0.05
"""Largest allowed root mean square of the difference for int8 codes, as a share of the image's; docs/half-size.md."""

_TOLERANCE = {"fp32": 2e-3, "fp16": 1e-2, "bf16": 5e-2}
"""Largest allowed difference, as a share of the image's root mean square: the rounding of the number types."""

Problems = dict[int, str]
"""What is wrong with images, by row."""

_opening = threading.Lock()


@dataclass(frozen=True)
class Originals:
    """What a store was built from, as it is now."""

    store: ActivationStore
    """The store."""
    images: ImageList
    """Its images."""
    model_path: Path
    """Its checkpoint."""
    info: BackboneInfo
    """Description of the checkpoint."""
    device: Device
    """Value of `--device`."""

    def recorded_rows(self, shards: range) -> npt.NDArray[np.int64]:
        """Rows of some consecutive shards whose files were read when the store was built, int64, shape `(n,)`."""
        rows = [self.store.shard_rows(shard) for shard in (shards.start, shards.stop - 1)]
        start, stop = rows[0].start, rows[1].stop
        return start + np.flatnonzero(self._digests[start:stop].any(axis=1))

    def compare_files(self, shards: range, advance: Callable[[int], None] = lambda n_images: None) -> Problems:
        """Compare the files of some consecutive shards with their recorded digests.

        Args:
            shards: The shards.
            advance: Called with the number of images that were compared.

        Raises:
            SourceError: If the disk fails repeatedly.
        """
        problems = Problems()
        with ImageDecoder(self.images, n_workers=0) as decoder:
            for image in decoder.iter_hashes(self.recorded_rows(shards).tolist()):
                if problem := compare_source(bytes(self._digests[image.row]), image):
                    problems[image.row] = problem
                advance(1)
        return problems

    def recompute(
        self, rows: npt.NDArray[np.int64], advance: Callable[[int], None] = lambda n_images: None
    ) -> Problems:
        """Run the network over some images and compare what it gives with what is stored.

        Args:
            rows: The images, shape `(n,)`.
            advance: Called with the number of images that were compared.

        Raises:
            SourceError: If the disk fails repeatedly.
        """
        with _opening:
            device, backbone = self._network
        problems = Problems()
        with StoreReader(self.store) as reader, open_decoder(self.store, self.images) as decoder:
            for start in range(0, len(rows), BATCH_IMAGES):
                batch = list(decoder.iter_rows(rows[start : start + BATCH_IMAGES].tolist()))
                computed = compute_activations(backbone, batch, self.store.spec, device)[0].astype(np.float64)
                stored = reader.read(np.array([image.row for image in batch])).astype(np.float64)
                for image, mine, theirs in zip(batch, computed, stored, strict=True):
                    if image.reason:
                        problems[image.row] = f"the image can no longer be read: {image.reason}"
                    elif differ(mine, theirs, self.store.spec):
                        problems[image.row] = "its activations differ from recomputed ones"
                advance(len(batch))
        return problems

    @functools.cached_property
    def _digests(self) -> npt.NDArray[np.uint8]:
        """SHA-256 of the files as they were, zeros for those that could not be read, shape `(n_images, 32)`."""
        return self.store.column("images/sha256")

    @functools.cached_property
    def _network(self) -> tuple[torch.device, Backbone]:
        """The device and the network on it."""
        device = choose_device(self.device)
        return device, load_backbone(self.model_path, self.info, device=device)


@dataclass(frozen=True)
class SharedOriginals:
    """What the workers of a cluster need to know to open the same."""

    store: SharedStore
    """The store."""
    images: str
    """Path of the images from the root."""
    model_path: str | None
    """Path of the checkpoint from the root; None for the one in the package."""
    model_name: str | None
    """Value of `--model_name`."""
    device: Device
    """Value of `--device`."""

    @classmethod
    def of(cls, originals: Originals, place: Path, model_name: str | None) -> "SharedOriginals":
        """What workers need to know.

        Args:
            originals: What they open.
            place: Folder or CSV of the images.
            model_name: Value of `--model_name`.
        """
        path = originals.model_path
        return cls(
            SharedStore.of(originals.store), str(place.absolute()),
            None if path == EMBEDDED_MODEL else str(path.absolute()), model_name, originals.device,
        )  # fmt: skip

    def open(self) -> Originals:
        """Store, images and checkpoint, opened once in this process.

        Raises:
            ClusterError: If one of them is not there.
            UserError: If the checkpoint is another one.
        """
        store = self.store.open()
        with _opening:
            return _open_originals(self, store)


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
    require_network(store)
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


def require_network(store: ActivationStore) -> None:
    """Raise for imported embeddings, which no network here can compute again.

    Raises:
        UserError: If the store was imported.
    """
    if store.spec.imported:
        raise UserError(
            f"store '{store.path}' was imported ('{store.spec.model_name}'): there is no network to ask for its "
            "activations. Without --deep, `verify` checks its files"
        )


def differ(mine: npt.NDArray[np.float64], theirs: npt.NDArray[np.float64], spec: StoreSpec) -> bool:
    """Whether an image's activations differ by more than the rounding of the number types.

    Args:
        mine: Recomputed, shape `(T, D)`.
        theirs: Stored, shape `(T, D)`.
        spec: Spec of the store.
    """
    size, difference = np.sqrt((theirs**2).mean()), np.abs(mine - theirs)
    if spec.store_dtype == "int8":
        return bool(np.sqrt((difference**2).mean()) > _INT8_TOLERANCE * size)
    # A value that lies between two of the stored type may have been rounded to the other one.
    step = np.spacing(np.abs(theirs).astype(spec.store_dtype)).astype(np.float64)
    return bool((difference > _TOLERANCE[spec.precision] * size + step).any())


@functools.lru_cache(maxsize=1)
def _open_originals(shared: SharedOriginals, store: ActivationStore) -> Originals:
    place = Path(shared.images)
    if not place.exists():
        raise unreachable("images", shared.images)
    path = EMBEDDED_MODEL if shared.model_path is None else Path(shared.model_path)
    try:
        info = describe_own_backbone(store, path, shared.model_name)
    except BackboneNotFoundError as error:
        raise unreachable("checkpoint", str(path)) from error
    return Originals(store, list_images_of(store, place), path, info, shared.device)
