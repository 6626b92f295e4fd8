"""What identifies a store: frozen dataclasses, their canonical JSON and its hash."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self, TypeVar, get_args

import numpy as np

from cytosae_cache.errors import StoreCorruptError
from cytosae_cache.format.quantize import SCALE_BYTES

FORMAT_VERSION = 1

T = TypeVar("T")

_LATER = {"added_later": True}
"""Metadata of fields that older stores lack. They have the meaning of then as default, and are written only if they
differ from it, so that the JSON and the hash of older specs stay what they were."""

UNUSED_IF_IMPORTED = ("block", "n_blocks", "preprocessing")
"""Fields of a spec that say nothing about imported embeddings."""

_MAX_IMAGE_VALUES = 1 << 30

StoreDtype = Literal["float16", "float32", "int8"]
Precision = Literal["fp32", "bf16", "fp16"]
Compression = Literal["none", "lz4", "zstd"]


@dataclass(frozen=True)
class TokenLayout:
    """Order of an image's tokens: CLS, then registers, then the patch grid row by row."""

    n_cls: int
    """Class tokens at the start: 1, or 0 for networks without one."""
    n_registers: int
    """Register tokens after the class token."""
    grid: tuple[int, int]
    """Patch rows and patch columns."""

    @property
    def n_tokens(self) -> int:
        """Tokens per image, of all kinds."""
        return self.n_cls + self.n_registers + self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the network's input."""

    image_size: int = 224
    """Height and width in pixels after resizing; the aspect ratio is not kept."""
    resample: str = "pillow-bilinear"
    """Filter of the resize."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Subtracted from each RGB channel, in units of the 0-1 range."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Divisor of each RGB channel."""
    scale: float = field(default=1 / 255, metadata=_LATER)
    """Factor that turns pixel values of 0 to 255 into the range that `mean` and `std` refer to."""
    white_level: int = field(default=0, metadata=_LATER)
    """Value that stands for white in greyscale of more than 8 bits; 0: the largest of a file's bits."""


@dataclass(frozen=True)
class StoreSpec:
    """Everything that determines the values in a store, except the images themselves."""

    model_name: str
    """Name of the backbone, for display; `weights_sha256` identifies it."""
    weights_sha256: str
    """SHA-256 of the weights, 64 hex digits."""
    block: int
    """Block whose output is stored, counted from 0."""
    n_blocks: int
    """Blocks of the whole network, needed to count `block` from the end."""
    d_model: int
    """Channels of an activation."""
    tokens: TokenLayout
    """Order of an image's tokens."""
    module: str = "resid"
    """What is stored: the residual stream after the block."""
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    """How images were prepared."""
    store_dtype: StoreDtype = "float16"
    """Dtype on disk; int8 codes are read as float16 (`cytosae_cache.format.quantize`)."""
    precision: Precision = "fp32"
    """Precision in which the network computed."""
    imported: bool = field(default=False, metadata=_LATER)
    """Whether another program computed the numbers: then `weights_sha256` is a digest of their origin, and the fields
    of `UNUSED_IF_IMPORTED` say nothing."""

    def __post_init__(self) -> None:
        """Check every field against its range.

        Raises:
            ValueError: If a field is out of range; the message names it.
        """
        if not 0 <= self.block < self.n_blocks:
            raise ValueError(f"block must lie in 0..n_blocks-1, found block={self.block}, n_blocks={self.n_blocks}")
        if self.d_model < 1 or self.tokens.n_tokens < 1 or min(self.tokens.grid) < 0:
            raise ValueError(f"d_model and tokens must be positive, found d_model={self.d_model}, tokens={self.tokens}")
        if self.d_model * self.tokens.n_tokens > _MAX_IMAGE_VALUES:
            raise ValueError(
                f"tokens x d_model must be at most {_MAX_IMAGE_VALUES:,}, found {self.tokens.n_tokens} x {self.d_model}"
            )
        if len(self.weights_sha256) != 64 or not set(self.weights_sha256) <= set("0123456789abcdef"):
            raise ValueError(f"weights_sha256 must be 64 hex digits, found {self.weights_sha256!r}")
        for name, value, known in (
            ("store_dtype", self.store_dtype, get_args(StoreDtype)),
            ("precision", self.precision, get_args(Precision)),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, found {value!r}")

    def to_json(self) -> dict[str, Any]:
        """The spec as plain JSON values."""
        record = _without_defaults(self, asdict(self))
        record["preprocessing"] = _without_defaults(self.preprocessing, record["preprocessing"])
        return json.loads(json.dumps(record))  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Read a spec that `to_json` wrote.

        Raises:
            StoreCorruptError: If a field is missing, unknown, of the wrong type or out of range.
        """
        try:
            record = _record(cls, value, "spec")
            tokens = _record(TokenLayout, record["tokens"], "spec.tokens")
            preprocessing = _record(Preprocessing, record["preprocessing"], "spec.preprocessing")
            for name, text in (("model_name", str), ("module", str), ("weights_sha256", str)):
                _typed(record[name], text, f"spec.{name}")
            for name, kind in (("block", int), ("n_blocks", int), ("d_model", int), ("imported", bool)):
                _typed(record[name], kind, f"spec.{name}")
            rows, columns = (_typed(item, int, "spec.tokens.grid") for item in tokens["grid"])
            n_cls, n_registers = (_typed(tokens[name], int, f"spec.tokens.{name}") for name in ("n_cls", "n_registers"))
            if min(rows, columns, n_cls, n_registers) < 0 or max(rows, columns, n_cls, n_registers) > 1 << 16:
                raise ValueError(f"token layout out of range: {tokens}")
            record["tokens"] = TokenLayout(n_cls, n_registers, (rows, columns))
            record["preprocessing"] = Preprocessing(
                image_size=_typed(preprocessing["image_size"], int, "spec.preprocessing.image_size"),
                resample=_typed(preprocessing["resample"], str, "spec.preprocessing.resample"),
                mean=_triple(preprocessing["mean"]),
                std=_triple(preprocessing["std"]),
                scale=_typed(preprocessing["scale"], float, "spec.preprocessing.scale"),
                white_level=_typed(preprocessing["white_level"], int, "spec.preprocessing.white_level"),
            )
            return cls(**record)
        except (TypeError, ValueError) as error:
            raise StoreCorruptError(f"the store's spec cannot be read: {error}") from error

    @property
    def hash(self) -> str:
        """First 12 hex digits of the SHA-256 of the canonical JSON; they name the store's folder."""
        return hashlib.sha256(canonical_json(self.to_json())).hexdigest()[:12]

    @property
    def value_dtype(self) -> Literal["float16", "float32"]:
        """Dtype in which activations are computed, passed to the writer and read."""
        return "float16" if self.store_dtype == "int8" else self.store_dtype

    @property
    def record_shape(self) -> tuple[int, int]:
        """Shape of one image as stored; in int8 stores, each token's scale follows its codes."""
        return (self.tokens.n_tokens, self.d_model + (SCALE_BYTES if self.store_dtype == "int8" else 0))

    @property
    def record_bytes(self) -> int:
        """Bytes of one image as stored, uncompressed."""
        return math.prod(self.record_shape) * np.dtype(self.store_dtype).itemsize

    @property
    def image_shape(self) -> tuple[int, int]:
        """Shape of one image's activations: `(n_tokens, d_model)`."""
        return (self.tokens.n_tokens, self.d_model)

    def differences(self, other: "StoreSpec") -> list[str]:
        """Fields in which two specs differ, as `name: here, there` lines; empty if they are equal."""
        mine, theirs = json.loads(json.dumps([asdict(self), asdict(other)]))
        return [f"{name}: {mine[name]}, {theirs[name]}" for name in mine if mine[name] != theirs[name]]


def canonical_json(value: object) -> bytes:
    """JSON with sorted keys and without blanks, as UTF-8: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _record(cls: type, value: object, where: str) -> dict[str, Any]:
    """Check that a value is a JSON object with the fields of a dataclass; those added later may be missing."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object, found {type(value).__name__}")
    defaults = _later_defaults(cls)
    known = {item.name for item in fields(cls)}
    missing, unknown = known - set(defaults) - set(value), set(value) - known
    if missing or unknown:
        raise ValueError(f"{where}: missing {sorted(missing)}, unknown {sorted(unknown)}")
    return {**defaults, **value}


def _later_defaults(cls: Any) -> dict[str, Any]:  # noqa: ANN401 - a dataclass
    """Defaults of the fields that older stores lack."""
    return {item.name: item.default for item in fields(cls) if "added_later" in item.metadata}


def _without_defaults(item: Any, record: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401 - a dataclass
    """A record without those later fields that have their default."""
    defaults = _later_defaults(item)
    return {name: value for name, value in record.items() if name not in defaults or value != defaults[name]}


def _typed(value: object, expected: type[T], where: str) -> T:
    """Check that a value has exactly the expected type (here, a bool is not an int)."""
    if type(value) is not expected:
        raise ValueError(f"{where} must be {expected.__name__}, found {value!r}")
    return value


def _triple(value: object) -> tuple[float, float, float]:
    """Check that a value is three numbers, one per colour channel."""
    if not isinstance(value, list) or len(value) != 3 or not all(type(item) in (int, float) for item in value):
        raise ValueError(f"expected three numbers, found {value!r}")
    red, green, blue = (float(item) for item in value)
    return red, green, blue
