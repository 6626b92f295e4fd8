"""Training steps against a loop written by hand, resuming and repeating; counters of dead latents."""

import copy
import io

import pytest
import torch

from cytosae.sae.loss import LossWeights
from cytosae.sae.registry import make_sae as make_architecture
from cytosae.sae.relu import ReluSae
from cytosae.training.matmul import MatmulConfig
from cytosae.training.step import DeadLatentTracker, TrainStep
from tests.cytosae.sae.test_relu import NAMES, D, S, length, loss_by_loops, make_sae, make_x

# --- counters of dead latents


def test_tracker_counts_the_steps_since_each_latent_fired():
    tracker = DeadLatentTracker(3)
    fires = [[1, 0, 0], [0, 0, 1], [0, 0, 0], [1, 0, 0]]
    wanted = [[0, 1, 1], [1, 2, 0], [2, 3, 1], [0, 4, 2]]
    for row, counts in zip(fires, wanted, strict=True):
        tracker.update(torch.tensor(row))
        assert tracker.n_steps_since_fired.tolist() == counts
    assert tracker.n_steps_since_fired.dtype == torch.int64


def test_dead_means_more_than_the_window():
    tracker = DeadLatentTracker(2)
    for _ in range(4):
        tracker.update(torch.zeros(2, dtype=torch.int64))
    assert tracker.dead(4).tolist() == [False, False]
    assert tracker.dead(3).tolist() == [True, True]


# --- training steps


def make_step(seed=0, *, lr=0.01, ghost=True, window=1, cls=2.0, dtype=torch.float32, matmul=None, **more) -> TrainStep:
    sae = make_sae(seed, dtype)
    with torch.no_grad():
        sae.b_enc[1] = -20  # dead from the start
        sae.W_enc[:, 1] *= 0.1
    return TrainStep(
        sae, lr=lr, weights=LossWeights(l1_coefficient=0.05), use_ghost_grads=ghost, dead_feature_window=window,
        mse_cls_coefficient=cls, matmul=matmul, **more,
    )  # fmt: skip


@pytest.mark.parametrize("matmul", [None, MatmulConfig(torch.float64), MatmulConfig(torch.float64, sparse_below=1.1)])
@pytest.mark.parametrize("ghost", [True, False])
def test_steps_are_those_of_a_loop_written_by_hand(ghost, matmul):
    step = make_step(ghost=ghost, dtype=torch.float64, matmul=matmul)
    sae = copy.deepcopy(step.sae)
    adam = torch.optim.Adam(sae.parameters(), lr=1.0, betas=(0.9, 0.999), fused=False, foreach=False)
    silent = [0] * S
    for number in range(6):
        x, lr = make_x(10 + number), 0.02 * (number + 1)
        with torch.no_grad():
            for s in range(S):
                sae.W_dec[s] /= length(sae.W_dec[s])
        rows = sae.W_dec.detach().clone()
        dead = tuple(s for s in range(S) if silent[s] > 1) if ghost else ()
        expected = loss_by_loops(sae, x, l1_coefficient=0.05, dead=dead, cls=2.0)
        fired = (sae.encode(x) > 0).any(dim=0).any(dim=0)
        silent = [0 if fired[s] else silent[s] + 1 for s in range(S)]
        adam.zero_grad()
        expected[0].backward()
        for s in range(S):
            sae.W_dec.grad[s] -= (sae.W_dec.grad[s] @ rows[s]) * rows[s]
        adam.param_groups[0]["lr"] = lr
        adam.step()

        step.optimizer.param_groups[0]["lr"] = lr
        result = step.step(x)
        for found, wanted in zip(result.terms, expected, strict=True):
            assert found.item() == pytest.approx(wanted.item(), rel=1e-7, abs=1e-12)
        assert (result.terms.ghost > 0) == bool(dead)
        assert step.tracker.n_steps_since_fired.tolist() == silent
        for name in NAMES:
            torch.testing.assert_close(getattr(step.sae, name), getattr(sae, name), rtol=1e-6, atol=1e-9)
    assert not ghost or silent[1] > 1, "the ghost path was never taken"


def test_result_is_from_before_the_update_and_has_no_graph():
    step, x = make_step(lr=0.1), make_x(dtype=torch.float32)
    before = copy.deepcopy(step.sae)
    result = step.step(x)
    assert torch.equal(result.n_fired, (before.encode(x) > 0).sum(dim=(0, 1)))
    torch.testing.assert_close(result.reconstruction, before(x).reconstruction.detach())
    assert not any(tensor.requires_grad for tensor in (*result.terms, result.reconstruction))
    assert not torch.equal(before.W_enc, step.sae.W_enc)


def test_a_rate_of_zero_changes_only_the_norm_of_decoder_rows():
    step = make_step(lr=0.0)
    with torch.no_grad():
        step.sae.W_dec *= 3
    before = copy.deepcopy(step.sae)
    step.step(make_x(dtype=torch.float32))
    for name in ("W_enc", "b_enc", "b_dec"):
        assert torch.equal(getattr(step.sae, name), getattr(before, name))
    torch.testing.assert_close(step.sae.W_dec * 3, before.W_dec)


def test_training_lowers_the_loss_on_one_batch():
    step, x = make_step(lr=0.02, ghost=False), make_x(dtype=torch.float32)
    losses = [step.step(x).terms.loss.item() for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


def test_resumed_training_is_the_same_to_the_last_bit():
    unbroken, first, resumed = make_step(), make_step(), make_step(seed=9)
    batches = [make_x(20 + number, torch.float32) for number in range(8)]
    for x in batches[:4]:
        unbroken.step(x)
        first.step(x)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for x in batches[4:]:
        wanted, found = unbroken.step(x), resumed.step(x)
        assert [term.item() for term in found.terms] == [term.item() for term in wanted.terms]
        assert wanted.terms.ghost > 0
    for name in NAMES:
        assert torch.equal(getattr(unbroken.sae, name), getattr(resumed.sae, name))
    assert torch.equal(unbroken.tracker.n_steps_since_fired, resumed.tracker.n_steps_since_fired)


def test_loaded_state_is_a_copy():
    first, second = make_step(), make_step(seed=9)
    first.step(make_x(1, torch.float32))
    state = first.state_dict()
    kept = copy.deepcopy(state)
    second.load_state_dict(state)
    second.step(make_x(2, torch.float32))
    for number, moments in state["optimizer"]["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(tensor, kept["optimizer"]["state"][number][name])


def test_training_is_repeatable_to_the_last_bit():
    first, again = make_step(), make_step()
    for number in range(4):
        x = make_x(30 + number, torch.float32)
        first.step(x)
        again.step(x)
    assert torch.equal(first.sae.W_enc, again.sae.W_enc)


def test_state_of_another_size_is_refused():
    other = TrainStep(
        ReluSae(D, S + 1), lr=0.01, weights=LossWeights(), use_ghost_grads=False, dead_feature_window=1
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="size mismatch for W_enc"):
        make_step().load_state_dict(other.state_dict())


def test_a_zero_token_does_not_break_training():
    step, x = make_step(), make_x(dtype=torch.float32)
    x[0, 1] = 0
    with torch.no_grad():
        step.sae.b_dec.fill_(3.0)
    terms = [step.step(x).terms for _ in range(5)]
    assert all(torch.isfinite(term.loss) and term.loss < 100 for term in terms)
    assert all(torch.isfinite(parameter).all() for parameter in step.sae.parameters())


@pytest.mark.parametrize("shape", [(3, D), (2, 3, D + 1), (D,), (1, 2, 3, D)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=rf"x must be \(B, T, {D}\), found \("):
        make_step().step(torch.zeros(shape))


def test_parameters_with_a_rate_of_their_own_get_it():
    sae = make_architecture("jumprelu", D, S, k=2)
    step = TrainStep(sae, lr=0.002, weights=LossWeights(), use_ghost_grads=False, dead_feature_window=1)
    rates = {part: group["lr"] for group in step.optimizer.param_groups for part in group["params"]}
    assert {name: rates[part] for name, part in sae.named_parameters()} == {
        "W_enc": 0.002, "b_enc": 0.002, "W_dec": 0.002, "b_dec": 0.002, "threshold": 0.02,
    }  # fmt: skip


@pytest.mark.parametrize("matmul", [None, MatmulConfig()])
@pytest.mark.parametrize(("factor", "rate"), [(None, 0.01), (0.5, 0.005)])
def test_weight_decay_shrinks_the_encoder_of_active_latents_at_its_own_rate(matmul, factor, rate):
    free, decaying = (make_step(matmul=matmul, encoder_lr_factor=factor, weight_decay=decay) for decay in (None, 2.0))
    before = free.sae.W_enc.detach().clone()
    for step in (free, decaying):
        is_active = step.step(make_x(3)).n_fired > 0
    assert is_active.tolist() == [number != 1 for number in range(S)]
    for (name, one), other in zip(free.sae.named_parameters(), decaying.sae.parameters(), strict=True):
        if name == "W_enc":
            torch.testing.assert_close(one - other, 2.0 * rate * before * is_active)
        else:
            assert torch.equal(one, other)
