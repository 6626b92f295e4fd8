"""Store and autoencoder as the workers of a cluster open them: by name, once."""

import functools
import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cytosae.formats.tensor_file import digest_tensors
from cytosae.sae.base import Sae
from cytosae_pipeline.config.store import Device
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.runtime.devices import choose_device
from cytosae_pipeline.statistics.inputs import Inputs, read_sae
from cytosae_pipeline.workspace.shared_store import SharedStore, different, unreachable

_opening = threading.Lock()


@dataclass(frozen=True)
class SharedInputs:
    """A store, and an autoencoder that workers read from its file."""

    store: SharedStore
    """The store."""
    sae_path: str
    """Path of the autoencoder from the root."""
    activation: str
    """What the user stated about its activation function, as JSON."""
    digest: str
    """SHA-256 of its encoder, as from `digest_encoder`."""
    device: Device
    """Value of `--device`."""

    def open(self) -> Inputs:
        """Store and autoencoder without its decoder, opened once in this process.

        Raises:
            ClusterError: If one of them is not there, or another one.
        """
        with _opening:
            return _open_inputs(self)


def share(inputs: Inputs, device: Device) -> SharedInputs:
    """What workers need to know to open the same.

    Args:
        inputs: Autoencoder and store.
        device: Value of `--device` for the workers.

    Raises:
        UserError: If the autoencoder has no file.
    """
    sae = inputs.sae
    if sae.source is None:
        raise UserError(
            "--dask needs an autoencoder in a file, which workers read, found one in memory: save it and pass its path"
        )
    return SharedInputs(
        SharedStore.of(inputs.store), str(sae.source.path.absolute()), json.dumps(sae.source.activation),
        digest_encoder(sae), device,
    )  # fmt: skip


def digest_encoder(sae: Sae) -> str:
    """SHA-256 of what decides the activations of an autoencoder: architecture, settings, and all but the decoder."""
    about = json.dumps([sae.architecture, sae.settings], sort_keys=True)
    return digest_tensors({name: value for name, value in sae.state_dict().items() if name != "W_dec"}, about)


@functools.lru_cache(maxsize=1)
def _open_inputs(shared: SharedInputs) -> Inputs:
    return Inputs(shared.store.open(), _open_sae(shared))


def _open_sae(shared: SharedInputs) -> Sae:
    stated: dict[str, Any] = json.loads(shared.activation) or {}
    names = {"architecture": "sae_arch", "k": "sae_k", "threshold": "sae_threshold"}
    try:
        sae = read_sae(
            Path(shared.sae_path), device=choose_device(shared.device), encoder_only=True,
            **{names[name]: value for name, value in stated.items()},
        )  # fmt: skip
    except FileNotFoundError as error:
        raise unreachable("autoencoder", shared.sae_path) from error
    if digest_encoder(sae) != shared.digest:
        raise different("autoencoder", shared.sae_path)
    return sae
