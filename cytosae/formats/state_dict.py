"""State dicts with our names and no config: what they compute must be stated."""

from cytosae.formats.foreign import (
    ForeignSae,
    InteropError,
    Source,
    read_number,
    read_whole_number,
    show_names,
    state_activation,
)

_COMMON = {"W_enc", "b_enc", "W_dec", "b_dec"}


def is_state_dict(source: Source) -> bool:
    """Whether the tensors have our names."""
    return set(source.tensors) >= _COMMON


def read_state_dict(source: Source) -> ForeignSae:
    """An autoencoder that computes what docs/definitions.md, section 4, defines for the stated architecture.

    Raises:
        InteropError: If the architecture is not stated.
    """
    state = {name: tensor for name, tensor in source.tensors.items() if name not in ("k", "threshold")}
    n_latents = state["b_enc"].numel()
    more, hint, threshold = set(source.tensors) - _COMMON - {"k"}, "", None
    if more == {"threshold"} and source.tensors["threshold"].numel() == n_latents:
        possible: tuple[str, ...] = ("jumprelu",)
        state["threshold"] = source.tensors["threshold"]
        # In dictionary_learning the same tensors have another meaning.
        hint = "If dictionary_learning wrote them, put its config.json beside them; otherwise"
    elif more <= {"threshold"}:
        possible = ("topk", "batchtopk") if more else ("relu", "topk", "batchtopk")
        threshold = read_number(source, "threshold")
    elif more == {"r_mag", "b_mag"}:
        possible = ("gated",)
    else:
        raise InteropError(f"no architecture here has exactly its tensors: {show_names(source.tensors)}")
    k = read_whole_number(source, "k")
    known, tensors = state_activation(
        source, "a plain state dict", possible, n_latents, k=k, threshold=threshold, hint=hint
    )
    return ForeignSae(known, state | tensors, is_stated=True)
