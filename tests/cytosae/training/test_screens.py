"""Where `batchtopk` looks for what a step keeps: any screen gives the same result, and one is nearly always enough."""

import copy

import pytest
import torch

from cytosae.training.encoder_blocks import EncoderProduct
from cytosae.training.matmul import MatmulConfig
from tests.cytosae.training.test_fused_loss import largest_difference, make_case, make_step, make_tokens

FAST = MatmulConfig(torch.float64)


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """Number of entries of each time that a batch was encoded."""
    found: list[int] = []
    above = EncoderProduct.above

    def counting(self, bound):
        entries = above(self, bound)
        found.append(len(entries.values))
        return entries

    monkeypatch.setattr(EncoderProduct, "above", counting)
    return found


@pytest.mark.parametrize("growth", [1.0, 0.96, 1.04])
@pytest.mark.parametrize("arch", ["batchtopk", "matryoshka"])
def test_steps_encode_once_while_activations_grow_or_shrink(encoded, arch, growth):
    """The running threshold follows a thousand steps, and activations of a young run change sooner."""
    sae = make_case(arch)
    fused, plain = make_step(sae, FAST), make_step(copy.deepcopy(sae), None)
    n_steps = 40
    for number in range(n_steps):
        x = make_tokens(number) * (growth**number if growth > 1 else growth ** (number - n_steps))
        found, wanted = fused.step(x), plain.step(x)
        assert found.terms.loss.item() == pytest.approx(wanted.terms.loss.item(), rel=1e-9)
    assert largest_difference(fused.sae, plain.sae) < 1e-8
    assert n_steps <= len(encoded) <= 1.2 * n_steps
    assert sum(encoded[-20:]) < 20 * 4 * sae.k * x.shape[1], "too many candidates"


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0, 3.0, 1e6])
def test_any_screen_gives_the_same_step(encoded, share):
    results = []
    for first in (None, share):
        step = make_step(make_case("batchtopk"), FAST)
        step.step(make_tokens(1))
        step.sae.screen_share = first if first is not None else step.sae.screen_share
        step.step(make_tokens(2))
        results.append(step.sae.state_dict())
    assert all(torch.equal(values, results[1][name]) for name, values in results[0].items())
    assert len(encoded) <= 2 * 3 * 2


def test_where_too_few_are_positive_all_are_kept_and_looked_for_once(encoded):
    step = make_step(make_case("batchtopk"), FAST)
    step.step(make_tokens(0))
    with torch.no_grad():
        step.sae.b_enc.sub_(5)
    for _ in range(12):
        x = make_tokens(3)
        positive = step.sae.pre_activations(x.flatten(0, 1)) > 0
        before = len(encoded)
        found = step.step(x)
        assert found.n_fired.sum() == positive.sum() < step.sae.k * x.shape[1]
    assert len(encoded) == before + 1, "the last step looked again for what is not there"
    with torch.no_grad():
        step.sae.b_enc.add_(6)
    for _ in range(40):
        before = len(encoded)
        found = step.step(make_tokens(3))
    assert found.n_fired.sum() == step.sae.k * x.shape[1]
    assert len(encoded) == before + 1
    assert encoded[-1] < positive.numel() / 2, "the screen stayed open"
