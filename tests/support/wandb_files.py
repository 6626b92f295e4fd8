"""Reads the file that a run of wandb leaves on disk: blocks of LevelDB's log format with protobuf messages in them."""

import json
import struct
from pathlib import Path

_BLOCK, _HEADER = 32768, 7


def read_records(path: Path) -> list:
    """All records of a run, in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    records, message, position = [], b"", 7
    while position < len(data):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += _HEADER + length
        message += data[position - length : position]
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(message))
            message = b""
    return records


def read_history(records: list) -> dict[int, dict]:
    """What was logged, by step; nested keys joined by a colon."""
    history = {}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            row = {":".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            history[row["_step"]] = row
    return history


def read_config(records: list) -> dict:
    """The run's configuration, without what wandb adds."""
    (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    found = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert found.pop("_wandb", {}) == {}
    return found
