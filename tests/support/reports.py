"""The data files of a report, as tests read them."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_TYPES = {"f4": "<f4", "u1": "u1", "u2": "<u2", "i4": "<i4", "i1": "i1"}


def read_data(report: Path, name: str) -> Any:
    """The record in `data/NAME.js` of a report."""
    return read_script((report / "data" / f"{name}.js").read_text(), name)


def read_script(text: str, name: str) -> Any:
    """The record in the text of a data file."""
    found = re.fullmatch(r'cytosae\.receive\(("[^"]+"),(.*)\);\n', text, re.DOTALL)
    assert json.loads(found[1]) == name
    return json.loads(found[2])


def unpack(value: dict[str, Any]) -> npt.NDArray[Any]:
    """An array as `records/encoding.py` packs it."""
    return np.frombuffer(base64.b64decode(value["data"]), _TYPES[value["dtype"]]).reshape(value["shape"])
