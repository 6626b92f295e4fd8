"""Every closed form against plain autograd: losses, gradients, steps, and what memory and screens may not change."""

import copy

import pytest
import torch

from cytosae.sae.base import Sae
from cytosae.sae.loss import LossInputs, LossWeights
from cytosae.sae.registry import ARCHITECTURES, make_sae
from cytosae.sae.relu import ReluSae
from cytosae.training import encoder_blocks, fused_elementwise, fused_topk
from cytosae.training.fused_loss import find_fused_loss
from cytosae.training.matmul import MatmulConfig
from cytosae.training.step import TrainStep

N, D, S, K = 77, 24, 160, 5
SMALL = 8 * S * 11
"""Bytes for the latents of 11 tokens, so that parts are uneven."""
WEIGHTS = LossWeights(l1_coefficient=0.05, pre_act_coefficient=0.5)
INPUTS = LossInputs(torch.ones(()), WEIGHTS, torch.float64)
DEAD = 60
"""More than D / 2, so that AuxK must choose."""

pytestmark = pytest.mark.filterwarnings("error")


def make_case(arch: str, dtype: torch.dtype = torch.float64) -> Sae:
    """An autoencoder without zeros, in which a few latents are active and thresholds lie on both sides of 0."""
    sae = make_sae(arch, D, S, k=K, bandwidth=0.3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.2 * torch.randn(len(parameter), generator=generator))
            if name == "threshold":
                parameter.add_(0.3)
        sae.b_enc.sub_(0.3)
    return sae.to(dtype)


def make_tokens(seed: int = 5, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(1, N, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_step(sae: Sae, matmul: MatmulConfig | None, **options) -> TrainStep:
    ghosts = sae.architecture == "relu"
    step = TrainStep(
        sae, lr=0.01, weights=WEIGHTS, use_ghost_grads=ghosts, dead_feature_window=1, matmul=matmul, **options
    )
    step.tracker.n_steps_since_fired[:DEAD] = 10
    return step


def largest_difference(one: Sae, other: Sae) -> float:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((first.double() - second.double()).detach().abs().max()) for first, second in pairs)


def test_every_architecture_has_a_closed_form_and_a_subclass_has_none():
    class Derived(ReluSae):
        """May have another loss."""

    assert find_fused_loss(Derived(D, S)) is None
    assert all(find_fused_loss(make_sae(name, D, S, k=3)) for name in ARCHITECTURES)


@pytest.mark.parametrize("sparse_below", [0.0, 1.1])
@pytest.mark.parametrize("max_bytes", [1 << 29, SMALL])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_losses_and_gradients_are_those_of_plain_autograd(arch, max_bytes, sparse_below):
    sae, x = make_case(arch), make_tokens()[0]
    plain = copy.deepcopy(sae)
    dead = torch.arange(S) < DEAD
    variance = (x - x.mean(dim=0)).square().sum()
    inputs = LossInputs(variance, WEIGHTS, x.dtype, dead, use_ghost_grads=arch == "relu")
    wanted = plain.training_loss(x, inputs)
    wanted.terms.loss.backward()
    matmul = MatmulConfig(torch.float64, max_bytes=max_bytes, sparse_below=sparse_below)
    found, gradients = find_fused_loss(sae)(sae, x, inputs, matmul)
    gradients.store_(sae)
    for name, term in wanted.terms._asdict().items():
        assert getattr(found.terms, name).item() == pytest.approx(term.item(), rel=1e-12), name
    assert torch.equal(found.n_fired, wanted.n_fired)
    assert 0 < found.n_fired.sum() < found.n_fired.numel() * N
    torch.testing.assert_close(found.reconstruction, wanted.reconstruction.detach())
    for name, parameter in sae.named_parameters():
        expected = getattr(plain, name).grad
        assert expected.any(), name
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-13)
    if "threshold" in dict(sae.named_buffers()):
        assert sae.threshold == plain.threshold


@pytest.mark.parametrize("sparse_below", [0.0, 1.1])
@pytest.mark.parametrize("max_gradient", [None, 0.05])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_steps_are_those_of_plain_autograd(arch, max_gradient, sparse_below):
    sae = make_case(arch)
    plain = make_step(copy.deepcopy(sae), None, max_gradient=max_gradient)
    fused = make_step(sae, MatmulConfig(torch.float64, sparse_below=sparse_below), max_gradient=max_gradient)
    before = copy.deepcopy(sae)
    for seed in range(4):
        wanted, found = plain.step(make_tokens(seed)), fused.step(make_tokens(seed))
        assert found.terms.loss.item() == pytest.approx(wanted.terms.loss.item(), rel=1e-9)
        assert torch.equal(found.n_fired, wanted.n_fired)
    assert largest_difference(fused.sae, plain.sae) < 1e-9
    assert largest_difference(fused.sae, before) > 1e-3
    assert all(part.grad is None for part in (fused.sae.W_enc, fused.sae.W_dec)), "a gradient outlives the step"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_float32_is_within_1e_5(arch):
    x = make_tokens(dtype=torch.float32)[0]
    results = []
    for matmul in (None, MatmulConfig(sparse_below=0.0), MatmulConfig(sparse_below=1.1)):
        sae = make_case(arch, torch.float32)
        inputs = LossInputs((x - x.mean(dim=0)).square().sum(), WEIGHTS, x.dtype)
        if matmul is None:
            loss = sae.training_loss(x, inputs)
            loss.terms.loss.backward()
        else:
            loss, gradients = find_fused_loss(sae)(sae, x, inputs, matmul)
            gradients.store_(sae)
        results.append((loss.terms.loss.item(), {name: part.grad for name, part in sae.named_parameters()}))
    (wanted, expected), *others = results
    for found, gradients in others:
        assert found == pytest.approx(wanted, rel=1e-5)
        for name, gradient in gradients.items():
            assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_bfloat16_products_leave_weights_and_gradients_in_float32(arch):
    losses = []
    for matmul in (MatmulConfig(), MatmulConfig(torch.bfloat16)):
        step = make_step(make_case(arch, torch.float32), matmul)
        losses.append([step.step(make_tokens(seed, torch.float32)).terms.loss.item() for seed in range(3)])
        assert {parameter.dtype for parameter in step.sae.parameters()} == {torch.float32}
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=0.03)


@pytest.mark.parametrize("arch", ["topk", "batchtopk", "matryoshka", "jumprelu", "gated"])
def test_memory_and_blocks_change_nothing_that_is_chosen(arch, monkeypatch):
    results = []
    for width, max_bytes in ((2048, 1 << 29), (7, 1 << 29), (64, 8 * 64 * 70)):
        monkeypatch.setattr(encoder_blocks, "LATENTS_PER_BLOCK", width)
        step = make_step(make_case(arch), MatmulConfig(torch.float64, max_bytes, sparse_below=1.1))
        results.append([step.step(make_tokens(seed)).n_fired for seed in range(3)] + [step.sae.b_enc.detach()])
    for other in results[1:]:
        for found, wanted in zip(other, results[0], strict=True):
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("threshold", [0.0, 1e-3, 0.5, 50.0])
@pytest.mark.parametrize("arch", ["batchtopk", "matryoshka"])
def test_the_screen_does_not_change_what_a_batch_keeps(arch, threshold):
    sae = make_case(arch)
    sae.threshold.fill_(threshold)
    centred = make_tokens()[0] - sae.b_dec
    wanted = copy.deepcopy(sae).keep(sae.pre_activations(make_tokens()[0]))
    found = fused_topk._select(sae, centred.detach(), INPUTS, MatmulConfig(torch.float64))
    assert torch.equal(torch.stack([found.rows, found.columns], dim=1), wanted.nonzero())
    assert len(found.values) == K * N


def test_a_batch_with_too_few_positive_latents_keeps_them_all():
    sae = make_case("batchtopk")
    with torch.no_grad():
        sae.b_enc.fill_(-1.3)
    found = fused_topk._select(sae, (make_tokens()[0] - sae.b_dec).detach(), INPUTS, MatmulConfig(torch.float64))
    assert 0 < len(found.values) < K * N
    assert len(found.values) == (sae.pre_activations(make_tokens()[0]) > 0).sum()


def test_equal_values_go_to_the_first_tokens_and_latents_in_bfloat16():
    sae = make_case("batchtopk", torch.float32)
    x = make_tokens(dtype=torch.float32)[0].repeat(6, 1)
    results = []
    for max_bytes in (1 << 29, 2 * S * 64):
        again = copy.deepcopy(sae)
        matmul = MatmulConfig(torch.bfloat16, max_bytes)
        results.append(fused_topk._select(again, (x - sae.b_dec).detach(), INPUTS, matmul))
    one, other = results
    assert len(one.values) == K * len(x)
    assert torch.equal(one.rows, other.rows)
    assert torch.equal(one.columns, other.columns)
    last = one.values.min()
    assert (one.values == last).sum() > 1, "no tie at the threshold"


@pytest.mark.parametrize("width", [2048, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_entries_above_a_bound_are_those_of_a_comparison(dtype, width, monkeypatch):
    monkeypatch.setattr(encoder_blocks, "LATENTS_PER_BLOCK", width)
    sae, x = make_case("relu", torch.float32), make_tokens(dtype=torch.float32)[0]
    product = encoder_blocks.EncoderProduct(sae, (x - sae.b_dec).detach(), MatmulConfig(dtype))
    dense = torch.empty(N, S, dtype=dtype)
    for block in product:
        dense[block.tokens, block.latents] = block.pre
    for bound in (0.0, -0.0, 0.25, -0.25, 1e-30):
        found = product.above(torch.tensor(bound, dtype=dtype)).sort()
        assert torch.equal(torch.stack([found.rows, found.columns], dim=1), (dense > bound).nonzero())
        assert torch.equal(found.values, dense[dense > bound])
    few = product.above(torch.full((S,), 0.25, dtype=dtype))
    assert product.above_if_few(torch.zeros((), dtype=dtype), 0.01) is None
    assert len(few.values) == (dense > 0.25).sum()
    all_of_them = product.above_if_few(torch.zeros((), dtype=dtype), 0.99)
    assert torch.equal(torch.stack([all_of_them.rows, all_of_them.columns], dim=1), (dense > 0).nonzero())


def test_many_active_latents_of_gated_and_jumprelu_take_the_dense_form():
    x = make_tokens()[0]
    inputs = LossInputs((x - x.mean(dim=0)).square().sum(), WEIGHTS, x.dtype)
    for arch in ("gated", "jumprelu"):
        for sparse_below, cheap in ((0.01, False), (1.1, True)):
            sae = make_case(arch)
            _, gradients = find_fused_loss(sae)(sae, x, inputs, MatmulConfig(torch.float64, sparse_below=sparse_below))
            assert (type(gradients).__name__ == "SparseGradients") == cheap


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("arch", ["jumprelu", "gated"])
def test_blocks_of_the_dense_form_change_nothing(arch, ahead, monkeypatch):
    results = []
    for n_latents, n_tokens in ((1024, 64), (50, 7), (159, 1)):
        monkeypatch.setattr("cytosae.training.gradients.ROWS_PER_BLOCK", n_latents)
        monkeypatch.setattr(fused_elementwise, "_TOKENS_AT_ONCE", n_tokens)
        monkeypatch.setattr(fused_elementwise, "runs_ahead", lambda device: ahead)
        step = make_step(make_case(arch), MatmulConfig(torch.float64, sparse_below=0.0))
        losses = [step.step(make_tokens(seed)) for seed in range(3)]
        results.append([loss.n_fired for loss in losses] + list(step.sae.state_dict().values()))
    for other in results[1:]:
        for found, wanted in zip(other, results[0], strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("arch", ["jumprelu", "gated"])
def test_the_dense_form_in_bfloat16_is_near_the_sparse_one(arch):
    results = []
    for sparse_below in (0.0, 1.1):
        sae, x = make_case(arch, torch.float32), make_tokens(dtype=torch.float32)[0]
        inputs = LossInputs((x - x.mean(dim=0)).square().sum(), WEIGHTS, x.dtype)
        loss, found = find_fused_loss(sae)(sae, x, inputs, MatmulConfig(torch.bfloat16, sparse_below=sparse_below))
        found.store_(sae)
        results.append((loss.n_fired, {name: part.grad for name, part in sae.named_parameters()}))
    (n_dense, dense), (n_sparse, sparse) = results
    assert torch.equal(n_dense, n_sparse), "both look at the same products, rounded once"
    for name, gradient in sparse.items():
        assert (dense[name] - gradient).norm() <= 0.02 * gradient.norm(), name
