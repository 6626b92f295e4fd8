"""Explained variance against its definition."""

import math

import pytest

from cytosae.training.metrics import explained_variance
from tests.cytosae.sae.test_relu import D, make_x


def test_explained_variance_follows_its_definition():
    x = make_x()
    again = x + 0.3 * make_x(2)
    tokens, guesses = x.reshape(-1, D).tolist(), again.reshape(-1, D).tolist()
    mean = [sum(column) / len(tokens) for column in zip(*tokens, strict=True)]
    errors = [math.dist(token, guess) ** 2 for token, guess in zip(tokens, guesses, strict=True)]
    spreads = [math.dist(token, mean) ** 2 for token in tokens]
    variance = explained_variance(x, again)
    assert variance.total.item() == pytest.approx(1 - sum(errors) / sum(spreads))
    shares = [1 - error / spread for error, spread in zip(errors, spreads, strict=True)]
    centre = sum(shares) / len(shares)
    deviation = math.sqrt(sum((share - centre) ** 2 for share in shares) / len(shares))
    assert variance.per_token_std.item() == pytest.approx(deviation)


def test_explained_variance_of_perfect_and_constant_reconstructions():
    x = make_x()
    perfect, mean = explained_variance(x, x), explained_variance(x, x.mean(dim=(0, 1)).expand_as(x))
    assert perfect.total == 1
    assert perfect.per_token_std == 0
    assert mean.total.item() == pytest.approx(0)
