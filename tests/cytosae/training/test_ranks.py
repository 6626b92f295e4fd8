"""Steps of several ranks, each with its part of the tokens, against the step of one process with all of them."""

import copy
import math

import pytest
import torch

from cytosae.sae.registry import ARCHITECTURES
from cytosae.sae.topk import n_among_largest
from cytosae.training.fused_loss import find_fused_loss
from cytosae.training.gradients import StoredGradients
from cytosae.training.matmul import MatmulConfig
from tests.cytosae.training.test_fused_loss import D, largest_difference, make_case, make_step, make_tokens
from tests.support.worlds import run_ranks

SPLITS = [[40, 37], [30, 0, 47], [1, 76]]
"""Tokens of every rank; one may have none."""


def run_steps(sae, matmul, split, n_steps=4, **options):
    """Steps of ranks; returns their steps and the results of the last ones."""

    def work(world):
        step = make_step(copy.deepcopy(sae), matmul, token_ranks=world, **options)
        for seed in range(n_steps):
            result = step.step(make_tokens(seed, step.sae.b_dec.dtype).split(split, dim=1)[world.rank])
        return step, result

    return run_ranks(len(split), work)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("sparse_below", [None, 0.0, 0.25, 1.1])
@pytest.mark.parametrize("max_gradient", [None, 0.05])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_ranks_take_the_step_of_one_process(arch, max_gradient, sparse_below, split):
    sae = make_case(arch)
    matmul = None if sparse_below is None else MatmulConfig(torch.float64, 8 * 160 * 33, sparse_below=sparse_below)
    alone = make_step(copy.deepcopy(sae), matmul, max_gradient=max_gradient)
    for seed in range(4):
        wanted = alone.step(make_tokens(seed))
    ranks = run_steps(sae, matmul, split, max_gradient=max_gradient)
    for step, result in ranks:
        assert largest_difference(step.sae, alone.sae) < 1e-9
        assert torch.equal(result.n_fired, wanted.n_fired)
        for name, term in wanted.terms._asdict().items():
            assert getattr(result.terms, name).item() == pytest.approx(term.item(), rel=1e-9, abs=1e-15), name
        assert torch.equal(step.tracker.n_steps_since_fired, alone.tracker.n_steps_since_fired)
    found = torch.cat([result.reconstruction for _, result in ranks], dim=1)
    torch.testing.assert_close(found, wanted.reconstruction)
    for step, result in ranks[1:]:
        assert largest_difference(step.sae, ranks[0][0].sae) == 0, "ranks must have the same bits"
        assert result.terms == ranks[0][1].terms


@pytest.mark.parametrize("options", [{"norm_weighted_l1": True}, {"mse_cls_coefficient": 3.0}])
@pytest.mark.parametrize("sparse_below", [None, 0.0, 1.1])
def test_options_of_relu_on_ranks(options, sparse_below):
    sae = make_case("relu")
    matmul = None if sparse_below is None else MatmulConfig(torch.float64, sparse_below=sparse_below)
    x = make_tokens().view(11, 7, D)
    alone = make_step(copy.deepcopy(sae), matmul, **options)
    alone.step(x)

    def work(world):
        step = make_step(copy.deepcopy(sae), matmul, token_ranks=world, **options)
        step.step(x.split([6, 5])[world.rank])
        return step.sae

    for found in run_ranks(2, work):
        assert largest_difference(found, alone.sae) < 1e-12


@pytest.mark.parametrize("sparse_below", [0.0, 1.1])
def test_relu_with_ghosts_and_clipping_has_the_bits_of_one_process_that_adds_the_halves_in_order(sparse_below):
    sae = make_case("relu", torch.float32)
    matmul = MatmulConfig(sparse_below=sparse_below)
    halves = [40, 37]
    alone = make_step(copy.deepcopy(sae), matmul, max_gradient=0.05)
    for seed in range(4):
        x = make_tokens(seed, torch.float32)
        alone.sae.normalise_decoder_()
        inputs = alone._loss_inputs(x, 1.0)
        n_fired, summed = 0, {}
        for half in x[0].split(halves):
            loss, gradients = find_fused_loss(alone.sae)(alone.sae, half, inputs, matmul)
            gradients.store_(alone.sae)
            n_fired = n_fired + loss.n_fired
            for name, part in alone.sae.named_parameters():
                summed[name] = summed[name] + part.grad if name in summed else part.grad
        for name, part in alone.sae.named_parameters():
            part.grad = summed[name]
        alone.tracker.update(n_fired)
        alone._update(StoredGradients(alone.sae), n_fired > 0)
    for step, _ in run_steps(sae, matmul, halves, max_gradient=0.05):
        assert largest_difference(step.sae, alone.sae) == 0
    assert largest_difference(alone.sae, sae) > 1e-3


@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 6, 9])
def test_the_largest_of_all_ranks_are_found_with_ties_in_order(n):
    parts = [torch.tensor([3.0, 1.0, 2.0]), torch.tensor([]), torch.tensor([2.0, 2.0, 5.0])]
    counts = run_ranks(3, lambda world: n_among_largest(parts[world.rank], n, world))
    everything = sorted(((-value, rank) for rank, part in enumerate(parts) for value in part.tolist()))
    assert counts == [sum(1 for _, rank in everything[:n] if rank == number) for number in range(3)]


def test_no_rank_needs_a_latent_that_is_alive():
    sae = make_case("batchtopk")
    with torch.no_grad():
        sae.b_enc.fill_(-100)
    for step, result in run_steps(sae, MatmulConfig(torch.float64), [40, 37], n_steps=1):
        assert not result.n_fired.any()
        assert math.isfinite(result.terms.loss)
        assert step.sae.threshold == 0


@pytest.mark.parametrize("matmul", [None, MatmulConfig(torch.float64)])
@pytest.mark.parametrize("arch", ["batchtopk", "matryoshka"])
def test_a_rank_may_have_none_of_the_largest(arch, matmul):
    sae = make_case(arch)
    with torch.no_grad():
        sae.b_enc.fill_(1e-6)
        sae.b_dec.zero_()
    x = make_tokens().clone()
    x[:, 40:] *= 1e-9
    alone = make_step(copy.deepcopy(sae), matmul)
    wanted = alone.step(x)

    def work(world):
        step = make_step(copy.deepcopy(sae), matmul, token_ranks=world)
        return step.step(x.split([40, 37], dim=1)[world.rank]), step.sae

    for result, found in run_ranks(2, work):
        assert torch.equal(result.n_fired, wanted.n_fired)
        assert largest_difference(found, alone.sae) < 1e-9
    assert not wanted.reconstruction[:, 40:].any()


def test_ranks_whose_weights_differ_are_found():
    def work(world):
        step = make_step(make_case("relu", torch.float32), MatmulConfig(), token_ranks=world)
        step.step(make_tokens(0, torch.float32).split([30, 30, 17], dim=1)[world.rank])
        before = step.find_unequal_ranks()
        if world.rank == 1:
            step.sae.W_dec.data[3, 2] = step.sae.W_dec.data[3, 2].nextafter(torch.tensor(9.0))
        return before, step.find_unequal_ranks()

    assert run_ranks(3, work) == [([], [1])] * 3
    assert make_step(make_case("relu"), MatmulConfig()).find_unequal_ranks() == []
