"""Uploaded images, read with the store's own vision transformer and never stored."""

import logging
import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from cytosae.backbones.backbone import Backbone, load_backbone
from cytosae.backbones.errors import BackboneError
from cytosae.backbones.images import UnreadableImageError
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.building.activations import compute_activations
from cytosae_pipeline.building.originals import describe_own_backbone
from cytosae_pipeline.config import StoreSource
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.images.decoding import Decoded, Wanted, decode_data
from cytosae_pipeline.images.isolation import DecodingError, Isolation, Limits
from cytosae_pipeline.runtime.devices import choose_device
from cytosae_pipeline.workspace.build_record import find_model
from cytosae_pipeline.workspace.paths import resolve_model_path

logger = logging.getLogger(__name__)


class UploadReader:
    """Computes activations of single images, as the store would contain them.

    Args:
        store: The store.
        model_path: Checkpoint of its vision transformer, which is loaded for the first image.
        config: Name of the architecture, and the device.

    Raises:
        BackboneError: If there is no such checkpoint or it cannot be read.
        UserError: If it is not the network that the store was built with.
    """

    def __init__(self, store: ActivationStore, model_path: Path, config: StoreSource) -> None:
        self._store, self._path = store, model_path
        self._info = describe_own_backbone(store, model_path, config.model_name)
        self._device = choose_device(config.device)
        self._backbone: Backbone | None = None
        self._decoding = threading.Lock()
        self._process = Isolation(Limits())

    def decode(self, data: bytes) -> npt.NDArray[np.uint8]:
        """An image file's pixels as the network takes them, shape `(size, size, 3)`; one file at a time.

        A process of its own decodes it: a file from anywhere may crash a decoder, or keep it busy for hours.

        Raises:
            UnreadableImageError: If it is not an image; the message may be shown in the browser.
        """
        wanted = Wanted(self._info.image_size, self._info.resample, self._store.spec.preprocessing.white_level or None)
        # A file of a few bytes may decode to hundreds of MB: never decode two at once.
        with self._decoding:
            try:
                return self._process.run(decode_data, data, wanted, self._process.limits)
            except DecodingError as error:
                raise UnreadableImageError(
                    "the process that decoded it was killed, perhaps for lack of memory"
                ) from error

    def close(self) -> None:
        """End the process that decodes."""
        self._process.close()

    def compute(self, pixels: npt.NDArray[np.uint8]) -> torch.Tensor:
        """Activations of an image in the type that the store returns, shape `(T, D)`. Not thread-safe.

        Args:
            pixels: What `decode` returned.
        """
        if self._backbone is None:
            self._backbone = load_backbone(self._path, self._info, device=self._device)
        image = Decoded(0, pixels, None, "")
        computed = compute_activations(self._backbone, [image], self._store.spec, self._device)[0]
        return torch.from_numpy(computed[0])


def open_uploads(store: ActivationStore, config: StoreSource) -> UploadReader | None:
    """A reader of new images; None if there is no vision transformer, neither given nor where the store was built.

    Raises:
        BackboneError: If the given checkpoint does not exist or cannot be read.
        UserError: If it is not the network that the store was built with.
    """
    if store.spec.imported and config.model_path is None:
        return None
    model_path = resolve_model_path(find_model(store, config.root_dir, config.model_path))
    if model_path is None:
        return None
    try:
        return UploadReader(store, model_path, config)
    except (BackboneError, UserError) as error:
        if config.model_path is not None:
            raise
        logger.warning(f"new images cannot be analysed: {error}")
        return None
