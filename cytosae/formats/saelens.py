"""Folders of SAELens 2 to 6: `cfg.json` and `sae_weights.safetensors`. Versions 2 to 5 differ in what the config says.

The newest version is written, which `SAE.load_from_disk` opens.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from cytosae.backbones.errors import shown
from cytosae.formats.foreign import (
    OWN_CONFIG_KEY,
    ForeignSae,
    InteropError,
    Source,
    check_stated_sizes,
    read_number,
    require_shapes,
    show_names,
    transpose,
    whole_number_from,
)
from cytosae.formats.tensor_file import DIGEST_KEY, digest_tensors
from cytosae.sae.base import SMALLEST_NORM, Sae
from cytosae.sae.registry import ARCHITECTURES, saelens_defaults

SAELENS_CONFIG, SAELENS_WEIGHTS = "cfg.json", "sae_weights.safetensors"
"""Files of a SAELens folder, which `SAE.load_from_disk` opens."""

SAELENS_VERSION = "6.0.0"
"""Oldest version whose folders SAELens reads without guessing their defaults."""

_TRAINED_AS_BATCHTOPK = ("batchtopk", "matryoshka_batchtopk")
"""Architectures of training checkpoints whose inference version is jumprelu."""

_COMMON = {"W_enc", "W_dec", "b_dec"}

_FUNCTION_KEYS = ("activation_fn_str", "activation_fn")
"""Where versions 2 to 5 save the name of the activation function."""


def to_saelens(sae: Sae, cfg: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """`cfg.json` and the tensors of a SAELens folder.

    Saved autoencoders take raw activations, so no scaling has to be folded in.

    Args:
        sae: The autoencoder.
        cfg: The config in its file.

    Raises:
        InteropError: If SAELens has no such architecture.
    """
    if sae.saelens_architecture is None:
        raise InteropError(f"SAELens has no architecture for {sae.architecture}: use --format safetensors")
    more, state = sae.to_saelens()
    d_in, n_latents = sae.W_enc.shape
    config = {
        "architecture": sae.saelens_architecture,
        "d_in": d_in,
        "d_sae": n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            "sae_lens_training_version": None,
            "model_name": cfg.get("model_name"),
            "hook_name": _hook_name(cfg),
            OWN_CONFIG_KEY: {**cfg, "arch": sae.architecture, "settings": sae.settings},
        },
    }
    return config | more, state


def is_saelens(source: Source) -> bool:
    """Whether the files are those of SAELens: by name, or by the config in the same file."""
    return source.name == SAELENS_WEIGHTS or is_saelens_config(source.config)


def is_saelens_config(config: object) -> bool:
    """Whether it is the config of SAELens 2 to 5, which also wrote it into checkpoints."""
    return isinstance(config, dict) and "arch" not in config and any(name in config for name in _FUNCTION_KEYS)


def read_saelens(source: Source) -> ForeignSae:
    """An autoencoder of SAELens; missing entries of the config have the defaults that SAELens gives them.

    Raises:
        InteropError: If the config is not one of SAELens, or if what it states is not supported.
    """
    config = source.config
    if not isinstance(config, dict):
        raise InteropError(f"{SAELENS_CONFIG} must contain an object, found {type(config).__name__}")
    _check_input(config)
    theirs = _find_architecture(config)
    tensors = dict(source.tensors)
    is_centred, is_rescaled = _read_flag(config, "apply_b_dec_to_input", True), _is_rescaled(config, theirs)
    factor = _take_decoder_factor(config, tensors)
    if factor is not None:
        require_shapes(
            {"scaling_factor": factor},
            {"scaling_factor": tuple(tensors["W_dec"].shape[:1]) if "W_dec" in tensors else ()},
        )
    if theirs in _TRAINED_AS_BATCHTOPK:
        theirs, tensors = "jumprelu", _with_threshold(source, is_rescaled=is_rescaled)
    elif "log_threshold" in tensors:
        if "threshold" in tensors:
            raise InteropError("its tensors contain both threshold and log_threshold; SAELens saves one of them")
        tensors["threshold"] = tensors.pop("log_threshold").float().exp()
    n_latents = tensors["b_gate" if "b_gate" in tensors else "b_enc"].numel() if set(tensors) >= _COMMON else None
    k = _read_k(config, n_latents) if theirs == "topk" else None
    cfg = _own_config(config, theirs, k)
    if cfg is None:
        kind = saelens_defaults()[theirs]
        settings = kind.settings_from_saelens({**config, "k": k})
        cfg = {"arch": kind.architecture, "settings": settings, "saelens": config}
    try:
        state = ARCHITECTURES[cfg["arch"]].from_saelens(tensors)
    except ValueError as error:
        raise InteropError(str(error)) from error
    if "W_enc" in state and state["W_enc"].ndim == 2:
        check_stated_sizes(config, SAELENS_CONFIG, dict(zip(("d_in", "d_sae"), state["W_enc"].shape, strict=True)))
    return ForeignSae(cfg, state, is_centred, is_rescaled, factor)


def write_saelens(
    folder: Path, sae: Sae, cfg: Mapping[str, Any], *, write: Callable[[Path, bytes], object] = Path.write_bytes
) -> None:
    """Write a folder that SAELens 6 opens with `SAE.load_from_disk`; other files of the folder stay.

    Args:
        folder: Created if missing.
        sae: The autoencoder.
        cfg: Its config.
        write: Writes one file. The config comes last, so a folder with it is complete if every write is atomic.

    Raises:
        InteropError: If SAELens does not have the architecture.
    """
    config, state = to_saelens(sae, cfg)
    weights, text = save(state, metadata={DIGEST_KEY: digest_tensors(state)}), json.dumps(config, indent=1) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / SAELENS_WEIGHTS, weights)
    write(folder / SAELENS_CONFIG, text.encode())


def _check_input(config: Mapping[str, Any]) -> None:
    """Refuse a treatment of the input that cannot be part of the weights."""
    normalize = config.get("normalize_activations")
    if normalize is True:  # its name before version 3.3
        normalize = "expected_average_only_in"
    if not (normalize is None or normalize is False or normalize == "none"):
        hint = "it rescales every token"
        if normalize == "expected_average_only_in":
            hint = (
                "the scale of the inputs is not part of the weights. Open it with SAELens, call "
                "fold_activation_norm_scaling_factor with it and save it again"
            )
        raise InteropError(f"{SAELENS_CONFIG} has normalize_activations {shown(repr(normalize))}, not 'none': {hint}")
    reshape = config.get("reshape_activations", "hook_z" if "hook_z" in str(config.get("hook_name")) else "none")
    if reshape != "none":
        raise InteropError(f"{SAELENS_CONFIG} has reshape_activations {shown(repr(reshape))}; only 'none' is supported")


def _hook_name(cfg: Mapping[str, Any]) -> str:
    """Where the activations were taken, as SAELens names it; imported embeddings have no such place."""
    spec = cfg.get("spec")
    if isinstance(spec, Mapping) and spec.get("imported"):
        return "imported"
    return f"blocks.{cfg.get('block_layer')}.hook_resid_post"


def _find_architecture(config: Mapping[str, Any]) -> str:
    """The architecture in the terms of version 6."""
    theirs, known = config.get("architecture", "standard"), [*saelens_defaults(), *_TRAINED_AS_BATCHTOPK]
    if not isinstance(theirs, str) or theirs not in known:
        raise InteropError(f"{SAELENS_CONFIG} has architecture {shown(repr(theirs))}; known are {', '.join(known)}")
    functions = {name: config[name] for name in _FUNCTION_KEYS if config.get(name) is not None}
    for name, function in functions.items():
        allowed = {"standard": ("relu", "topk"), "topk": ("topk",)}.get(theirs, ("relu",))
        if function not in allowed or function != next(iter(functions.values())):
            raise InteropError(
                f"{SAELENS_CONFIG} has {name} {shown(repr(function))} and architecture {theirs!r}; supported is "
                f"{' or '.join(allowed)}"
            )
    _read_arguments(config)
    return "topk" if "topk" in functions.values() else theirs


def _read_arguments(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Arguments of the activation function in versions 2 to 5."""
    arguments = config.get("activation_fn_kwargs")
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict) or not set(arguments) <= {"k"}:
        raise InteropError(f"{SAELENS_CONFIG} has activation_fn_kwargs {shown(repr(arguments))}; only k is supported")
    return arguments


def _read_k(config: Mapping[str, Any], n_latents: int | None) -> int:
    """The number of active latents per token, which may be in two places."""
    stated = {"k": config.get("k"), "activation_fn_kwargs.k": _read_arguments(config).get("k")}
    found = {
        name: whole_number_from(value, f"{SAELENS_CONFIG}: {name}", n_latents)
        for name, value in stated.items()
        if value is not None
    }
    if len(set(found.values())) > 1:
        raise InteropError(
            f"{SAELENS_CONFIG} has {' and '.join(f'{name} {k}' for name, k in found.items())}: correct one of them"
        )
    return next(iter(found.values())) if found else whole_number_from(None, f"{SAELENS_CONFIG}: k", n_latents)


def _own_config(config: Mapping[str, Any], theirs: str, k: int | None) -> dict[str, Any] | None:
    """The config that this package put into the folder's metadata; None if there is none, or if a newer version did.

    Raises:
        InteropError: If it contradicts the rest of the config: whoever changed one of them meant something.
    """
    metadata = config.get("metadata")
    cfg = metadata.get(OWN_CONFIG_KEY) if isinstance(metadata, dict) else None
    if cfg is None:
        return None
    where = f"metadata.{OWN_CONFIG_KEY}"
    if not isinstance(cfg, dict):
        raise InteropError(f"{SAELENS_CONFIG} has {where} {shown(repr(cfg))}; expected an object")
    kind = ARCHITECTURES.get(cfg["arch"]) if isinstance(cfg.get("arch"), str) else None
    if kind is None:
        return None
    advice = f"Correct the wrong one, or delete {where}"
    if kind.saelens_architecture != theirs:
        raise InteropError(
            f"{SAELENS_CONFIG} has architecture {theirs}, but {where}.arch {kind.architecture}, which is exported as "
            f"{kind.saelens_architecture}. {advice}"
        )
    if k is not None:
        settings = cfg.get("settings")
        ours = settings.get("k") if isinstance(settings, dict) else None
        if whole_number_from(ours, f"{SAELENS_CONFIG}: {where}.settings.k") != k:
            raise InteropError(f"{SAELENS_CONFIG} has k {k}, but {where}.settings.k {shown(repr(ours))}. {advice}")
    return cfg


def _is_rescaled(config: Mapping[str, Any], theirs: str) -> bool:
    """Whether latents are multiplied by the norm of their decoder row."""
    is_rescaled = _read_flag(config, "rescale_acts_by_decoder_norm", False)
    if is_rescaled and theirs not in ("topk", *_TRAINED_AS_BATCHTOPK):
        raise InteropError(
            f"{SAELENS_CONFIG} has rescale_acts_by_decoder_norm True, which architecture {theirs} does not have"
        )
    return is_rescaled


def _take_decoder_factor(config: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """Remove the factor of each latent in the decoder from the tensors; None if there is none, or all are 1."""
    named = [name for name in ("scaling_factor", "finetuning_scaling_factor") if name in tensors]
    if not named:
        return None
    factor = tensors.pop(named[0])
    if torch.allclose(factor.double(), torch.ones((), dtype=torch.float64)):
        return None
    # Version 2 always applies it and has no such entry; later versions refuse a factor without it.
    if not _read_flag(config, "finetuning_scaling_factor", True):
        raise InteropError(f"{named[0]} is not 1, but {SAELENS_CONFIG} has finetuning_scaling_factor False")
    return factor


def _with_threshold(source: Source, *, is_rescaled: bool) -> dict[str, torch.Tensor]:
    """Tensors of a training checkpoint with the threshold that its inference version has.

    It applies after rescaling, which multiplies thresholds as well: hence the division.
    """
    tensors = {name: tensor for name, tensor in source.tensors.items() if name != "topk_threshold"}
    threshold = read_number(source, "topk_threshold")
    if threshold is None or not {"W_dec", "b_enc"} <= set(tensors):
        raise InteropError(f"a training checkpoint needs topk_threshold, W_dec and b_enc, found {show_names(tensors)}")
    W_dec = transpose(tensors, "W_dec").T
    n_latents = len(W_dec)
    require_shapes(tensors, {"b_enc": (n_latents,)})
    norms = torch.linalg.vector_norm(W_dec.float(), dim=1) if is_rescaled else torch.ones(n_latents)
    return {**tensors, "threshold": threshold / norms.clamp_min(SMALLEST_NORM)}


def _read_flag(config: Mapping[str, Any], name: str, default: bool) -> bool:
    """An entry that is true or false."""
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise InteropError(f"{SAELENS_CONFIG} has {name} {shown(repr(value))}; expected true or false")
    return value
