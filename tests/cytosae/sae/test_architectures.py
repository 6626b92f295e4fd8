"""Architectures: activations, training losses and their gradients, rescaling, and what training finds."""

import copy

import pytest
import torch

from cytosae.sae.base import Sae
from cytosae.sae.jumprelu import JumpReluSae
from cytosae.sae.loss import LossInputs, LossWeights
from cytosae.sae.registry import ARCHITECTURES, make_sae
from cytosae.sae.topk import BatchTopKSae, MatryoshkaSae, TopKSae
from cytosae.statistics.block_encoder import BlockEncoder
from cytosae.training.lr_schedule import LearningRateSchedule
from cytosae.training.matmul import MatmulConfig
from cytosae.training.step import TrainStep

D, S, N, K = 6, 20, 9, 3
OTHERS = [name for name in ARCHITECTURES if name != "relu"]


def make_random(name: str, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> Sae:
    """No zeros, positive thresholds, some latents inactive."""
    sae = make_sae(name, D, S, k=K, prefixes=(0.25, 1.0), bandwidth=0.2).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for tensor in sae.state_dict().values():
        tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator).to(dtype))
    for unit in sae._latent_units()[1:]:
        unit.data.abs_()
    sae.normalise_decoder_()
    return sae


def make_tokens(n: int = N, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def loss_of(sae, x, *, dead=None, weights=None):
    variance = (x - x.mean(dim=0)).square().sum()
    weights = weights or LossWeights(l1_coefficient=0.1)
    return sae.training_loss(x, LossInputs(variance, weights, x.dtype, dead))


# --- activations


def activation_by_hand(sae: Sae, s: int, linear: float, pre: list[float]) -> float:
    """Latent s of a token, from `(x - b_dec) W_enc` and all its pre-activations."""
    if sae.architecture == "gated":
        return max(0.0, linear * sae.r_mag[s].exp().item() + sae.b_mag[s].item()) if pre[s] > 0 else 0.0
    if sae.architecture == "topk":
        active = pre[s] >= sorted(pre)[-K]
    elif sae.architecture == "relu":
        active = True
    else:
        active = pre[s] > (sae.threshold[s] if sae.threshold.ndim else sae.threshold).item()
    return max(pre[s], 0.0) if active else 0.0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_activations_by_loops(name):
    sae, x = make_random(name), make_tokens()
    acts = sae.encode(x)
    for token in range(N):
        centred = (x[token] - sae.b_dec).tolist()
        linear = [sum(value * sae.W_enc[d, s].item() for d, value in enumerate(centred)) for s in range(S)]
        pre = [linear[s] + sae.b_enc[s].item() for s in range(S)]
        assert acts[token].tolist() == pytest.approx([activation_by_hand(sae, s, linear[s], pre) for s in range(S)])
    assert 0 < (acts > 0).double().mean() < 1


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_statistics_encode_as_the_architecture_does(name):
    sae = make_random(name, dtype=torch.float32)
    images = make_tokens(60, torch.float32).view(12, 5, D)
    reduced = BlockEncoder(sae, [0.1]).reduce(images, first_row=3)
    acts = sae.encode(images)
    torch.testing.assert_close(reduced.scores, acts.mean(dim=1))
    assert torch.equal(reduced.counts[0], (acts > 0.1).sum(dim=1, dtype=torch.int32))
    again = [BlockEncoder(sae, [0.1]).reduce(images[at : at + 1], first_row=3 + at).scores for at in range(12)]
    assert torch.equal(torch.cat(again), reduced.scores), "depends on how the rows were split"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_activating_in_place_gives_the_same(name):
    sae = make_random(name)
    pre = sae.pre_activations(make_tokens()).detach()
    expected = sae.activate(pre.clone())
    assert torch.equal(sae.activate_(pre), expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tokens_are_fitted_only_where_the_class_says_so(name):
    sae = make_random(name)
    before = copy.deepcopy(sae.state_dict())
    sae.fit_to_tokens_(make_tokens())
    changed = any(not torch.equal(tensor, before[key]) for key, tensor in sae.state_dict().items())
    assert changed == sae.fits_to_tokens


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scaling_folded_in_is_the_same_function(name):
    sae, x = make_random(name), make_tokens()
    mean, scale = torch.randn(D, dtype=torch.float64), 2.5
    folded = copy.deepcopy(sae)
    folded.fold_scaling_(mean, scale)
    normalised = (x - mean) / scale
    torch.testing.assert_close(folded.encode(x), scale * sae.encode(normalised))
    torch.testing.assert_close(folded(x).reconstruction, scale * sae(normalised).reconstruction + mean)
    assert torch.equal(folded.W_dec, sae.W_dec)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rescaled_latents_reconstruct_the_same(name):
    sae, x = make_random(name), make_tokens()
    single = sae.needs_whole_rows or name in ("batchtopk", "matryoshka")
    factor = torch.tensor(1.7) if single else torch.rand(S, dtype=torch.float64) + 0.5
    scaled = copy.deepcopy(sae)
    scaled.rescale_latents_(factor.double())
    torch.testing.assert_close(scaled.encode(x), factor * sae.encode(x))
    torch.testing.assert_close(scaled(x).reconstruction, sae(x).reconstruction)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (TopKSae, {"k": 0}, "whole number from 1 to the 20 latents, found 0"),
        (BatchTopKSae, {"k": S + 1}, "found 21"),
        (MatryoshkaSae, {"k": 1, "prefixes": (0.5,)}, "ascend from above 0 to 1"),
        (MatryoshkaSae, {"k": 1, "prefixes": (0.0, 1.0)}, "ascend from above 0 to 1"),
        (JumpReluSae, {"k": 0}, "k and bandwidth must be above 0"),
        (JumpReluSae, {"bandwidth": 0}, "k and bandwidth must be above 0"),
    ],
)
def test_settings_out_of_range_are_refused(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(D, S, **settings)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_value_above_which_latents_are_active(name):
    sae, x = make_random(name), make_tokens()
    bound = sae.active_above
    assert (bound is None) == (name in ("topk", "gated"))
    if bound is not None:
        pre = sae.pre_activations(x)
        assert torch.equal(sae.activate(pre), torch.where(pre > bound, pre, 0.0))
        assert (bound >= 0).all()


# --- training losses


def dense_topk_loss(sae, x, dead):
    """Loss of topk, batchtopk and matryoshka with dense tensors and autograd alone."""
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    positive = torch.relu(pre)
    if sae.architecture == "topk":
        keep = torch.zeros_like(pre).scatter(1, positive.topk(K, dim=1).indices, 1.0)
    else:
        keep = torch.zeros(pre.numel(), dtype=x.dtype)
        keep[positive.flatten().topk(K * len(x)).indices] = 1
        keep = keep.view(pre.shape)
    acts = positive * keep
    bounds = [round(share * S) for share in getattr(sae, "prefixes", (1.0,))]
    total = (x - x.mean(dim=0)).square().sum()
    parts = [(acts[:, :end] @ sae.W_dec[:end] + sae.b_dec - x).square().sum() / total for end in bounds]
    mse, reconstruction = sum(parts) / len(parts), acts @ sae.W_dec + sae.b_dec
    numbers = dead.nonzero().squeeze(1)
    values, at = pre[:, numbers].topk(min(D // 2, len(numbers)), dim=1)
    again = torch.zeros_like(pre).scatter(1, numbers[at], torch.relu(values)) @ sae.W_dec
    residual = (x - reconstruction).detach()
    aux = 1 / 32 * (again - residual).square().sum() / residual.square().sum()
    return mse, aux, reconstruction, acts


@pytest.mark.parametrize("name", ["topk", "batchtopk", "matryoshka"])
def test_losses_and_gradients_are_those_of_dense_ones(name):
    sae, x = make_random(name), make_tokens()
    dead = torch.arange(S) % 2 == 0
    mse, aux, reconstruction, acts = dense_topk_loss(sae, x, dead)
    (mse + aux).backward()
    wanted = {key: parameter.grad.clone() for key, parameter in sae.named_parameters()}
    sae.zero_grad()
    found = loss_of(sae, x, dead=dead)
    found.terms.loss.backward()
    assert found.terms.mse.item() == pytest.approx(mse.item())
    assert found.terms.ghost.item() == pytest.approx(aux.item())
    assert aux > 0
    torch.testing.assert_close(found.reconstruction, reconstruction)
    assert torch.equal(found.n_fired, (acts > 0).sum(dim=0))
    for key, parameter in sae.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[key])


def test_auxiliary_term_reaches_only_the_encoder_of_dead_latents():
    sae, x = make_random("topk"), make_tokens()
    with torch.no_grad():
        sae.b_enc[:5] = -3  # never among the largest, but AuxK uses the positive ones of dead latents
        sae.W_enc[:, :5] *= 4
    dead = torch.arange(S) < 5
    loss_of(sae, x, dead=dead).terms.ghost.backward()
    assert sae.W_enc.grad[:, :5].abs().sum() > 0
    assert not sae.W_enc.grad[:, 5:].any(), "the residual is not detached"
    assert not sae.W_dec.grad[5:].any()
    torch.testing.assert_close(sae.b_dec.grad, -(sae.W_enc @ sae.b_enc.grad))  # through the encoder alone


@pytest.mark.parametrize("name", ["jumprelu", "gated"])
def test_gradients_are_finite_differences_where_the_loss_is_smooth(name):
    sae, x = make_random(name), make_tokens()
    weights = LossWeights(l1_coefficient=0.1, l0_coefficient=0.0)  # the step function of L0 has no derivative
    loss_of(sae, x, weights=weights).terms.loss.backward()
    for key in ("W_enc", "b_enc", "W_dec", "b_dec") + (("r_mag", "b_mag") if name == "gated" else ()):
        parameter = getattr(sae, key)
        for at in range(0, parameter.numel(), 7):
            flat = parameter.data.view(-1)
            ends = []
            for sign in (1, -1):
                before = flat[at].item()
                flat[at] += sign * 1e-6
                terms = loss_of(sae, x, weights=weights).terms
                # The gated loss freezes the decoder in its auxiliary term, which is left out here.
                frozen = name == "gated" and key in ("W_dec", "b_dec")
                ends.append((terms.mse + terms.l1 if frozen else terms.loss).item())
                flat[at] = before
            slope = (ends[0] - ends[1]) / 2e-6
            wanted = parameter.grad.view(-1)[at].item()
            if name == "gated" and key == "b_dec":
                continue  # reaches the auxiliary term through the encoder, but not through the decoder
            assert wanted == pytest.approx(slope, rel=1e-4, abs=1e-7), (key, at)


def test_thresholds_learn_by_the_straight_through_estimator():
    sae, x = make_random("jumprelu"), make_tokens()
    found = loss_of(sae, x, weights=LossWeights(l0_coefficient=0.7))
    found.terms.loss.backward()
    pre = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).detach()
    threshold, active = sae.threshold.detach(), (pre > sae.threshold).double().detach()
    error = ((pre * active) @ sae.W_dec + sae.b_dec - x).detach()
    of_acts = 2 * error @ sae.W_dec.detach().T / (x - x.mean(dim=0)).square().sum()
    l0 = active.sum() / N
    of_l0 = 0.7 * 2 * (l0 / K - 1) / (K * N)
    near = ((pre - threshold).abs() < 0.1).double()
    assert near.sum() > 3
    wanted = -(near * (of_acts * threshold + of_l0)).sum(dim=0) / 0.2
    torch.testing.assert_close(sae.threshold.grad, wanted)
    assert found.terms.l1.item() == pytest.approx(0.7 * (l0 / K - 1).square().item())
    assert torch.equal(found.n_fired, active.sum(dim=0).long())


def test_the_pre_activation_loss_pulls_dead_latents_towards_their_thresholds():
    sae, x = make_random("jumprelu"), make_tokens()
    dead = torch.arange(S) < 5
    with torch.no_grad():
        sae.b_enc[:4] = -3
        sae.b_enc[4] = 3  # above its threshold on average: nothing pulls it
        sae.threshold[0] = -2  # acts as 0
    mean_pre = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).detach().mean(dim=0)
    found = loss_of(sae, x, dead=dead, weights=LossWeights(pre_act_coefficient=0.7))
    assert found.terms.ghost.item() == pytest.approx(0.7 / S * (torch.relu(sae.threshold) - mean_pre)[:4].sum().item())
    torch.testing.assert_close(found.terms.loss, found.terms.mse + found.terms.l1 + found.terms.ghost)
    found.terms.ghost.backward()
    wanted = torch.zeros(S, dtype=x.dtype)
    wanted[:4] = -0.7 / S
    torch.testing.assert_close(sae.b_enc.grad, wanted)
    torch.testing.assert_close(sae.W_enc.grad, torch.outer((x - sae.b_dec).detach().mean(dim=0), wanted))
    assert sae.threshold.grad is sae.b_dec.grad is None


@pytest.mark.parametrize(("coefficient", "n_revived"), [(0.0, 0), (0.03125, 6)])
def test_pulled_latents_of_jumprelu_fire_again(coefficient, n_revived):
    sae, x = make_random("jumprelu", dtype=torch.float32), make_tokens(64, torch.float32)[None]
    with torch.no_grad():
        sae.b_enc[:6] = -20
    weights = LossWeights(pre_act_coefficient=coefficient)
    step = TrainStep(sae, lr=0.1, weights=weights, use_ghost_grads=False, dead_feature_window=1, matmul=MatmulConfig())
    has_fired = sum(step.step(x).n_fired[:6] for _ in range(400)) > 0
    assert has_fired.sum() == n_revived


def test_jumprelu_starts_with_k_active_latents_per_token():
    sae, x = make_random("jumprelu"), make_tokens(200)
    sae.fit_to_tokens_(x)
    assert (sae.encode(x) > 0).sum(dim=1).double().mean().item() == pytest.approx(K, abs=0.01)
    assert len(sae.threshold.unique()) == 1
    sae.k = S
    sae.fit_to_tokens_(x)
    assert (sae.threshold == 0).all(), "a threshold below 0 would let negative latents through"


def test_running_threshold_follows_the_smallest_kept_activation():
    sae = make_random("batchtopk")
    sae.threshold.zero_()
    smallest = []
    for seed in range(4):
        pre = torch.randn(N, S, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        kept = sae.keep(pre)
        assert kept.sum() == K * N
        wanted = torch.relu(pre).flatten().topk(K * N).values.sort().values
        torch.testing.assert_close(pre[kept].sort().values, wanted)
        smallest.append(wanted[0].item())
        follows = smallest[0]
        for value in smallest[1:]:
            follows = 0.95 * follows + 0.05 * value
        assert sae.threshold.item() == pytest.approx(follows)


@pytest.mark.parametrize("running", [0.0, 1e-3, 0.4, 100.0])
@pytest.mark.parametrize("name", ["batchtopk", "matryoshka"])
def test_calibration_leaves_k_active_latents_per_token_whatever_the_running_threshold(name, running):
    sae, x = make_random(name), make_tokens(1500)
    assert sae.calibrates
    sae.threshold.fill_(running)
    sae.calibrate_(x)
    assert int((sae.encode(x) > 0).sum()) == K * 1500
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    sae.calibrate_(x)
    assert sae.threshold == 0


@pytest.mark.parametrize("name", ["relu", "topk", "jumprelu", "gated"])
def test_other_architectures_have_nothing_to_calibrate(name):
    sae, x = make_random(name), make_tokens()
    before = sae.encode(x)
    sae.calibrate_(x)
    assert not sae.calibrates
    assert torch.equal(sae.encode(x), before)


# --- training


def test_ties_at_the_threshold_of_a_batch_go_to_the_first_tokens_and_latents():
    sae = make_random("batchtopk")
    pre = torch.zeros(N, S, dtype=torch.float64)
    pre[3:] = 1.0
    pre[-1, -1] = 2.0
    kept = sae.keep(pre)
    assert kept.sum() == K * N
    assert kept[-1, -1]
    flat = kept.flatten().nonzero().squeeze(1)
    assert flat[:-1].tolist() == list(range(3 * S, 3 * S + K * N - 1))
    assert not sae.keep(-torch.ones(N, S, dtype=torch.float64)).any()


@pytest.mark.parametrize("options", [{"use_ghost_grads": True}, {"norm_weighted_l1": True}, {"mse_cls_coefficient": 2}])
def test_options_that_an_architecture_does_not_use_are_refused(options):
    with pytest.raises(ValueError, match=f"architecture topk has no option {next(iter(options))}"):
        TrainStep(
            make_random("topk"),
            **{"lr": 0.1, "weights": LossWeights(), "use_ghost_grads": False, "dead_feature_window": 1, **options},
        )


PLANTED_WIDTH, PLANTED_FEATURES, PLANTED_LATENTS = 24, 32, 40


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("relu", LossWeights(l1_coefficient=0.01)),
        ("topk", LossWeights()),
        ("batchtopk", LossWeights()),
        ("jumprelu", LossWeights()),
        ("gated", LossWeights(l1_coefficient=0.3)),
        ("matryoshka", LossWeights()),
    ],
)
def test_a_planted_dictionary_is_recovered(name, weights):
    generator = torch.Generator().manual_seed(0)
    planted = torch.nn.functional.normalize(torch.randn(PLANTED_FEATURES, PLANTED_WIDTH, generator=generator), dim=1)

    def draw(n: int) -> torch.Tensor:
        active = torch.rand(n, PLANTED_FEATURES, generator=generator) < K / PLANTED_FEATURES
        return ((active * (0.5 + torch.rand(active.shape, generator=generator))) @ planted)[None]

    sae = make_sae(name, PLANTED_WIDTH, PLANTED_LATENTS, seed=1, k=K, prefixes=(0.5, 1.0), bandwidth=0.1)
    sae.tie_()
    if sae.fits_to_tokens:
        sae.fit_to_tokens_(draw(512)[0])
    step = TrainStep(
        sae, lr=3e-3, weights=weights, use_ghost_grads=False, dead_feature_window=30, matmul=MatmulConfig()
    )
    n_steps = 1000
    schedule = LearningRateSchedule(step.optimizer, "constant", n_steps=n_steps, decay_share=0.3)
    for number in range(n_steps):
        step.step(draw(512), sparsity=min(1, (number + 1) / 100))
        schedule.step()
    x = draw(4096)
    acts = sae.encode(x)
    closest = (planted @ torch.nn.functional.normalize(sae.W_dec, dim=1).T).max(dim=1).values
    assert closest.mean() > 0.85, "mean maximum cosine similarity"
    assert ((acts > 0).sum(dim=(0, 1)) == 0).float().mean() <= 0.25, "share of dead latents"
    l0 = (acts > 0).float().sum(dim=-1).mean().item()
    assert l0 == pytest.approx(K, rel=0.6 if name in ("relu", "gated") else 0.05)
