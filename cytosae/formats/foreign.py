"""What readers of other programs' autoencoders share: what they get, what they return, and what a user may state."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cytosae.backbones.errors import shown

OWN_CONFIG_KEY = "cytosae_cache"
"""Key of our whole config in files of other formats."""

_MAX_CONFIG_BYTES = 1 << 22


class InteropError(ValueError):
    """A file of another format cannot be read, or a format cannot represent an autoencoder."""


class Activation(NamedTuple):
    """The activation function of an autoencoder, stated by the user because its files do not contain it."""

    architecture: str
    """Architecture, a name in `ARCHITECTURES`."""
    k: int | None = None
    """Active latents per token (topk, batchtopk)."""
    threshold: float | None = None
    """Activation that a latent must exceed, the same for all latents (batchtopk)."""


class Source(NamedTuple):
    """The contents of an autoencoder's files, before anything is known about them."""

    name: str
    """Name of the file with the tensors."""
    tensors: Mapping[str, torch.Tensor]
    """Dense tensors; none is larger than the file."""
    config: Any
    """Contents of the config beside it, as JSON values; None if there is none."""
    activation: Activation | None
    """What the user stated."""


class ForeignSae(NamedTuple):
    """An autoencoder of another program in terms of our classes, its shapes still unchecked.

    The flags state how its formulas differ from `Sae`; `load_sae` folds the differences into the weights.
    """

    cfg: dict[str, Any]
    """`arch`, `settings`, and the other program's config under the program's name."""
    state_dict: dict[str, torch.Tensor]
    """Tensors under our names, any floating-point type."""
    is_centred: bool = True
    """Whether its encoder subtracts `b_dec` from the input."""
    has_unit_decoder: bool = False
    """Whether its latents are multiplied by the norm of their decoder row, and the rows divided by it."""
    decoder_factor: torch.Tensor | None = None
    """Factor of each decoder row that does not change the latents, shape `(S,)`."""
    is_stated: bool = False
    """Whether the user stated the activation function, as the files do not contain it."""


def show_names(value: object) -> str:
    """Some of a dict's keys, escaped, or the type of any other value."""
    if not isinstance(value, Mapping):
        return type(value).__name__
    return str(sorted(name[:40] if isinstance(name, str) else f"<{type(name).__name__}>" for name in value)[:8])


def read_json(path: Path) -> Any:  # noqa: ANN401 - JSON values
    """The contents of a small JSON file; NaN and infinities become text.

    Raises:
        InteropError: If it is missing, damaged or long.
    """
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise InteropError(f"{path.name} has more than {_MAX_CONFIG_BYTES:,} bytes")
        return json.loads(path.read_bytes(), parse_constant=str)
    except InteropError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InteropError(f"{path.name} cannot be read: {error}") from error


def state_activation(
    source: Source,
    layout: str,
    possible: tuple[str, ...],
    n_latents: int,
    *,
    k: int | None = None,
    threshold: torch.Tensor | None = None,
    hint: str = "",
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """`arch` and `settings`, and tensors besides the four common ones, as the user states them.

    Args:
        source: The files.
        layout: What their tensors look like, for messages.
        possible: Architectures that can have such tensors.
        n_latents: Latents S.
        k: Active latents per token, if the files contain it.
        threshold: The files' threshold, 0-dimensional.
        hint: What else the user can do, for messages: the first words of a sentence.

    Raises:
        InteropError: If the user stated nothing, too little, or something else than the files.
    """
    stated = source.activation
    if stated is None:
        options = [f"--sae_arch {name}{_missing_options(name, k, threshold)}" for name in possible]
        raise InteropError(
            f"its tensors are those of {layout}, which do not contain the activation function. "
            f"{f'{hint} state' if hint else 'State'} it with {' or '.join(options)}"
        )
    architecture = stated.architecture
    if architecture not in possible:
        raise InteropError(
            f"its tensors are those of {layout}, which can be {' or '.join(possible)}; found --sae_arch {architecture}"
        )
    k = _agree("k", k, stated.k)
    given = None if stated.threshold is None else torch.tensor(float(stated.threshold)).item()
    value = _agree("threshold", None if threshold is None else threshold.item(), given)
    if missing := _missing_options(architecture, k, value):
        raise InteropError(f"--sae_arch {architecture} needs{missing}, which its files do not contain")
    if architecture != "batchtopk":
        return {"arch": architecture, "settings": {"k": k} if architecture == "topk" else {}}, {}
    if k is not None:
        return {"arch": architecture, "settings": {"k": k}}, {"threshold": torch.tensor(value)}
    # Without k, the same function as a JumpReLU with one threshold for all latents.
    return {"arch": "jumprelu", "settings": {}}, {"threshold": torch.full((n_latents,), value)}


def check_activation(stated: Activation | None, cfg: Mapping[str, Any]) -> None:
    """Refuse what the user stated if the files say something else.

    Args:
        stated: What the user stated.
        cfg: `arch` and `settings` from the files.

    Raises:
        InteropError: If they differ.
    """
    if stated is None:
        return
    found, settings = cfg.get("arch", "relu"), cfg.get("settings")
    k = settings.get("k") if isinstance(settings, dict) else None
    if found != stated.architecture or stated.threshold is not None or stated.k not in (None, k):
        known = f"{found} with k {k}" if found == "topk" else found
        raise InteropError(
            f"its files contain its activation function, {known}: omit --sae_arch, --sae_k and --sae_threshold, found "
            f"--sae_arch {stated.architecture}"
        )


def read_whole_number(source: Source, name: str) -> int | None:
    """A whole number that is saved as a tensor; None if there is none.

    Raises:
        InteropError: If the tensor is anything else.
    """
    if name not in source.tensors:
        return None
    tensor = source.tensors[name]
    if tensor.numel() != 1 or tensor.is_complex() or tensor.double().item() % 1 != 0:
        raise InteropError(f"tensor {name} must be one whole number, found shape {tuple(tensor.shape)}")
    return int(tensor.item())


def read_number(source: Source, name: str) -> torch.Tensor | None:
    """A number that is saved as a tensor, 0-dimensional, float32; None if there is none.

    Raises:
        InteropError: If the tensor is anything else.
    """
    if name not in source.tensors:
        return None
    tensor = source.tensors[name]
    if tensor.numel() != 1 or tensor.is_complex():
        raise InteropError(f"tensor {name} must be one number, found shape {tuple(tensor.shape)}")
    return tensor.reshape(()).float()


def whole_number_from(value: object, where: str, n_latents: int | None = None) -> int:
    """A count in a config; 3.0 is 3, but neither text nor `true` is a number.

    Args:
        value: What the config contains.
        where: File and key, for the message.
        n_latents: Latents S, if the number counts some of them.

    Raises:
        InteropError: If it is no whole number above 0, or more than there are latents.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and value % 1 == 0 and value >= 1 and (n_latents is None or value <= n_latents):  # type: ignore[operator]
        return int(value)  # type: ignore[call-overload, no-any-return]
    limit = "above 0" if n_latents is None else f"from 1 to the {n_latents} latents"
    raise InteropError(f"{where} must be a whole number {limit}, found {shown(repr(value))}")


def check_stated_sizes(config: Mapping[str, Any], file: str, sizes: Mapping[str, int]) -> None:
    """Refuse a config that states other sizes than the tensors have; sizes that it does not state are not checked.

    Args:
        config: The config, or a part of it.
        file: Its name, for the message.
        sizes: Size that the tensors have, by its key.

    Raises:
        InteropError: If a size differs or is no whole number.
    """
    for key, size in sizes.items():
        stated = config.get(key)
        if stated is not None and whole_number_from(stated, f"{file}: {key}") != size:
            raise InteropError(f"{file} has {key} {shown(repr(stated))}, but the tensors have {size:,}")


def require_shapes(tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors with other shapes, before any arithmetic that could broadcast them.

    Raises:
        InteropError: If a shape differs.
    """
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise InteropError(f"tensor {name} has shape {tuple(tensors[name].shape)}, expected {shape}")


def transpose(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """A transposed matrix, as a view.

    Raises:
        InteropError: If the tensor has other than two dimensions.
    """
    if tensors[name].ndim != 2:
        raise InteropError(f"tensor {name} must have two dimensions, found shape {tuple(tensors[name].shape)}")
    return tensors[name].T


def _missing_options(architecture: str, k: int | None, threshold: object) -> str:
    """Options without which an architecture stays incomplete."""
    if architecture == "topk" and k is None:
        return " --sae_k K"
    return " --sae_threshold T" if architecture == "batchtopk" and threshold is None else ""


def _agree(name: str, found: Any, stated: Any) -> Any:  # noqa: ANN401 - a number or None
    """The value from the files or from the user."""
    if None not in (found, stated) and found != stated:
        raise InteropError(f"its files contain {name} {found}, but --sae_{name} {stated} was given: omit --sae_{name}")
    return stated if found is None else found
