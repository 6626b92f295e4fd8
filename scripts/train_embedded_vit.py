"""Train the vision transformer that is shipped with the package, on procedural cells only.

    python scripts/train_embedded_vit.py              # trains and writes assets/cytosae_tiny14.pth in the package
    python scripts/train_embedded_vit.py --evaluate   # measures the shipped file on cells of other seeds, prints JSON

Every training cell is drawn afresh and seen once. One thread, so that the same machine gives the same numbers.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from cytosae_pipeline.demo.cells import CELL_CLASSES, REGIONS, make_cell_with_regions

ASSET_PATH = Path(__file__).parent.parent / "pipeline" / "cytosae_pipeline" / "assets" / "cytosae_tiny14.pth"
ARCHITECTURE = {
    "name": "cytosae_tiny14",
    "width": 128,
    "depth": 6,
    "heads": 4,
    "patch_size": 14,
    "mlp_ratio": 4,
    "n_registers": 0,
    "swiglu": False,
}
SEED = 20_260_101
SIZE, GRID = 224, 16
N_PARTS = 2 + 3 * len(CELL_CLASSES)
"""What a patch may show: background, red cell, or one class's cytoplasm, nucleus or granules."""

# Cells of the three purposes never share a random state; the cohort's seeds have another form altogether.
TRAINING, PROBE, HELD_OUT = 1, 2, 3


class Attention(nn.Module):
    """Self-attention with DINOv2's parameter names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend among all tokens: (b, t, d) to the same."""
        b, t, d = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))


class LayerScale(nn.Module):
    """A gain per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels of (b, t, d)."""
        return x * self.gamma


class Mlp(nn.Module):
    """Two layers with an exact GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token of (b, t, d) by itself."""
        return self.fc2(functional.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, mlp_ratio * width)
        self.ls2 = LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        """Add attention, then the MLP, to the stream (b, t, d)."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """One token a patch."""

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Images (b, 3, 224, 224) to tokens (b, 256, d)."""
        return self.proj(x).flatten(2).transpose(1, 2)


class TinyViT(nn.Module):
    """DINOv2's layout, small."""

    def __init__(self) -> None:
        super().__init__()
        width, patch_size = int(ARCHITECTURE["width"]), int(ARCHITECTURE["patch_size"])
        self.patch_embed = PatchEmbed(width, patch_size)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + GRID * GRID, width) * 0.02)
        self.mask_token = nn.Parameter(torch.zeros(1, width))
        heads, ratio = int(ARCHITECTURE["heads"]), int(ARCHITECTURE["mlp_ratio"])
        self.blocks = nn.ModuleList(Block(width, heads, ratio) for _ in range(int(ARCHITECTURE["depth"])))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (b, 257, d) after the second-to-last block, and after the last block and the norm."""
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks[:-1]:
            x = block(x)
        return x, self.norm(self.blocks[-1](x))


class Heads(nn.Module):
    """What training asks of the tokens; thrown away afterwards."""

    def __init__(self, width: int) -> None:
        super().__init__()
        n = len(CELL_CLASSES)
        self.cls_last = nn.Linear(width, n)
        self.cls_inner = nn.Linear(width, n)
        self.mean_inner = nn.Linear(width, n)
        self.parts_inner = nn.Linear(width, N_PARTS)


class Cells:
    """Procedural cells by number: number i shows class i modulo 6 and depends on nothing but i and the purpose."""

    def __init__(self, purpose: int) -> None:
        self.purpose = purpose

    def make_batch(self, numbers: range) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised images (b, 3, 224, 224), labels (b,) and shares of each part in each patch (b, 256, N_PARTS)."""
        images = np.empty((len(numbers), SIZE, SIZE, 3), dtype=np.uint8)
        labels = np.array([i % len(CELL_CLASSES) for i in numbers])
        parts = np.zeros((len(numbers), GRID * GRID, N_PARTS), dtype=np.float32)
        for row, (i, label) in enumerate(zip(numbers, labels.tolist(), strict=True)):
            rng = np.random.default_rng([SEED, self.purpose, i])
            picture, regions = make_cell_with_regions(CELL_CLASSES[label], rng, size=SIZE)
            images[row] = np.asarray(picture)
            shares = get_region_shares(regions)
            parts[row, :, :2] = shares[:, :2]
            parts[row, :, 2 + 3 * label : 5 + 3 * label] = shares[:, 2:]
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        pixels = (torch.from_numpy(images).float() / 255 - mean) / std
        return pixels.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels), torch.from_numpy(parts)


def get_region_shares(regions: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Share of each region in each patch, (256, 5), from a region map (224, 224)."""
    one_hot = regions[None] == np.arange(len(REGIONS), dtype=np.uint8)[:, None, None]
    side = SIZE // GRID
    shares = one_hot.reshape(len(REGIONS), GRID, side, GRID, side).mean(axis=(2, 4), dtype=np.float32)
    return shares.reshape(len(REGIONS), -1).T


def get_loss(inner: Tensor, last: Tensor, heads: Heads, labels: Tensor, parts: Tensor) -> Tensor:
    """Class from the last CLS; class from the inner CLS and patches; parts from the inner patches; scale near one."""
    width = inner.shape[-1]
    flat = functional.layer_norm(inner, (width,))
    mean = functional.layer_norm(inner[:, 1:].mean(dim=1), (width,))
    loss = functional.cross_entropy(heads.cls_last(last[:, 0]), labels, label_smoothing=0.05)
    loss = loss + functional.cross_entropy(heads.cls_inner(flat[:, 0]), labels, label_smoothing=0.05)
    loss = loss + functional.cross_entropy(heads.mean_inner(mean), labels, label_smoothing=0.05)
    dense = functional.cross_entropy(heads.parts_inner(flat[:, 1:]).flatten(0, 1), parts.flatten(0, 1))
    return loss + 2 * dense + 0.02 * (inner.square().mean(dim=-1) - 1).square().mean()


def train(n_steps: int, batch_size: int, peak_lr: float) -> None:
    """Train from scratch and write the asset."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    model = TinyViT().train()
    heads = Heads(int(ARCHITECTURE["width"]))
    matrices = [p for p in model.parameters() if p.ndim == 2 and min(p.shape) > 1]
    others = [p for p in model.parameters() if not (p.ndim == 2 and min(p.shape) > 1)]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": [*others, *heads.parameters()], "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.99))
    n_warm_up = max(1, n_steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / n_warm_up, 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / n_steps))),
    )
    cells, start = Cells(TRAINING), time.perf_counter()
    for step in range(n_steps):
        images, labels, parts = cells.make_batch(range(step * batch_size, (step + 1) * batch_size))
        inner, last = model(images)
        loss = get_loss(inner, last, heads, labels, parts)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 0 or step == n_steps - 1:
            right = (heads.cls_last(last[:, 0]).argmax(dim=1) == labels).float().mean()
            rms, spent_s = inner.square().mean().sqrt(), time.perf_counter() - start
            print(f"step {step} loss {loss:.3f} accuracy {right:.3f} rms {rms:.2f} {spent_s:.0f} s", flush=True)
    write_asset(model)


def write_asset(model: TinyViT) -> None:
    state = {key: value.detach().to(torch.float16).contiguous() for key, value in model.state_dict().items()}
    partial = ASSET_PATH.with_suffix(".partial")
    torch.save({"architecture": ARCHITECTURE, "state_dict": state}, partial)
    partial.replace(ASSET_PATH)
    print(f"wrote {ASSET_PATH} ({ASSET_PATH.stat().st_size} bytes)")


def read_asset() -> TinyViT:
    model = TinyViT()
    asset = torch.load(ASSET_PATH, weights_only=True)
    model.load_state_dict({key: value.float() for key, value in asset["state_dict"].items()})
    return model.eval()


def get_probe_accuracy(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """Accuracy of a ridge regression onto one-hot labels, inputs standardised by the training part."""
    mean, std = train_x.mean(dim=0), train_x.std(dim=0) + 1e-6

    def prepare(x: Tensor) -> Tensor:
        return functional.pad((x - mean) / std, (0, 1), value=1.0).double()

    x, y = prepare(train_x), functional.one_hot(train_y).double()
    weights = torch.linalg.solve(x.T @ x + 1e-2 * len(x) * torch.eye(x.shape[1], dtype=torch.float64), x.T @ y)
    return float((prepare(test_x) @ weights).argmax(dim=1).eq(test_y).double().mean())


@torch.inference_mode()
def get_activations(models: list[TinyViT], purpose: int, n_cells: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Inner tokens (n, 257, d) of each model, labels (n,) and dominant region of each patch (n, 256)."""
    cells, tokens, labels, regions = Cells(purpose), [[] for _ in models], [], []
    for first in range(0, n_cells, 60):
        images, label, parts = cells.make_batch(range(first, min(n_cells, first + 60)))
        for found, model in zip(tokens, models, strict=True):
            found.append(model(images)[0])
        labels.append(label)
        white = parts[..., 2:].unflatten(-1, (len(CELL_CLASSES), 3)).sum(dim=-2)
        regions.append(torch.cat([parts[..., :2], white], dim=-1).argmax(dim=-1))
    return [torch.cat(found) for found in tokens], torch.cat(labels), torch.cat(regions)


def evaluate(n_probe: int, n_held_out: int) -> None:
    """Print what linear probes read from the tokens after the second-to-last block, trained and untrained."""
    few = 5 * len(CELL_CLASSES)
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    models = {"trained": read_asset(), "untrained": TinyViT().eval()}
    probe, probe_y, probe_regions = get_activations(list(models.values()), PROBE, n_probe)
    test, test_y, test_regions = get_activations(list(models.values()), HELD_OUT, n_held_out)
    result: dict[str, object] = {
        "n_probe_cells": n_probe,
        "n_probe_cells_few": few,
        "n_held_out_cells": n_held_out,
        "chance": {
            "class": 1 / len(CELL_CLASSES),
            "patch_region": float(test_regions.flatten().bincount().max() / test_regions.numel()),
        },
        "seed": SEED,
        "file_bytes": ASSET_PATH.stat().st_size,
    }
    for name, x, z in zip(models, probe, test, strict=True):
        some = torch.randperm(n_probe * GRID * GRID)[:20_000]
        patches = x[:, 1:].flatten(0, 1)[some], probe_regions.flatten()[some]
        result[name] = {
            "class_from_mean_patch": get_probe_accuracy(x[:, 1:].mean(1), probe_y, z[:, 1:].mean(1), test_y),
            "class_from_cls": get_probe_accuracy(x[:, 0], probe_y, z[:, 0], test_y),
            "class_from_mean_patch_few": get_probe_accuracy(
                x[:few, 1:].mean(1), probe_y[:few], z[:, 1:].mean(1), test_y
            ),
            "class_from_cls_few": get_probe_accuracy(x[:few, 0], probe_y[:few], z[:, 0], test_y),
            "patch_region": get_probe_accuracy(*patches, z[:, 1:].flatten(0, 1), test_regions.flatten()),
            "rms": float(z.square().mean().sqrt()),
            "largest": float(z.abs().max()),
        }
    print(json.dumps(result, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluate", action="store_true", help="measure the shipped file instead of training")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    options = parser.parse_args()
    if options.evaluate:
        evaluate(n_probe=1200, n_held_out=1200)
    else:
        train(options.steps, options.batch_size, options.lr)


if __name__ == "__main__":
    main()
