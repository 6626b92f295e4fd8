"""Gradients by block: none lives longer than it must."""

import weakref

import pytest
import torch

from cytosae.sae.loss import LossInputs
from cytosae.sae.registry import make_sae
from cytosae.training.fused_loss import find_fused_loss
from cytosae.training.matmul import MatmulConfig
from tests.cytosae.training.test_fused_loss import WEIGHTS, D, S, make_tokens


@torch.no_grad()
@pytest.mark.parametrize(
    ("arch", "norm_weighted"),
    [("relu", False), ("relu", True), ("topk", False), ("jumprelu", False), ("gated", False)],
)
def test_no_block_lives_while_the_next_one_is_handed_out(arch, norm_weighted, monkeypatch):
    monkeypatch.setattr("cytosae.training.gradients.ROWS_PER_BLOCK", S // 4)
    sae, x = make_sae(arch, D, S, k=5), make_tokens(dtype=torch.float32)[0]
    inputs = LossInputs(
        torch.ones(()), WEIGHTS, torch.bfloat16, torch.arange(S) < 3,
        use_ghost_grads=arch == "relu", norm_weighted_l1=norm_weighted,
    )  # fmt: skip
    _, gradients = find_fused_loss(sae)(sae, x, inputs, MatmulConfig(torch.bfloat16, sparse_below=0.0))
    earlier: list[weakref.ref[torch.Tensor]] = []
    for gradient in gradients.rows():
        assert [one() for one in earlier if one() is not None] == []
        earlier.append(weakref.ref(gradient.values))
        del gradient
    assert len(earlier) == 8
