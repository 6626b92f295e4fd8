"""The reference's loss and its gradients against a loop over scalars."""

import pytest
import torch

from cytosae.sae.base import Sae
from cytosae.sae.relu import ReluSae
from tests.support.losses import plain_loss

B, T, D, S = 2, 3, 4, 6
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


def make_sae(seed=0, dtype=torch.float64) -> Sae:
    """Random parameters, the biases too; decoder rows of unit norm."""
    sae = ReluSae(D, S, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.6)
    sae.normalise_decoder_()
    return sae


def make_x(seed=1, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def length(numbers) -> torch.Tensor:
    return sum(number * number for number in numbers) ** 0.5


def loss_by_loops(sae, x, *, l1_coefficient, dead=(), cls=1.0):
    """docs/definitions.md, section 5, one number at a time: (loss, mse, l1, ghost)."""
    W_enc, b_enc, W_dec, b_dec = (getattr(sae, name) for name in NAMES)
    n_images, n_tokens = x.shape[:2]
    mse = l1 = ghost = torch.zeros((), dtype=x.dtype)
    for b in range(n_images):
        for t in range(n_tokens):
            token = [x[b, t, d] for d in range(D)]
            pre = [b_enc[s] + sum((token[d] - b_dec[d]) * W_enc[d, s] for d in range(D)) for s in range(S)]
            acts = [value if value > 0 else value * 0 for value in pre]
            again = [b_dec[d] + sum(acts[s] * W_dec[s, d] for s in range(S)) for d in range(D)]
            error = [(again[d] - token[d]) ** 2 / length(token) for d in range(D)]
            mse = mse + sum(error) * (cls if t == 0 else 1.0)
            l1 = l1 + l1_coefficient * sum(abs(value) for value in acts)
            if not dead:
                continue
            residual = [(token[d] - again[d]).detach() for d in range(D)]
            raw = [sum(torch.exp(pre[s]) * W_dec[s, d] for s in dead) for d in range(D)]
            scale = (length(residual) / (1e-6 + 2 * length(raw))).detach()
            for d in range(D):
                ghost_error = (raw[d] * scale - residual[d]) ** 2 / length(residual)
                ghost = ghost + (error[d] / (ghost_error + 1e-6)).detach() * ghost_error
    n = n_images * n_tokens
    mse, l1, ghost = mse / (n * D), l1 / n, ghost / (n * D)
    return mse + l1 + ghost, mse, l1, ghost


def gradients(sae, loss) -> dict[str, torch.Tensor]:
    sae.zero_grad()
    loss.backward()
    return {name: getattr(sae, name).grad.clone() for name in NAMES}


@pytest.mark.parametrize("dead", [(), (2,), (0, 3, 5), tuple(range(S))])
@pytest.mark.parametrize("cls", [1.0, 0.0, 3.5])
@pytest.mark.parametrize("l1_coefficient", [0.0, 0.3])
def test_loss_and_gradients_follow_the_definition(dead, cls, l1_coefficient):
    sae, x = make_sae(), make_x()
    mask = torch.zeros(S, dtype=torch.bool)
    mask[list(dead)] = True
    loss = plain_loss(sae, x, l1_coefficient=l1_coefficient, dead_mask=mask, mse_cls_coefficient=cls)
    terms = loss.terms
    expected = loss_by_loops(sae, x, l1_coefficient=l1_coefficient, dead=dead, cls=cls)
    for found, wanted in zip(terms, expected, strict=True):
        assert found.shape == ()
        assert found.item() == pytest.approx(wanted.item(), rel=1e-10, abs=1e-14)
    ours, theirs = gradients(sae, terms.loss), gradients(sae, expected[0])
    for name in NAMES:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=1e-9, atol=1e-12, msg=lambda text, n=name: f"{n} {text}"
        )
    assert torch.equal(loss.n_fired, (sae.encode(x) > 0).sum(dim=(0, 1)))
    torch.testing.assert_close(loss.reconstruction, sae(x).reconstruction)


def test_cls_coefficient_does_not_affect_the_ghost_term():
    sae, x, mask = make_sae(), make_x(), torch.arange(S) < 2
    plain = plain_loss(sae, x, l1_coefficient=0.1, dead_mask=mask).terms
    weighted = plain_loss(sae, x, l1_coefficient=0.1, dead_mask=mask, mse_cls_coefficient=7.0).terms
    assert weighted.ghost == plain.ghost
    assert weighted.mse > plain.mse


@pytest.mark.parametrize("mask", [None, torch.zeros(S, dtype=torch.bool)])
def test_without_dead_latents_the_ghost_term_is_exactly_zero(mask):
    terms = plain_loss(make_sae(), make_x(), l1_coefficient=0.1, dead_mask=mask).terms
    assert terms.ghost.item() == 0
    assert not terms.ghost.requires_grad


def test_ghost_term_moves_a_latent_that_never_fires():
    sae, x = make_sae(), make_x()
    with torch.no_grad():
        sae.b_enc[2] = -3
        sae.W_enc[:, 2] *= 0.1
    mask = torch.arange(S) == 2
    without = plain_loss(sae, x, l1_coefficient=0.1).terms
    assert not gradients(sae, without.loss)["W_enc"][:, 2].any()
    loss = plain_loss(sae, x, l1_coefficient=0.1, dead_mask=mask)
    assert not loss.n_fired[2]
    found = gradients(sae, loss.terms.loss)
    assert found["W_enc"][:, 2].abs().min() > 0
    assert found["b_enc"][2] != 0
    assert found["W_dec"][2].abs().min() > 0


def test_perfect_reconstruction_costs_nothing_and_has_finite_gradients():
    sae = ReluSae(2, 2)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2))
        sae.W_dec.copy_(torch.eye(2))
    terms = plain_loss(sae, torch.ones(1, 2, 2), l1_coefficient=0.0, dead_mask=torch.tensor([False, True])).terms
    assert [term.item() for term in terms] == [0, 0, 0, 0]
    terms.loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in sae.parameters())


def test_a_zero_token_adds_nothing_and_the_others_are_unchanged():
    sae, x, mask = make_sae(), make_x(), torch.arange(S) < 2
    x[0, 1] = 0
    x[1, 0] = 0
    loss = plain_loss(sae, x, l1_coefficient=0.0, dead_mask=mask, mse_cls_coefficient=2.0)
    found = loss.terms
    assert loss.reconstruction[0, 1].abs().min() > 0
    kept = torch.stack([x[0, 0], x[0, 2], x[1, 1], x[1, 2]])[:, None]  # as images of one token, none of them weighted
    weights = torch.tensor([2.0, 1.0, 1.0, 1.0])
    parts = [
        loss_by_loops(sae, kept[n : n + 1], l1_coefficient=0.0, dead=(0, 1), cls=weights[n].item()) for n in range(4)
    ]
    assert found.mse.item() == pytest.approx(sum(part[1] for part in parts).item() / (B * T))
    assert found.ghost.item() == pytest.approx(sum(part[3] for part in parts).item() / (B * T))
    found.loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in sae.parameters())
