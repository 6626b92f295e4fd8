"""Architectures of autoencoders by name."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from cytosae.sae.base import Sae
from cytosae.sae.gated import GatedSae
from cytosae.sae.jumprelu import JumpReluSae
from cytosae.sae.topk import BatchTopKSae, MatryoshkaSae, TopKSae

ARCHITECTURES: Mapping[str, type[Sae]] = {
    kind.architecture: kind for kind in (Sae, TopKSae, BatchTopKSae, JumpReluSae, GatedSae, MatryoshkaSae)
}
"""Every architecture by its name."""

SETTINGS = ("k", "bandwidth", "prefixes")
"""Settings that some architectures have."""


def make_sae(
    architecture: str,
    d_in: int,
    n_latents: int,
    *,
    seed: int = 42,
    device: torch.device | str | None = None,
    **settings: Any,  # noqa: ANN401 - of the architecture
) -> Sae:
    """An untrained autoencoder of a named architecture.

    Args:
        architecture: Its name.
        d_in: Width D of the activations.
        n_latents: Latents S.
        seed: Seed of the weights.
        device: Where the parameters live.
        **settings: Settings of architectures; those that this one does not have are ignored.

    Raises:
        ValueError: If the name is unknown, or a setting out of range; the message says what there is.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, found {architecture!r}")
    kind = ARCHITECTURES[architecture]
    known = inspect.signature(kind).parameters
    chosen = {name: value for name, value in settings.items() if name in SETTINGS and name in known}
    return kind(d_in, n_latents, seed=seed, device=device, **chosen)
