"""Architectures by name. A new architecture is a subclass of `Sae` and one call of `register`."""

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # option tables list the names without importing torch
    import torch

    from cytosae.sae.base import Sae

_MODULE = "cytosae.sae"

_architectures: "dict[str, type[Sae] | str]" = {
    "relu": "relu:ReluSae",
    "topk": "topk:TopKSae",
    "batchtopk": "topk:BatchTopKSae",
    "jumprelu": "jumprelu:JumpReluSae",
    "gated": "gated:GatedSae",
    "matryoshka": "topk:MatryoshkaSae",
}
"""The class of every name, or `module:class` in `cytosae.sae` until it is first looked up."""


class _Architectures(Mapping[str, "type[Sae]"]):
    """A read-only view that imports a class when it is looked up."""

    def __getitem__(self, name: str) -> "type[Sae]":
        kind = _architectures[name]
        if isinstance(kind, str):
            module, _, class_name = kind.partition(":")
            kind = _architectures[name] = getattr(importlib.import_module(f"{_MODULE}.{module}"), class_name)
        return kind

    def __iter__(self) -> Iterator[str]:
        return iter(_architectures)

    def __len__(self) -> int:
        return len(_architectures)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in _architectures


ARCHITECTURES: "Mapping[str, type[Sae]]" = _Architectures()
"""Every registered architecture by its name. Listing the names imports nothing."""


def register(kind: "type[Sae]") -> "type[Sae]":
    """Make an architecture known to `train`, to checkpoints and to exports. Works as a class decorator.

    Raises:
        ValueError: If another class has the name already, or is already read from the same SAELens architecture.
    """
    if ARCHITECTURES.get(kind.architecture, kind) is not kind:
        raise ValueError(f"architecture {kind.architecture!r} is registered already")
    if kind.is_saelens_default and kind.saelens_architecture is not None:
        other = saelens_defaults().get(kind.saelens_architecture, kind)
        if other is not kind:
            raise ValueError(f"SAELens' {kind.saelens_architecture} is already read as {other.architecture}")
    _architectures[kind.architecture] = kind
    return kind


def saelens_defaults() -> "dict[str, type[Sae]]":
    """The class that a SAELens folder of each architecture is read as, unless this package wrote it."""
    return {
        kind.saelens_architecture: kind
        for kind in ARCHITECTURES.values()
        if kind.is_saelens_default and kind.saelens_architecture is not None
    }


def make_sae(
    architecture: str,
    d_in: int,
    n_latents: int,
    *,
    seed: int = 42,
    device: "torch.device | str | None" = None,
    **settings: Any,  # noqa: ANN401 - of the architecture
) -> "Sae":
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


def check_stated(sae_arch: str | None, sae_k: int | None, sae_threshold: float | None) -> None:
    """Check that what a user states about an autoencoder fits together.

    Raises:
        ValueError: If `sae_k` or `sae_threshold` belongs to another architecture, or the architecture is unknown.
    """
    if sae_arch is not None and sae_arch not in ARCHITECTURES:
        raise ValueError(f"sae_arch must be one of {', '.join(ARCHITECTURES)}, found {sae_arch!r}")
    stated = {"sae_k": (sae_k, ("topk", "batchtopk")), "sae_threshold": (sae_threshold, ("batchtopk",))}
    for name, (value, owners) in stated.items():
        if value is not None and sae_arch not in owners:
            found = "none" if sae_arch is None else sae_arch
            raise ValueError(f"{name} needs sae_arch {' or '.join(owners)}, found {found}")
