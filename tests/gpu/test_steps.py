"""Training on each device: closed forms against autograd, steps, clipping, Adam, repeatability, the CPU's numbers."""

import copy

import pytest
import torch

from cytosae.sae import kernels
from cytosae.sae.base import Sae
from cytosae.sae.loss import LossInputs, LossWeights
from cytosae.sae.registry import ARCHITECTURES, make_sae
from cytosae.training.fused_loss import find_fused_loss
from cytosae.training.matmul import MatmulConfig
from cytosae.training.step import TrainStep
from tests.cytosae.training.test_adam import make_pair, take_step
from tests.cytosae.training.test_fused_loss import DEAD, SMALL, WEIGHTS, S, largest_difference, make_case
from tests.cytosae.training.test_fused_loss import make_tokens as make_host_tokens

LIMITS = {torch.float64: 1e-9, torch.float32: 4e-5}
"""Relative error of gradients, by the type that everything is computed in; ghost gradients on an H200 have 2.1e-5."""


def make_tokens(seed: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return make_host_tokens(seed, dtype).to(device)


def make_step(sae: Sae, matmul: MatmulConfig | None, **options) -> TrainStep:
    step = TrainStep(
        sae, lr=0.01, weights=WEIGHTS, use_ghost_grads=sae.architecture == "relu", dead_feature_window=1, matmul=matmul,
        **options,
    )  # fmt: skip
    step.tracker.n_steps_since_fired[:DEAD] = 10
    return step


def all_equal(one: TrainStep, other: TrainStep) -> bool:
    pairs = zip(one.sae.state_dict().values(), other.sae.state_dict().values(), strict=True)
    return all(torch.equal(first, second) for first, second in pairs)


@pytest.mark.parametrize("sparse_below", [0.0, 1.1])
@pytest.mark.parametrize("max_bytes", [1 << 29, SMALL])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_closed_forms_are_those_of_autograd(device, arch, dtype, max_bytes, sparse_below):
    sae, x = make_case(arch, dtype).to(device), make_tokens(5, dtype, device)[0]
    plain = copy.deepcopy(sae)
    dead = torch.arange(S, device=device) < DEAD
    variance = (x - x.mean(dim=0)).square().sum()
    inputs = LossInputs(variance, WEIGHTS, dtype, dead, use_ghost_grads=arch == "relu")
    wanted = plain.training_loss(x, inputs)
    wanted.terms.loss.backward()
    found, gradients = find_fused_loss(sae)(sae, x, inputs, MatmulConfig(dtype, max_bytes, sparse_below))
    gradients.store_(sae)
    assert found.terms.loss.item() == pytest.approx(wanted.terms.loss.item(), rel=LIMITS[dtype])
    assert torch.equal(found.n_fired, wanted.n_fired)
    assert found.reconstruction.device.type == device.type
    for name, parameter in sae.named_parameters():
        expected = getattr(plain, name).grad
        assert (parameter.grad - expected).norm() <= LIMITS[dtype] * expected.norm(), name


@pytest.mark.parametrize("max_gradient", [None, 0.05])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_steps_are_those_of_autograd(device, arch, max_gradient):
    sae = make_case(arch).to(device)
    plain = make_step(copy.deepcopy(sae), None, max_gradient=max_gradient)
    fused = make_step(sae, MatmulConfig(torch.float64, sparse_below=0.0), max_gradient=max_gradient)
    for seed in range(4):
        x = make_tokens(seed, torch.float64, device)
        wanted, found = plain.step(x), fused.step(x)
        assert found.terms.loss.item() == pytest.approx(wanted.terms.loss.item(), rel=1e-9)
    assert largest_difference(fused.sae, plain.sae) < 1e-8


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_device_takes_the_cpus_steps(device, arch):
    results = []
    for where in (torch.device("cpu"), device):
        step = make_step(make_case(arch).to(where), MatmulConfig(torch.float64, sparse_below=0.0), max_gradient=0.05)
        losses = [step.step(make_tokens(seed, torch.float64, where)).terms.loss.item() for seed in range(4)]
        results.append((losses, step.sae.cpu()))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-9)
    assert largest_difference(results[1][1], results[0][1]) < 1e-8


@pytest.mark.parametrize("sparse_below", [0.0, 1.1])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_bfloat16_products_are_near_float32(device, arch, sparse_below):
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        step = make_step(make_case(arch, torch.float32).to(device), MatmulConfig(dtype, sparse_below=sparse_below))
        losses.append([step.step(make_tokens(seed, torch.float32, device)).terms.loss.item() for seed in range(3)])
        assert {(part.dtype, part.device.type) for part in step.sae.parameters()} == {(torch.float32, device.type)}
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=0.03)


@pytest.mark.parametrize("sparse_below", [0.0, 1.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_steps_repeat_and_resume_to_the_last_bit(device, arch, dtype, sparse_below):
    def make() -> TrainStep:
        sae = make_sae(arch, 64, 2048, k=16, device=device)
        weights = LossWeights(l1_coefficient=1e-3)
        matmul = MatmulConfig(dtype, sparse_below=sparse_below)
        return TrainStep(
            sae, lr=1e-3, weights=weights, use_ghost_grads=arch == "relu", dead_feature_window=0, max_gradient=0.5,
            matmul=matmul,
        )  # fmt: skip

    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(4, 250, 64, generator=generator).to(device) for _ in range(4)]
    unbroken, again, resumed = make(), make(), make()
    for number, x in enumerate(batches):
        unbroken.step(x)
        again.step(x)
        if number == 1:
            resumed.load_state_dict(copy.deepcopy(again.state_dict()))
        elif number > 1:
            resumed.step(x)
    assert all_equal(unbroken, again), "the same steps gave other numbers"
    assert all_equal(unbroken, resumed), "a resumed run gave other numbers"


@pytest.mark.parametrize("rows", [16, 64, 1 << 20])
def test_adam_by_rows_is_torchs_to_the_last_bit(device, monkeypatch, rows):
    for name in ("ROWS_PER_BLOCK", "ROWS_PER_BLOCK_GPU"):
        monkeypatch.setattr(f"cytosae.training.gradients.{name}", rows)
    sae, mine, other, theirs = make_pair(device)
    with kernels.without_kernels():
        for seed in range(5):
            take_step(seed, sae, mine, other, theirs)
    for one, two in zip(sae.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        assert mine.state[one]["step"] == theirs.state[two]["step"] == 5
        assert mine.state[one]["step"].device.type == device.type
