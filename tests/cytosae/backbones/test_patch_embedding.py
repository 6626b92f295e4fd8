"""The patch embedding of a GPU against the convolution that it replaces there."""

import pytest
import torch

from cytosae.backbones import vit


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(28, 42), (30, 45)])
def test_the_product_is_the_convolution(bias, size):
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(3, 10, 14, stride=14, bias=bias)
    pixels = torch.randn(2, 3, *size)
    found = vit._embed_by_product(convolution, pixels)
    assert found.shape == (2, 6, 10)
    torch.testing.assert_close(found, vit._embed(convolution, pixels))
