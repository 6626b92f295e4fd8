"""Adam by blocks of rows against torch's own; its state."""

import copy
import subprocess
import sys

import pytest
import torch

from cytosae.sae.loss import LossWeights
from cytosae.sae.registry import make_sae
from cytosae.training.adam import RowwiseAdam
from cytosae.training.gradients import MATRICES, RowGradient, StoredGradients, by_latent
from cytosae.training.matmul import MatmulConfig
from cytosae.training.step import TrainStep
from tests.cytosae.training.test_fused_loss import make_case

S, D = 160, 24


CPU = torch.device("cpu")


def make_pair(device=CPU, decay=0.0):
    sae = make_case("relu", torch.float32).to(device)
    sae.W_enc.data = sae.W_enc.data.t().contiguous().t()
    other = copy.deepcopy(sae)
    mine = RowwiseAdam(groups(sae, decay), lr=0.01, betas=(0.9, 0.999), device=device)
    theirs = torch.optim.AdamW(groups(other, decay), lr=0.01, betas=(0.9, 0.999), fused=True)
    return sae, mine, other, theirs


def groups(sae, decay):
    return [
        {"params": [sae.W_enc], "weight_decay": decay},
        {"params": [part for part in sae.parameters() if part is not sae.W_enc], "weight_decay": 0.0},
    ]


def take_step(seed, sae, mine, other, theirs):
    generator = torch.Generator().manual_seed(seed)
    for one, two in zip(sae.parameters(), other.parameters(), strict=True):
        two.grad = torch.empty_like(two).copy_(torch.randn(one.shape, generator=generator))
        one.grad = two.grad.clone()
    for gradient in StoredGradients(sae).rows():
        mine.update_rows(getattr(sae, gradient.name), gradient)
    for name in MATRICES:
        mine.finish_rows(getattr(sae, name))
        getattr(sae, name).grad = None
    mine.step()
    theirs.step()


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_updates_by_rows_are_torchs_to_the_last_bit(monkeypatch, decay):
    for rows in (16, 64, 1024):
        monkeypatch.setattr("cytosae.training.gradients.ROWS_PER_BLOCK", rows)
        sae, mine, other, theirs = make_pair(decay=decay)
        for seed in range(5):
            take_step(seed, sae, mine, other, theirs)
        for one, two in zip(sae.parameters(), other.parameters(), strict=True):
            assert torch.equal(one, two)
            assert mine.state[one]["step"] == theirs.state[two]["step"] == 5


def test_a_state_in_another_layout_is_taken_over():
    sae, mine, other, theirs = make_pair()
    for seed in range(3):
        take_step(seed, sae, mine, other, theirs)
    state = copy.deepcopy(mine.state_dict())
    for moments in state["state"].values():
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name] = moments[name].contiguous()
    again = copy.deepcopy(sae)
    resumed = RowwiseAdam(groups(again, 0.0), lr=0.01, betas=(0.9, 0.999), device=CPU)
    resumed.load_state_dict(state)
    assert resumed.state[again.W_enc]["exp_avg"].stride() == again.W_enc.stride()
    take_step(9, sae, mine, other, theirs)
    take_step(9, again, resumed, copy.deepcopy(other), theirs)
    for one, two in zip(sae.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_copied_step_goes_on_like_the_original():
    step = TrainStep(
        make_sae("topk", 8, 32, k=3), lr=1e-3, weights=LossWeights(), use_ghost_grads=False, dead_feature_window=1,
        matmul=MatmulConfig(),
    )  # fmt: skip
    x = torch.randn(1, 9, 8, generator=torch.Generator().manual_seed(0))
    step.step(x)
    copied = copy.deepcopy(step)
    assert torch.equal(step.step(x).reconstruction, copied.step(x).reconstruction)
    assert copied.optimizer.state[copied.sae.W_enc]["step"] == 2


def test_weights_that_are_not_laid_out_by_latent_are_refused():
    sae, mine, *_ = make_pair()
    sae.W_enc.data = sae.W_enc.data.contiguous()
    gradient = RowGradient("W_enc", slice(0, S), torch.ones(S, D))
    with pytest.raises(ValueError, match="W_enc must have its latents' weights next to each other"):
        mine.update_rows(sae.W_enc, gradient)


def test_rows_of_both_matrices_are_latents():
    sae = make_case("relu")
    assert by_latent("W_enc", sae.W_enc).shape == by_latent("W_dec", sae.W_dec).shape == (S, D)


def test_a_step_imports_no_compiler():
    """torch's own methods of an optimiser import `torch._dynamo`, which takes as long as torch itself."""
    code = """
import sys, torch
from cytosae.sae.loss import LossWeights
from cytosae.sae.registry import make_sae
from cytosae.training.lr_schedule import LearningRateSchedule
from cytosae.training.step import TrainStep

step = TrainStep(
    make_sae("batchtopk", 8, 16, k=2), lr=1e-3, weights=LossWeights(), use_ghost_grads=False, dead_feature_window=2
)
schedule = LearningRateSchedule(
    step.optimizer, "constantwithwarmup", n_steps=4, warm_up_steps=1, n_cycles=1, decay_share=0.5
)
for _ in range(2):
    step.step(torch.randn(2, 4, 8))
    schedule.step()
step.load_state_dict(step.state_dict())
step.step(torch.randn(2, 4, 8))
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
