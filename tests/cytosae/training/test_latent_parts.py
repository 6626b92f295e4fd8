"""Steps of several ranks, each with its part of the latents, against the step of one process with all of them."""

import copy

import pytest
import torch

from cytosae.sae.registry import ARCHITECTURES, make_sae
from cytosae.training.latent_parts import LatentParts
from cytosae.training.matmul import MatmulConfig
from tests.cytosae.training.test_fused_loss import S, largest_difference, make_case, make_step, make_tokens
from tests.support.worlds import run_ranks

SPLITTING = [name for name, kind in ARCHITECTURES.items() if kind.splits_latents]


def make_part(sae, world, matmul, **options):
    """This rank's step, with the dead latents of `make_step`."""
    parts = LatentParts(world, S)
    own = parts.cut_sae(sae, torch.device("cpu")).to(sae.b_dec.dtype)
    parts.copy_sae_(own, sae)
    step = make_step(own, matmul, latent_ranks=world, parts=parts, **options)
    dead = make_step(copy.deepcopy(sae), matmul).tracker.n_steps_since_fired
    step.tracker.n_steps_since_fired.copy_(parts.cut("n_steps_since_fired", dead))
    return step, parts


def test_three_architectures_can_be_split():
    assert SPLITTING == ["relu", "topk", "batchtopk"]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("sparse_below", [0.0, 1.1])
@pytest.mark.parametrize("max_gradient", [None, 0.05])
@pytest.mark.parametrize("arch", SPLITTING)
def test_parts_take_the_step_of_the_whole(arch, max_gradient, sparse_below, size):
    sae = make_case(arch)
    matmul = MatmulConfig(torch.float64, 8 * S * 33, sparse_below=sparse_below)
    alone = make_step(copy.deepcopy(sae), matmul, max_gradient=max_gradient)
    for seed in range(4):
        wanted = alone.step(make_tokens(seed))
    state = alone.state_dict()

    def work(world):
        step, parts = make_part(sae, world, matmul, max_gradient=max_gradient)
        for seed in range(4):
            result = step.step(make_tokens(seed))
        return step, result, parts.join_counts(result.n_fired), step.state_dict(), parts.join_sae(step.sae)

    ranks = run_ranks(size, work)
    for step, result, n_fired, _, _ in ranks:
        assert step.sae.W_enc.shape[1] < S
        for name, term in wanted.terms._asdict().items():
            assert getattr(result.terms, name).item() == pytest.approx(term.item(), rel=1e-9, abs=1e-15), name
        torch.testing.assert_close(result.reconstruction, wanted.reconstruction)
        assert torch.equal(n_fired, wanted.n_fired)
        assert torch.equal(step.sae.b_dec, ranks[0][0].sae.b_dec)
    _, _, _, found, whole = ranks[0]
    assert whole.W_enc.shape == alone.sae.W_enc.shape
    for name, tensor in state["sae"].items():
        torch.testing.assert_close(found["sae"][name], tensor, rtol=1e-9, atol=1e-9)
    assert torch.equal(found["n_steps_since_fired"], state["n_steps_since_fired"])
    for number, moments in state["optimizer"]["state"].items():
        for name, values in moments.items():
            torch.testing.assert_close(found["optimizer"]["state"][number][name], values, rtol=1e-7, atol=1e-9)
    assert all(one[4] is None for one in ranks[1:])


@pytest.mark.parametrize("arch", SPLITTING)
def test_a_state_resumes_in_another_number_of_parts(arch):
    sae, matmul = make_case(arch), MatmulConfig(torch.float64)
    alone = make_step(copy.deepcopy(sae), matmul)
    for seed in range(2):
        alone.step(make_tokens(seed))
    state = copy.deepcopy(alone.state_dict())
    for seed in range(2, 4):
        alone.step(make_tokens(seed))

    def work(world):
        step, _ = make_part(sae, world, matmul)
        step.load_state_dict(state)
        for seed in range(2, 4):
            step.step(make_tokens(seed))
        return step.state_dict()

    again = make_step(copy.deepcopy(sae), matmul)
    again.load_state_dict(run_ranks(3, work)[0])
    assert largest_difference(again.sae, alone.sae) < 1e-9


def test_norms_weigh_l1_in_parts():
    sae, matmul = make_case("relu"), MatmulConfig(torch.float64)
    alone = make_step(copy.deepcopy(sae), matmul, norm_weighted_l1=True)
    wanted = alone.step(make_tokens()).terms

    def work(world):
        step, parts = make_part(sae, world, matmul, norm_weighted_l1=True)
        return step.step(make_tokens()).terms, parts.join("W_dec", step.sae.W_dec)

    (found, W_dec), _ = run_ranks(2, work)
    assert found.l1.item() == pytest.approx(wanted.l1.item(), rel=1e-12)
    torch.testing.assert_close(W_dec, alone.sae.W_dec, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("arch", ["jumprelu", "gated", "matryoshka"])
def test_other_architectures_are_refused_by_name(arch):
    def work(world):
        with pytest.raises(ValueError, match=f"architecture {arch} cannot be split by latents: split the data"):
            make_step(make_sae(arch, 4, 8, k=2), MatmulConfig(), latent_ranks=world)

    run_ranks(2, work)
