"""The screened encoder against the dense one: the same latents are active, whatever is hard about weights or tokens."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cytosae.sae.int8_weights import LARGEST, Int8Weights, has_int8_products
from cytosae.sae.registry import ARCHITECTURES, make_sae
from cytosae.statistics.block_encoder import BlockEncoder
from cytosae.statistics.screen import Screen
from cytosae.statistics.screened_encoder import make_screened_encoder
from cytosae.statistics.screened_images import ScreenedImageEncoder

D, S, T, K = 24, 200, 9, 5

FAST = pytest.param(
    True, marks=pytest.mark.skipif(not has_int8_products(), reason="this processor has no exact 8-bit products")
)


def make_trained(name, *, seed=0, spread=1.0):
    """An autoencoder with few active latents, thresholds, biases and channels of very different sizes."""
    sae = make_sae(name, D, S, k=K, prefixes=(0.25, 1.0), bandwidth=0.2)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sae.tie_()
        sae.W_enc.mul_(torch.exp(spread * torch.randn(D, 1, generator=generator)))
        sae.b_dec.normal_(generator=generator)
        x = make_tokens(64, seed=seed)
        sae.b_enc.copy_(0.2 * sae.pre_activations(x).std() * torch.randn(S, generator=generator))
        if name in ("relu", "gated"):
            sae.b_enc.sub_(sae.pre_activations(x).flatten().topk(K * len(x)).values[-1])
        sae.fit_to_tokens_(x)
        sae.calibrate_(x)
    return sae


def make_tokens(n, *, seed=1, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(spread * torch.randn(n, 1, generator=generator))
    return sizes * torch.randn(n, D, generator=generator)


def encode_densely(sae, tokens):
    return sae.activate(torch.addmm(sae.b_enc, tokens, sae.W_enc)).detach()


def encode_screened(sae, tokens, *, fast):
    dense = torch.zeros(len(tokens), len(sae.b_enc))
    for first, acts in make_screened_encoder(sae, fast=fast).encode(tokens):
        dense[acts.columns, acts.rows + first] = acts.values
    return dense


def assert_same(found, expected):
    scale = expected.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fast", [False, FAST])
@pytest.mark.parametrize("name", ["relu", "jumprelu", "gated", "topk", "batchtopk", "matryoshka"])
def test_activations_equal_the_dense_ones(name, fast):
    sae, tokens = make_trained(name), make_tokens(700)
    expected = encode_densely(sae, tokens)
    assert 0 < (expected > 0).float().mean() < 0.2
    assert_same(encode_screened(sae, tokens, fast=fast), expected)


def test_all_architectures_can_be_screened():
    assert all(make_screened_encoder(make_sae(name, D, S), fast=False) for name in ARCHITECTURES)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["topk", "batchtopk", "jumprelu"]), st.floats(0, 6), st.floats(0, 6))
def test_no_active_latent_is_missed(seed, name, channels, sizes):
    sae = make_trained(name, seed=seed, spread=channels)
    tokens = make_tokens(40, seed=seed + 1, spread=sizes)
    pre = torch.addmm(sae.b_enc, tokens, sae.W_enc).detach().double()
    near = 1e-5 * (tokens.norm(dim=1, keepdim=True) * sae.W_enc.norm(dim=0) + sae.b_enc.abs())
    bound = pre.topk(K, dim=1).values[:, -1:] if name == "topk" else sae.active_above
    found = encode_screened(sae, tokens, fast=has_int8_products()) > 0
    # A latent within rounding of its bound may be either.
    assert bool(found[(pre > bound + near) & (pre > near)].all())
    assert not found[(pre < bound - near) | (pre < -near)].any()


@pytest.mark.parametrize("fast", [False, FAST])
@pytest.mark.parametrize("by_token", [False, True])
def test_a_screen_lets_few_entries_through(by_token, fast):
    sae, tokens = make_trained("topk"), make_tokens(500)
    pre = torch.addmm(sae.b_enc, tokens, sae.W_enc).detach()
    bound = pre.topk(K, dim=1).values[:, -1:].clamp_min(1e-3) if by_token else pre.quantile(0.97, dim=0)
    found = torch.zeros_like(pre, dtype=torch.bool)
    for entries in Screen(sae, fast=fast).above(tokens, bound):
        found[entries.columns, entries.rows] = True
    assert bool(found[pre > bound].all())
    assert found.float().mean() < 0.4


def test_latents_that_tie_at_the_kth_place_are_all_kept():
    sae, tokens = make_trained("topk"), make_tokens(50)
    with torch.no_grad():
        for part in (sae.W_enc.t(), sae.b_enc):
            part[S // 2 :] = part[: S // 2].clone()
    acts = encode_screened(sae, tokens, fast=has_int8_products())
    assert torch.equal(acts[:, : S // 2], acts[:, S // 2 :])
    assert ((acts > 0).sum(dim=1) == K + 1).all()


@pytest.mark.parametrize("name", ["relu", "topk"])
def test_no_tokens_have_no_activations(name):
    sae = make_trained(name)
    assert encode_screened(sae, make_tokens(0), fast=False).shape == (0, S)
    assert make_screened_encoder(sae, fast=False).candidate_share(make_tokens(0)) == 0


def test_tokens_with_fewer_than_k_positive_latents():
    sae, tokens = make_trained("topk"), make_tokens(50)
    with torch.no_grad():
        sae.b_enc.sub_(torch.addmm(sae.b_enc, tokens, sae.W_enc).amax(dim=1).median())
    expected = encode_densely(sae, tokens)
    assert 0 < (expected > 0).any(dim=1).sum() < len(tokens)
    assert_same(encode_screened(sae, tokens, fast=has_int8_products()), expected)


@pytest.mark.parametrize("shares", [(1.0,), (100.0, 0.8), (100.0,), (1e-6,), (1.2, 1e-6)])
def test_any_bound_gives_the_largest_latents(monkeypatch, shares):
    """Too high, too few are above it; too low, too many."""
    monkeypatch.setattr("cytosae.statistics.screened_encoder._SHARES", shares)
    monkeypatch.setattr("cytosae.statistics.screened_encoder._MOST", 1)
    sae, tokens = make_trained("topk"), make_tokens(200)
    assert_same(encode_screened(sae, tokens, fast=has_int8_products()), encode_densely(sae, tokens))


@pytest.mark.parametrize("name", ["batchtopk", "topk"])
def test_values_that_are_not_numbers_stay_so(name):
    sae, tokens = make_trained(name), make_tokens(300)
    tokens[7, 3], tokens[8, 2] = torch.nan, torch.inf
    expected = encode_densely(sae, tokens)
    found = encode_screened(sae, tokens, fast=has_int8_products())
    ordinary = [n for n in range(300) if n not in (7, 8)]
    assert_same(found[ordinary], expected[ordinary])
    assert found[7].isnan().any()
    assert expected[7].isnan().any()


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("thresholds", [(), (0.0, 0.3, -1.0)])
def test_images_are_reduced_as_by_the_dense_encoder(name, thresholds):
    sae = make_trained(name)
    images = make_tokens(21 * T).view(21, T, D).half()
    expected = BlockEncoder(sae, thresholds).reduce(images, 3)
    encoder = ScreenedImageEncoder(sae, make_screened_encoder(sae, fast=has_int8_products()), thresholds)
    found = encoder.reduce(images, 3)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.counts, expected.counts)
    assert found.counts.dtype == expected.counts.dtype
    for size in (1, 5):
        parts = [encoder.reduce(images[at : at + size], 3 + at).scores for at in range(0, 21, size)]
        assert torch.equal(torch.cat(parts), found.scores), "depends on how the rows were split"


@pytest.mark.parametrize("name", ["relu", "topk"])
def test_activations_are_passed_on_in_parts(name, monkeypatch):
    monkeypatch.setattr("cytosae.statistics.screened_images.LATENT_CHUNK", 64)
    monkeypatch.setattr("cytosae.statistics.screen.LATENTS_AT_ONCE", 128)
    sae = make_trained(name)
    images = make_tokens(10 * T).view(10, T, D)
    found = torch.full((10, T, S), -1.0)

    def keep(rows, latents, acts):
        assert acts.shape[2] <= 64
        found[rows, :, latents] = acts

    ScreenedImageEncoder(sae, make_screened_encoder(sae, fast=False)).reduce(images, 6, on_acts=keep)
    expected = encode_densely(sae, (images - sae.b_dec).flatten(0, 1)).detach()
    assert_same(found.view(-1, S), expected)


@pytest.mark.parametrize("name", ["jumprelu", "topk"])
def test_the_sum_of_an_activation_does_not_depend_on_the_others(name):
    sae, tokens = make_trained(name), make_tokens(300)
    whole = encode_screened(sae, tokens, fast=has_int8_products())
    alone = [encode_screened(sae, tokens[at : at + 1], fast=has_int8_products()) for at in range(0, 300, 7)]
    assert torch.equal(torch.cat(alone), whole[::7])


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (256, 384, 130), (300, 770, 65)])
@pytest.mark.skipif(not has_int8_products(), reason="this processor has no exact 8-bit products")
def test_fast_products_equal_plain_ones(shape):
    n, d, s = shape
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(s, d, generator=generator) * torch.rand(s, 1, generator=generator)
    tokens = torch.randint(-LARGEST, LARGEST + 1, (n, d), generator=generator).to(torch.int8)
    plain = Int8Weights(weights, fast=False)
    bias = 0.1 * torch.randn(s, generator=generator)
    products = tokens.double() @ (weights / plain.scale[:, None]).round().double().t() * plain.scale.double() * 0.01
    decided = (products + bias).abs() > 1e-5
    found = Int8Weights(weights, fast=True).above_zero(tokens, 0.01, bias) > 0
    assert torch.equal(found[decided], (products + bias > 0)[decided])
    assert torch.equal(found[decided], (plain.above_zero(tokens, 0.01, bias) > 0)[decided])
    torch.testing.assert_close(Int8Weights(weights, fast=True).multiply(tokens) * 0.01, products.float())


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What was found out about this processor is forgotten, before the test and after it."""
    has_int8_products.cache_clear()
    yield
    has_int8_products.cache_clear()


@pytest.mark.usefixtures("forgotten")
def test_a_processor_whose_products_overflow_is_noticed(monkeypatch):
    """Instructions that add pairs of products in 16 bits, as processors without others do."""

    def overflow(tokens, scale, zero, packed, w_scale, zeros, bias, out_scale, *rest):
        products = tokens.int().view(len(tokens), -1, 2)[:, None] * packed.int().view(len(packed), -1, 2)
        total = products.sum(dim=3).clamp(-(2**15), 2**15 - 1).sum(dim=2) - zero * packed.int().sum(dim=1)
        return (total * w_scale * scale + bias > 0).to(torch.uint8)

    monkeypatch.setattr(torch.ops.onednn, "qlinear_prepack", lambda weight, shape: weight)
    monkeypatch.setattr(torch.ops.onednn, "qlinear_pointwise", overflow)
    assert not has_int8_products()


@pytest.mark.usefixtures("forgotten")
def test_a_torch_without_the_operators_is_noticed(monkeypatch):
    def refuse(*arguments):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(torch.ops.onednn, "qlinear_prepack", refuse)
    assert not has_int8_products()
