"""`build` against the bare forward pass on tensors in memory, and several blocks against one. Prints JSON lines.

    python -m benchmarks.build --encoders dinov2_vits14 kaiko_vitb16 dinov3_vits16 --images 128
    python -m benchmarks.build --model-path ../shared/data/vit/dinov2_vits14.pth --images-path ../shared/data/bccd_cells

Baseline of `build`: the same network on the same number of images, already decoded and normalised, in batches of the
same size. Ours: `build` from nothing, with decoding, writing, checksums and loading the weights. An encoder of the
registry gets random weights in its published shapes, which take as long as trained ones.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import compare
from cytosae.backbones.backbone import Backbone, describe_backbone, load_backbone
from cytosae.backbones.dinov2 import expected_shapes
from cytosae.backbones.images import to_tensor
from cytosae.backbones.registry import ARCHITECTURES, known_transform
from cytosae.backbones.vit import Architecture
from cytosae_cache.format.spec import Precision
from cytosae_pipeline.building.build import build_stores
from cytosae_pipeline.config import BuildConfig
from cytosae_pipeline.demo.cohort import plan_cohort, write_cohort
from cytosae_pipeline.runtime.devices import autocast, choose_device, choose_precision

_BLOCKS = (-2, -4, -6)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoders", nargs="*", default=[], choices=list(ARCHITECTURES))
    parser.add_argument("--model-path", type=Path, nargs="*", default=[])
    parser.add_argument("--images-path", type=Path, help="a data set; drawn cells by default")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=BuildConfig().batch_size)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        source = options.images_path or _draw_cells(root / "cells", options.images)
        paths = [write_random(root, ARCHITECTURES[encoder]) for encoder in options.encoders]
        for path in [*options.model_path, *paths]:
            _measure(path, source, root, options)


def _measure(path: Path, source: Path, root: Path, options: argparse.Namespace) -> None:
    """Both comparisons of one encoder."""
    name = path.stem if path.stem in ARCHITECTURES else None
    info = describe_backbone(path, name=name, block=-2)
    device = choose_device(options.device)
    precision = choose_precision(options.precision, device)
    backbone = load_backbone(path, info, device=device)
    size = info.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (options.batch, size, size, 3), dtype=np.uint8)
    tensor = to_tensor(pixels, mean=info.image_mean, std=info.image_std, device=device)

    def build(*blocks: int) -> None:
        config = BuildConfig(
            root_dir=root / "work", dataset_name="benchmark", images=source, limit=options.images, model_path=path,
            model_name=name, block_layer=blocks, batch_size=options.batch, workers=options.workers,
            device=options.device, precision=precision,
        )  # fmt: skip
        build_stores(config)
        shutil.rmtree(root / "work")

    sizes = {
        "encoder": info.name, "images": options.images, "batch": options.batch, "tokens": info.n_tokens,
        "width": info.d_model, "threads": torch.get_num_threads(), "workers": options.workers,
        "device": device.type, "precision": precision,
    }  # fmt: skip
    compare(
        "build", lambda: _forward(backbone, tensor, options.images, precision), lambda: build(-2),
        rounds=options.rounds, **sizes,
    )  # fmt: skip
    sizes["blocks"] = len(_BLOCKS)
    compare("build_blocks", lambda: build(-2), lambda: build(*_BLOCKS), rounds=options.rounds, **sizes)


def _forward(backbone: Backbone, tensor: torch.Tensor, n_images: int, precision: Precision) -> None:
    """The network alone."""
    with torch.inference_mode(), autocast(precision, tensor.device):
        for start in range(0, n_images, len(tensor)):
            backbone(tensor[: n_images - start])
    if tensor.device.type == "cuda":
        torch.cuda.synchronize()


def _draw_cells(folder: Path, n_images: int) -> Path:
    """A data set of at least `n_images` drawn cells."""
    cells = plan_cohort(seed=0, n_patients_per_group=2, cells_per_patient=-(-n_images // 6))
    return write_cohort(folder, cells)


def write_random(root: Path, architecture: Architecture) -> Path:
    """A checkpoint of a known encoder with random weights."""
    transform, rotary = known_transform(architecture.name), architecture.rope_theta is not None
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in expected_shapes(architecture).items():
        if architecture.layer_scale or "gamma" not in name:
            around = float(name.endswith("gamma") or ("norm" in name and name.endswith("weight")))
            state[name] = around + 0.02 * torch.randn(shape, generator=generator)
    if not rotary:
        n_patches = (transform.size // architecture.patch_size) ** 2
        state["pos_embed"] = 0.02 * torch.randn(1, 1 + n_patches, architecture.width, generator=generator)
    path = root / f"{architecture.name}.pth"
    torch.save(state, path)
    return path


if __name__ == "__main__":
    main()
