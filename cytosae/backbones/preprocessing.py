"""How an encoder wants its images: size, filter, scale, mean and standard deviation, and where that is stated."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from cytosae.backbones.errors import BackboneError, shown
from cytosae.backbones.images import FILTERS, IMAGE_MEAN, IMAGE_SIZE, IMAGE_STD

Triple = tuple[float, float, float]

HALF: Triple = (0.5, 0.5, 0.5)
"""Mean and standard deviation of networks that want values of -1 to 1."""
CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
"""Mean of each RGB channel that CLIP was trained with."""
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation of each RGB channel that CLIP was trained with."""

MAX_IMAGE_SIZE = 4096
"""Largest height and width of the input in pixels; more has no use for a cell, and a file may state anything."""

_PILLOW_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


@dataclass(frozen=True)
class ImageTransform:
    """How a picture becomes the network's input: resized, times `scale`, minus `mean`, over `std`."""

    size: int = IMAGE_SIZE
    """Height and width in pixels; the aspect ratio is not kept, and nothing is cropped."""
    mean: Triple = IMAGE_MEAN
    """Subtracted from each RGB channel, after scaling."""
    std: Triple = IMAGE_STD
    """Divisor of each RGB channel."""
    scale: float = 1 / 255
    """Factor of the pixel values of 0 to 255."""
    resample: str = "bilinear"
    """Pillow's filter of the resize."""


@dataclass(frozen=True)
class StatedTransform:
    """What a file, a registry entry or the user states of a transform; None where nothing is stated."""

    size: int | None = None
    """Height and width in pixels."""
    mean: Triple | None = None
    """Subtracted from each RGB channel, after scaling."""
    std: Triple | None = None
    """Divisor of each RGB channel."""
    scale: float | None = None
    """Factor of the pixel values of 0 to 255."""
    resample: str | None = None
    """Pillow's filter of the resize."""

    def filled_from(self, other: "StatedTransform | ImageTransform") -> Self:
        """What is stated here, and what only `other` states."""
        mine = {item.name: getattr(self, item.name) for item in fields(self)}
        return type(self)(**{name: getattr(other, name) if value is None else value for name, value in mine.items()})

    def complete(self) -> ImageTransform | None:
        """The transform, if size, mean and standard deviation are stated; else None."""
        if self.size is None or self.mean is None or self.std is None:
            return None
        return ImageTransform(**{item.name: value for item in fields(self) if (value := getattr(self, item.name))})


def as_options(transform: ImageTransform) -> str:
    """A transform as options to paste."""
    mean, std = (" ".join(map(str, values)) for values in (transform.mean, transform.std))
    options = f"--image-size {transform.size} --image-mean {mean} --image-std {std}"
    return options if transform.resample == "bilinear" else f"{options} --image-resample {transform.resample}"


def read_transformers(folder: Path, resample: str) -> StatedTransform:
    """What `preprocessor_config.json` or `processor_config.json` of a transformers folder states.

    Args:
        folder: The folder.
        resample: The family's own filter, for a file that states none.

    Raises:
        BackboneError: If it states something that is not possible, or images that are not square.
    """
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            config = read_json(folder / name)
            # A processor of text and images keeps that of images under its own name.
            stated = config.get("image_processor", config if name == "preprocessor_config.json" else {})
            if stated:
                return _with_filter(_checked(folder / name, _from_processor, stated), _class_filter(stated) or resample)
    return StatedTransform()


def read_timm(config: Mapping[str, Any], path: Path, resample: str) -> StatedTransform:
    """What timm's `pretrained_cfg` states.

    Args:
        config: The file's contents.
        path: The file.
        resample: The filter where none is stated.

    Raises:
        BackboneError: As for `read_transformers`.
    """
    stated = config.get("pretrained_cfg", config)
    return _with_filter(_checked(path, _from_pretrained_cfg, stated), resample)


def read_open_clip(config: Mapping[str, Any], path: Path) -> StatedTransform:
    """What the `preprocess_cfg` of an `open_clip_config.json` states, and the size of its network.

    Raises:
        BackboneError: As for `read_transformers`.
    """
    return _with_filter(_checked(path, _from_open_clip, config), "bicubic")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        BackboneError: If the file is missing or is no JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise BackboneError(f"'{path}' is missing: expected a folder with config.json and weights") from None
    except (ValueError, RecursionError) as error:
        raise BackboneError(f"'{path}' is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise BackboneError(f"'{path}' must contain a JSON object")
    return value


def _from_processor(stated: Mapping[str, Any]) -> StatedTransform:
    """An image processor of transformers. With a centre crop, the crop is what the network sees."""
    crop = stated.get("crop_size") if stated.get("do_center_crop", "crop_size" in stated) else None
    scale = stated.get("rescale_factor")
    normalises = stated.get("do_normalize", True)
    return StatedTransform(
        size=_side(crop) or _side(stated.get("size")),
        mean=_triple(stated.get("image_mean")) if normalises else (0.0, 0.0, 0.0),
        std=_triple(stated.get("image_std"), positive=True) if normalises else (1.0, 1.0, 1.0),
        scale=_positive(scale) if stated.get("do_rescale", True) else 1.0,
        resample=_filter(stated.get("resample")),
    )


def _from_pretrained_cfg(stated: Mapping[str, Any]) -> StatedTransform:
    """Read timm's `pretrained_cfg`; sizes are `(channels, height, width)`."""
    shape = stated.get("input_size")
    return StatedTransform(
        size=_side(shape[1:] if isinstance(shape, list | tuple) and len(shape) == 3 else shape),
        mean=_triple(stated.get("mean")),
        std=_triple(stated.get("std"), positive=True),
        resample=_filter(stated.get("interpolation")),
    )


def _from_open_clip(config: Mapping[str, Any]) -> StatedTransform:
    """Read open_clip's description: numbers beside the model, the size inside it unless it is stated."""
    stated = config.get("preprocess_cfg", {})
    size = stated.get("size", config.get("model_cfg", {}).get("vision_cfg", {}).get("image_size"))
    return StatedTransform(
        size=_side(size),
        mean=_triple(stated.get("mean")),
        std=_triple(stated.get("std"), positive=True),
        resample=_filter(stated.get("interpolation")),
    )


def _with_filter(stated: StatedTransform, resample: str) -> StatedTransform:
    """What is stated, with the filter that the program uses where it states other things but no filter."""
    return stated if stated == StatedTransform() else stated.filled_from(StatedTransform(resample=resample))


def _class_filter(stated: Any) -> str | None:  # noqa: ANN401 - checked here
    """The default filter of a transformers image processor, by its class."""
    name = str(stated.get("image_processor_type") or stated.get("feature_extractor_type") or "")
    bicubic = name.startswith(("CLIP", "Siglip", "Bit", "DeiT"))
    return "bicubic" if bicubic else "bilinear" if name.startswith(("ViT", "DINOv3")) else None


def _checked(
    path: Path, parse: Callable[[Mapping[str, Any]], StatedTransform], stated: Mapping[str, Any]
) -> StatedTransform:
    """The parsed transform, or an error that names the file."""
    try:
        return parse(stated)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise BackboneError(f"'{path}' states an impossible preprocessing: {error}") from error


def _side(value: Any) -> int | None:  # noqa: ANN401 - checked here
    """Height and width in pixels, from the ways in which they are stated."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        sides = [value[key] for key in ("height", "width", "shortest_edge", "longest_edge") if key in value]
    else:
        sides = list(value) if isinstance(value, list | tuple) else [value]
    if not sides or not all(type(side) is int and 1 <= side <= MAX_IMAGE_SIZE for side in sides):
        raise ValueError(f"expected a size in pixels of 1 to {MAX_IMAGE_SIZE}, found {shown(value)}")
    if len(set(sides)) > 1:
        raise ValueError(f"images of {' x '.join(map(str, sides))} pixels are not square, which is not supported")
    return int(sides[0])


def _triple(value: Any, *, positive: bool = False) -> Triple | None:  # noqa: ANN401 - checked here
    """Three finite numbers."""
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise ValueError(f"expected three numbers, found {shown(value)}")
    red, green, blue = (float(number) for number in value)
    if not all(math.isfinite(number) and (number > 0 or not positive) for number in (red, green, blue)):
        raise ValueError(f"expected three {'positive' if positive else 'finite'} numbers, found {shown(value)}")
    return red, green, blue


def _positive(value: Any) -> float | None:  # noqa: ANN401 - checked here
    """A positive number; 1/255 in the digits of any number type is exactly 1/255."""
    if value is None:
        return None
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"expected a positive factor, found {shown(value)}")
    return 1 / 255 if math.isclose(number, 1 / 255, rel_tol=1e-6) else number


def _filter(value: Any) -> str | None:  # noqa: ANN401 - checked here
    """The name of one of Pillow's filters, from its number or name; None also for timm's `random`."""
    if value is None or value == "random":
        return None
    name = _PILLOW_FILTERS.get(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if name not in FILTERS:
        raise ValueError(f"unknown interpolation {shown(value)}; known are {', '.join(FILTERS)}")
    return str(name)
