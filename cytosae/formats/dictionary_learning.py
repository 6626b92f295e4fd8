"""Autoencoders of dictionary_learning: `ae.pt`, a state dict, and `config.json`, which names its class."""

from typing import Any

import torch

from cytosae.backbones.errors import shown
from cytosae.formats.foreign import (
    ForeignSae,
    InteropError,
    Source,
    check_stated_sizes,
    read_number,
    read_whole_number,
    show_names,
    state_activation,
    transpose,
    whole_number_from,
)

DICTIONARY_LEARNING_CONFIG, DICTIONARY_LEARNING_WEIGHTS = "config.json", "ae.pt"
"""Files of a folder."""

_LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
_SAME = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
_TRANSPOSED = ("encoder.weight", "decoder.weight")
_EXTRA = {"k", "threshold", "group_sizes"}
"""What a class may save besides the tensors below."""

_NAMES = {
    "AutoEncoder": {**_LINEAR, "bias": "b_dec"},
    "AutoEncoderNew": {**_LINEAR, "decoder.bias": "b_dec"},
    "AutoEncoderTopK": {**_LINEAR, "b_dec": "b_dec"},
    "BatchTopKSAE": {**_LINEAR, "b_dec": "b_dec"},
    "MatryoshkaBatchTopKSAE": _SAME,
    "JumpReluAutoEncoder": {**_SAME, "threshold": "threshold"},
    "GatedAutoEncoder": {
        "encoder.weight": "W_enc", "gate_bias": "b_enc", "decoder.weight": "W_dec", "decoder_bias": "b_dec",
        "r_mag": "r_mag", "mag_bias": "b_mag",
    },
}  # fmt: skip
"""Our name of each tensor, by class."""

_ARCHITECTURES = {
    "AutoEncoder": "relu", "AutoEncoderNew": "relu", "GatedAutoEncoder": "gated", "JumpReluAutoEncoder": "jumprelu",
}  # fmt: skip
"""Our architecture for classes without k."""

_UNCENTRED = ("AutoEncoderNew", "JumpReluAutoEncoder")
"""Classes whose encoder does not subtract the decoder's bias from the input."""


def is_dictionary_learning(source: Source) -> bool:
    """Whether the files are those of dictionary_learning: by the config, or by the tensors."""
    return _find_class(source) is not None or bool(_fitting(source))


def read_dictionary_learning(source: Source) -> ForeignSae:
    """An autoencoder of dictionary_learning, with the numbers that `load_dictionary` gives.

    Raises:
        InteropError: If its class is not supported, or does not have these tensors.
    """
    name, fitting = _find_class(source), _fitting(source)
    if name is not None and name not in _NAMES:
        raise InteropError(
            f"{DICTIONARY_LEARNING_CONFIG} has dict_class {shown(repr(name))}; known are {', '.join(_NAMES)}"
        )
    if name is not None and name not in fitting:
        raise InteropError(
            f"{DICTIONARY_LEARNING_CONFIG} has dict_class {name}, which saves {', '.join(_NAMES[name])}; found "
            f"{show_names(source.tensors)}"
        )
    kind = name or fitting[0]
    state = {
        ours: transpose(source.tensors, theirs) if theirs in _TRANSPOSED else source.tensors[theirs]
        for theirs, ours in _NAMES[kind].items()
    }
    # Two classes have tensors that no other class has.
    is_known = name is not None or kind in ("GatedAutoEncoder", "MatryoshkaBatchTopKSAE")
    sizes = dict(zip(("activation_dim", "dict_size"), state["W_enc"].shape, strict=True))
    check_stated_sizes(_trainer(source), DICTIONARY_LEARNING_CONFIG, sizes)
    n_latents = state["b_enc"].numel()
    known, more = (_describe(source, kind, n_latents) if is_known else None) or _state(source, fitting, n_latents)
    return ForeignSae(
        known,
        state | more,
        is_centred=kind not in _UNCENTRED,
        # `AutoEncoder.from_pretrained` gives the decoder's rows unit norm.
        has_unit_decoder=kind == "AutoEncoder",
        is_stated="dictionary_learning" not in known,
    )


def _trainer(source: Source) -> dict[str, Any]:
    """The part of the config that describes the autoencoder; empty if there is none."""
    trainer = source.config.get("trainer") if isinstance(source.config, dict) else None
    return trainer if isinstance(trainer, dict) else {}


def _find_class(source: Source) -> str | None:
    """The class that the config names; None if there is no config of dictionary_learning."""
    name = _trainer(source).get("dict_class")
    return name if name is None or isinstance(name, str) else repr(name)


def _fitting(source: Source) -> list[str]:
    """Classes that save such tensors. Those of JumpReluAutoEncoder are too common to be taken for it without config."""
    found = set(source.tensors)
    names = [name for name, names in _NAMES.items() if set(names) <= found <= {*names, *_EXTRA}]
    if "group_sizes" in found:
        return [name for name in names if name == "MatryoshkaBatchTopKSAE"]
    named = _find_class(source)
    return [name for name in names if name == named or name not in ("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder")]


def _state(source: Source, fitting: list[str], n_latents: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What the user states of an autoencoder whose files do not contain it."""
    possible: tuple[str, ...] = ("topk", "batchtopk")
    if fitting[0] in ("AutoEncoder", "AutoEncoderNew"):
        possible = ("relu",) if fitting[0] == "AutoEncoder" else ("relu", *possible)
    layout, hint = (
        f"dictionary_learning's {' and '.join(fitting)}",
        f"Put its {DICTIONARY_LEARNING_CONFIG} beside it, or",
    )
    if _find_class(source) or "MatryoshkaBatchTopKSAE" in fitting:
        layout, hint = f"a {_find_class(source) or fitting[0]} whose threshold was never set", ""
    k, threshold = read_whole_number(source, "k"), _read_threshold(source)
    return state_activation(source, layout, possible, n_latents, k=k, threshold=threshold, hint=hint)


def _describe(source: Source, kind: str, n_latents: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
    """The config, and tensors besides the named ones, of an autoencoder of a known class.

    None if it is a batchtopk autoencoder without a threshold: it would apply no sparsity at all.
    """
    extra: dict[str, torch.Tensor] = {}
    if kind in _ARCHITECTURES:
        architecture, settings = _ARCHITECTURES[kind], {}
    else:
        architecture, settings = "topk" if kind == "AutoEncoderTopK" else "batchtopk", {"k": _read_k(source, n_latents)}
    if architecture == "batchtopk":
        threshold = _read_threshold(source)
        if threshold is None:
            return None
        extra["threshold"] = threshold
    return {"arch": architecture, "settings": settings, "dictionary_learning": source.config}, extra


def _read_k(source: Source, n_latents: int) -> int:
    """Number k from the tensors and from the config, which must agree."""
    saved, stated = read_whole_number(source, "k"), _trainer(source).get("k")
    if saved is None or stated is not None:
        stated = whole_number_from(stated, f"{DICTIONARY_LEARNING_CONFIG}: k", n_latents)
    if None not in (saved, stated) and saved != stated:
        raise InteropError(f"its tensors contain k {saved}, but {DICTIONARY_LEARNING_CONFIG} has k {stated}")
    return whole_number_from(stated if saved is None else saved, "tensor k", n_latents)


def _read_threshold(source: Source) -> torch.Tensor | None:
    """The threshold; None if it is missing or, negative, was never set."""
    threshold = read_number(source, "threshold")
    return None if threshold is None or threshold < 0 else threshold
