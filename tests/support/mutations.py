"""Valid files made invalid: bits flipped, pieces cut, doubled or swapped, and values replaced by what nobody expects.

A mutation is a function of the file's bytes, its form and a seed, and of nothing else.
"""

import io
import json
import random
import re
import struct
import zipfile
from collections.abc import Callable
from typing import Any, Literal

Form = Literal["bytes", "json", "json lines", "toml", "csv", "zip", "safetensors"]
"""What a file consists of; `bytes` means that only its bytes are mutated."""

DEPTH = 100_000
"""Lists inside each other, where a list of lists replaces a value."""

WITH_CHECKSUMS = ("mutate a zip member",)
"""Mutations after which the file's own checksums are right: other contents, not damage."""

_PLACE = "@value@"
_END_BYTES = 512
_VALUES = (
    "null", "true", "-1", "0", "1e999", "NaN", "9" * 400, "99999999999", "0.5", '""', '"\\u0000"', '"../../x"',
    '"\\ud800"', '"\\u001b[31m"', "[]", "{}", "[null]", '"' + "x" * 70_000 + '"', "[" * DEPTH + "]" * DEPTH,
    "[" * DEPTH, '{"a":' * DEPTH,
)  # fmt: skip
_CELLS = (
    "", "null", "-1", "1e999", "9" * 400, "\0", "../../x", "/dev/zero", '"', '"a\nb"', "\x1b[31m", "x" * 200_000,
    "[" * DEPTH, ",", "\u202e", "=1+1",
)  # fmt: skip
_INVALID_UTF8 = b"\xff\xfe\xc3"


def mutate(data: bytes, form: Form, seed: int) -> tuple[str, bytes]:
    """Mutate a file.

    Args:
        data: Its bytes.
        form: What it consists of.
        seed: Chooses the mutation; neighbouring seeds are of different kinds.

    Returns:
        What was done, and the bytes, which differ from those of before.
    """
    ways = [*_BYTES, *_STRUCTURES.get(form, ())]
    dice = random.Random(seed)
    way = ways[seed % len(ways)]
    for _ in range(100):
        made = way(data, dice)
        if made != data:
            return way.__name__.strip("_").replace("_", " "), made
    return "cut off", data[:-1] or b"\0"


def _place(size: int, dice: random.Random) -> int:
    """An offset: anywhere, or near one of the ends, where headers and indexes are."""
    near = min(size, _END_BYTES)
    return dice.choice((dice.randrange(size), dice.randrange(near), size - 1 - dice.randrange(near)))


def _piece(size: int, dice: random.Random) -> tuple[int, int]:
    first, second = _place(size, dice), _place(size, dice)
    return min(first, second), max(first, second) + 1


def _flip_a_bit(data: bytes, dice: random.Random) -> bytes:
    made = bytearray(data)
    made[_place(len(data), dice)] ^= 1 << dice.randrange(8)
    return bytes(made)


def _flip_many_bits(data: bytes, dice: random.Random) -> bytes:
    for _ in range(dice.randrange(2, 40)):
        data = _flip_a_bit(data, dice)
    return data


def _cut_off(data: bytes, dice: random.Random) -> bytes:
    return data[: _place(len(data), dice)]


def _cut_out(data: bytes, dice: random.Random) -> bytes:
    start, stop = _piece(len(data), dice)
    return data[:start] + data[stop:]


def _double(data: bytes, dice: random.Random) -> bytes:
    start, stop = _piece(len(data), dice)
    return data[:stop] + data[start:]


def _swap(data: bytes, dice: random.Random) -> bytes:
    length = dice.choice((1, 4, 16, 64))
    first, second = sorted((_place(len(data), dice), _place(len(data), dice)))
    if second - first < length:
        return data
    one, two = data[first : first + length], data[second : second + length]
    return data[:first] + two + data[first + length : second] + one + data[second + length :]


def _zeros(data: bytes, dice: random.Random) -> bytes:
    start, stop = _piece(len(data), dice)
    return data[:start] + bytes(stop - start) + data[stop:]


def _extreme_number(data: bytes, dice: random.Random) -> bytes:
    """Eight bytes, or four, as the largest numbers or small negative ones."""
    number = dice.choice((b"\xff" * 8, b"\xff\xff\xff\x7f", b"\xff" * 7 + b"\x7f", b"\0\0\0\x80", b"\0\0\0\0\1\0\0\0"))
    at = _place(len(data), dice)
    return (data[:at] + number + data[at + len(number) :])[: max(len(data), at + 1)]


def _invalid_text(data: bytes, dice: random.Random) -> bytes:
    at = _place(len(data), dice)
    return data[:at] + dice.choice((b"\0", _INVALID_UTF8, b"\xef\xbb\xbf")) + data[at:]


def _replace_a_json_value(data: bytes, dice: random.Random) -> bytes:
    """One value of a JSON document, at any depth."""
    tree = json.loads(data)
    holders = list(_holders(tree))
    if not holders:
        return dice.choice(_VALUES).encode()
    holder, key = dice.choice(holders)
    holder[key] = _PLACE
    return json.dumps(tree).replace(f'"{_PLACE}"', dice.choice(_VALUES)).encode()


def _replace_a_json_document(data: bytes, dice: random.Random) -> bytes:
    return dice.choice(_VALUES).encode()


def _remove_a_json_value(data: bytes, dice: random.Random) -> bytes:
    tree = json.loads(data)
    holders = list(_holders(tree))
    if holders:
        holder, key = dice.choice(holders)
        del holder[key]
    return json.dumps(tree).encode()


def _repeat_a_json_key(data: bytes, dice: random.Random) -> bytes:
    """A key a second time in its object, with another value."""
    tree = json.loads(data)
    holders = [(holder, key) for holder, key in _holders(tree) if isinstance(holder, dict)]
    if not holders:
        return data
    holder, key = dice.choice(holders)
    holder[_PLACE] = None
    again = f"{json.dumps(key)}: {dice.choice(_VALUES[:10])}"
    return json.dumps(tree).replace(f'"{_PLACE}": null', again).encode()


def _holders(tree: Any) -> Any:
    """Every place of a tree, as its container and key or index."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key
        yield from _holders(value)


def _mutate_a_line(data: bytes, dice: random.Random) -> bytes:
    lines = data.splitlines()
    at = dice.randrange(len(lines))
    way = dice.choice((_replace_a_json_value, _replace_a_json_document, _remove_a_json_value, _repeat_a_json_key))
    lines[at] = way(lines[at], dice)
    return b"\n".join(lines) + b"\n"


def _mutate_a_toml_value(data: bytes, dice: random.Random) -> bytes:
    lines = data.decode().splitlines()
    at = dice.randrange(len(lines))
    key, _, value = lines[at].partition("=")
    made = dice.choice(
        (f"{key}= {dice.choice(_VALUES)}", f"{lines[at]}\n{lines[at]}", f"{key}= [{dice.choice(_VALUES)}]",
         f"[{key.strip()}]\n{lines[at]}", f"{'a.' * 5000}b ={value}", f"{key}= 0x{'f' * 5000}")
    )  # fmt: skip
    return "\n".join([*lines[:at], made, *lines[at + 1 :], ""]).encode("utf-8", "surrogatepass")


def _mutate_a_csv_cell(data: bytes, dice: random.Random) -> bytes:
    lines = data.decode().splitlines()
    at = dice.choice((0, dice.randrange(len(lines))))
    cells = lines[at].split(",")
    cells[dice.randrange(len(cells))] = dice.choice((*_CELLS, cells[0]))
    lines[at] = ",".join(cells)
    return ("\n".join(lines) + "\n").encode()


def _mutate_csv_lines(data: bytes, dice: random.Random) -> bytes:
    lines = data.decode().splitlines()
    at = dice.randrange(len(lines))
    made = dice.choice(
        ([lines[at]] * 2, [], [lines[at] + ",x"], [""], [lines[at].rpartition(",")[0]], [lines[at].replace(",", ";")])
    )
    return ("\n".join([*lines[:at], *made, *lines[at + 1 :]]) + "\n").encode()


def _mutate_a_zip_member(data: bytes, dice: random.Random) -> bytes:
    """The bytes of one member, or its name; its checksum is right."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info, archive.read(info)) for info in archive.infolist()]
    small = [at for at, (_, content) in enumerate(members) if 0 < len(content) < 1 << 16] or [0]
    at = dice.choice(small)
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for i, (info, content) in enumerate(members):
            name = info.filename
            if i == at:
                content = dice.choice(_BYTES)(content, dice) if content else b"x"
            archive.writestr(zipfile.ZipInfo(name), content)
    return target.getvalue()


def _mutate_a_safetensors_header(data: bytes, dice: random.Random) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    way = dice.choice(
        (_replace_a_json_value, _replace_a_json_document, _remove_a_json_value, _repeat_a_json_key, _flip_a_bit)
    )
    header = way(data[8 : 8 + length], dice)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def _replace_a_number(data: bytes, dice: random.Random) -> bytes:
    """A number in the text of a file."""
    found = list(re.finditer(rb"\d+", data))
    if not found:
        return data
    one = dice.choice(found)
    return data[: one.start()] + dice.choice((b"0", b"-1", b"4294967296", b"9" * 40, b"1e9")) + data[one.end() :]


Way = Callable[[bytes, random.Random], bytes]
_JSON: tuple[Way, ...] = (
    _replace_a_json_value, _replace_a_json_value, _replace_a_json_document, _remove_a_json_value, _repeat_a_json_key,
    _invalid_text, _replace_a_number,
)  # fmt: skip
_BYTES: tuple[Way, ...] = (
    _flip_a_bit, _flip_many_bits, _cut_off, _cut_out, _double, _swap, _zeros, _extreme_number,
)  # fmt: skip
_STRUCTURES: dict[Form, tuple[Way, ...]] = {
    "json": _JSON,
    "json lines": (_mutate_a_line, _mutate_a_line, _mutate_a_line, _invalid_text, _replace_a_number),
    "toml": (_mutate_a_toml_value, _mutate_a_toml_value, _mutate_a_toml_value, _invalid_text, _replace_a_number),
    "csv": (_mutate_a_csv_cell, _mutate_a_csv_cell, _mutate_a_csv_cell, _mutate_csv_lines, _mutate_csv_lines,
            _invalid_text),
    "zip": (_mutate_a_zip_member,) * 6,
    "safetensors": (_mutate_a_safetensors_header,) * 5,
}  # fmt: skip
