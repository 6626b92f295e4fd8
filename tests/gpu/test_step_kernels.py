"""Our kernels of activation functions and of Adam against torch; on a GPU, and on the CPU in Triton's interpreter."""

import copy

import pytest
import torch

from cytosae.sae import kernels
from cytosae.training import encoder_blocks
from cytosae.training.adam import RowwiseAdam
from cytosae.training.gradients import RowGradient
from cytosae.training.matmul import MatmulConfig
from tests.gpu.test_triton_kernels import S, check_steps, compute_twice, make_case, random

pytest.importorskip("triton", reason="needs Triton: pip install -e '.[gpu-tests]'")

RULES = ("relu", "jumprelu", "gated")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
"""Relative error by type: bfloat16 has 8 bits, and Triton's interpreter cuts further ones off."""


@pytest.fixture
def device(device_of_kernels, monkeypatch) -> torch.device:
    """A device with kernels, of which each program looks at few tokens."""
    from cytosae.training import triton_activations

    for name, size in (("_ROWS", 4), ("_COLUMNS", 16), ("_STEPS", 3)):
        monkeypatch.setattr(triton_activations, name, size)
    return device_of_kernels


def check(found: torch.Tensor, expected: torch.Tensor, rel: float) -> None:
    """Compare with a limit in terms of the whole."""
    assert found.shape == expected.shape
    assert (found.cpu().double() - expected.double()).norm() <= rel * expected.double().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (13, 1), (12, 16), (31, 49), (0, 4)])
@pytest.mark.parametrize("rule", RULES)
def test_activations_gradients_and_sums_are_those_of_torch(device, rule, shape, dtype):
    from cytosae.training import triton_activations

    n, m = shape
    # A block of a wider matrix, as for some of the latents.
    wide, products = random(n, m + 7).to(device, dtype), [random(n, m, seed=seed).to(dtype) for seed in (1, 2)]
    pre = wide[:, 3 : 3 + m]
    decoded, backward, (vectors, constant) = triton_activations.compute_by_torch(
        rule, pre.cpu().float(), [one.float() for one in products]
    )
    given, again = [one.to(device) for one in vectors], []
    for _ in range(2):
        room = [torch.full((n, m), 9.0, dtype=dtype, device=device) for _ in range(3)]
        outputs, acts, changed = room[: len(decoded)], room[2], [one.to(device, copy=True) for one in products]
        counted = triton_activations.activate(rule, pre, outputs, given)
        summed = triton_activations.differentiate(rule, pre, acts, changed, (given, constant), len(backward))
        assert counted.dtype == summed.dtype == torch.float64
        assert torch.equal(counted[0].cpu(), (decoded[0] > 0).sum(dim=0).double())
        for found, wanted, total in zip(outputs, decoded, counted[1:], strict=True):
            check(found, wanted, TOLERANCE[dtype])
            check(total, wanted.sum(dim=0), 1e-5)
        check(changed[0], backward[0], TOLERANCE[dtype])
        assert torch.equal(acts, torch.full_like(acts, 9.0) if rule == "relu" else outputs[0])
        for total, wanted in zip(summed, backward, strict=True):
            check(total, wanted.sum(dim=0), 1e-5)
        bits = [*outputs, counted, changed[0], summed]
        again = again or bits
        assert all(torch.equal(one, other) for one, other in zip(bits, again, strict=True)), "repeated, other bits"
    assert torch.equal(wide.cpu(), random(n, m + 7).to(dtype)), "it wrote beside its block"


def test_relu_takes_the_place_of_what_it_is_computed_from(device):
    from cytosae.training import triton_activations

    wide = random(9, 30).to(device)
    counted = triton_activations.activate("relu", wide[:, 4:20], [wide[:, 4:20]], [])
    expected = random(9, 30)
    expected[:, 4:20].relu_()
    assert torch.equal(wide.cpu(), expected)
    assert torch.equal(counted[0].cpu(), (expected[:, 4:20] > 0).sum(dim=0).double())


@pytest.mark.parametrize("rule", RULES)
def test_what_is_no_number_is_not_hidden(device, rule):
    from cytosae.training import triton_activations

    pre = torch.tensor([[torch.nan, torch.inf, 1.0]]).repeat(5, 1).to(device)
    decoded = [torch.zeros_like(pre) for _ in range(2 if rule == "gated" else 1)]
    vectors = [one.to(device) for one in triton_activations.compute_by_torch(rule, pre.cpu(), [pre.cpu()] * 2)[2][0]]
    counted = triton_activations.activate(rule, pre, decoded, vectors)
    assert torch.isnan(decoded[0][:, 0]).all()
    assert torch.isinf(decoded[0][:, 1]).all()
    assert torch.isnan(counted[1][0])
    assert torch.isfinite(decoded[0][:, 2]).all()


@pytest.mark.parametrize("rows", [16, 1 << 20])
@pytest.mark.parametrize("max_bytes", [1 << 29, 4 * S * 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_dense_losses_and_gradients_are_those_without_kernels(device, rule, dtype, max_bytes, rows, monkeypatch):
    for name in ("ROWS_PER_BLOCK", "ROWS_PER_BLOCK_GPU"):
        monkeypatch.setattr(f"cytosae.training.gradients.{name}", rows)
    matmul = MatmulConfig(dtype, max_bytes, sparse_below=0.0)
    (found, _, gradients), (wanted, _, expected) = compute_twice(rule, device, matmul)
    assert torch.equal(found.n_fired, wanted.n_fired)
    rel = TOLERANCE[dtype]
    assert found.terms.loss.item() == pytest.approx(wanted.terms.loss.item(), rel=rel)
    check(found.reconstruction, wanted.reconstruction.cpu(), rel)
    for name, gradient in gradients.items():
        check(gradient, expected[name].cpu(), rel)


@pytest.mark.parametrize("rule", RULES)
def test_dense_steps_repeat_to_the_last_bit_and_are_those_of_autograd(device, rule):
    check_steps(rule, device, MatmulConfig(sparse_below=0.0), max_gradient=0.5)


@pytest.mark.parametrize("on_sphere", [False, True])
@pytest.mark.parametrize("scale", [None, 0.25])
@pytest.mark.parametrize("decay", [0.0, 5.0])
@pytest.mark.parametrize("width", [1, 24, 100, 768])
def test_adam_is_torchs(device, width, decay, scale, on_sphere):
    weights = torch.nn.functional.normalize(random(6, width, seed=3), dim=1)
    mine, theirs = (torch.nn.Parameter(weights.clone().to(where)) for where in (device, "cpu"))
    adam = RowwiseAdam([{"params": [mine], "weight_decay": decay}], lr=0.01, betas=(0.8, 0.98), device=device)
    other = torch.optim.AdamW([theirs], lr=0.01, betas=(0.8, 0.98), weight_decay=decay, foreach=False)
    factor = None if scale is None else torch.tensor(scale, device=device)
    for seed in range(4):
        values = random(6, width, seed=seed)
        rows = theirs.detach()
        along = (values * rows).sum(dim=1, keepdim=True) * rows if on_sphere else 0
        theirs.grad = (values - along) * (scale or 1)
        other.step()
        for block in (slice(0, 2), slice(2, 6)):
            gradient = RowGradient("W_dec", block, values[block].to(device))
            adam.update_rows(mine, gradient, on_sphere=on_sphere, scale=factor)
        adam.finish_rows(mine)
    assert adam.state[mine]["step"] == 4
    if on_sphere and width == 1:
        return  # what is left is rounding, which Adam scales up
    check(mine.detach() - weights.to(device), theirs.detach() - weights, 1e-5)
    for name in ("exp_avg", "exp_avg_sq"):
        check(adam.state[mine][name], other.state[theirs][name], 1e-5)


def test_rows_that_are_not_chosen_do_not_decay(device):
    weights, values = random(6, 24, seed=3), random(6, 24, seed=4)
    found = []
    for decaying in (None, torch.tensor([True, False, True, True, False, False]), torch.zeros(6, dtype=torch.bool)):
        mine = torch.nn.Parameter(weights.clone().to(device))
        groups = [{"params": [mine], "weight_decay": 5.0}]
        adam = RowwiseAdam(groups, lr=0.01, betas=(0.8, 0.98), device=device)
        chosen = None if decaying is None else decaying.to(device)
        for block in (slice(0, 2), slice(2, 6)):
            gradient = RowGradient("W_dec", block, values[block].to(device))
            adam.update_rows(mine, gradient, decaying=chosen)
        found.append(mine.detach().cpu())
    everything, some, none = found
    torch.testing.assert_close(none - everything, 0.05 * weights)
    for row, decays in enumerate([True, False, True, True, False, False]):
        assert torch.equal(some[row], (everything if decays else none)[row])


def test_adam_goes_on_from_a_saved_state(device):
    first, second = (torch.nn.Parameter(random(6, 24, seed=3).to(device)) for _ in range(2))
    mine, again = (
        RowwiseAdam([{"params": [one]}], lr=0.01, betas=(0.9, 0.999), device=device) for one in (first, second)
    )

    def step(adam: RowwiseAdam, parameter: torch.nn.Parameter, seed: int) -> None:
        adam.update_rows(parameter, RowGradient("W_dec", slice(0, 6), random(6, 24, seed=seed).to(device)))
        adam.finish_rows(parameter)

    for seed in range(3):
        step(mine, first, seed)
    step(again, second, 9)  # counted, and forgotten
    second.data.copy_(first.data)
    again.load_state_dict(copy.deepcopy(mine.state_dict()))
    for adam, parameter in ((mine, first), (again, second)):
        step(adam, parameter, 5)
    assert torch.equal(first, second)
    assert again.state[second]["step"] == 4


def test_rows_that_no_program_holds_are_torchs(device):
    parameter = torch.nn.Parameter(torch.ones(2, kernels.WIDEST_ROW + 1, device=device))
    adam = RowwiseAdam([{"params": [parameter]}], lr=0.01, betas=(0.9, 0.999), device=device)
    adam.update_rows(parameter, RowGradient("W_dec", slice(0, 2), torch.ones_like(parameter)))
    torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, 0.99))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "m", "k"), [(5, 300, 7), (4, 150, 32), (3, 1, 1), (0, 5, 2), (2, 0, 3), (6, 20, 20), (3, 257, 40), (2, 9, 12)]
)
def test_the_largest_of_a_row_are_those_of_torch(device, n, m, k, dtype, monkeypatch):
    from cytosae.training import triton_topk

    monkeypatch.setattr(triton_topk, "_GROUPS", 64)
    monkeypatch.setattr(triton_topk, "_CHUNK", 16)
    pre = random(n, m, seed=n).to(dtype)
    wanted = torch.nn.functional.pad(pre, (0, max(0, k - m))).topk(k, dim=1).values.relu()
    assert triton_topk.can_find(m, k)
    again = []
    for _ in range(2):
        values, columns = (part.cpu() for part in triton_topk.find_largest(pre.to(device), k))
        assert (values.dtype, columns.dtype) == (dtype, torch.int64)
        assert torch.equal(values.sort(dim=1, descending=True).values, wanted)
        for row, kept, at in zip(pre, values, columns, strict=True):
            n_kept = int((kept > 0).sum())
            assert torch.equal(row[at[:n_kept]], kept[:n_kept])
            assert (at[:n_kept].diff() > 0).all(), "not by column"
            assert not kept[n_kept:].any()
        assert not again or all(torch.equal(one, other) for one, other in zip(again, (values, columns), strict=True))
        again = [values, columns]


def test_of_equal_numbers_the_first_are_kept_and_what_is_no_number_is_not(device, monkeypatch):
    from cytosae.training import triton_topk

    monkeypatch.setattr(triton_topk, "_GROUPS", 4)
    monkeypatch.setattr(triton_topk, "_CHUNK", 8)
    pre = torch.zeros(6, 50)
    pre[0], pre[1, ::3], pre[2, 5:] = 1.0, 2.0, torch.nan
    pre[2, :5] = torch.tensor([-1.0, 3.0, 0.0, -0.0, torch.inf])
    pre[3], pre[4, 49], pre[5, ::7] = -torch.inf, 1e-40, 1e-40
    values, columns = (part.cpu() for part in triton_topk.find_largest(pre.to(device), 3))
    assert columns[0].tolist() == [0, 1, 2]
    assert columns[1].tolist() == [0, 3, 6]
    assert (columns[2, :2].tolist(), values[2].tolist()) == ([1, 4], [3, torch.inf, 0])
    assert values[3].tolist() == [0, 0, 0]
    assert (columns[4, 0], values[4].tolist()) == (49, pre[4, [49, 0, 0]].tolist())
    assert columns[5].tolist() == [0, 7, 14]


def test_too_many_candidates_are_left_to_torch(device, monkeypatch):
    from cytosae.training import triton_topk

    assert triton_topk.can_find(49152, 256)
    assert not triton_topk.can_find(49152, 512)
    assert not triton_topk.can_find(10, 0)
    pre = random(2, 5000, seed=3).to(device)
    values, columns = encoder_blocks._largest_in_rows(pre, 300)
    wanted = pre.topk(300, dim=1)
    assert torch.equal(values, wanted.values.gather(1, wanted.indices.argsort(dim=1)))
    assert torch.equal(columns, wanted.indices.sort(dim=1).values)
    monkeypatch.setattr(triton_topk, "find_largest", lambda pre, k: pytest.fail("it looked for them"))
    monkeypatch.setattr(triton_topk, "_WIDEST", 1)
    for found, expected in zip(encoder_blocks._largest_in_rows(pre, 300), (values, columns), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("width", [1, 24, 100, 768])
def test_rows_are_normalised(device, width):
    from cytosae.sae import triton_kernels

    matrix = random(7, width, seed=3)
    matrix[2], matrix[4] = 0, 1e-3
    found = matrix.to(device, copy=True)
    triton_kernels.normalise_rows_(found, 0.5)
    check(found, matrix / matrix.norm(dim=1, keepdim=True).clamp_min(0.5), 1e-6)
    found[1, 0] = torch.nan
    triton_kernels.normalise_rows_(found, 0.5)
    assert found[1].isnan().all()


def test_decoders_are_normalised_by_a_kernel(device, monkeypatch):
    from cytosae.sae import triton_kernels

    calls = []
    real = triton_kernels.normalise_rows_
    monkeypatch.setattr(triton_kernels, "normalise_rows_", lambda *given: (calls.append(len(given[0])), real(*given)))
    sae = make_case("relu", device)
    sae.W_dec.data.mul_(3)
    calls.clear()
    sae.normalise_decoder_()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(S, device=device))
    assert calls == [S]


@pytest.mark.parametrize("on_sphere", [False, True])
def test_adam_takes_gradients_in_the_type_of_the_products(device, on_sphere):
    weights, values = random(6, 24, seed=3), random(6, 24, seed=4).to(torch.bfloat16)
    found = []
    for given in (values, values.float()):
        mine = torch.nn.Parameter(weights.clone().to(device))
        adam = RowwiseAdam([{"params": [mine]}], lr=0.01, betas=(0.8, 0.98), device=device)
        adam.update_rows(mine, RowGradient("W_dec", slice(0, 6), given.to(device, copy=True)), on_sphere=on_sphere)
        found.append(mine.detach())
    assert torch.equal(*found)


def test_kernels_are_right_when_they_are_tried_out(device):
    from cytosae.training import triton_activations, triton_adam, triton_topk

    assert triton_topk.find_problem(device) is None
    assert triton_activations.find_problem(device) is None
    assert triton_adam.find_problem(device) is None
