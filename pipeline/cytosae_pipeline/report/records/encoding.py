"""Data files as scripts: a page opened from disk must not fetch files, but it may run scripts that deliver them."""

import base64
import json
from typing import Any

import numpy as np
import numpy.typing as npt

_TYPES = {"float32": "f4", "uint8": "u1", "uint16": "u2", "int32": "i4", "int8": "i1"}
_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def pack(array: npt.NDArray[Any]) -> dict[str, Any]:
    """An array as JSON: its type, shape, and little-endian bytes in base64.

    Raises:
        KeyError: If the page does not support the type.
    """
    kind = _TYPES[array.dtype.name]
    data = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes()
    return {"dtype": kind, "shape": list(array.shape), "data": base64.b64encode(data).decode("ascii")}


def to_script(name: str, value: object) -> bytes:
    """A data file of the page: one call with a JSON argument. No string in it can end the script or the call.

    Raises:
        ValueError: If a number is not finite.
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character, escape in _ESCAPES.items():
        text = text.replace(character, escape)
    return f"cytosae.receive({json.dumps(name)},{text});\n".encode()


def finite(value: float) -> float | None:
    """The number, or None if it is not finite, which JSON cannot express."""
    return float(value) if np.isfinite(value) else None
