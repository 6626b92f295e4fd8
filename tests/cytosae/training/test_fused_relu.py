"""The closed form of relu against plain autograd: losses, gradients, counts, parts of a batch."""

import copy

import pytest
import torch

from cytosae.sae.base import Sae
from cytosae.sae.loss import SaeLoss
from cytosae.sae.relu import ReluSae
from cytosae.training.fused_relu import fused_relu_loss
from cytosae.training.matmul import MatmulConfig
from tests.support.losses import make_inputs, plain_loss

B, T, D, S = 4, 17, 48, 300
SMALL = 8 * S * 11
"""Bytes for the latents of 11 tokens, so that parts are uneven."""


def make_case(dtype: torch.dtype, *, shift: float = 0.0) -> tuple[Sae, torch.Tensor, torch.Tensor]:
    """An autoencoder without zeros, activations with one zero token, and a mask of dead latents."""
    generator = torch.Generator().manual_seed(0)
    sae = ReluSae(D, S, dtype=dtype)
    x = 2 * torch.randn(B, T, D, generator=generator, dtype=torch.float64)
    x[1, 2] = 0
    with torch.no_grad():
        sae.b_enc.copy_(0.3 * torch.randn(S, generator=generator) + shift)
        sae.b_dec.copy_(0.1 * torch.randn(D, generator=generator))
        sae.W_dec.mul_(torch.rand(S, 1, generator=generator) + 0.5)
    return sae, x.to(dtype), torch.rand(S, generator=generator) < 0.3


def plain(sae: Sae, x: torch.Tensor, **options) -> SaeLoss:
    sae.zero_grad()
    loss = plain_loss(sae, x, **options)
    loss.terms.loss.backward()
    return loss._replace(reconstruction=loss.reconstruction.detach())


def fused(sae: Sae, x: torch.Tensor, *, matmul: MatmulConfig, **options) -> SaeLoss:
    loss, found = fused_relu_loss(sae, x.flatten(0, 1), make_inputs(x, **options), matmul)
    found.store_(sae)
    return loss._replace(reconstruction=loss.reconstruction.view(x.shape))


def gradients(sae: Sae) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in sae.named_parameters()}


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Distance relative to the norm of the expected tensor."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("sparse_below", [0.0, 1.1])
@pytest.mark.parametrize("max_bytes", [1 << 29, SMALL])
@pytest.mark.parametrize("norm_weighted_l1", [False, True])
@pytest.mark.parametrize("ghost", [False, True])
def test_losses_and_gradients_are_those_of_the_plain_path(ghost, norm_weighted_l1, max_bytes, sparse_below):
    sae, x, dead = make_case(torch.float64)
    options = {
        "l1_coefficient": 0.03, "dead_mask": dead if ghost else None, "mse_cls_coefficient": 2.0,
        "norm_weighted_l1": norm_weighted_l1,
    }  # fmt: skip
    wanted = plain(sae, x, **options)
    expected = gradients(sae)
    matmul = MatmulConfig(torch.float64, max_bytes=max_bytes, sparse_below=sparse_below)
    found = fused(sae, x, **options, matmul=matmul)
    for name in wanted.terms._fields:
        one, other = getattr(found.terms, name).item(), getattr(wanted.terms, name).item()
        assert one == pytest.approx(other, rel=1e-12), name
    assert (found.terms.ghost > 0) == ghost
    assert torch.equal(found.n_fired, wanted.n_fired)
    torch.testing.assert_close(found.reconstruction, wanted.reconstruction)
    for name, gradient in gradients(sae).items():
        assert distance(gradient, expected[name]) < 1e-11, name
    assert found.reconstruction.shape == x.shape


@pytest.mark.parametrize("sparse_below", [0.0, 1.1])
@pytest.mark.parametrize("max_bytes", [1 << 29, SMALL])
def test_float32_is_within_1e_5(max_bytes, sparse_below):
    sae, x, _ = make_case(torch.float32)
    options = {"l1_coefficient": 0.03, "mse_cls_coefficient": 2.0}
    wanted = plain(sae, x, **options)
    expected = gradients(sae)
    found = fused(sae, x, **options, matmul=MatmulConfig(max_bytes=max_bytes, sparse_below=sparse_below))
    for one, other in zip(found.terms, wanted.terms, strict=True):
        assert one.item() == pytest.approx(other.item(), rel=1e-5)
    for name, gradient in gradients(sae).items():
        assert distance(gradient, expected[name]) < 1e-5, name


@pytest.mark.parametrize("sparse_below", [0.0, 1.1])
def test_ghost_gradients_in_float32_are_as_exact_as_the_plain_ones(sparse_below):
    # The ghost term divides by its own error, which may be as small as rounding: the plain path is also off by more
    # than 1e-5 where that happens. So both are compared with float64.
    sae, x, dead = make_case(torch.float32)
    options = {"l1_coefficient": 0.03, "dead_mask": dead}
    plain(wide := copy.deepcopy(sae).double(), x.double(), **options)
    truth = gradients(wide)
    plain(sae, x, **options)
    allowed = {name: max(1e-5, 20 * distance(gradient, truth[name])) for name, gradient in gradients(sae).items()}
    fused(sae, x, **options, matmul=MatmulConfig(sparse_below=sparse_below))
    for name, gradient in gradients(sae).items():
        assert distance(gradient, truth[name]) < allowed[name] < 1e-2, name


@pytest.mark.parametrize("shift", [0.0, -2.0])
def test_bfloat16_products_leave_weights_and_gradients_in_float32(shift):
    sae, x, _ = make_case(torch.float32, shift=shift)
    wanted = plain(sae, x, l1_coefficient=0.03)
    expected = gradients(sae)
    found = fused(sae, x, l1_coefficient=0.03, matmul=MatmulConfig(torch.bfloat16))
    assert {parameter.dtype for parameter in sae.parameters()} == {torch.float32}
    assert found.terms.loss.item() == pytest.approx(wanted.terms.loss.item(), rel=5e-3)
    for name, gradient in gradients(sae).items():
        assert gradient.dtype == torch.float32
        assert 0 < distance(gradient, expected[name]) < 0.1, name  # a few latents near 0 fire in one and not the other


def test_no_tensor_of_tokens_and_latents_is_larger_than_the_budget():
    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            result = function(*arguments, **(named or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                    self.largest = max(self.largest, tensor.nbytes)
            return result

    generator = torch.Generator().manual_seed(0)
    sae, x = ReluSae(8, 512), torch.randn(4, 64, 8, generator=generator)
    budget = 64 * 512 * 4
    for matmul, most in ((MatmulConfig(max_bytes=budget), budget), (MatmulConfig(), 256 * 512 * 4)):
        with Watch() as watch:
            fused(sae, x, l1_coefficient=0.1, dead_mask=torch.ones(512) > 0, matmul=matmul)
        assert watch.largest == most
