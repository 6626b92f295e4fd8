"""Architectures by name. A new architecture is a subclass of `Sae` and one call of `register`."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from cytosae.sae.base import Sae
from cytosae.sae.gated import GatedSae
from cytosae.sae.jumprelu import JumpReluSae
from cytosae.sae.relu import ReluSae
from cytosae.sae.topk import BatchTopKSae, MatryoshkaSae, TopKSae

_architectures: dict[str, type[Sae]] = {}

ARCHITECTURES: Mapping[str, type[Sae]] = MappingProxyType(_architectures)
"""Every registered architecture by its name."""


def register(kind: type[Sae]) -> type[Sae]:
    """Make an architecture known to `make_sae`, to checkpoints and to exports. Works as a class decorator.

    Raises:
        ValueError: If another class has the name already, or is already read from the same SAELens architecture.
    """
    if _architectures.get(kind.architecture, kind) is not kind:
        raise ValueError(f"architecture {kind.architecture!r} is registered already")
    if kind.is_saelens_default and kind.saelens_architecture is not None:
        other = saelens_defaults().get(kind.saelens_architecture, kind)
        if other is not kind:
            raise ValueError(f"SAELens' {kind.saelens_architecture} is already read as {other.architecture}")
    _architectures[kind.architecture] = kind
    return kind


def saelens_defaults() -> dict[str, type[Sae]]:
    """The class that a SAELens folder of each architecture is read as, unless this package wrote it."""
    return {
        kind.saelens_architecture: kind
        for kind in _architectures.values()
        if kind.is_saelens_default and kind.saelens_architecture is not None
    }


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
        device: Device of the parameters.
        **settings: Settings of architectures; those that this architecture does not have are ignored.

    Raises:
        ValueError: If the name is unknown, or a setting is out of range.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, found {architecture!r}")
    kind = ARCHITECTURES[architecture]
    chosen = {name: settings[name] for name in kind.setting_names if name in settings}
    return kind(d_in, n_latents, seed=seed, device=device, **chosen)


for _kind in (ReluSae, TopKSae, BatchTopKSae, JumpReluSae, GatedSae, MatryoshkaSae):
    register(_kind)
