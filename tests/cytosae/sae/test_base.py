"""The autoencoder: docs/definitions.md, section 4, seeded starts, decoder rows."""

import math

import pytest
import torch

from cytosae.sae.base import Sae
from cytosae.sae.registry import ARCHITECTURES, make_sae
from cytosae.sae.relu import ReluSae

D, S = 5, 11


def make_random_sae(seed=0) -> Sae:
    """All four parameters non-zero, float64."""
    sae = ReluSae(D, S, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return sae


def test_forward_is_the_definition():
    sae = make_random_sae()
    x = torch.randn(2, 3, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    W_enc, b_enc, W_dec, b_dec = (getattr(sae, name).tolist() for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    output = sae(x)
    for b in range(2):
        for t in range(3):
            centred = [x[b, t, d].item() - b_dec[d] for d in range(D)]
            pre = [b_enc[s] + sum(centred[d] * W_enc[d][s] for d in range(D)) for s in range(S)]
            acts = [max(value, 0.0) for value in pre]
            again = [b_dec[d] + sum(acts[s] * W_dec[s][d] for s in range(S)) for d in range(D)]
            assert output.pre[b, t].tolist() == pytest.approx(pre)
            assert output.acts[b, t].tolist() == pytest.approx(acts)
            assert output.reconstruction[b, t].tolist() == pytest.approx(again)


@pytest.mark.parametrize("leading", [(), (0,), (1,), (2, 3), (2, 3, 4)])
def test_parts_agree_with_forward_at_any_leading_shape(leading):
    sae = make_random_sae()
    x = torch.randn(*leading, D, dtype=torch.float64)
    output = sae(x)
    assert output.pre.shape == output.acts.shape == (*leading, S)
    assert output.reconstruction.shape == x.shape
    torch.testing.assert_close(sae.pre_activations(x), output.pre, rtol=0, atol=0)
    torch.testing.assert_close(sae.encode(x), output.acts, rtol=0, atol=0)
    torch.testing.assert_close(sae.decode(output.acts), output.reconstruction, rtol=0, atol=0)


def test_parameters_have_the_shapes_of_the_file_format():
    shapes = {name: tuple(tensor.shape) for name, tensor in ReluSae(D, S).state_dict().items()}
    assert shapes == {"W_enc": (D, S), "b_enc": (S,), "W_dec": (S, D), "b_dec": (D,)}


def test_initial_weights_are_kaiming_uniform_with_unit_rows_and_zero_biases():
    sae = ReluSae(64, 512, seed=7)
    bound = math.sqrt(6 / 512)  # fan-in is the second dimension, as torch counts it and the reference uses it
    assert sae.W_enc.abs().max() <= bound
    assert sae.W_enc.abs().max() > 0.99 * bound
    assert sae.W_enc.var().item() == pytest.approx(bound**2 / 3, rel=0.02)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(512))
    assert not sae.b_enc.any()
    assert not sae.b_dec.any()


def test_the_seed_alone_determines_the_initial_weights():
    state = torch.random.get_rng_state()
    first = ReluSae(D, S, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state), "the global random state was touched"
    torch.manual_seed(99)
    again, other = ReluSae(D, S, seed=3), ReluSae(D, S, seed=4)
    assert torch.equal(first.W_enc, again.W_enc)
    assert torch.equal(first.W_dec, again.W_dec)
    assert not torch.equal(first.W_enc, other.W_enc)
    assert not torch.equal(first.W_dec, other.W_dec)


def test_dtype_and_device_are_as_requested():
    assert {parameter.dtype for parameter in ReluSae(D, S, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    assert {parameter.device.type for parameter in ReluSae(D, S, device="meta").parameters()} == {"meta"}


def test_normalise_decoder_keeps_directions_and_survives_a_zero_row():
    sae = make_random_sae()
    before = sae.W_dec.detach().clone()
    with torch.no_grad():
        sae.W_dec[3] = 0
    sae.normalise_decoder_()
    torch.testing.assert_close(sae.W_dec.norm(dim=1)[[0, 1, 2, 4]], torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(sae.W_dec[0], before[0] / before[0].norm())
    assert not sae.W_dec[3].any()
    assert sae.W_dec.requires_grad


@pytest.mark.parametrize(("d_in", "n_latents"), [(0, 3), (3, 0), (-1, 3)])
def test_sizes_below_one_are_refused(d_in, n_latents):
    with pytest.raises(ValueError, match=f"1 or more, found {d_in} and {n_latents}"):
        ReluSae(d_in, n_latents)


def test_the_base_class_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Sae(D, S)


def test_make_sae_knows_its_architectures():
    for name in ARCHITECTURES:
        assert torch.equal(make_sae(name, D, S, seed=8, k=3).W_enc, ReluSae(D, S, seed=8).W_enc)
    with pytest.raises(ValueError, match=r"one of relu.*found 'tpok'"):
        make_sae("tpok", D, S)
