"""Sparse products and the encoder's product on each device, against dense ones."""

import pytest
import torch

from cytosae.sae.coo import CooMatrix
from cytosae.sae.registry import make_sae
from cytosae.training import encoder_blocks
from cytosae.training.encoder_blocks import EncoderProduct
from cytosae.training.matmul import MatmulConfig

N, S, D = 70, 130, 24


def random(*shape: int, device: torch.device, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(
        device, dtype
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_sparse_products_are_those_of_the_dense_matrix(device, share, dtype):
    chosen = torch.rand(N, S, generator=torch.Generator().manual_seed(1)) < share
    matrix = random(N, S, device=device, dtype=dtype) * chosen.to(device)
    left, right = random(N, D, device=device, dtype=dtype), random(S, D, device=device, dtype=dtype)
    entries = CooMatrix.from_dense(matrix)
    by_column = entries.transpose()
    torch.testing.assert_close(entries.matmul(right), matrix @ right)
    torch.testing.assert_close(by_column.matmul(left), matrix.T @ left)
    torch.testing.assert_close(entries.sampled_matmul(left, right), (left @ right.T)[matrix != 0])
    torch.testing.assert_close(by_column.sampled_matmul(right, left), (right @ left.T)[matrix.T != 0])
    torch.testing.assert_close(entries.row_sums(), matrix.double().sum(dim=1))
    torch.testing.assert_close(entries.split_rows([3, 40])[0].matmul(right), matrix[3:40] @ right)
    _, middle, _ = entries.split_columns([0, 5, 90, S])
    torch.testing.assert_close(middle.matmul(right[5:90]), matrix[:, 5:90] @ right[5:90])


def test_long_sums_repeat_to_the_last_bit(device):
    rows = torch.randint(0, 7, (100_000,), generator=torch.Generator().manual_seed(0)).sort().values.to(device)
    values = random(100_000, device=device, dtype=torch.float32)
    entries = CooMatrix(rows, torch.arange(len(rows), device=device), values, (7, len(rows)))
    table = random(len(rows), 3, device=device, dtype=torch.float32)
    sums, products = entries.row_sums(), entries.matmul(table)
    for _ in range(5):
        assert torch.equal(entries.row_sums(), sums)
        assert torch.equal(entries.matmul(table), products)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [2048, 7])
@pytest.mark.parametrize("max_bytes", [1 << 29, 8 * S * 11])
def test_the_encoders_product_finds_what_the_whole_matrix_has(device, monkeypatch, dtype, width, max_bytes):
    monkeypatch.setattr(encoder_blocks, "LATENTS_PER_BLOCK", width)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sae = make_sae("relu", D, S, device=device).to(wide)
    centred = random(N, D, device=device, dtype=wide)
    product = EncoderProduct(sae, centred, MatmulConfig(dtype, max_bytes))
    pre = torch.empty(N, S, dtype=dtype, device=device)
    for block in product:
        pre[block.tokens, block.latents] = block.pre
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(pre.to(wide), centred @ sae.W_enc.detach(), rtol=limit, atol=limit)
    for bound in (0.0, 0.4, -0.3):
        found = product.above(torch.tensor(bound, dtype=dtype, device=device)).sort()
        at = (pre > torch.tensor(bound, dtype=dtype, device=device)).nonzero(as_tuple=True)
        assert torch.equal(found.rows, at[0])
        assert torch.equal(found.columns, at[1])
        assert torch.equal(found.values, pre[at])
    largest = product.largest(9)
    kept = torch.zeros_like(pre)
    kept[largest.rows, largest.columns] = largest.values
    expected = pre.topk(9, dim=1).values.clamp_min(0)
    # A product of another shape may be rounded otherwise.
    limit = min(limit, 0.02)
    torch.testing.assert_close(kept.topk(9, dim=1).values, expected, rtol=limit, atol=limit)
