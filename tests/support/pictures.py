"""Small image folders and vision-transformer checkpoints for tests."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cytosae.backbones.dinov2 import expected_shapes
from cytosae.backbones.vit import Architecture

LABELS = ("blast", "lymphocyte", "neutrophil")
HEARING_MAIN = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "from cytosae_pipeline.cli.app import main; main()"
)
"""The command line in a child that hears Ctrl-C even where the test run itself ignores it."""

LAYOUT = "class/patient"
"""Layout of the pictures: the same patients have cells of several classes, which only the user can know."""

BROKEN = "neutrophil/p2/broken.png"


def write_pictures(
    root: Path, n: int = 22, *, n_patients: int = 4, broken: bool = True, own_patients: bool = False
) -> Path:
    """A folder class/patient/image; patients are interleaved in row order, one file is no image.

    Patients have cells of several classes, unless every class has its own.
    """
    rng = np.random.default_rng(0)
    for number in range(n):
        label = LABELS[number % 3]
        patient = f"{label if own_patients else ''}p{number % n_patients}"
        path = root / label / patient / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_picture(path, rng)
    if broken:
        (root / BROKEN).parent.mkdir(parents=True, exist_ok=True)
        (root / BROKEN).write_bytes(b"\x89PNG no image")
    return root


def change_pictures(root: Path) -> None:
    """Other pixels under the same names."""
    rng = np.random.default_rng(1)
    for path in sorted(root.rglob("*.png")):
        if path != root / BROKEN:
            _write_picture(path, rng)


def _write_picture(path: Path, rng: np.random.Generator) -> None:
    colour = rng.integers(0, 256, size=(1, 1, 3))
    noise = rng.integers(-40, 40, size=(32, 32, 3))
    Image.fromarray(np.clip(colour + noise, 0, 255).astype(np.uint8)).save(path)


def write_vit(
    path: Path, *, width: int = 24, depth: int = 4, patch_size: int = 112, name: str = "toy_vit", seed=0
) -> Path:
    """A random network in DinoBloom's file layout that states its own small architecture."""
    architecture = Architecture(name, width, depth, heads=2, patch_size=patch_size)
    generator = torch.Generator().manual_seed(seed)
    shapes = expected_shapes(architecture)
    n_patches = (224 // patch_size) ** 2
    shapes["pos_embed"] = (1, 1 + n_patches, width)
    state = {}
    for key, shape in shapes.items():
        is_gain = key.endswith("gamma") or ("norm" in key and key.endswith("weight"))
        state[key] = 0.1 * torch.randn(shape, generator=generator) + float(is_gain)
    stated = {"name": name, "width": width, "depth": depth, "heads": 2, "patch_size": patch_size}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"architecture": stated, "teacher": {f"backbone.{key}": value for key, value in state.items()}}, path)
    return path
