"""Rates of the machine's products: measured once, remembered, and measured again where the memory is of no use."""

import json
import math
from pathlib import Path

import pytest
import torch

from cytosae.sae.int8_weights import has_int8_products
from cytosae_pipeline.runtime import product_rates
from cytosae_pipeline.runtime.product_rates import ProductRates, find_rates, measure_rates, rates_path


@pytest.fixture
def n_measured(tmp_path, monkeypatch) -> list[int]:
    """Widths that were measured, in a home without memories."""
    found: list[int] = []

    def measure(d_in: int) -> ProductRates:
        found.append(d_in)
        return ProductRates(fp32=2e9, bf16=6e9, sparse=3e8, int8=8e9)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(product_rates, "measure_rates", measure)
    return found


def test_rates_are_positive_and_sparse_products_pay_below_some_share():
    rates = measure_rates(16, n_tokens=64, n_latents=128)
    assert all(rate > 0 and math.isfinite(rate) for rate in (rates.fp32, rates.bf16, rates.sparse))
    for precision in ("fp32", "bf16"):
        assert 0 < rates.crossover(precision) <= 1
    assert ProductRates(fp32=2e9, bf16=6e9, sparse=3e8, int8=8e9).crossover("fp32") == pytest.approx(0.15)
    assert ProductRates(fp32=2e9, bf16=6e9, sparse=3e8, int8=8e9).crossover("bf16") == pytest.approx(0.05)
    assert ProductRates(fp32=2e9, bf16=6e9, sparse=9e9, int8=0.0).crossover("fp32") == 1


def test_products_of_8_bits_have_a_rate_where_they_are_exact(monkeypatch):
    assert (measure_rates(16, n_tokens=64, n_latents=128).int8 > 0) == has_int8_products()
    monkeypatch.setattr(product_rates, "has_int8_products", lambda: False)
    assert measure_rates(16, n_tokens=64, n_latents=128).int8 == 0


def test_slow_products_of_8_bits_are_measured_on_few_tokens_alone(monkeypatch):
    sizes = []

    class Slow(product_rates.Int8Weights):
        def __init__(self, weights, *, fast):
            super().__init__(weights, fast=False)

        def above_zero(self, tokens, scale, bias):
            sizes.append((len(tokens), len(bias)))
            return super().above_zero(tokens, scale, bias)

    monkeypatch.setattr(product_rates, "has_int8_products", lambda: True)
    monkeypatch.setattr(product_rates, "Int8Weights", Slow)
    x, weights = torch.randn(512, 16), torch.randn(1024, 16)
    assert 0 < product_rates._measure_int8(x, weights, 1e18) < 1e18
    assert set(sizes) == {(64, 256)}
    product_rates._measure_int8(x, weights, 1.0)
    assert (512, 1024) in sizes


def test_what_was_measured_is_remembered_for_the_width_and_the_threads(n_measured, monkeypatch):
    first = find_rates(384)
    assert find_rates(384) == first
    assert n_measured == [384]
    find_rates(768)
    assert n_measured == [384, 768]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    find_rates(384)
    assert n_measured == [384, 768, 384]
    assert len(json.loads(rates_path().read_text())) == 3
    assert oct(rates_path().stat().st_mode & 0o022) == "0o0"


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[1]", b"[" * 99_999, b'{"KEY": {"fp32": 1e9}}', b'{"KEY": {"fp32": 0, "bf16": 1, "sparse": 1}}',
     b'{"KEY": {"fp32": NaN, "bf16": 1, "sparse": 1}}', b'{"KEY": {"fp32": "x", "bf16": 1, "sparse": 1}}',
     b'{"KEY": {"fp32": 1, "bf16": 1, "sparse": 1}}', b'{"KEY": {"fp32": 1, "bf16": 1, "sparse": 1, "int8": -1}}'],
)  # fmt: skip
def test_a_damaged_memory_is_measured_again(n_measured, damage):
    find_rates(384)
    (key,) = json.loads(rates_path().read_text())
    rates_path().write_bytes(damage.replace(b"KEY", key.encode()))
    find_rates(384)
    assert n_measured == [384, 384]
    find_rates(384)
    assert n_measured == [384, 384], "was not remembered again"


def test_a_home_that_cannot_be_written_to_is_measured_every_time(n_measured, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert find_rates(384) == find_rates(384)
    assert n_measured == [384, 384]


def test_memories_lie_in_the_users_cache(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert rates_path() == Path.home() / ".cache" / "cytosae-cache" / "product_rates.json"
