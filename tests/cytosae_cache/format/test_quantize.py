"""Codes decode to within half a step; NaN and infinity come back unchanged."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cytosae_cache.format.quantize import SCALE_BYTES, Channels, dequantize, measure_channels, quantize


def _round_trip(image, channels):
    record = np.empty((len(image), image.shape[1] + SCALE_BYTES), np.int8)
    quantize(image, channels, record)
    out = np.empty_like(image)
    dequantize(record, channels, out, np.empty(image.shape, np.float32))
    return record, out


@given(arrays(np.float16, (5, 6), elements=st.floats(-60_000, 60_000, width=16)), st.integers(0, 9))
def test_no_number_is_off_by_more_than_half_a_step(image, seed):
    rng = np.random.default_rng(seed)
    channels = Channels(rng.normal(size=6).astype(np.float32), rng.uniform(0.1, 9, size=6).astype(np.float32))
    record, out = _round_trip(image, channels)
    codes, scales = record[:, :-SCALE_BYTES], record[:, -SCALE_BYTES:].copy().view("<f4")
    assert codes.min() >= -127
    z = np.abs((image.astype(np.float64) - channels.mean) / channels.std).max(axis=1, keepdims=True)
    np.testing.assert_allclose(scales, z / 127, rtol=1e-5, atol=1e-30)
    allowed = 0.5 * scales * channels.std + np.abs(image.astype(np.float64)) * 2**-10 + 1e-4
    assert (np.abs(out.astype(np.float64) - image) <= allowed).all()


def test_numbers_near_the_limit_of_float16_stay_finite():
    image = np.full((2, 6), 65_504, np.float16)
    channels = Channels(np.zeros(6, np.float32), np.array([0.1, 1, 2, 3, 5, 9], np.float32))
    for sign in (1, -1):
        _, out = _round_trip(sign * image, channels)
        assert np.isfinite(out).all()
        assert (sign * out <= 65_504).all()


def test_tokens_at_the_mean_and_tokens_that_are_not_finite():
    channels = Channels(np.full(3, 2, np.float32), np.ones(3, np.float32))
    image = np.array([[2, 2, 2], [np.nan] * 3, [1, np.inf, 0], [1, 2, 3]], np.float16)
    record, out = _round_trip(image, channels)
    assert out[0].tolist() == [2, 2, 2]
    assert np.isnan(out[1]).all()
    assert not np.isfinite(out[2]).any()
    assert record[1:3, :-SCALE_BYTES].tolist() == [[0] * 3] * 2
    np.testing.assert_allclose(out[3], image[3], atol=1e-3)


def test_channels_are_the_mean_and_deviation():
    images = np.random.default_rng(0).normal(3, 2, size=(4, 5, 6)).astype(np.float16)
    images[..., 2] = 7
    channels = measure_channels(images)
    tokens = images.reshape(-1, 6).astype(np.float64)
    np.testing.assert_allclose(channels.mean, tokens.mean(axis=0), rtol=1e-6)
    expected = tokens.std(axis=0)
    expected[2] = 1  # no deviation: any positive number is valid
    np.testing.assert_allclose(channels.std, expected, rtol=1e-5)


def test_channels_of_an_empty_sample():
    channels = measure_channels(np.empty((0, 5, 3), np.float16))
    assert channels.mean.tolist() == [0] * 3
    assert channels.std.tolist() == [1] * 3


@pytest.mark.parametrize("outlier", [1, 1000])
def test_one_large_channel_does_not_degrade_the_others(outlier):
    images = np.random.default_rng(0).normal(size=(8, 20, 16))
    images[..., 3] *= outlier
    images = images.astype(np.float16)
    _, out = _round_trip(images[0], measure_channels(images))
    others = np.delete(np.arange(16), 3)
    difference = out.astype(np.float64)[:, others] - images[0].astype(np.float64)[:, others]
    assert np.sqrt((difference**2).mean()) < 0.02
