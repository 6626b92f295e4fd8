"""Peak memory of refusing hostile input: `PYTHONPATH=.:cache:pipeline python scripts/measure_refusals.py`.

Each input is read by the real verb in a process of its own; peaks are above what the program has after its imports.
"""

import os
import pickle
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import crc32c
import numcodecs

from tests.support.fault_stages import IMPORTS
from tests.support.hostile_files import make_png_of_zeros, make_zstd_of_zeros
from tests.support.mutation_kinds import build, read_with, sign, train, with_compressed_store, with_sae
from tests.support.nursery import Nursery

GIB = 1 << 30
LINES = ("hostile input", "verb", "bytes", "peak, MB", "answer")

Case = tuple[str, Callable[[Path], Path | None], Callable[[Path], list[object]]]


def main() -> None:
    """Measure all and print a table."""
    os.environ["SOURCE_DATE_EPOCH"] = "1700000000"
    print(f"| {' | '.join(LINES)} |\n|{' --- |' * len(LINES)}")
    with tempfile.TemporaryDirectory(prefix="cytosae-refusals-") as folder, Nursery(imports=IMPORTS) as nursery:
        for at, (name, spoil, command) in enumerate(make_cases()):
            root = Path(folder) / str(at)
            root.mkdir()
            (with_compressed_store if "lz4" in name else with_sae)(root, nursery)
            path = spoil(root)
            words = command(root)
            ended = nursery.run(*words)
            answer = next((line for line in ended.output.splitlines() if line.startswith("Error: ")), "")
            shown = answer.removeprefix("Error: ").replace(f"{root}/", "")[:100].replace("|", "/")
            size = f"{path.stat().st_size:,}" if path else ""
            verdict = shown if ended.code in (1, 2) else "as without it" if ended.code == 0 else f"ended: {ended.code}"
            print(f"| {name} | `{words[0]}` | {size} | {ended.peak_bytes / 1e6:.0f} | {verdict} |", flush=True)


def make_cases() -> Iterator[Case]:
    """Name, what spoils a workspace, and the command that reads the result."""
    features, by_model = read_with("features"), build(model=Path("x.pt"))
    yield "store: a table's chunk that unpacks to 6 GiB", _write_large_chunk, features
    yield "store: a table of 4,294,967,295 texts in 4 bytes", _write_many_texts, features
    yield "store: an lz4 image of 24 bytes that claims 66 kB", _write_short_image, features
    yield "autoencoder: a pickle that asks for 6 GiB", _write_pickle, read_with("features", sae="./x.pt")
    yield "encoder: the same", _write_pickle, by_model
    picture = build("--strict-images", "--dataset_name", "pictures", images="x.csv")
    yield "PNG of 1 x 134,217,727 pixels", lambda root: _write_picture(root, 1, (1 << 27) - 1), picture
    yield "PNG of 11,586 x 11,586 pixels", lambda root: _write_picture(root, 11_586, 11_586), picture
    for name, value in (("5,000 lists", "[" * 5000 + "]" * 5000), ("a number of 5,000 digits", "0x" + "f" * 5000)):
        yield (
            f"sweep with {name}",
            lambda root, value=value: _write(root / "x.toml", f"seed = {value}\n".encode()),
            lambda root: [*train("--run_name", "g")(root), "--sweep", root / "x.toml"],
        )
    yield "`--expansion_factor 100000000`", lambda root: None, train("--run_name", "g", "--expansion_factor", 10**8)
    yield "`--batch_size 1000000000`", lambda root: None, read_with("features", "--batch_size", 10**9)


def _write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


def _store(root: Path) -> Path:
    return next(root.glob("out/activations/cells/*.zarr"))


def _write_large_chunk(root: Path) -> Path:
    array = _store(root) / "images/valid"
    text = (array / "zarr.json").read_text()
    (array / "zarr.json").write_text(
        text.replace('"chunk_shape": [\n        24', f'"chunk_shape": [\n        {6 * GIB}')
    )
    path = _write(array / "c/0", make_zstd_of_zeros(6 * GIB))
    sign(root)
    return path


def _write_many_texts(root: Path) -> Path:
    path = _write(_store(root) / "images/label/c/0", numcodecs.Zstd().encode(struct.pack("<I", 2**32 - 1)))
    sign(root)
    return path


def _write_short_image(root: Path) -> Path:
    """The index, with a right checksum, says that the first image has 24 bytes; its header claims all of them."""
    path = _store(root) / "activations/c/0/0/0"
    data, n = bytearray(path.read_bytes()), 4
    index = list(struct.unpack(f"<{2 * n}Q", data[-16 * n - 4 : -4]))
    index[1] = 24
    packed = struct.pack(f"<{2 * n}Q", *index)
    data[-16 * n - 4 :] = packed + struct.pack("<I", crc32c.crc32c(packed))
    path.write_bytes(data)
    return path


def _write_pickle(root: Path) -> Path:
    size = pickle.encode_long(6 * GIB)
    config, state = (b"X" + struct.pack("<I", len(name)) + name for name in (b"cfg", b"state_dict"))
    asking = b"cbuiltins\nbytearray\n(\x8a" + bytes([len(size)]) + size + b"tR"
    code = b"\x80\x02}(" + config + b"}" + state + asking + b"u."
    with zipfile.ZipFile(root / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", code)
        archive.writestr("x/byteorder", "little")
        archive.writestr("x/version", "3\n")
    return root / "x.pt"


def _write_picture(root: Path, width: int, height: int) -> Path:
    _write(root / "x.csv", b"path,label\nx.png,a\n")
    return _write(root / "x.png", make_png_of_zeros(width, height))


if __name__ == "__main__":
    main()
