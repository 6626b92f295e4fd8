"""State dicts of overcomplete's autoencoders with a linear encoder.

The package saves no config. What its classes compute in evaluation mode is read; the activation function must be stated
where the tensors do not decide it.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from cytosae.formats.foreign import (
    ForeignSae,
    InteropError,
    Source,
    read_number,
    require_shapes,
    show_names,
    state_activation,
    transpose,
)

_BATCH_NORM_EPSILON = 1e-5
"""That of torch's BatchNorm1d, which overcomplete does not change."""

_SMALLEST_NORM = 1e-8
"""Added to norms when the dictionary is normalised."""

_MOST_DRIFT = 0.1
"""Difference from unit norm that steps after the last normalisation can explain."""

_LINEAR = "encoder.final_block.0."
_NORM = "encoder.final_block.1."
_KNOWN = {
    f"{_LINEAR}weight", f"{_LINEAR}bias", *(f"{_NORM}{name}" for name in (
        "weight", "bias", "running_mean", "running_var", "num_batches_tracked",
    )),
    "encoder.weight", "encoder.bias", "encoder.tied_to._weights", "encoder.tied_to.multiplier",
    *(f"{place}.{name}" for place in ("dictionary", "encoder.tied_to") for name in ("C", "W", "Relax", "multiplier")),
    "dictionary._weights", "thresholds",
}  # fmt: skip


def is_overcomplete(source: Source) -> bool:
    """Whether the tensors are those of overcomplete."""
    return any(name.startswith("dictionary.") for name in source.tensors)


def read_overcomplete(source: Source) -> ForeignSae:
    """An autoencoder of overcomplete.

    Raises:
        InteropError: If its encoder is not linear, its dictionary is not normalised, or its activation function is
            neither in the tensors nor stated.
    """
    if more := {name: None for name in source.tensors if name not in _KNOWN}:
        raise InteropError(f"of overcomplete, only linear encoders are read, found {show_names(more)}")
    W_dec = _read_dictionary(source)
    n_latents, d_in = W_dec.shape
    W_enc, b_enc = _read_encoder(source.tensors, W_dec)
    state = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": torch.zeros(d_in)}
    if "thresholds" in source.tensors:
        require_shapes(source.tensors, {"thresholds": (n_latents,)})
        # Equal to the threshold is active there, and inactive here.
        threshold = torch.nextafter(source.tensors["thresholds"].float().exp(), torch.tensor(-math.inf))
        cfg: dict[str, Any] = {"arch": "jumprelu", "settings": {}}
        return ForeignSae(cfg, {**state, "threshold": threshold})
    cfg, more_tensors = state_activation(
        source, "overcomplete's SAE, TopKSAE and BatchTopKSAE", ("relu", "topk", "batchtopk"), n_latents
    )
    return ForeignSae(cfg, state | more_tensors, is_stated=True)


def _read_encoder(tensors: Mapping[str, torch.Tensor], W_dec: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`W_enc` and `b_enc`, with batch normalisation folded in."""
    n_latents, d_in = W_dec.shape
    place = _LINEAR if f"{_LINEAR}weight" in tensors else "encoder."
    weight = W_dec if "encoder.weight" not in tensors and place == "encoder." else tensors[f"{place}weight"]
    bias = tensors.get(f"{place}bias", torch.zeros(n_latents))
    require_shapes({"weight": weight, "bias": bias}, {"weight": (n_latents, d_in), "bias": (n_latents,)})
    if weight is W_dec and not any(name.startswith("encoder.tied_to.") for name in tensors):
        raise InteropError("it has no encoder: neither encoder.final_block.0.weight nor encoder.weight")
    norm = {name.removeprefix(_NORM): tensor for name, tensor in tensors.items() if name.startswith(_NORM)}
    if not norm:
        return weight.T, bias
    if not {"weight", "bias", "running_mean", "running_var"} <= set(norm):
        raise InteropError("its encoder has layer normalisation (mlp_ln), which compares latents with each other")
    require_shapes(norm, dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (n_latents,)))
    scale = norm["weight"].double() / (norm["running_var"].double() + _BATCH_NORM_EPSILON).sqrt()
    shift = (bias.double() - norm["running_mean"].double()) * scale + norm["bias"].double()
    return (weight.float() * scale.float()[:, None]).T, shift.float()


def _read_dictionary(source: Source) -> torch.Tensor:
    """The dictionary as it is in evaluation mode, shape `(S, D)`."""
    tensors = source.tensors
    multiplier = read_number(source, "dictionary.multiplier")
    factor = 1.0 if multiplier is None else multiplier.exp()
    if "dictionary._weights" not in tensors:
        return _read_archetypes(tensors) * factor
    weights = transpose(tensors, "dictionary._weights").T.float()
    norms: torch.Tensor = torch.linalg.vector_norm(weights, dim=1, keepdim=True)
    if len(norms) and (norms - 1).abs().max() > _MOST_DRIFT:
        raise InteropError(
            f"the rows of dictionary._weights have norms from {norms.min():.2g} to {norms.max():.2g}, not 1, and the "
            "file does not contain their normalization; only 'l2' is supported. If it is that, call sae.eval() in "
            "overcomplete, which normalises them, and save it again"
        )
    return weights / (norms + _SMALLEST_NORM) * factor


def _read_archetypes(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The dictionary of a relaxed archetypal autoencoder: convex combinations of points, and deviations from them."""
    names = ("dictionary.W", "dictionary.C", "dictionary.Relax")
    if not set(names) <= set(tensors):
        raise InteropError(f"it has neither dictionary._weights nor {', '.join(names)}")
    shares, points, deviations = (transpose(tensors, name).T.float() for name in names)
    (n_latents, n_points), d_in = shares.shape, points.shape[1]
    require_shapes(tensors, {"dictionary.C": (n_points, d_in), "dictionary.Relax": (n_latents, d_in)})
    if (shares < 0).any() or not torch.allclose(shares.sum(dim=1), torch.ones(()), atol=1e-4):
        raise InteropError(
            "the rows of dictionary.W are not shares that add up to 1: call sae.eval() in overcomplete, which projects "
            "them, and save it again"
        )
    return shares @ points + deviations
