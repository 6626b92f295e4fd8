"""Folders of EleutherAI's sparsify (formerly `sae`): `cfg.json` and `sae.safetensors`."""

from collections.abc import Mapping

from cytosae.backbones.errors import shown
from cytosae.formats.foreign import (
    ForeignSae,
    InteropError,
    Source,
    check_stated_sizes,
    show_names,
    state_activation,
    transpose,
    whole_number_from,
)

SPARSIFY_CONFIG, SPARSIFY_WEIGHTS = "cfg.json", "sae.safetensors"
"""Files of a folder."""

_TENSORS = {"encoder.weight", "encoder.bias", "W_dec", "b_dec"}

_DEFAULT_K = 32

_UNSUPPORTED = (
    "transcode", "skip_connection", "signed", "batch_topk", "sample_topk", "jumprelu",
)  # fmt: skip
"""Entries of any version that give another function if they are set. `multi_topk` and `normalize_decoder` are not among
them: they matter in training alone."""


def is_sparsify(source: Source) -> bool:
    """Whether the files are those of sparsify: by name, or by the tensors."""
    return (source.name == SPARSIFY_WEIGHTS and source.config is not None) or set(source.tensors) == _TENSORS


def read_sparsify(source: Source) -> ForeignSae:
    """An autoencoder of sparsify.

    Raises:
        InteropError: If it is a transcoder, or its config states what is not supported.
    """
    if "W_skip" in source.tensors:
        raise InteropError("it has a skip connection, W_skip, which no architecture here has")
    if set(source.tensors) != _TENSORS:
        raise InteropError(f"sparsify saves {', '.join(sorted(_TENSORS))}, found {show_names(source.tensors)}")
    state = {
        "W_enc": transpose(source.tensors, "encoder.weight"),
        "b_enc": source.tensors["encoder.bias"],
        "W_dec": source.tensors["W_dec"],
        "b_dec": source.tensors["b_dec"],
    }
    if source.config is None:
        hint = f"Put its {SPARSIFY_CONFIG} beside it, or"
        known, more = state_activation(source, "sparsify", ("topk",), state["b_enc"].numel(), hint=hint)
        return ForeignSae(known, state | more, is_stated=True)
    k = _check_config(source.config, *state["W_enc"].shape)
    return ForeignSae({"arch": "topk", "settings": {"k": k}, "sparsify": source.config}, state)


def _check_config(config: object, d_in: int, n_latents: int) -> int:
    """The config's k, if everything else in it is supported."""
    if not isinstance(config, Mapping):
        raise InteropError(f"{SPARSIFY_CONFIG} must contain an object, found {type(config).__name__}")
    for name in _UNSUPPORTED:
        if config.get(name):
            raise InteropError(
                f"{SPARSIFY_CONFIG} has {name} {shown(repr(config[name]))}, which no architecture here has"
            )
    if config.get("activation", "topk") != "topk":
        found = shown(repr(config["activation"]))
        raise InteropError(f"{SPARSIFY_CONFIG} has activation {found}; only 'topk' is supported")
    # Without num_latents, which is 0 then, their number is a multiple of d_in.
    named = {"num_latents": n_latents} if config.get("num_latents") else {"expansion_factor": n_latents // d_in}
    check_stated_sizes(config, SPARSIFY_CONFIG, {"d_in": d_in, **named})
    return whole_number_from(config.get("k", _DEFAULT_K), f"{SPARSIFY_CONFIG}: k", n_latents)
