"""Commands that messages tell users to type: complete, and quoted so that they work when they are copied."""

import shlex
from collections.abc import Sequence

from cytosae_pipeline.config.fields import Config, is_fixed_length

WHICH_STORE = (
    "root_dir",
    "dataset_name",
    "store",
    "model_name",
    "block_layer",
    "module_name",
    "image_size",
    "image_mean",
    "image_std",
    "image_resample",
    "white_level",
)
"""Options that say which store is meant."""

WHICH_IMAGES = ("model_path", "images", "layout")
"""Options that say from what a store is built."""

WHICH_RESULTS = (
    *WHICH_STORE,
    *WHICH_IMAGES,
    "vit_type",
    "sae_path",
    "sae_arch",
    "sae_k",
    "sae_threshold",
    "allow_mismatch",
    "with_dataset",
    "joined_patients",
)
"""Options that say which autoencoder and statistics are meant."""


def command(verb: str, config: Config | None = None, keep: Sequence[str] = WHICH_RESULTS, **options: object) -> str:
    """A command line.

    Args:
        verb: The verb.
        config: Options that the user gave; those of `keep` that differ from their default are repeated.
        keep: Names of the options to repeat.
        **options: Further options, which take precedence; None leaves one out.
    """
    chosen: dict[str, object] = {}
    for name in keep:
        field = config.__dataclass_fields__.get(name) if config is not None else None
        if field is not None and getattr(config, name) != field.default:
            chosen[name] = getattr(config, name)
    words = ["cytosae-cache", verb]
    for name, value in {**chosen, **options}.items():
        fixed = config is not None and name in chosen and is_fixed_length(type(config), name)
        words += [f"--{name}", *map(str, chosen[name])] if fixed else _option(name, value)  # type: ignore[call-overload]
    return shlex.join(words)


def _option(name: str, value: object) -> list[str]:
    """The words of one option; none for None and for a switch that is off."""
    if value is None or value is False:
        return []
    if value is True:
        return [f"--{name}"]
    values = value if isinstance(value, tuple) else (value,)
    return [word for item in values for word in (f"--{name}", str(item))]
