"""Vision transformers on each device: in float32 they give the CPU's numbers, which a convolution in TF32 would not."""

import numpy as np
import pytest
import torch

from cytosae.backbones.backbone import describe_backbone, load_backbone
from cytosae.backbones.images import to_tensor
from cytosae_pipeline.runtime.devices import autocast
from tests.cytosae.backbones.test_backbone import ALL, save_toy

CPU = torch.device("cpu")


def run(path, where: torch.device, precision: str) -> torch.Tensor:
    info = describe_backbone(path, name=None, block=-1)
    backbone = load_backbone(path, info, device=where)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3), dtype=np.uint8)
    with torch.inference_mode(), autocast(precision, where):
        found = backbone(to_tensor(pixels, mean=info.image_mean, std=info.image_std, device=where))
    assert found.device.type == where.type
    return found.float().cpu()


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 2e-5), ("bf16", 0.1), ("fp16", 0.02)])
@pytest.mark.parametrize("shape", ALL)
def test_forward_passes_are_those_of_the_cpu(device, tmp_path, shape, precision, limit):
    if device == CPU and precision == "fp16":
        pytest.skip("float16 is for GPUs")
    path = save_toy(tmp_path / "vit.pth", ALL[shape])
    expected, found = run(path, CPU, "fp32"), run(path, device, precision)
    assert (found - expected).norm() <= limit * expected.norm()
