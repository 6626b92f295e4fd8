"""Cuts pictures into square patches: a second data set for `benchmarks.peers`.

    python -m benchmarks.patches --pictures FOLDER --out patches
    cytosae-cache build --dataset_name patches --images patches --model_path VIT

Patches do not overlap, so that none that is held out shares pixels with another. Each picture's name is the label of
its patches. The pictures of docs/comparison.md are those of colour in scikit-image 0.26.0 and scikit-learn 1.9.1.
"""

import argparse
from pathlib import Path

from PIL import Image

_SUFFIXES = {".jpg", ".jpeg", ".png", ".tif"}


def main() -> None:
    """Cut all pictures of a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--side", type=int, default=64, help="pixels of a patch's side")
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    paths = sorted(path for path in options.pictures.rglob("*") if path.suffix.lower() in _SUFFIXES)
    n_patches = sum(cut(path, options.out, options.side) for path in paths)
    print(f"{n_patches:,} patches of {len(paths)} pictures in '{options.out}'")


def cut(path: Path, out: Path, side: int) -> int:
    """Write a picture's patches into a folder of its name, as PNG, and return their number."""
    folder = out / path.stem
    folder.mkdir()
    with Image.open(path) as picture:
        pixels = picture.convert("RGB")
    places = [
        (left, top)
        for top in range(0, pixels.height - side + 1, side)
        for left in range(0, pixels.width - side + 1, side)
    ]
    for number, (left, top) in enumerate(places):
        pixels.crop((left, top, left + side, top + side)).save(folder / f"{number:04d}.png")
    return len(places)


if __name__ == "__main__":
    main()
