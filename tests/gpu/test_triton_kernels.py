"""Our kernels of sparse products and searches against torch; on a GPU, and on the CPU in Triton's interpreter."""

import contextlib
import copy

import pytest
import torch

from cytosae.sae import kernels
from cytosae.sae.base import Sae
from cytosae.sae.coo import CooMatrix
from cytosae.sae.loss import LossInputs, LossWeights, SaeLoss
from cytosae.sae.registry import ARCHITECTURES, make_sae
from cytosae.training import block_search, encoder_blocks
from cytosae.training.encoder_blocks import EncoderProduct
from cytosae.training.fused_loss import find_fused_loss
from cytosae.training.gradients import Gradients
from cytosae.training.matmul import MatmulConfig
from cytosae.training.step import TrainStep
from tests.cytosae.training.test_sync_points import Waits

pytest.importorskip("triton", reason="needs Triton: pip install -e '.[gpu-tests]'")

D, S, DEAD = 12, 40, 12
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
"""Relative error of a product by type: bfloat16 rounds the result to 8 bits."""


@pytest.fixture
def device(device_of_kernels, monkeypatch) -> torch.device:
    """A device whose products run as kernels, which divide long rows."""
    from cytosae.sae import triton_kernels

    monkeypatch.setattr(triton_kernels, "_LONGEST", 32)
    return device_of_kernels


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_matrix(n: int, m: int, share: float, device: torch.device) -> CooMatrix:
    """A matrix of which one row and one column are empty, and the last column is full."""
    chosen = torch.rand(n, m, generator=torch.Generator().manual_seed(1)) < share
    chosen[:, -1] = True
    chosen[n // 2], chosen[:, m // 2] = False, False
    return CooMatrix.from_dense((random(n, m) * chosen).to(device))


def to_dense(matrix: CooMatrix) -> torch.Tensor:
    dense = torch.zeros(matrix.shape, dtype=torch.float64, device=matrix.values.device)
    dense[matrix.rows, matrix.columns] = matrix.values.double()
    return dense


def check_products(matrix: CooMatrix, table: torch.Tensor, left: torch.Tensor) -> None:
    """Compare all products of a matrix with dense ones, and with themselves."""
    limit = TOLERANCE[table.dtype]
    for entries, factor, other in ((matrix, table, left), (matrix.transpose(), left, table)):
        product = entries.matmul(factor)
        expected = to_dense(entries) @ factor.double()
        assert (product.dtype, product.shape) == (table.dtype, expected.shape)
        assert (product.double() - expected).norm() <= limit * expected.norm()
        assert torch.equal(product[entries.row_lengths() == 0], torch.zeros_like(product[entries.row_lengths() == 0]))
        sampled = entries.sampled_matmul(other, factor)
        wanted = (other.double() @ factor.double().T)[entries.rows, entries.columns]
        assert (sampled.dtype, sampled.shape) == (table.dtype, wanted.shape)
        assert (sampled.double() - wanted).norm() <= limit * wanted.norm()
        assert torch.equal(entries.matmul(factor), product), "repeated, a product has other bits"
        assert torch.equal(entries.sampled_matmul(other, factor), sampled), "repeated, a product has other bits"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [1, 100, 128, 200])
def test_products_are_those_of_the_dense_matrix(device, width, dtype):
    matrix = make_matrix(37, 5, 0.4, device)
    assert matrix.transpose().row_lengths().max() == 36, "no row is longer than what one program adds up"
    check_products(matrix, random(5, width).to(device, dtype), random(37, width, seed=3).to(device, dtype))


@pytest.mark.parametrize("width", [384, 768, 1024, 1536])
def test_widths_of_vision_transformers(device, width):
    check_products(make_matrix(3, 4, 1.0, device), random(4, width).to(device), random(3, width, seed=3).to(device))


@pytest.mark.parametrize("length", [31, 32, 33, 64, 65, 97])
def test_rows_of_any_length_begin_anywhere(device, length):
    """A row that starts, ends or continues at a multiple of what one program adds up, in the middle of others."""
    rows = torch.tensor([0] * 5 + [2] * length + [3] * 30 + [4] * length).to(device)
    matrix = CooMatrix(rows, torch.arange(len(rows), device=device), random(len(rows)).to(device), (6, len(rows)))
    table = random(len(rows), 9).to(device)
    product = matrix.matmul(table)
    torch.testing.assert_close(product.double(), to_dense(matrix) @ table.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (4, 4), (0, 0)])
def test_a_matrix_without_entries(device, shape):
    none = torch.empty(0, dtype=torch.int64, device=device)
    matrix = CooMatrix(none, none, none.float(), shape)
    assert torch.equal(matrix.matmul(torch.ones(shape[1], 3, device=device)), torch.zeros(shape[0], 3, device=device))
    one, other = (torch.ones(n, 3, device=device) for n in shape)
    assert matrix.sampled_matmul(one, other).shape == (0,)


def test_factors_and_entries_may_lie_apart_in_memory(device):
    matrix, table, left = make_matrix(9, 4, 0.5, device), random(12, 4).to(device).t(), random(9, 24).to(device)[:, ::2]
    pairs = torch.stack([matrix.rows, matrix.columns], dim=1)
    apart = CooMatrix(pairs[:, 0], pairs[:, 1], matrix.values.repeat_interleave(2)[::2], matrix.shape)
    assert not any(part.is_contiguous() for part in (*apart[:3], table, left))
    check_products(apart, table, left)


@pytest.mark.gpu
def test_addresses_have_64_bits():
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs a CUDA device with 12 GiB of free memory")
    table = torch.zeros(2**31 // 768 + 9, 768, dtype=torch.bfloat16, device="cuda")
    table[-2:] = torch.tensor([[3.0], [5.0]], device="cuda")
    at, last = torch.tensor([0, 1], device="cuda"), len(table) - 1
    matrix = CooMatrix(at, at + last - 1, torch.tensor([1.0, 2.0], device="cuda"), (2, len(table)))
    assert matrix.matmul(table)[:, 0].tolist() == [3, 10]
    assert matrix.sampled_matmul(torch.ones_like(table[:2]), table).tolist() == [3 * 768, 5 * 768]


def check_search(pre: torch.Tensor, bound: torch.Tensor) -> None:
    """Compare the entries above a bound with those that torch finds, twice."""
    from cytosae.sae import triton_kernels

    expected = (pre > bound).nonzero(as_tuple=True)
    for _ in range(2):
        ends = triton_kernels.count_above(pre, bound)
        assert (ends.dtype, int(ends[-1])) == (torch.int64, len(expected[0]))
        rows, columns, values = triton_kernels.take_above(pre, bound, ends, int(ends[-1]))
        assert (rows.dtype, columns.dtype, values.dtype) == (torch.int64, torch.int64, pre.dtype)
        assert torch.equal(rows, expected[0])
        assert torch.equal(columns, expected[1])
        assert torch.equal(values, pre[expected])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (3, 4096), (5, 4097), (2, 9000), (0, 4), (4, 0)])
def test_entries_above_a_bound_are_those_of_a_comparison(device, shape, dtype):
    pre = random(*shape).to(device, dtype)
    for bound in (0.0, -0.0, 1.5, -10.0, 10.0):
        check_search(pre, torch.tensor(bound, dtype=dtype, device=device))
    for one_for_each in (shape[1:], (shape[0], 1)):
        check_search(pre, random(*one_for_each, seed=4).to(device, dtype))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_entries_and_bounds_may_be_any_number(device, dtype, monkeypatch):
    from cytosae.sae import triton_kernels

    monkeypatch.setattr(triton_kernels, "_CHUNK", 4)
    monkeypatch.setattr(triton_kernels, "_CHUNKS", 2)
    smallest = 1e-40 if dtype == torch.float32 else 1e-39  # subnormal
    numbers = [0.0, -0.0, 1.0, -1.0, smallest, -smallest, torch.inf, -torch.inf, torch.nan, -torch.nan, 3e38]
    pre = torch.tensor(numbers, dtype=dtype, device=device).repeat(3, 1)
    for bound in numbers:
        check_search(pre, torch.tensor(bound, dtype=dtype, device=device))
    check_search(pre, pre[0].flip(0))
    check_search(pre, pre[0])
    check_search(pre, pre[:, :3].t()[:, :1])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_matrices_and_bounds_may_lie_apart_in_memory(device, dtype):
    check_search(random(40, 9).to(device, dtype).t(), random(80).to(device, dtype)[::2])


@pytest.mark.gpu
def test_entries_are_found_beyond_2_31():
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs a CUDA device with 12 GiB of free memory")
    from cytosae.sae import triton_kernels

    pre = torch.zeros(2**31 // 49152 + 9, 49152, dtype=torch.bfloat16, device="cuda")
    wanted = torch.tensor([[0, 3], [2**31 // 49152 + 1, 0], [len(pre) - 1, 49150], [len(pre) - 1, 49151]])
    pre[tuple(wanted.t().cuda())] = torch.arange(1.0, 5.0, dtype=torch.bfloat16, device="cuda")
    bound = pre.new_zeros(())
    ends = triton_kernels.count_above(pre, bound)
    assert int(ends[-1]) == len(wanted)
    rows, columns, values = triton_kernels.take_above(pre, bound, ends, len(wanted))
    assert torch.equal(torch.stack([rows, columns], dim=1).cpu(), wanted)
    assert values.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("max_bytes", [1 << 29, 4 * S * 5])
@pytest.mark.parametrize("ahead", [False, True])
def test_the_encoders_product_finds_what_it_finds_without_kernels(device, dtype, max_bytes, ahead, monkeypatch):
    if ahead:
        for module in (block_search, encoder_blocks):
            monkeypatch.setattr(module, "runs_ahead", lambda device: True)
    for name, n in (("_SAMPLED_TOKENS", 5), ("_SHORTEST_PART", 4), ("LATENTS_PER_BLOCK", 6)):
        monkeypatch.setattr(encoder_blocks, name, n)
    product = EncoderProduct(
        make_case("relu", device), random(12, D, seed=9).to(device), MatmulConfig(dtype, max_bytes)
    )
    for bound in (torch.zeros((), device=device), 0.3 * random(S).to(device), torch.full((), 99.0, device=device)):
        for most in (1.0, 0.9):
            found = product.above_if_few(bound.to(dtype), most)
            with kernels.without_kernels():
                expected = product.above_if_few(bound.to(dtype), most)
            assert all(torch.equal(one, other) for one, other in zip(found[:3], expected[:3], strict=True))
            at = found.rows * S + found.columns
            assert torch.equal(at, at.sort().values)
    assert product.above_if_few(bound.new_full((), -99.0, dtype=dtype), 0.5) is None
    with monkeypatch.context() as patch:  # no sample, so that the search itself stops
        patch.setattr(encoder_blocks, "_SAMPLED_TOKENS", 12)
        assert product.above_if_few(bound.new_full((), -99.0, dtype=dtype), 0.5) is None
    found = product.largest(3)
    with kernels.without_kernels():
        assert all(torch.equal(one, other) for one, other in zip(found[:3], product.largest(3)[:3], strict=True))


def test_a_block_is_one_sync_point(device, monkeypatch):
    monkeypatch.setattr(encoder_blocks, "runs_ahead", lambda device: True)
    monkeypatch.setattr(encoder_blocks, "_SAMPLED_TOKENS", 16)
    product = EncoderProduct(make_case("relu", device), random(40, D, seed=9).to(device), MatmulConfig())
    bound = torch.zeros((), device=device)
    for most, n_blocks in ((1.0, 1), (0.9, 2)):
        with Waits() as waits:
            assert product.above_if_few(bound, most) is not None
        assert +waits.found == {"__int__": n_blocks}


def test_kernels_are_right_when_they_are_tried_out(device):
    from cytosae.sae import triton_kernels

    assert triton_kernels.find_problem(device) is None


def make_case(arch: str, device: torch.device) -> Sae:
    """An autoencoder in which few latents are active, one of them on all tokens, and thresholds on both sides of 0."""
    sae = make_sae(arch, D, S, k=3, bandwidth=0.3)
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(sae.named_parameters()):
            if parameter.ndim == 1:
                parameter.copy_(0.2 * random(len(parameter), seed=seed) + (0.3 if name == "threshold" else 0))
        sae.b_enc.sub_(0.5)
        for bias in (sae.b_enc, getattr(sae, "b_mag", sae.b_enc)):
            bias[DEAD + 1] = 5
    return sae.to(device)


Found = tuple[SaeLoss, Gradients, dict[str, torch.Tensor]]
"""A loss, its gradients, and what these are by parameter."""


def compute_twice(arch: str, device: torch.device, matmul: MatmulConfig) -> tuple[Found, Found]:
    """The loss of a batch with our kernels, and without them."""
    x, weights = random(40, D, seed=9).to(device), LossWeights(l1_coefficient=0.05)
    dead, results = torch.arange(S, device=device) < DEAD, []
    for around in (contextlib.nullcontext(), kernels.without_kernels()):
        sae = make_case(arch, device)
        variance = (x - x.mean(dim=0)).square().sum()
        inputs = LossInputs(variance, weights, matmul.dtype, dead, use_ghost_grads=arch == "relu")
        with around:
            loss, gradients = find_fused_loss(sae)(sae, x, inputs, matmul)
            gradients.store_(sae)
        results.append((loss, gradients, {name: part.grad for name, part in sae.named_parameters()}))
    return results[0], results[1]


def check_steps(arch: str, device: torch.device, matmul: MatmulConfig, **options) -> None:
    """Two steps repeat to the last bit, and are those of autograd."""
    sae, results = make_case(arch, device), []
    for one in (matmul, matmul, None):
        step = TrainStep(
            copy.deepcopy(sae), lr=1e-3, weights=LossWeights(l1_coefficient=0.05), use_ghost_grads=arch == "relu",
            dead_feature_window=1, matmul=one, **options,
        )  # fmt: skip
        step.tracker.n_steps_since_fired[:DEAD] = 10
        losses = [step.step(random(1, 24, D, seed=seed).to(device)).terms.loss.item() for seed in (9, 10)]
        results.append((losses, list(step.sae.state_dict().values())))
    (losses, found), (_, again), (wanted, expected) = results
    assert losses == pytest.approx(wanted, rel=1e-4)
    for one, other, plain in zip(found, again, expected, strict=True):
        assert torch.equal(one, other)
        # Adam's first steps have the length of the learning rate, whichever way the smallest gradients are rounded.
        assert ((one - plain).abs() > 1e-4).float().mean() < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_losses_and_gradients_are_those_of_torchs_products(device, arch, dtype):
    results = compute_twice(arch, device, MatmulConfig(dtype, sparse_below=0.9))
    assert all(type(kind).__name__ in ("SparseGradients", "SumOfGradients") for _, kind, _ in results)
    (found, _, gradients), (wanted, _, expected) = results
    assert found.n_fired[DEAD + 1] == 40, "no latent is active on all tokens"
    assert torch.equal(found.n_fired, wanted.n_fired)
    assert found.terms.loss.item() == pytest.approx(wanted.terms.loss.item(), rel=1e-5)
    assert (found.reconstruction - wanted.reconstruction).norm() <= 1e-5 * wanted.reconstruction.norm()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_steps_repeat_to_the_last_bit_and_are_those_of_autograd(device, arch):
    check_steps(arch, device, MatmulConfig(sparse_below=0.9))
