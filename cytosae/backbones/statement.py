"""What is stated about an encoder beside its weights, and checks of single values."""

from dataclasses import dataclass, field
from typing import Any

from cytosae.backbones.errors import shown
from cytosae.backbones.preprocessing import CLIP_MEAN, CLIP_STD, HALF, ImageTransform, StatedTransform
from cytosae.backbones.vit import ACTIVATIONS

IMAGENET = ImageTransform(resample="bicubic")
"""What most families want: ImageNet's numbers."""
INCEPTION = ImageTransform(mean=HALF, std=HALF)
"""What ViT wants: values of -1 to 1."""
SIGLIP = ImageTransform(mean=HALF, std=HALF, resample="bicubic")
"""What SigLIP wants."""
OPENAI = ImageTransform(mean=CLIP_MEAN, std=CLIP_STD, resample="bicubic")
"""What CLIP wants."""

_ACTIVATION_NAMES = {
    **{name: name for name in ACTIVATIONS},
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), "gelu_tanh"),
    **{"swish": "silu", "quickgelu": "quick_gelu"},
}


@dataclass(frozen=True)
class Statement:
    """What is stated about an encoder, from whichever source."""

    name: str
    """Name of the encoder where the user gives none."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Fields of its `Architecture`; the others follow from the tensors."""
    transform: StatedTransform = field(default_factory=StatedTransform)
    """How it wants its images."""
    suggestion: ImageTransform = IMAGENET
    """What the family usually wants, for a message where nothing is stated."""
    note: str = ""
    """What a user should know about how the encoder was recognised."""
    assume: bool = False
    """Whether the suggestion is a definition of ours, which applies where nothing is stated (with a note)."""


def whole_number(value: Any, default: int | None, *, top: int, least: int = 1) -> int:  # noqa: ANN401 - checked here
    """A whole number from `least` to `top`; the default if there is none.

    Raises:
        ValueError: If it is something else.
    """
    value = default if value is None else value
    if type(value) is not int or not least <= value <= top:
        raise ValueError(f"expected a whole number of {least} to {top}, found {shown(value)}")
    return int(value)


_LARGEST = {"width": 1 << 16, "depth": 1000, "heads": 1 << 10, "patch_size": 1024}
"""More than any vision transformer has, by field of `Architecture`."""


def size_of(field: str, value: Any, default: int | None, *, least: int = 1) -> int:  # noqa: ANN401 - checked here
    """A size that a file states for a field of `Architecture`; the default if it states none.

    Raises:
        ValueError: If it is no whole number from `least` to more than any vision transformer has.
    """
    return whole_number(value, default, top=_LARGEST[field], least=least)


def positive_number(value: Any, top: float = 1.0) -> float:  # noqa: ANN401 - checked here
    """A number above 0 and at most `top`.

    Raises:
        ValueError: If it is something else.
    """
    if not isinstance(value, int | float) or not 0 < value <= top:
        raise ValueError(f"expected a number above 0 and at most {top:g}, found {shown(value)}")
    return float(value)


def activation_name(name: Any) -> str:  # noqa: ANN401 - checked here
    """Our name of an activation function.

    Raises:
        ValueError: If it is unknown.
    """
    if not isinstance(name, str) or name not in _ACTIVATION_NAMES:
        raise ValueError(f"unknown activation {shown(repr(name))}; known are {', '.join(sorted(_ACTIVATION_NAMES))}")
    return _ACTIVATION_NAMES[name]
