"""Maps over an image's patches and the strongest latents of images and tokens, against plain sorting."""

import numpy as np
import pytest
import torch

from cytosae.sae.registry import ARCHITECTURES, make_sae
from cytosae.statistics.heatmaps import LatentEncoder, make_byte_maps, summarize_image


def _acts(n_tokens=9, n_latents=40, seed=0, *, ties=False):
    values = torch.randn(n_tokens, n_latents, generator=torch.Generator().manual_seed(seed)).relu()
    return (values * 2).round() / 2 if ties else values


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_chosen_latents_are_those_of_the_whole_encoder(arch):
    sae = make_sae(
        arch, 12, 48, seed=1, **({"k": 6} if arch in ("topk", "batchtopk", "matryoshka", "jumprelu") else {})
    )
    sae.b_enc.data.normal_(generator=torch.Generator().manual_seed(3))
    x = torch.randn(5, 7, 12, generator=torch.Generator().manual_seed(2))
    chosen = np.array([40, 3, 3, 17])
    expected = sae.encode(x)[..., torch.from_numpy(chosen)]
    torch.testing.assert_close(LatentEncoder(sae, chosen)(x), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        LatentEncoder(sae, chosen)(x.half()), sae.encode(x.half().float())[..., chosen], rtol=1e-5, atol=1e-6
    )


def test_latents_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"latents must lie in 0\.\.47, found 3\.\.48"):
        LatentEncoder(make_sae("relu", 12, 48), np.array([3, 48]))


def test_byte_maps_are_activations_to_one_level():
    acts = _acts()
    maps = make_byte_maps(acts)
    assert maps.levels.shape == (40, 9)
    np.testing.assert_array_equal(maps.peaks, acts.amax(dim=0).numpy())
    again = maps.levels * (maps.peaks[:, None] / 255)
    assert np.abs(again - acts.T.numpy()).max() <= maps.peaks.max() / 255 + 1e-6
    assert ((maps.levels > 0) == (acts.T.numpy() > 0)).all(), "what is active at all is seen"


def test_maps_without_activations():
    assert make_byte_maps(torch.zeros(4, 2)).levels.tolist() == [[0] * 4] * 2
    assert make_byte_maps(torch.zeros(0, 3)).levels.shape == (3, 0)
    tiny = make_byte_maps(torch.full((4, 1), 1e-30))
    assert (tiny.levels == 255).all()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n", [1, 5, 40, 99])
def test_the_strongest_latents_are_those_of_a_sort(ties, n):
    acts = _acts(ties=ties)
    reading = summarize_image(acts, n_latents=n, n_per_token=n)
    for token, values in enumerate(acts.tolist()):
        expected = sorted(
            (latent for latent, value in enumerate(values) if value > 0), key=lambda at: (-values[at], at)
        )[:n]
        found = [latent for latent in reading.token_latents[token].tolist() if latent >= 0]
        assert found == expected
        assert reading.token_values[token][: len(found)].tolist() == [values[at] for at in expected]
        assert (reading.token_values[token][len(found) :] == 0).all()
    scores = acts.mean(dim=0).tolist()
    expected = sorted((latent for latent, value in enumerate(scores) if value > 0), key=lambda at: (-scores[at], at))[
        :n
    ]
    assert reading.latents.tolist() == expected
    assert reading.scores.tolist() == [scores[at] for at in expected]


def test_an_image_on_which_nothing_is_active():
    reading = summarize_image(torch.zeros(3, 5), n_latents=2, n_per_token=2)
    assert reading.latents.tolist() == []
    assert (reading.token_latents == -1).all()
